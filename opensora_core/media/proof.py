"""A clip of copied packets, proved by its bytes: frames that were decoded in the source need not be decoded again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from opensora_core.media.decoding import Decoder, Survey
from opensora_core.media.packets import (
    DamageError,
    UnreliableTimesError,
    packets_from,
    prefix_bytes,
    require_times,
    seconds,
    whole_units,
)
from opensora_core.media.read import Budget, opened
from opensora_core.media.shown import Screen

_HEAD, _SEAM = 4, 20
"""Copied packets that are decoded all the same where a copy begins: enough to see that its header fits; and where new
ones follow it, more than the pictures that a decoder may hold back, which it has to give before it goes on."""


@dataclass
class Proof:
    """What the packets of a clip have to be.

    Attributes:
        codec: of all of them.
        length_bytes: as of `packets.prefix_bytes`, of the packets that are written.
        sums: of the packets, in the order of decoding.
        new: places of those that no source had.
        hidden: places of those that show nothing.
    """

    codec: str
    length_bytes: int
    sums: list[int] = field(default_factory=list)
    new: set[int] = field(default_factory=set)
    hidden: set[int] = field(default_factory=set)

    def add(self, packet: Packet[VideoStream], *, is_new: bool, is_hidden: bool) -> None:
        """Remember the next packet."""
        if is_new:
            self.new.add(len(self.sums))
        if is_hidden:
            self.hidden.add(len(self.sums))
        self.sums.append(_sum(packet, self.codec, self.length_bytes))


def proved(proof: Proof, budget: Budget) -> Survey | None:
    """Compare a clip with what it has to be, and decode what is new in it and what stands beside a seam.

    Copied packets behind the seam are those of the source, bit for bit; all that decoding them needs comes before them
    in the clip as it did in the source, where they were decoded.

    Args:
        proof: of the clip.
        budget: names the file.

    Returns:
        What decoding it as a whole would show, or None where that has to be done to know.

    Raises:
        InputError: beyond the budget.
        av.FFmpegError: what the container has against the file.
    """
    try:
        with opened(budget.path, budget.limits.max_pixels) as (container, stream):
            return _proved(proof, budget, container, stream)
    except (UnreliableTimesError, DamageError):
        return None


def _proved(proof: Proof, budget: Budget, container: InputContainer, stream: VideoStream) -> Survey:
    require_times(stream, stream.codec_context.name)
    decoder = Decoder(stream, 1, budget, only_count=True)
    screen = Screen(budget.path, stream, None, budget.limits.max_pixels)
    pts: list[int] = []
    due: set[int] = set()
    size: tuple[int, int] | None = None
    last_new = max(proof.new, default=-1)
    left = _SEAM if last_new >= 0 else _HEAD
    for place, packet in enumerate(chain(_matching(proof, budget, container, stream), [None])):
        if packet is not None:
            assert packet.pts is not None
            if place in proof.new:
                left = _SEAM if place < last_new else _HEAD
            else:
                left -= 1
            if place not in proof.hidden:
                pts.append(packet.pts)
                if left >= 0:
                    due.add(packet.pts)
        if packet is None or left >= 0:
            for frame in decoder.feed(packet):
                if frame.is_corrupt or frame.pts not in due:
                    raise DamageError("a frame is damaged, or one that was not expected")
                due.remove(frame.pts)
                size = size or screen.size(frame)
    if due or size is None:
        raise DamageError(f"{len(due)} frames did not come out of the decoder")
    times = [seconds(when, stream) for when in sorted(pts)]
    return Survey(times, *size, float(stream.average_rate or 1))


def _matching(
    proof: Proof, budget: Budget, container: InputContainer, stream: VideoStream
) -> Iterator[Packet[VideoStream]]:
    """The packets of a clip, as long as they are those of the proof.

    Raises:
        DamageError: one is another, or some are missing.
    """
    context, count = stream.codec_context, 0
    length_bytes = prefix_bytes(context.name, context.extradata)
    for packet in packets_from(container, stream, float("-inf")):
        count += 1
        budget.check(count)
        is_whole = packet.pts is not None and not packet.is_corrupt and not packet.is_discard
        if not is_whole or count > len(proof.sums) or proof.codec != context.name:
            raise DamageError("a packet that was not written")
        if _sum(packet, context.name, length_bytes) != proof.sums[count - 1]:
            raise DamageError("a packet is not what was written")
        yield packet
    if count != len(proof.sums):
        raise DamageError(f"{count} of {len(proof.sums)} packets are there")


def _sum(packet: Packet[VideoStream], codec: str, length_bytes: int) -> int:
    """The same for units that are parted in another way, as containers ask for it."""
    total = 0
    for unit in _parts(packet, codec, length_bytes):
        total = zlib.crc32(unit, zlib.crc32(len(unit).to_bytes(4, "big"), total))
    return total


def _parts(packet: Packet[VideoStream], codec: str, length_bytes: int) -> Iterator[bytes]:
    data = bytes(packet)
    if codec in ("h264", "hevc"):
        yield from (unit.rstrip(b"\0") for unit in whole_units(data, length_bytes))
    else:
        yield data
