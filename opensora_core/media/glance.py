"""A glance at every frame of a video: decoded once, and reduced to small pictures straight from the planes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from opensora_core.errors import InputError
from opensora_core.media.bars import Bars
from opensora_core.media.decoding import Decoder, counted
from opensora_core.media.packets import packets_from, seconds
from opensora_core.media.pixels import Frames
from opensora_core.media.read import Budget, Limits, opened
from opensora_core.media.shown import Screen
from opensora_core.media.sketch import COLUMNS, ROWS, Sketch

LONG = Limits(max_frames=5_000_000, max_seconds=24 * 3600.0)
"""What a source may cost that is to be cut into clips: it is longer than what a loader reads."""

_TOP = float("-inf")
_CHUNK = 256
_MOST_THUMBNAILS = 96  # evenly spaced ones, and as many of frames that differ from the one before
_THUMBNAIL_SIDE = 160
_LEAST_SPACING = 40  # frames
_STARTLING, _STARTLING_RATIO = 5.0, 3.0  # levels, and times the recent difference, of a frame that may begin a shot


@dataclass(frozen=True)
class Chunk:
    """Consecutive frames of a video.

    Attributes:
        first: number of the first one.
        seconds: (N,) timestamps.
        is_keyframe: (N,).
        luma: (N, 36, 64) as the decoder has it, reduced to 8 bits: one sample for each place, of the upper field.
        chroma: (N, 2, 18, 32).
        pictures: (N, H, W, 3) BGR, where they were asked for.
    """

    first: int
    seconds: NDArray[np.float64]
    is_keyframe: NDArray[np.bool_]
    luma: NDArray[np.uint8]
    chroma: NDArray[np.uint8]
    pictures: Frames | None


@dataclass
class Glance:
    """One pass over a video: iterate once; what the whole of it showed is known afterwards.

    Attributes:
        path: the file.
        limits: what it may cost.
        threads: of the decoder.
        picture_width: also give pictures of about this width, as detectors of PySceneDetect take them.
        on_progress: is told the share of the video that is done, 0..1.
        width, height: as shown: upright, with square pixels.
        fps: mean rate.
        num_frames: that were decoded.
        damage: what could not be decoded; empty where nothing is amiss.
        thumbnails: number of a frame -> (h, w, 3) RGB: frames evenly spaced, at most one in a second, and those
            that differ most from the one before.
        even: numbers of the evenly spaced ones.
        crop: top, left, height and width within bars that are black in every thumbnail, in pixels as shown; None
            without bars.
    """

    path: Path
    limits: Limits = LONG
    threads: int = 1
    picture_width: int | None = None
    on_progress: Callable[[float], None] | None = None
    width: int = 0
    height: int = 0
    fps: float = 0.0
    num_frames: int = 0
    damage: str = ""
    thumbnails: dict[int, Frames] = field(default_factory=dict)
    even: list[int] = field(default_factory=list)
    crop: tuple[int, int, int, int] | None = None

    def __iter__(self) -> Iterator[Chunk]:
        """Decode.

        Raises:
            InputError: no video, nothing in it can be decoded, or beyond the limits.
        """
        budget = Budget(self.path, self.limits)
        try:
            with opened(self.path, self.limits.max_pixels) as (container, stream):
                yield from self._decode(container, stream, budget)
        except (av.FFmpegError, OSError, ValueError, IndexError) as error:
            raise InputError(f"cannot read {self.path} as a video: {error}") from error
        if not self.num_frames:
            raise InputError(f"{self.path} holds no frame that can be decoded{self.damage and ': ' + self.damage}")

    def begin(self, stream: VideoStream) -> None:
        """Learn the rate of the stream that is to be glanced at, and decode it no better than that needs."""
        self.fps = float(stream.average_rate or stream.guessed_rate or 25)
        # pictures that no other refers to need no smoothing of block edges to be glanced at
        stream.codec_context.options = {**stream.codec_context.options, "skip_loop_filter": "noref"}

    def _decode(self, container: InputContainer, stream: VideoStream, budget: Budget) -> Iterator[Chunk]:
        self.begin(stream)
        claim = _Claim.of(container, stream)
        screen = Screen(self.path, stream, None, self.limits.max_pixels)
        sketch, painter, bars = Sketch(), Painter(self, stream), Bars()
        lost, time, chunk = 0, 0.0, _Filling(0)
        decoder = Decoder(stream, self.threads, budget)
        for time, frame in counted(claim.watch(packets_from(container, stream, _TOP)), decoder):
            if frame is None:
                lost += 1
                claim.first_lost = time if lost == 1 else claim.first_lost
                continue
            if not self.num_frames:
                self.height, self.width = screen.size(frame)
                bars.shown(screen, frame)
            sketch.draw(frame, chunk.luma[chunk.size], chunk.chroma[chunk.size])
            if painter.look(self.num_frames, time, frame, chunk.luma[chunk.size]):
                bars.look(frame)
            chunk.add(time, frame.key_frame, painter.picture(frame))
            self.num_frames += 1
            if chunk.size == _CHUNK:
                if self.on_progress is not None and claim.duration:
                    self.on_progress(min((time - claim.start) / claim.duration, 1.0))
                yield chunk.chunk()
                chunk = _Filling(self.num_frames)
        self.damage = claim.damage(lost, time + 1 / self.fps, self.num_frames)
        self.crop = bars.crop(self.height, self.width)
        if chunk.size:
            yield chunk.chunk()
        if self.on_progress is not None:
            self.on_progress(1.0)


@dataclass
class _Filling:
    """Frames of a chunk that is not full yet."""

    first: int
    size: int = 0
    luma: NDArray[np.uint8] = field(default_factory=lambda: np.empty((_CHUNK, ROWS, COLUMNS), np.uint8))
    chroma: NDArray[np.uint8] = field(default_factory=lambda: np.empty((_CHUNK, 2, ROWS // 2, COLUMNS // 2), np.uint8))
    times: list[float] = field(default_factory=list)
    keys: list[bool] = field(default_factory=list)
    pictures: list[Frames] = field(default_factory=list)

    def add(self, time: float, is_keyframe: bool, picture: Frames | None) -> None:
        self.size += 1
        self.times.append(time)
        self.keys.append(is_keyframe)
        if picture is not None:
            self.pictures.append(picture)

    def chunk(self) -> Chunk:
        pictures = np.stack(self.pictures) if self.pictures else None
        times, keys = np.array(self.times), np.array(self.keys, np.bool_)
        return Chunk(self.first, times, keys, self.luma[: self.size], self.chroma[: self.size], pictures)


@dataclass
class _Claim:
    """What the container says that it holds, against what came of it."""

    num_frames: int
    start: float
    duration: float
    is_own: bool  # the duration is the video's own, not that of whatever else is in the file
    num_packets: int = 0
    num_torn: int = 0
    num_before_key: int = 0
    first_lost: float = 0.0

    @classmethod
    def of(cls, container: InputContainer, stream: VideoStream) -> _Claim:
        base = float(stream.time_base or 0)
        own = (stream.duration or 0) * base
        whole = (container.duration or 0) / av.time_base
        start = seconds(stream.start_time, stream) if stream.start_time is not None else 0.0
        return cls(stream.frames, start, own or whole, own > 0)

    def watch(self, packets: Iterable[Packet[VideoStream]]) -> Iterator[Packet[VideoStream]]:
        begun = False
        for packet in packets:
            self.num_packets += 1
            self.num_torn += packet.is_corrupt
            begun |= packet.is_keyframe
            self.num_before_key += not begun
            yield packet

    def damage(self, num_lost: int, end: float, num_frames: int) -> str:
        found = []
        if self.num_before_key:
            found.append(f"{self.num_before_key} packets come before the first keyframe")
        if num_lost:
            found.append(f"{num_lost} times something could not be decoded, first at {self.first_lost:.3f} s")
        if self.num_torn:
            found.append(f"{self.num_torn} packets are torn")
        missing = self.num_frames - self.num_packets
        # an edit list may leave frames out: only what also ends too early has lost some
        if (
            missing > 0
            and self.is_own
            and end < self.start + self.duration - 0.05 - 2 * self.duration / self.num_frames
        ):
            found.append(f"the container says {self.num_frames} frames, {num_frames} could be decoded")
        return "; ".join(found)


class Painter:
    """Makes the few thumbnails, and pictures for those who asked for them."""

    def __init__(self, glance: Glance, stream: VideoStream) -> None:
        self._glance = glance
        self._stream = stream
        self._screen: Screen | None = None
        self._scaler = VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._spacing, self._next, self._least = 2.0, _TOP, 0
        self._last: NDArray[np.int16] | None = None
        self._recent = 0.0
        self._startling: list[tuple[float, int]] = []

    def look(self, number: int, time: float, frame: VideoFrame, luma: NDArray[np.uint8]) -> bool:
        """Keep a thumbnail if it is time for one, which is the answer, or if the frame is unlike the one before."""
        coarse = luma[::4, ::4].astype(np.int16)
        difference = float(np.abs(coarse - self._last).sum()) / coarse.size if self._last is not None else 0.0
        recent, self._last, self._recent = self._recent, coarse, 0.7 * self._recent + 0.3 * difference
        if time >= self._next and number >= self._least:
            self._next, self._least = time + self._spacing, number + _LEAST_SPACING
            self._glance.even.append(number)
            self._paint(number, frame)
            if len(self._glance.even) > _MOST_THUMBNAILS:
                for odd in self._glance.even[1::2]:
                    del self._glance.thumbnails[odd]
                self._glance.even, self._spacing = self._glance.even[::2], 2 * self._spacing
            return True
        if difference > max(_STARTLING, _STARTLING_RATIO * recent):
            strength = difference / (recent + 1)
            if len(self._startling) < _MOST_THUMBNAILS:
                heapq.heappush(self._startling, (strength, number))
                self._paint(number, frame)
            elif strength > self._startling[0][0]:
                _, weakest = heapq.heapreplace(self._startling, (strength, number))
                del self._glance.thumbnails[weakest]
                self._paint(number, frame)
        return False

    def _paint(self, number: int, frame: VideoFrame) -> None:
        if self._screen is None:
            scale = min(_THUMBNAIL_SIDE / max(self._glance.width, self._glance.height), 1)
            size = max(round(self._glance.height * scale), 1), max(round(self._glance.width * scale), 1)
            self._screen = Screen(self._glance.path, self._stream, size, self._glance.limits.max_pixels)
        self._glance.thumbnails[number] = self._screen.show(frame).copy()

    def picture(self, frame: VideoFrame) -> Frames | None:
        """(H, W, 3) BGR of the width that was asked for, not enlarged, and of one size whatever the stream does."""
        if self._glance.picture_width is None:
            return None
        if self._size is None:
            width = min(self._glance.picture_width, frame.width)
            self._size = max(round(frame.height * width / frame.width), 1), width
        height, width = self._size
        small = self._scaler.reformat(
            frame, width=width, height=height, format="bgr24", interpolation=Interpolation.BILINEAR, threads=1
        )
        picture: Frames = small.to_ndarray().astype(np.uint8, copy=False)
        return picture


def count_frames(path: Path, limits: Limits = LONG) -> int:
    """Decode a video and count, as plainly as our libraries can: what a glance is measured against.

    Raises:
        InputError: it cannot be decoded.
    """
    try:
        with opened(path, limits.max_pixels) as (container, stream):
            stream.codec_context.thread_type = "NONE"
            return sum(1 for _ in container.decode(stream))
    except av.FFmpegError as error:
        raise InputError(f"cannot read {path} as a video: {error}") from error
