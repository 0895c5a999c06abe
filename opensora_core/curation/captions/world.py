"""Train the captioner that ships on the procedural world, and measure it.

    python -m opensora_core.curation.captions.world OUT --steps 2500
    python -m opensora_core.curation.captions.world OUT --measure
    python -m opensora_core.curation.captions.world OUT --videos samples/

Three stages share the steps. *Eyes*: the vision tower alone, under heads that read every attribute off its summary of
each frame and are thrown away; such a step costs half of one of the whole model, and says more about what there is to
see. *Words*: projector and language model on what the tower, now frozen, sees. *Both*: everything, gently. `lessons.py`
is what they are taught with, `fitting.py` how.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from opensora_core import world
from opensora_core.curation.captions.fitting import Fitting, Heads
from opensora_core.curation.captions.lessons import Batches
from opensora_core.curation.captions.tiny import (
    WIDTH,
    Frames,
    build,
    describe,
    load,
    save,
)
from opensora_core.errors import InputError, OsoraError
from opensora_core.media import read_video, write_video

STAGES = {"eyes": 0.6, "words": 0.32, "both": 0.08}
"""What is trained, with its share of the steps."""


@dataclass(frozen=True)
class Trained:
    """Where a training is: over the last steps, the loss, and the share of attributes read right.

    While words are trained these are read off captions led word by word, which flatters; `everything`, the share of
    captions without a wrong word, is what greedy decoding would get right.
    """

    step: int
    stage: str
    loss: float
    right: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """The share of clips of a split whose caption says an attribute right."""

    split: str
    attribute: str
    share: float
    num_clips: int


def train(
    folder: Path,
    *,
    steps: int,
    batch_size: int = 24,
    seed: int = 0,
    stages: Collection[str] = STAGES,
    start: Path | None = None,
    workers: int = 1,
    report_every: int = 50,
) -> Iterator[Trained]:
    """Train the captioner from nothing, and leave it in a folder.

    Args:
        folder: gets the model, its processor and `osora.json`; replaced at the end of each stage.
        steps: of all stages together.
        batch_size: clips per step.
        seed: of weights, clips and orders.
        stages: which, of `STAGES`.
        start: a captioner to go on from.
        workers: processes that render.
        report_every: steps between reports.

    Yields:
        A report every so many steps and at the end of a stage.

    Raises:
        InputError: `start` is no captioner.
        ResourceError: the folder cannot be written.
    """
    torch.manual_seed(seed)
    model, processor = build()
    if start is not None:
        model.load_state_dict(load(start)[0].state_dict())
    model.train()
    shares = {stage: STAGES[stage] for stage in STAGES if stage in stages}
    heads = Heads(WIDTH)
    loader = torch.utils.data.DataLoader(
        Batches(seed, steps, batch_size), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    batches = iter(loader)
    step = 0
    for stage, share in shares.items():
        last = steps if stage == list(shares)[-1] else step + round(steps * share / sum(shares.values()))
        fitting = Fitting(model, heads, processor.tokenizer, stage, last - step)
        recent: list[tuple[float, dict[str, float]]] = []
        while step < last:
            recent.append(fitting.step(*next(batches)))
            step += 1
            if step % report_every == 0 or step == last:
                names = recent[0][1]
                yield Trained(
                    step,
                    stage,
                    float(np.mean([loss for loss, _ in recent])),
                    {name: float(np.mean([right[name] for _, right in recent])) for name in names},
                )
                recent = []
        save(model, processor, folder)


def measure(folder: Path, *, clips: int = 240, seed: int = 10**6, batch_size: int = 24) -> Iterator[Measured]:
    """Caption freshly drawn clips of both splits, written as files and read back, and compare with what they show.

    Args:
        folder: has the captioner.
        clips: how many of each split.
        seed: of the clips; training draws from other ones.
        batch_size: clips at a time.

    Raises:
        InputError: no captioner there.
    """
    model, processor = load(folder)
    for number, split in enumerate(("seen", "held-out")):
        rng = np.random.default_rng([seed, number])
        scenes = [world.draw_scene(rng, split) for _ in range(clips)]  # type: ignore[arg-type]
        told: list[str] = []
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "clip.mp4"
            for first in range(0, clips, batch_size):
                batch = []
                for scene in scenes[first : first + batch_size]:
                    write_video(path, world.render(scene, rng), world.FPS)
                    batch.append(read_video(path).frames)
                told += describe(model, processor, batch)
        yield from score(split, scenes, told)


def compare(folder: Path, videos: Path, *, batch_size: int = 24) -> Iterator[Measured]:
    """Caption videos of the world whose scenes nobody knows, such as samples, and compare with the world's verifier.

    Args:
        folder: has the captioner.
        videos: has .mp4 files of the world's size; those in which the verifier finds no object are left out.
        batch_size: clips at a time.

    Raises:
        InputError: no captioner or no such video there, or one that cannot be read.
    """
    model, processor = load(folder)
    scenes: list[world.Scene] = []
    told: list[str] = []
    clips: list[Frames] = []
    for path in sorted(videos.glob("*.mp4")):
        clip = read_video(path).frames
        if clip.shape[1:3] == (world.SIZE, world.SIZE) and len(seen := world.verify(clip)) == len(world.ATTRIBUTES):
            scenes.append(world.Scene(**seen))  # type: ignore[arg-type]
            clips.append(clip)
    if not clips:
        raise InputError(f"{videos} has no .mp4 of the world", f"osora sample --prompt 'a red ball' --output {videos}")
    for first in range(0, len(clips), batch_size):
        told += describe(model, processor, clips[first : first + batch_size])
    yield from score("videos", scenes, told)


def score(split: str, scenes: Sequence[world.Scene], told: Sequence[str]) -> Iterator[Measured]:
    """The share of captions that say each attribute right, and that say everything right."""
    right = [
        {name: world.parse(caption).get(name) == value for name, value in asdict(scene).items()}
        for scene, caption in zip(scenes, told, strict=True)
    ]
    for name in world.ATTRIBUTES:
        yield Measured(split, name, float(np.mean([clip[name] for clip in right])), len(right))
    yield Measured(split, "everything", float(np.mean([all(clip.values()) for clip in right])), len(right))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or measure from the command line, with one JSON object per line about it."""
    parser = argparse.ArgumentParser(prog="python -m opensora_core.curation.captions.world", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the captioner is, or is to be")
    parser.add_argument("--steps", type=int, default=2500, help="of training, all stages together")
    parser.add_argument("--batch-size", type=int, default=24, help="clips per step")
    parser.add_argument("--seed", type=int, default=0, help="of weights and clips")
    parser.add_argument("--start", type=Path, help="a captioner to go on from, instead of random weights")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="which to go through")
    parser.add_argument("--measure", action="store_true", help="measure what is there instead of training")
    parser.add_argument("--clips", type=int, default=240, help="of each split, to measure with")
    parser.add_argument("--videos", type=Path, help="a folder of samples to caption and compare with the verifier")
    chosen = parser.parse_args(arguments)
    events: Iterator[Trained | Measured]
    if chosen.videos:
        events = compare(chosen.folder, chosen.videos)
    elif chosen.measure:
        events = measure(chosen.folder, clips=chosen.clips)
    else:
        events = train(
            chosen.folder,
            steps=chosen.steps,
            batch_size=chosen.batch_size,
            seed=chosen.seed,
            stages=chosen.stages,
            start=chosen.start,
        )
    try:
        for event in events:
            sys.stdout.write(json.dumps(asdict(event)) + "\n")
            sys.stdout.flush()
    except OsoraError as error:
        parser.exit(error.exit_code, f"error: {error.message}\n{error.hint}\n")


if __name__ == "__main__":
    main()
