"""The sound of clips: cut to the sample and encoded anew, or copied packet by packet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.codec.context import Flags
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Discard
from numpy.typing import NDArray

from opensora_core.errors import InputError
from opensora_core.media.read import opened

_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)  # that AAC has
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}
_BITS_PER_CHANNEL = 64_000
_FRAME_SAMPLES = 1024
# times of containers jitter by a millisecond; a sound that is off by more than this has a true gap
_MAX_JITTER_SECONDS = 0.02
_WARM_UP_SECONDS = 0.5  # decoders of sound need some packets before what they give is right

Samples = NDArray[np.float32]
"""(channels, samples)."""


class Sound(Protocol):
    """The sound of one clip."""

    def attach(self, container: OutputContainer) -> None:
        """Add its stream to a container."""

    def until(self, seconds: float) -> Iterator[Packet[AudioStream]]:
        """Packets up to a time of the clip, which begins at 0, that have not been given yet."""


class Soundtrack:
    """The first audio stream of a source, read once from its start to its end for pieces in their order.

    What is broken in it is left out; a source whose sound cannot be opened has none.
    """

    def __init__(self, path: Path, max_pixels: int) -> None:
        self._path = path
        self._max_pixels = max_pixels
        self._stack = ExitStack()
        self._packets: Iterator[Packet[AudioStream]] = iter(())
        self._last_start = float("-inf")
        self.stream: AudioStream | None = None
        self._blocks: _Blocks | None = None
        self._kept: list[Packet[AudioStream]] = []

    def __enter__(self) -> Soundtrack:
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        self._stack.close()
        self.stream, self._blocks, self._kept = None, None, []
        try:
            container, pictures = self._stack.enter_context(opened(self._path, self._max_pixels))
        except (InputError, av.FFmpegError):
            return
        for stream in container.streams.audio[:1]:
            if stream.codec_context is not None and stream.rate > 0 and stream.channels > 0:
                pictures.discard, stream.discard = Discard.all, Discard.default
                self.stream = stream
                self._packets = _demux(container, stream)

    def _from(self, start: float) -> None:
        """Go back to the top, where a piece begins before the last one did."""
        if start < self._last_start:
            self._open()
        self._last_start = start

    def encoded(self, start: float, end: float) -> Sound | None:
        """The samples of [start, end) seconds of the source, as AAC; None if there are none."""
        self._from(start)
        if self.stream is None:
            return None
        if self._blocks is None:
            self._blocks = _Blocks(self.stream, self._packets, start - _WARM_UP_SECONDS)
        sound = _Encoded(self._blocks, start, end)
        return sound if sound.is_audible else None

    def copied(self, start: float, end: float) -> Sound | None:
        """The packets that begin within [start, end) seconds of the source; None if there are none."""
        self._from(start)
        if self.stream is None:
            return None
        sound = _Copied(self.stream, self._packets, self._kept, start, end)
        return sound if sound.is_audible else None


def _demux(container: InputContainer, stream: AudioStream) -> Iterator[Packet[AudioStream]]:
    try:
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None:
                yield packet
    except (av.FFmpegError, IndexError):
        return


class _Blocks:
    """Decoded sound as blocks that begin at numbered samples, counted from second 0 of the source."""

    def __init__(self, stream: AudioStream, packets: Iterator[Packet[AudioStream]], start: float) -> None:
        self.rate = stream.rate if stream.rate in _RATES else 48000
        self.layout = _LAYOUTS.get(stream.channels, "stereo")
        self._stream = stream
        self._packets = packets
        self._start = start
        self._resampler = AudioResampler(format="fltp", layout=self.layout, rate=self.rate)
        self._next: int | None = None
        self._decoded = self._decode()
        self._held: tuple[int, Samples] | None = None

    def peek(self) -> tuple[int, Samples] | None:
        """The next block; None at the end."""
        if self._held is None:
            self._held = next(self._decoded, None)
        return self._held

    def drop(self) -> None:
        """Go on to the block after it."""
        self._held = None

    def _decode(self) -> Iterator[tuple[int, Samples]]:
        base = self._stream.time_base
        assert base is not None
        for packet in self._packets:
            if packet.pts is None or packet.pts * base < self._start:
                continue
            try:
                frames = self._stream.codec_context.decode(packet)
            except (av.FFmpegError, EOFError):
                continue
            for frame in frames:
                yield from self._placed(frame)

    def _placed(self, frame: AudioFrame) -> Iterator[tuple[int, Samples]]:
        if frame.pts is None or frame.time_base is None:
            return
        place = round(frame.pts * frame.time_base * self.rate)
        if self._next is None or abs(place - self._next) > _MAX_JITTER_SECONDS * self.rate:
            self._next = place
        frame.pts = None  # the resampler would invent silence for jitter
        try:
            pieces = self._resampler.resample(frame)
        except (av.FFmpegError, ValueError):  # it changes its layout on the way
            self._resampler = AudioResampler(format="fltp", layout=self.layout, rate=self.rate)
            return
        for piece in pieces:
            samples = piece.to_ndarray().astype(np.float32, copy=False)
            np.nan_to_num(samples, copy=False)
            yield self._next, samples
            self._next += samples.shape[1]


class _Encoded:
    """Samples [first, last) of a source as AAC. What is missing among them is silent; sound that ends early does so."""

    def __init__(self, blocks: _Blocks, start: float, end: float) -> None:
        self._blocks = blocks
        self._first, self._last = round(start * blocks.rate), round(end * blocks.rate)
        self._at = self._first  # the next sample that is wanted
        self._pending: Samples = np.zeros((len(_channels(blocks.layout)), 0), np.float32)
        self._num_encoded = 0
        self._is_finished = False
        while (block := blocks.peek()) is not None and block[0] + block[1].shape[1] <= self._first:
            blocks.drop()
        self.is_audible = block is not None and block[0] < self._last

    def attach(self, container: OutputContainer) -> None:
        """Add an AAC stream, with the coder that takes half the time of the default one."""
        self._stream = container.add_stream("aac", rate=self._blocks.rate, options={"aac_coder": "fast"})
        context = self._stream.codec_context
        assert isinstance(context, AudioCodecContext)
        context.layout, context.format = self._blocks.layout, "fltp"
        context.bit_rate = _BITS_PER_CHANNEL * len(self._pending)
        context.time_base = Fraction(1, self._blocks.rate)
        context.flags |= Flags.bitexact
        context.thread_count = 1
        self._context = context

    def until(self, seconds: float) -> Iterator[Packet[AudioStream]]:
        """Encode up to a time of the clip."""
        wanted = min(self._first + round(seconds * self._blocks.rate), self._last)
        while self._at < wanted and (block := self._blocks.peek()) is not None and block[0] < self._last:
            place, samples = block
            samples = samples[:, max(0, self._at - place) : self._last - place]
            silence = np.zeros((len(samples), max(0, place - self._at)), np.float32)
            self._at += silence.shape[1] + samples.shape[1]
            self._pending = np.concatenate([self._pending, silence, samples], 1)
            if place + block[1].shape[1] > self._last:
                break  # the next piece needs the rest of it
            self._blocks.drop()
            while self._pending.shape[1] >= _FRAME_SAMPLES:
                yield from self._encode(_FRAME_SAMPLES)
        if wanted == self._last and not self._is_finished:
            self._is_finished = True
            while self._pending.shape[1]:
                yield from self._encode(_FRAME_SAMPLES)
            yield from self._stream.encode(None)

    def _encode(self, num_samples: int) -> Iterator[Packet[AudioStream]]:
        samples, self._pending = self._pending[:, :num_samples], self._pending[:, num_samples:]
        frame = AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=self._blocks.layout)
        frame.sample_rate, frame.pts = self._blocks.rate, self._num_encoded
        frame.time_base = Fraction(1, self._blocks.rate)
        self._num_encoded += samples.shape[1]
        yield from self._stream.encode(frame)


class _Copied:
    """The packets of a stretch."""

    def __init__(
        self,
        source: AudioStream,
        packets: Iterator[Packet[AudioStream]],
        kept: list[Packet[AudioStream]],
        start: float,
        end: float,
    ) -> None:
        assert source.time_base is not None
        self._source, self._packets, self._kept = source, packets, kept
        self._base = source.time_base
        self._start, self._end = start, end
        while (packet := self._peek()) is not None and self._seconds(packet) < start - 1e-9:
            kept.clear()
        self.is_audible = packet is not None and self._seconds(packet) < end

    def _peek(self) -> Packet[AudioStream] | None:
        if not self._kept:
            self._kept.extend(packet for packet in [next(self._packets, None)] if packet is not None)
        return self._kept[0] if self._kept else None

    def _seconds(self, packet: Packet[AudioStream]) -> float:
        assert packet.pts is not None
        return float(packet.pts * self._base)

    def attach(self, container: OutputContainer) -> None:
        """Add a stream like the source's."""
        self._stream = container.add_stream_from_template(self._source, opaque=True)

    def until(self, seconds: float) -> Iterator[Packet[AudioStream]]:
        """Packets that begin before a time of the clip."""
        limit, origin = min(self._start + seconds, self._end), round(self._start / self._base)
        while (packet := self._peek()) is not None and self._seconds(packet) < limit:
            self._kept.clear()
            assert packet.pts is not None
            packet.pts -= origin
            packet.dts = packet.pts
            packet.stream = self._stream
            yield packet


def _channels(layout: str) -> tuple[object, ...]:
    return av.AudioLayout(layout).channels
