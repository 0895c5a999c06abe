"""The frames that captioners are shown, read by processes that a hostile file may kill without harm."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from opensora_core.config import CaptionConfig
from opensora_core.curation.captions import camera
from opensora_core.curation.captions.protocol import Shown
from opensora_core.curation.crew import Crew, Lost, Returned, Tell
from opensora_core.curation.crew_ray import RayCrew
from opensora_core.errors import InputError
from opensora_core.media import Limits, probe, read_frames
from opensora_core.media.pixels import Frames

if TYPE_CHECKING:
    from opensora_core.data.manifest import Clip  # torch comes with it, which who decodes does without

_MOST_WORKERS = 4


@dataclass(frozen=True)
class Sight:
    """What is to be seen of every clip; see `CaptionConfig`."""

    at: tuple[float, ...]
    side: int
    camera: bool
    limits: Limits


@dataclass(frozen=True)
class Unseen:
    """A clip that cannot be shown, and why."""

    index: int
    clip: Clip
    reason: str


@dataclass(frozen=True)
class _Task:
    index: int
    path: Path
    start_seconds: float | None
    end_seconds: float | None
    num_frames: int | None
    fps: float | None


_Result = tuple[list[Frames], str] | str


def see(
    config: CaptionConfig, at: tuple[float, ...], clips: Iterable[tuple[int, Clip]]
) -> Iterator[Shown | Unseen | None]:
    """Read clips in the background, in about their order.

    Yields:
        Every clip, once; and None now and then, while nothing is ready.

    Raises:
        ResourceError: processes do not start, or a machine of the cluster does not see a clip.
    """
    if not at and not config.camera:
        for index, clip in clips:
            yield Shown(index, clip)
        return
    limits = Limits(max_bytes=config.clip_bytes // 2, max_seconds=config.clip_seconds)
    known: dict[int, Clip] = {}

    def tasks() -> Iterator[_Task]:
        for index, clip in clips:
            known[index] = clip
            yield _Task(index, clip.path, clip.start_seconds, clip.end_seconds, clip.num_frames, clip.fps)

    words = _crew(config, Sight(at, config.side, config.camera, limits)).run(tasks())
    try:
        for word in words:
            if isinstance(word, Returned):
                clip = known.pop(word.task.index)
                if isinstance(word.result, str):
                    yield Unseen(word.task.index, clip, word.result)
                else:
                    yield Shown(word.task.index, clip, *word.result)
            elif isinstance(word, Lost):
                reason = word.reason.replace("source_seconds", "clip_seconds")  # the setting has another name here
                yield Unseen(word.task.index, known.pop(word.task.index), reason)
            else:
                yield None
    finally:
        words.close()  # type: ignore[attr-defined]


def _crew(config: CaptionConfig, sight: Sight) -> Crew[Sight, _Task, _Result] | RayCrew[Sight, _Task, _Result]:
    if config.engine == "ray":
        return RayCrew(
            look,
            sight,
            num_workers=config.workers or _MOST_WORKERS * config.gpus,
            stall_seconds=config.stall_seconds,
            task_seconds=config.clip_seconds,
            task_bytes=config.clip_bytes,
            address=config.ray_address,
            cpus=1,
            needs=lambda task: [task.path],
            folder=None,
        )
    return Crew(
        look,
        sight,
        num_workers=config.workers or min(os.cpu_count() or 1, _MOST_WORKERS),
        stall_seconds=config.stall_seconds,
        task_seconds=config.clip_seconds,
        task_bytes=config.clip_bytes,
    )


def look(sight: Sight, task: _Task, tell: Tell) -> _Result:
    """Read the frames of one clip, in a process of its own.

    Returns:
        Frames and how the camera moves; or why they cannot be read.
    """
    try:
        if task.num_frames and task.fps:
            try:
                return _read(sight, task, task.num_frames, task.fps)
            except InputError:  # the row may count wrongly: decoding knows
                pass
        found = probe(task.path, start_seconds=task.start_seconds, end_seconds=task.end_seconds, limits=sight.limits)
        return _read(sight, task, found.num_frames, found.fps)
    except InputError as error:
        return error.message
    except MemoryError:
        return f"reading {task.path} takes more memory than clip_bytes"


def _read(sight: Sight, task: _Task, num_frames: int, fps: float) -> tuple[list[Frames], str]:
    frames: list[Frames] = []
    if sight.at:
        read = read_frames(
            task.path,
            [round(share * (num_frames - 1)) for share in sight.at],
            start_seconds=task.start_seconds,
            end_seconds=task.end_seconds,
            limits=sight.limits,
        )
        frames = [_shrunk(frame, sight.side) for frame in read]
    return frames, _camera(sight, task, num_frames, fps) if sight.camera else ""


def _shrunk(frame: Frames, side: int) -> Frames:
    height, width = frame.shape[:2]
    if not side or max(height, width) <= side:
        return np.ascontiguousarray(frame)
    scale = side / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))


def _camera(sight: Sight, task: _Task, num_frames: int, fps: float) -> str:
    compared = camera.pairs(num_frames, fps)
    if not compared:
        return ""
    numbers = sorted({number for pair in compared for number in pair})
    read = partial(
        read_frames,
        task.path,
        start_seconds=task.start_seconds,
        end_seconds=task.end_seconds,
        limits=sight.limits,
    )
    first = read(numbers[:1])[0]
    width = min(camera.WIDTH, first.shape[1])
    height = max(round(first.shape[0] * width / first.shape[1]), 1)
    small = read(numbers, height=height, width=width)
    by_number = dict(zip(numbers, small, strict=True))
    return camera.describe([camera.motion_between(by_number[a], by_number[b], (b - a) / fps) for a, b in compared])
