"""How fast training reads clips: the frames that a sample needs, against the whole file as Open-Sora 1.0 read it."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from opensora_core.bench.measurement import Event, Measurement
from opensora_core.config import Config
from opensora_core.data import Bucket, Clip, ClipReader, Manifest, Pace, fit_video, read_manifest
from opensora_core.errors import InputError
from opensora_core.media import probe, read_video, write_video
from opensora_core.sampling import Notice, Progress

SECONDS, FPS, HEIGHT, WIDTH = 10, 24, 720, 1280
MADE, QUICK_MADE = 3, 1
MOST_CLIPS = 20
REPEATS, QUICK_REPEATS = 5, 2
OPENINGS, QUICK_OPENINGS = 200, 30
MAX_BYTES = 4 * 2**30


def measure(config: Config, *, quick: bool = False, source: Path | None = None) -> Iterator[Event]:
    """Measure reading with the settings' number of frames, interval and size, by the reader that training uses.

    Args:
        config: `video` and `data` settings.
        quick: one clip, few repeats.
        source: a manifest or folder of clips; None makes ten-second ones of 1280x720 with x264's usual keyframes.

    Raises:
        InputError: no clip is long enough.
    """
    with tempfile.TemporaryDirectory() as folder:
        if source is None:
            count = QUICK_MADE if quick else MADE
            for number in range(count):
                yield Progress("making clips", number, count, None)
                write_video(Path(folder) / f"{number}.mp4", _texture(number), FPS)
            source = Path(folder)
        reader, usable, left_out = _reader(config, read_manifest(source))
        if left_out:
            yield Notice(f"{left_out} of {left_out + len(usable)} clips are left out: broken, too short, or too many")
        yield from _compare(config, reader, usable, QUICK_REPEATS if quick else REPEATS)
        yield from _memory(reader, usable[0], QUICK_OPENINGS if quick else OPENINGS)


def _texture(seed: int) -> NDArray[np.uint8]:
    """Detail at every scale that drifts by a few pixels a frame, (T, H, W, 3): neither easy nor hopeless to encode."""
    rng = np.random.default_rng(seed)
    num_frames = SECONDS * FPS
    height, width = HEIGHT + num_frames, WIDTH + 2 * num_frames
    picture = np.zeros((height, width, 3), np.float32)
    for step in (64, 16, 4, 1):
        grain = rng.normal(0, 6 + 2 * step**0.5, (-(-height // step), -(-width // step), 3))
        picture += np.repeat(np.repeat(grain, step, axis=0), step, axis=1)[:height, :width]
    levels = (picture + 128).clip(0, 255).astype(np.uint8)
    return np.stack([levels[n : n + HEIGHT, 2 * n : 2 * n + WIDTH] for n in range(num_frames)])


def _reader(config: Config, manifest: Manifest) -> tuple[ClipReader, list[int], int]:
    """The reader of training, and the clips that it can be measured on."""
    video, data = config.video, config.data
    bucket = Bucket(video.num_frames, video.height, video.width, 1)
    pace = Pace(
        video.frame_interval, video.fps if data.frame_choice == "fps" else 0.0, data.frame_choice == "published"
    )
    clips: list[Clip] = []
    for clip in manifest:
        try:
            found = probe(clip.path, start_seconds=clip.start_seconds, end_seconds=clip.end_seconds)
        except InputError:
            continue
        if len(clips) < MOST_CLIPS and found.num_frames >= pace.span(video.num_frames, found.fps):
            clips.append(replace(clip, num_frames=found.num_frames, fps=found.fps))
    if not clips:
        raise InputError(
            f"none of the {len(manifest)} clips has {video.num_frames} frames at an interval of {video.frame_interval}",
            "--set video.num_frames=4, or other --data",
        )
    reader = ClipReader(
        Manifest.of(clips, folder=manifest.folder),
        (bucket,),
        pace,
        resize=data.resize,
        flip=data.flip,
        seed=config.train.seed,
        threads=data.decode_threads,
    )
    return reader, list(range(len(clips))), len(manifest) - len(clips)


def _compare(config: Config, reader: ClipReader, clips: list[int], repeats: int) -> Iterator[Event]:
    """Both ways by turns, over the same choices of frames."""
    bucket = reader.buckets[0]

    def needed(clip: Clip, indices: tuple[int, ...], index: int, epoch: int) -> None:
        reader.read(clip, bucket, reader.choose(clip, bucket, epoch, index))

    def whole(clip: Clip, indices: tuple[int, ...], index: int, epoch: int) -> None:
        frames = read_video(clip.path, MAX_BYTES).frames
        fit_video(torch.from_numpy(frames[list(indices)]).permute(0, 3, 1, 2), bucket.height, bucket.width)

    ways: dict[str, Callable[[Clip, tuple[int, ...], int, int], None]] = {
        "the frames that are needed": needed,
        "the whole file": whole,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for epoch in range(repeats):
        yield Progress("reading clips", epoch, repeats, None)
        for name, way in ways.items():
            begin = time.monotonic()
            for index in clips:
                clip = reader.manifest[index]
                way(clip, reader.choose(clip, bucket, epoch, index).indices, index, epoch)
            rates[name].append(len(clips) / (time.monotonic() - begin))
    size = f"{bucket} at an interval of {config.video.frame_interval}"
    for name, values in rates.items():
        yield Measurement(size, name, statistics.median(values), "clips/s", repeats * len(clips))
    ratios = [fast / slow for fast, slow in zip(*rates.values(), strict=True)]
    for name, value in (("median", statistics.median(ratios)), ("least", min(ratios)), ("most", max(ratios))):
        yield Measurement(size, f"times as fast, {name}", value, "x", len(ratios))


def _memory(reader: ClipReader, index: int, openings: int) -> Iterator[Event]:
    """What is still taken after many clips were opened and closed; only where the system tells (Linux)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    bucket, clip, rng = reader.buckets[0], reader.manifest[index], random.Random(0)
    sizes = []
    for number in range(openings + 1):
        reader.read(clip, bucket, reader.choose(clip, bucket, rng.randrange(2**30), index))
        if number in (openings // 10, openings):
            sizes.append(int(statm.read_text().split()[1]) * 4096)
        if number % 10 == 0:
            yield Progress("opening clips again and again", number, openings, None)
    yield Measurement("memory", "growth over so many clips", (sizes[-1] - sizes[0]) / 2**20, "MiB", openings)
