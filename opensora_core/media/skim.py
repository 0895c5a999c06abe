"""A look at the keyframes of a video alone, and at whatever stretches between them look worth it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from opensora_core.media.bars import Bars
from opensora_core.media.decoding import Decoder
from opensora_core.media.glance import Chunk, Glance, Painter
from opensora_core.media.packets import DamageError, Timeline, UnreliableTimesError, Window, packets_from, scan, seconds
from opensora_core.media.read import Budget, opened
from opensora_core.media.shown import Screen
from opensora_core.media.sketch import COLUMNS, ROWS, Sketch

_TOP = float("-inf")


@dataclass
class Skim:
    """A video whose frames are known by their packets. Made by `skimmed`.

    Attributes:
        seconds: (N,) times of all frames.
        keys: (K,) numbers of the keyframes.
        sizes: (N,) bytes of the packets, by frame.
        leaps: (N,) how many frames further a frame is shown than all those decoded before it; 0 where it is no further.
        luma, chroma: of the keyframes, as a `Chunk` has them.
    """

    seconds: NDArray[np.float64]
    keys: NDArray[np.int64]
    sizes: NDArray[np.int64]
    leaps: NDArray[np.int64]
    luma: NDArray[np.uint8]
    chroma: NDArray[np.uint8]
    _timeline: Timeline
    _packets: list[Packet[VideoStream]]
    _numbers: dict[int, int]
    _decoder: Decoder
    _sketch: Sketch

    def stretch(self, key: int) -> Chunk | None:
        """Decode from a keyframe up to the next one and with it; None where something between is damaged."""
        keys = self._timeline.keys
        first, last = keys[key], keys[key + 1]
        found: dict[int, VideoFrame] = {}
        self._decoder.restart()
        try:
            for packet in [*self._packets[first : last + 1], None]:
                for frame in self._decoder.feed(packet):
                    if frame.pts in self._numbers:
                        found[self._numbers[frame.pts]] = frame
        except DamageError:
            return None
        begin, end = int(self.keys[key]), int(self.keys[key + 1]) + 1
        if any(number not in found for number in range(begin, end)):
            return None
        luma = np.empty((end - begin, ROWS, COLUMNS), np.uint8)
        chroma = np.empty((end - begin, 2, ROWS // 2, COLUMNS // 2), np.uint8)
        for number in range(begin, end):
            self._sketch.draw(found[number], luma[number - begin], chroma[number - begin])
        is_key = np.isin(np.arange(begin, end), self.keys)
        return Chunk(begin, self.seconds[begin:end], is_key, luma, chroma, None)


@contextmanager
def skimmed(glance: Glance) -> Iterator[Skim]:
    """Find all frames by their packets and decode the keyframes; `glance` learns what the whole shows.

    Raises:
        UnreliableTimesError: the frames have to be decoded to be told apart, or keyframes are damaged: take the whole.
        InputError: no video, or beyond the limits.
    """
    budget = Budget(glance.path, glance.limits)
    with opened(glance.path, glance.limits.max_pixels) as (container, stream):
        timeline = scan(packets_from(container, stream, _TOP), stream, Window(), None, budget)
        packets = timeline.kept
        if packets is None or len(timeline.keys) < 2:
            raise UnreliableTimesError
        numbers = {pts: number for number, pts in enumerate(timeline.clip)}
        glance.begin(stream)
        decoder, sketch, bars = Decoder(stream, glance.threads, budget), Sketch(), Bars()
        screen, painter = Screen(glance.path, stream, None, glance.limits.max_pixels), Painter(glance, stream)
        luma = np.empty((len(timeline.keys), ROWS, COLUMNS), np.uint8)
        chroma = np.empty((len(timeline.keys), 2, ROWS // 2, COLUMNS // 2), np.uint8)
        keys = [numbers.get(timeline.pts[position], -1) for position in timeline.keys]
        if -1 in keys or keys != sorted(keys):
            raise UnreliableTimesError
        for index, (number, position) in enumerate(zip(keys, timeline.keys, strict=True)):
            try:
                decoder.restart()
                frames = [*decoder.feed(packets[position]), *decoder.feed(None)]
            except DamageError as error:
                raise UnreliableTimesError from error
            if len(frames) != 1 or frames[0].is_corrupt:
                raise UnreliableTimesError
            if not index:
                glance.height, glance.width = screen.size(frames[0])
                bars.shown(screen, frames[0])
            sketch.draw(frames[0], luma[index], chroma[index])
            if painter.look(number, seconds(timeline.clip[number], stream), frames[0], luma[index]):
                bars.look(frames[0])
            if glance.on_progress is not None:
                glance.on_progress((index + 1) / len(keys))
        sizes, leaps, furthest = np.zeros(len(numbers), np.int64), np.zeros(len(numbers), np.int64), -1
        for pts, packet in zip(timeline.pts, packets, strict=True):
            if pts in numbers:
                number = numbers[pts]
                sizes[number], leaps[number] = packet.size, max(number - furthest, 0)
                furthest = max(furthest, number)
        glance.num_frames = len(numbers)
        glance.crop = bars.crop(glance.height, glance.width)
        times = np.array([seconds(pts, stream) for pts in timeline.clip])
        yield Skim(times, np.array(keys), sizes, leaps, luma, chroma, timeline, packets, numbers, decoder, sketch)
