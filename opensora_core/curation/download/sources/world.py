"""The procedural world, rendered into files: data with captions that needs no network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora_core import media, net, world
from opensora_core.curation.download.events import DataRequest
from opensora_core.curation.download.item import Brought, Item
from opensora_core.curation.download.session import Session
from opensora_core.curation.download.source import Source
from opensora_core.errors import UsageError


def _count(request: DataRequest) -> int:
    if request.limit is None:
        raise UsageError("the world has no end", "osora download data world --limit 1000 --output data/world")
    return request.limit


@dataclass(frozen=True)
class _Scene:
    """A scene by its number; everything about it is drawn from the seed and this."""

    seed: int
    number: int

    def drawn(self) -> tuple[world.Scene, str, np.random.Generator]:
        """The scene, its caption, and the generator that draws the rest."""
        rng = np.random.default_rng([self.seed, self.number])
        scene = world.draw_scene(rng, split="train")
        return scene, world.caption(scene, rng), rng

    def __call__(self, target: Path, session: Session, tell: net.Progress) -> Brought:
        scene, _, rng = self.drawn()
        if session.client.stop.is_set():
            raise net.Cancelled
        written = target.with_suffix(".mp4")
        media.write_video(written, world.render(scene, rng), world.FPS)
        written.replace(target)
        return Brought()


def _items(session: Session) -> Iterator[Item]:
    seed = session.config.seed
    for number in range(_count(session.request)):
        scene = _Scene(seed, number)
        yield Item(
            key=f"world:{seed}:{number}",
            source=f"world:{seed}:{number}",
            bring=scene,
            path=f"files/world/{seed}-{number:06d}.mp4",
            name=f"{seed}-{number:06d}.mp4",
            caption=scene.drawn()[1],
            licence="Apache-2.0",
            attribution="osora",
            fields={"num_frames": world.NUM_FRAMES, "fps": world.FPS, "width": world.SIZE, "height": world.SIZE},
        )


SOURCE = Source(
    "scenes of the procedural world with captions",
    _items,
    lambda request: f"render {_count(request)} scenes of {world.NUM_FRAMES} frames of {world.SIZE}x{world.SIZE}",
)
