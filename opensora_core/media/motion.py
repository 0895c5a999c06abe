"""One pass over a clip for those who judge it: a few frames closely, and what changes from each frame to the next."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray

from opensora_core.errors import InputError
from opensora_core.media.bars import Bars
from opensora_core.media.clips import probe, read_frames
from opensora_core.media.decoding import Decoder, counted
from opensora_core.media.packets import DamageError, packets_from
from opensora_core.media.pixels import Frames
from opensora_core.media.read import Budget, Limits, opened
from opensora_core.media.shown import Screen
from opensora_core.media.sketch import COLUMNS, ROWS, Sketch
from opensora_core.media.stills import SUFFIXES

_LIMITS = Limits()
_TOP = float("-inf")
_SAME_LEVELS = 4  # by which a sample may differ and still be the same: what encoders do to what stands still
_VECTOR_FRAMES = 100  # whose vectors may wait for the garbage collector

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Footage:
    """What one pass over a clip gave.

    Attributes:
        num_frames: that were decoded.
        height, width: as shown.
        indices: numbers of the frames that were looked at closely, ascending.
        pictures: (N, H, W, 3) those frames, reduced to the side that was asked for and never enlarged.
        changes: (T - 1,) share of 2304 samples in which a frame differs from the one before.
        vectors: (V,) mean length of the codec's motion vectors of each frame that has some, in widths of the longer
            side per frame; empty where the codec tells none or they were not asked for.
        crop: top, left, height and width within bars that are black in all pictures, in pixels as shown; None without.
        has_time: whether it is a video; a picture has no motion.
    """

    num_frames: int
    height: int
    width: int
    indices: list[int]
    pictures: Frames
    changes: Floats
    vectors: Floats
    crop: tuple[int, int, int, int] | None
    has_time: bool


def watch(
    path: Path,
    indices: Sequence[int],
    *,
    side: int,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    vectors: bool = False,
    limits: Limits = _LIMITS,
) -> Footage:
    """Decode a clip once, with one thread: the result is the same on every run.

    Args:
        path: a video, a picture or an animation.
        indices: ascending numbers of the frames to look at closely.
        side: pixels that the longer side of the pictures has at most.
        start_seconds: time in the source, as its timestamps count it, from which on frames belong to the clip.
        end_seconds: time from which on they belong to it no more.
        vectors: ask the codec for its motion vectors (H.264, MPEG-4, MPEG-2 and some others have them).
        limits: of what it may cost.

    Raises:
        InputError: no video, damage within the clip, a frame that it does not have, or beyond the limits.
    """
    if path.suffix.lower() in SUFFIXES:
        return _watch_pictures(path, indices, side, (start_seconds, end_seconds), limits)
    start = _TOP if start_seconds is None else start_seconds
    end = math.inf if end_seconds is None else end_seconds
    watching = _Watching(path, indices, side, vectors, limits)
    try:
        with opened(path, limits.max_pixels) as (container, stream):
            if vectors:
                stream.codec_context.options = {**stream.codec_context.options, "flags2": "+export_mvs"}
            for time, frame in _decoded(container, stream, start, Budget(path, limits)):
                if time >= end:
                    break
                if time < start:
                    continue
                if frame is None:
                    raise InputError(f"{path} is damaged at {time:.3f} s")
                watching.take(frame, stream)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise InputError(f"cannot read {path} as a video: {error}") from error
    return watching.footage()


def _decoded(
    container: InputContainer, stream: VideoStream, start: float, budget: Budget
) -> Iterator[tuple[float, VideoFrame | None]]:
    """Frames from the keyframe before `start`, or from the top where none can be found."""
    decoder = Decoder(stream, 1, budget)
    if start != _TOP and container.format.name != "avi":  # whose times are those of coding
        try:
            yield from counted(packets_from(container, stream, start), decoder)
            return
        except DamageError:
            container.seek(0, stream=stream)
    yield from counted(packets_from(container, stream, _TOP), decoder)


class _Watching:
    """Takes the frames of a clip one after the other."""

    def __init__(self, path: Path, indices: Sequence[int], side: int, vectors: bool, limits: Limits) -> None:
        self._path, self._side, self._limits = path, side, limits
        self._wanted = list(indices)
        self._screen: Screen | None = None
        self._size = (0, 0)
        self._sketch, self._bars = Sketch(), Bars()
        self._luma = np.empty((2, ROWS, COLUMNS), np.uint8)
        self._chroma = np.empty((2, ROWS // 2, COLUMNS // 2), np.uint8)
        self._pictures: dict[int, Frames] = {}
        self._changes: list[float] = []
        self._vectors: list[float] | None = [] if vectors else None
        self._num_frames, self._anchor = 0, 0

    def take(self, frame: VideoFrame, stream: VideoStream) -> None:
        number = self._num_frames
        if self._screen is None:
            plain = Screen(self._path, stream, None, self._limits.max_pixels)
            height, width = self._size = plain.size(frame)
            scale = min(self._side / max(height, width), 1)
            small = max(round(height * scale), 1), max(round(width * scale), 1)
            self._screen = Screen(self._path, stream, small, self._limits.max_pixels)
            self._bars.shown(self._screen, frame)
        now, before = self._luma[number % 2], self._luma[(number + 1) % 2]
        self._sketch.draw(frame, now, self._chroma)
        if number:
            differs = np.abs(now.astype(np.int16) - before) > _SAME_LEVELS
            self._changes.append(float(np.count_nonzero(differs)) / differs.size)
        if number in self._wanted:
            self._pictures[number] = self._screen.show(frame).copy()
            self._bars.look(frame)
        if self._vectors is not None:
            self._take_vectors(frame, number)
        self._num_frames += 1

    def _take_vectors(self, frame: VideoFrame, number: int) -> None:
        """The vectors of pictures that refer to one earlier picture, over the frames that lie between the two."""
        if frame.pict_type == PictureType.B:
            return
        distance, self._anchor = number - self._anchor, number
        if frame.pict_type != PictureType.P or distance < 1:
            return
        # a frame whose side data was asked for is freed by the garbage collector only: ask a tiny copy
        tiny = frame.reformat(width=16, height=16, format="gray", interpolation=Interpolation.POINT, threads=1)
        data = cast(Mapping[Type, Any], tiny.side_data).get(Type.MOTION_VECTORS)
        if data is None or self._vectors is None:
            return
        found = data.to_ndarray()
        found = found[found["source"] < 0]
        area = found["w"].astype(np.float64) * found["h"]
        if (total := float(area.sum())) > 0:
            across = found["motion_x"] / found["motion_scale"]
            down = found["motion_y"] / found["motion_scale"]
            length = float((np.hypot(across, down) * area).sum()) / total
            self._vectors.append(length / distance / max(frame.width, frame.height))
        if len(self._vectors) % _VECTOR_FRAMES == 0:
            gc.collect(1)

    def footage(self) -> Footage:
        """What came of it.

        Raises:
            InputError: a frame that was asked for did not come.
        """
        _require(self._path, self._wanted, self._num_frames)
        return Footage(
            num_frames=self._num_frames,
            height=self._size[0],
            width=self._size[1],
            indices=self._wanted,
            pictures=np.stack([self._pictures[number] for number in self._wanted]),
            changes=np.array(self._changes),
            vectors=np.array(self._vectors or []),
            crop=self._bars.crop(*self._size),
            has_time=True,
        )


def _require(path: Path, wanted: Sequence[int], num_frames: int) -> None:
    if not num_frames:
        raise InputError(f"{path} holds no frame that can be decoded, or none in the seconds asked for")
    if not wanted or wanted[-1] >= num_frames:
        raise InputError(
            f"frame {wanted[-1] if wanted else 'none'} of {path} was asked for, which has {num_frames} frames to decode"
        )


def _watch_pictures(
    path: Path,
    indices: Sequence[int],
    side: int,
    span: tuple[float | None, float | None],
    limits: Limits,
) -> Footage:
    """Of a picture there is nothing between frames; of an animation only between those that are looked at."""
    found = probe(path, start_seconds=span[0], end_seconds=span[1], limits=limits)
    _require(path, indices, found.num_frames)
    scale = min(side / max(found.height, found.width), 1)
    pictures = read_frames(
        path,
        indices,
        height=max(round(found.height * scale), 1),
        width=max(round(found.width * scale), 1),
        start_seconds=span[0],
        end_seconds=span[1],
        limits=limits,
    )
    differs = np.abs(np.diff(pictures.astype(np.int16), axis=0)) > _SAME_LEVELS
    return Footage(
        num_frames=found.num_frames,
        height=found.height,
        width=found.width,
        indices=list(indices),
        pictures=pictures,
        changes=differs.mean(axis=(1, 2, 3)) if len(pictures) > 1 else np.empty(0),
        vectors=np.empty(0),
        crop=None,
        has_time=found.num_frames > 1,
    )
