"""Clips whose every frame is encoded anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from opensora_core.files import replacing
from opensora_core.media.decoding import Decoder, counted
from opensora_core.media.encoding import ENCODERS, prepare, rational_rate
from opensora_core.media.fitting import Colors, Fitting
from opensora_core.media.packets import packets_from
from opensora_core.media.pieces import Encoding, Piece
from opensora_core.media.piecework import Event, Patience, Work, checked, clip_container, ticks_of
from opensora_core.media.read import Limits
from opensora_core.media.soundtrack import Sound, Soundtrack

_LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG
_SAME_TIME = 1e-6


@dataclass(frozen=True)
class Source:
    """What all pieces of a source have in common."""

    path: Path
    stream: VideoStream
    seconds: NDArray[np.float64]  # (N,) of its frames
    base: Fraction  # seconds per tick of its clips
    track: Soundtrack
    limits: Limits
    is_decoded: bool = False  # all of it, to the frame, so that what is copied of it is proved by its bytes


def decoded(container: InputContainer, source: Source, threads: int) -> Iterator[Event]:
    """The frames of a source, each with the number that its time has among the known ones."""
    seconds, patience = source.seconds, Patience(source.path, source.limits)
    decoder, count = Decoder(source.stream, threads, patience), 0
    for time, frame in counted(packets_from(container, source.stream, float("-inf")), decoder):
        if frame is None:
            continue
        number = _number(time, count, seconds)
        count += 1
        if number is not None:
            yield number, -1, frame
            patience.renew()


def _number(time: float, count: int, seconds: NDArray[np.float64]) -> int | None:
    """The frame that has this time; for times that are made up, the one in its turn if it is near; else none."""
    right = int(np.searchsorted(seconds, time))
    for number in (right - 1, right):
        if 0 <= number < len(seconds) and abs(seconds[number] - time) < _SAME_TIME:
            return number
    if count < len(seconds):
        around = seconds[max(0, count - 1) : count + 2]
        if abs(seconds[count] - time) < np.diff(around).min(initial=1.0) / 2:
            return count
    return None


def encoded(source: Source, piece: Piece, encoding: Encoding) -> Work:
    """Encode the frames of a piece, which come in their order.

    Raises:
        InputError: a crop beyond the picture, or a clip that does not decode back.
        ResourceError: the disk refuses.
    """
    base, ticks, ends = _schedule(source, piece, encoding)
    due = deque(ticks)
    path = piece.path.with_suffix(".mp4")
    start, end = float(source.seconds[piece.start_frame]), piece.end_seconds
    fitting = Fitting(
        source.path,
        source.stream,
        ENCODERS[encoding.codec].pixel_format,
        crop=encoding.crop,
        short_side=encoding.short_side,
        max_pixels=source.limits.max_pixels,
    )
    frame = yield
    with replacing(path) as part:
        with clip_container(part, path, "mp4") as container:
            sound = source.track.encoded(start, end) if encoding.audio else None
            output = _Output(container, encoding, base, sound)
            for number in range(piece.start_frame, piece.end_frame):
                assert isinstance(frame, VideoFrame)
                for picture in fitting.feed(frame):
                    output.show(picture, fitting, due.popleft(), ends)
                if number + 1 < piece.end_frame:
                    frame = yield
            for picture in fitting.rest():
                output.show(picture, fitting, due.popleft(), ends)
            output.finish(end - start)
        times = [tick * base.numerator / base.denominator for shown in ticks for tick in shown]
        return checked(part, path, piece, times, source.limits, num_copied=0, tolerance=float(base) / 2)


def _schedule(source: Source, piece: Piece, encoding: Encoding) -> tuple[Fraction, list[list[int]], dict[int, int]]:
    """Seconds per tick, the ticks at which each frame of a piece is shown, and when each showing ends."""
    if encoding.fps is None:
        ticks = ticks_of(piece, source.seconds, source.base)
        return source.base, [[tick] for tick in ticks[:-1]], dict(pairwise(ticks))
    seconds = source.seconds[piece.start_frame : piece.end_frame]
    rate = rational_rate(encoding.fps)
    num_frames = max(1, round((piece.end_seconds - seconds[0]) * rate))
    wanted = seconds[0] + np.arange(num_frames) * float(1 / rate)
    right = np.searchsorted(seconds, wanted).clip(1, max(len(seconds) - 1, 1))
    if len(seconds) == 1:
        nearest = np.zeros(num_frames, np.int64)
    else:
        nearest = np.where(wanted - seconds[right - 1] <= seconds[right] - wanted, right - 1, right)
    shown: list[list[int]] = [[] for _ in seconds]
    for number, place in enumerate(nearest):
        shown[place].append(number)
    return 1 / rate, shown, {number: number + 1 for number in range(num_frames)}


class _Output:
    """The streams of a clip, which are added when its first picture is there."""

    def __init__(self, container: OutputContainer, encoding: Encoding, base: Fraction, sound: Sound | None) -> None:
        self._container, self._encoding, self._base, self._sound = container, encoding, base, sound
        self._stream: VideoStream | None = None

    def show(self, picture: VideoFrame, fitting: Fitting, ticks: list[int], ends: dict[int, int]) -> None:
        """Encode a picture for each of its ticks."""
        if self._stream is None:
            self._stream = self._add(fitting.size, fitting.colors, ends)
        picture.pict_type = 0  # the encoder's own choice, not the source's
        for tick in ticks:
            picture.pts, picture.time_base, picture.duration = tick, self._base, ends[tick] - tick
            self._mux(picture)

    def finish(self, seconds: float) -> None:
        """Write what the encoders still hold, and the sound up to the end of the clip."""
        if self._stream is not None:
            self._mux(None)
        if self._sound is not None:
            for packet in self._sound.until(seconds + 1):
                self._container.mux(packet)

    def _mux(self, picture: VideoFrame | None) -> None:
        assert self._stream is not None
        for packet in self._stream.encode(picture):
            if self._sound is not None and packet.dts is not None:
                for other in self._sound.until(max(0.0, float(packet.dts * self._base))):
                    self._container.mux(other)
            self._container.mux(packet)

    def _add(self, size: tuple[int, int], colors: Colors, ends: dict[int, int]) -> VideoStream:
        span = max(ends.values()) * self._base
        stream = self._container.add_stream(
            self._encoding.codec, rate=Fraction(len(ends) / span).limit_denominator(1001) or 1
        )
        assert isinstance(stream, VideoStream)
        context = stream.codec_context
        prepare(context, self._encoding, size, self._base)
        context.colorspace, context.color_primaries, context.color_trc = (
            colors.matrix,
            colors.primaries,
            colors.transfer,
        )
        context.color_range = _LIMITED_RANGE
        if self._sound is not None:
            self._sound.attach(self._container)
        return stream
