"""Latents -> files, with what is known of each sample in its file, in the records and in the gallery."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora_core import __version__, components, parallel
from opensora_core.config import Config
from opensora_core.files import append_line
from opensora_core.media import to_uint8, write_contact_sheet, write_gallery, write_video
from opensora_core.media.gallery import Exhibit
from opensora_core.media.pixels import Frames
from opensora_core.media.sheet import pick
from opensora_core.parallel import Axis, Mesh
from opensora_core.sampling.events import Event, Gallery, Notice, Saved, Sheet
from opensora_core.sampling.planning import Plan, Request
from opensora_core.vae import VideoVAE

RECORDS = "samples.jsonl"
_SHEET_COLUMNS = 8


@dataclass(frozen=True)
class _Written:
    """A file on the disk, as its writer tells the first process of it; `shown` are its frames for a contact sheet."""

    request: Request
    facts: dict[str, Any]
    seconds: float
    shown: Frames | None


class Writer:
    """Decodes latents and writes files.

    The first process of a group writes what the group drew; where a VAE needs a video in one piece, each process of the
    group decodes and writes samples of its own. Records, sheet and gallery are the first process' of the run alone.

    Args:
        config: the settings.
        plan: what is drawn.
        mesh: who draws it.
        everyone: all processes.
        sheet: keep what a contact sheet shows.
    """

    def __init__(self, config: Config, plan: Plan, mesh: Mesh, everyone: Axis, *, sheet: bool) -> None:
        self.config, self.plan, self.mesh, self.everyone, self.sheet = config, plan, mesh, everyone, sheet
        self.order = {request.path: number for number, request in enumerate(plan.requests)}
        self.shown: list[tuple[str, Frames]] = []
        self.last = time.monotonic()

    def write(self, vae: VideoVAE, batches: Sequence[Sequence[Request]], latents: Sequence[Tensor]) -> Iterator[Saved]:
        """Decode and write what each group has drawn, one sample of a group, or of each of its processes, at a time.

        Args:
            vae: decodes.
            batches: of each group.
            latents: (C, T, h, w) of each request of this process' group.

        Yields:
            What is on the disk, in the order of the requests; on the first process only.
        """
        own = batches[self.mesh.data.rank]
        share = (time.monotonic() - self.last) / len(own) if own else 0.0
        group = parallel.place_in_group(self.mesh)
        at_once = 1 if vae.frames_apart else group.size
        for start in range(0, max(map(len, batches)), at_once):
            number = start if vae.frames_apart else start + group.rank
            written = self._decode_and_write(vae, own[number], latents[number], share) if number < len(own) else None
            news = [item for item in parallel.collected(self.everyone, written) if item is not None]
            for item in sorted(news, key=lambda item: self.order[item.request.path]):
                yield self._record(item)
        self.last = time.monotonic()

    def _decode_and_write(self, vae: VideoVAE, request: Request, latents: Tensor, share: float) -> _Written | None:
        begin = time.monotonic()
        dtype = components.vae_dtype(self.config, self.mesh.device)

        def decode(part: Tensor) -> Frames:
            with torch.no_grad():
                return to_uint8(vae.decode(part[None].to(self.mesh.device, dtype))[0])

        frames = parallel.decode_by_frames(decode, latents, self.mesh) if vae.frames_apart else decode(latents)
        if frames is None:
            return None
        facts = self.facts(request, frames)
        write_video(request.path, frames, self.config.video.fps, {name: str(value) for name, value in facts.items()})
        shown = frames[pick(len(frames), _SHEET_COLUMNS)] if self.sheet else None
        return _Written(request, facts, share + time.monotonic() - begin, shown)

    def _record(self, item: _Written) -> Saved:
        request = item.request
        record = {"file": request.path.name, **item.facts, "seconds": round(item.seconds, 3)}
        append_line(request.path.parent / RECORDS, json.dumps(record, ensure_ascii=False))
        if item.shown is not None:
            self.shown.append((f"{request.prompt}  ·  seed {request.seed}", item.shown))
        return Saved(request.path, request.prompt, request.seed, item.seconds)

    def facts(self, request: Request, frames: Frames) -> dict[str, Any]:
        """What made a sample; the same for the same command, so no times and no machine."""
        config = self.config
        lora = {"lora": config.model.lora, "lora_scale": config.model.lora_scale} if config.model.lora else {}
        return {
            "prompt": request.prompt,
            "model": config.model.weights,
            **lora,
            "seed": request.seed,
            "steps": config.sampling.steps,
            "sampler": config.sampling.sampler,
            "guidance": config.sampling.guidance,
            "size": f"{frames.shape[1]}x{frames.shape[2]}",
            "frames": len(frames),
            "fps": config.video.fps,
            "version": __version__,
        }

    def finish(self) -> Iterator[Event]:
        """Write what shows all samples together."""
        if not self.mesh.is_first:
            return
        if self.sheet:
            write_contact_sheet(self.shown, self.plan.sheet, _SHEET_COLUMNS)
            yield Sheet(self.plan.sheet)
        if self.plan.gallery is not None:
            if write_gallery(self.plan.gallery, _exhibits(self.plan)):
                yield Gallery(self.plan.gallery)
            else:
                yield Notice(f"{self.plan.gallery} is not a gallery of ours, so it is left as it is")


def _exhibits(plan: Plan) -> list[Exhibit]:
    """Everything in the folder that the records know, with what is known last; this run's samples first."""
    folder = plan.requests[0].path.parent
    known: dict[str, dict[str, Any]] = {}
    for line in (folder / RECORDS).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            known[str(record["file"])] = record
        except (ValueError, KeyError, TypeError):
            continue  # a line that somebody edited; its file is just not shown
    ours = [request.path.name for request in plan.requests]
    exhibits = []
    for name in dict.fromkeys([*ours, *known]):
        path = folder / name
        if name in known and path.parent == folder and path.is_file():
            facts = {fact: str(value) for fact, value in known[name].items() if fact not in ("file", "prompt")}
            exhibits.append(Exhibit(path, str(known[name].get("prompt", "")), facts))
    return exhibits
