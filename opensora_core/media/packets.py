"""What the packets of a video say without being decoded: which frame is where, and what it takes to decode it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from opensora_core.media.read import Budget

# no codec lets more than 16 pictures overtake another, which are 32 packets where each field has its own
_MAX_REORDER = 40
_MAX_KEPT_BYTES = 64 * 2**20
# a jump to a keyframe empties the decoder first, which is worth a few frames
_MIN_JUMP = 4
# containers whose timestamps say when a frame is shown, and codecs that put one frame into a packet
_TIMED = {"mov", "matroska", "webm", "mpegts", "flv", "mp4"}
_ONE_FRAME_EACH = {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "mpeg2video", "ffv1", "prores"}
_UNKNOWN_OR_PROGRESSIVE = (0, 1)


class UnreliableTimesError(Exception):
    """Packets do not say which frame they hold: frames have to be counted as they are decoded."""


class DamageError(Exception):
    """A frame that should have been decoded was not."""


@dataclass(frozen=True)
class Window:
    """Seconds of a clip within its source, [start, end)."""

    start: float = float("-inf")
    end: float = float("inf")


@dataclass(frozen=True)
class Timeline:
    """The packets of a stretch of video in the order of decoding, which begins at a keyframe."""

    pts: list[int]
    shown: list[bool]  # False: an edit list cuts the frame out, or it is there for others to refer to
    droppable: list[bool]  # no other picture refers to it
    keys: list[int]  # positions of keyframes
    clip: list[int]  # timestamps of the frames of the clip, in the order of showing
    kept: list[Packet[VideoStream]] | None  # the packets themselves, where they are few

    def runs(self, wanted: Container[int]) -> list[tuple[int, int]]:
        """Stretches (first, last) of packets that have to be decoded for the frames of the wanted timestamps."""
        runs: list[tuple[int, int]] = []
        key_number = -1
        for position, pts in enumerate(self.pts):
            if key_number + 1 < len(self.keys) and self.keys[key_number + 1] == position:
                key_number += 1
            if pts not in wanted:
                continue
            number = key_number
            while number > 0 and self.pts[self.keys[number]] > pts:  # shown before the keyframe: refers back beyond it
                number -= 1
            first, last = self.keys[number], position
            while runs and first <= runs[-1][1] + _MIN_JUMP:
                first = min(first, runs.pop()[0])
            runs.append((first, last))
        return runs


def seconds(pts: int, stream: VideoStream) -> float:
    """The time of a timestamp, as near as a float can be."""
    base = stream.time_base
    assert base is not None
    return pts * base.numerator / base.denominator


def packets_from(container: InputContainer, stream: VideoStream, start: float) -> Iterator[Packet[VideoStream]]:
    """Packets in the order of decoding, from a keyframe that is shown at `start` or before it.

    Raises:
        DamageError: there is no such keyframe, or the container cannot seek.
    """
    if start == float("-inf") or (stream.start_time is not None and start <= seconds(stream.start_time, stream)):
        yield from _demux(container, stream)
        return
    base = stream.time_base
    assert base is not None
    for back in (0, 1, 10, 100):  # containers without an index land where they like
        try:
            container.seek(int((start - back) / base), stream=stream)
        except (av.FFmpegError, OverflowError):
            break
        packets = _demux(container, stream)
        first = next((packet for packet in packets if packet.is_keyframe), None)
        if first is not None and first.pts is not None and seconds(first.pts, stream) <= start:
            yield from chain([first], packets)
            return
    raise DamageError(f"no keyframe before {start:g} s can be found")


def _demux(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    try:
        for packet in container.demux(stream):
            if packet.size:  # the last one is empty and flushes; AVI has empty ones for frames that stand still
                yield packet
    except (av.FFmpegError, IndexError):
        # torn, or PyAV stumbles over a stream that appeared midway: what came so far is what there is
        return


def scan(
    packets: Iterable[Packet[VideoStream]],
    stream: VideoStream,
    window: Window,
    last_frame: int | None,
    budget: Budget,
) -> Timeline:
    """Find the frames of a clip by their timestamps.

    Args:
        packets: from a keyframe at or before the window's start.
        stream: that they belong to.
        window: of the clip.
        last_frame: number of the last frame that is of interest; the rest is not looked at. None: all are.
        budget: is asked for every packet.

    Raises:
        UnreliableTimesError: the timestamps or the codec do not allow to tell frames by their packets.
        InputError: beyond the budget.
    """
    codec = stream.codec_context.name
    require_times(stream, codec)
    read_header = _HEADERS.get(codec, _unknown_header)
    length_bytes = prefix_bytes(codec, stream.codec_context.extradata)
    timeline = Timeline([], [], [], [], [], [])
    kept: list[Packet[VideoStream]] | None = timeline.kept
    kept_bytes, num_from_start, layered = 0, 0, False
    for packet in packets:
        budget.check(len(timeline.pts) + 1)
        if packet.pts is None:
            raise UnreliableTimesError
        hidden, droppable, layer = read_header(packet, length_bytes)
        layered |= layer > 0
        if packet.is_keyframe:
            timeline.keys.append(len(timeline.pts))
        timeline.pts.append(packet.pts)
        timeline.shown.append(not (hidden or packet.is_discard))
        timeline.droppable.append(droppable)
        if kept is not None:
            kept_bytes += packet.size
            kept.append(packet)
            kept = kept if kept_bytes <= _MAX_KEPT_BYTES else None
        if timeline.shown[-1] and (when := seconds(packet.pts, stream)) >= window.start:
            num_from_start += 1
            if when < window.end:
                timeline.clip.append(packet.pts)
        # what could still come before the last frame of interest would overtake more pictures than any codec allows
        if last_frame is not None and num_from_start > last_frame + _MAX_REORDER:
            break
        if num_from_start > len(timeline.clip) + _MAX_REORDER:
            break
    timeline.clip.sort()
    if len(set(timeline.clip)) < len(timeline.clip):
        raise UnreliableTimesError
    # pictures overtake others, but their times do not: they were written in the order of coding
    if stream.codec_context.has_b_frames and len(timeline.pts) > 1 and timeline.pts == sorted(timeline.pts):
        raise UnreliableTimesError
    # a stream that begins between keyframes, or with pictures that refer to what came before it
    if timeline.pts and (timeline.keys[:1] != [0] or (timeline.clip and timeline.clip[0] < timeline.pts[0])):
        raise UnreliableTimesError
    # one picture may refer to another of a lower layer that is "not referred to" within its own
    loose = [False] * len(timeline.pts) if layered else timeline.droppable
    return Timeline(timeline.pts, timeline.shown, loose, timeline.keys, timeline.clip, kept)


def require_times(stream: VideoStream, codec: str) -> None:
    """Check that a packet holds a frame and says when it is shown, as far as container and codec can tell.

    Raises:
        UnreliableTimesError: it does not.
    """
    timed = _TIMED.intersection(stream.container.format.name.split(","))
    if not timed or codec not in _ONE_FRAME_EACH or stream.codec_context.field_order not in _UNKNOWN_OR_PROGRESSIVE:
        raise UnreliableTimesError


def prefix_bytes(codec: str, extradata: bytes | None) -> int:
    """How many bytes say the length of a unit of a packet; 0 where start codes part them."""
    place = {"h264": 4, "hevc": 21}.get(codec, 0)
    if extradata and len(extradata) > place and extradata[0] == 1:
        return (extradata[place] & 3) + 1
    return 0


def whole_units(data: bytes, length_bytes: int) -> Iterator[bytes]:
    """The units of an H.264 or HEVC packet."""
    if not length_bytes:
        yield from (unit for unit in (part.rstrip(b"\0") for part in data.split(b"\0\0\1")[1:]) if unit)
        return
    place = 0
    while place + length_bytes < len(data):
        length = int.from_bytes(data[place : place + length_bytes], "big")
        yield data[place + length_bytes : place + length_bytes + length]
        place += length_bytes + max(length, 1)


def is_droppable(packet: Packet[VideoStream], codec: str, length_bytes: int) -> bool:
    """Whether no other picture refers to this one, as far as its header tells by itself."""
    _, droppable, layer = _HEADERS.get(codec, _unknown_header)(packet, length_bytes)
    return droppable and not layer


def units_of(packet: Packet[VideoStream], length_bytes: int) -> Iterator[bytes]:
    """The first two bytes of each unit of an H.264 or HEVC packet."""
    data = bytes(packet)
    if length_bytes:
        place = 0
        while place + length_bytes + 2 <= len(data):
            place += length_bytes
            yield data[place : place + 2]
            place += int.from_bytes(data[place - length_bytes : place], "big")
    else:
        place = data.find(b"\0\0\1")
        while place >= 0:
            yield data[place + 3 : place + 5]
            place = data.find(b"\0\0\1", place + 3)


def _h264_header(packet: Packet[VideoStream], length_bytes: int) -> tuple[bool, bool, int]:
    slices = [unit[0] for unit in units_of(packet, length_bytes) if unit]
    # other units: access unit delimiter, supplemental information, filler. Parameter sets and extensions are needed
    droppable = all(byte & 31 in (1, 6, 9, 12) and (byte & 31 != 1 or not byte >> 5 & 3) for byte in slices)
    return False, droppable and any(byte & 31 == 1 for byte in slices), 0


def _hevc_header(packet: Packet[VideoStream], length_bytes: int) -> tuple[bool, bool, int]:
    units = [(unit[0] >> 1 & 63, (unit[1] & 7) - 1) for unit in units_of(packet, length_bytes) if len(unit) == 2]
    slices = [kind for kind, _ in units if kind < 32]
    droppable = all(kind < 15 and not kind % 2 for kind in slices) and not any(32 <= kind <= 34 for kind, _ in units)
    return False, droppable and bool(slices), max((layer for _, layer in units), default=0)


def _vp8_header(packet: Packet[VideoStream], length_bytes: int) -> tuple[bool, bool, int]:
    return not memoryview(packet)[0] >> 4 & 1, False, 0


def _unknown_header(packet: Packet[VideoStream], length_bytes: int) -> tuple[bool, bool, int]:
    return False, False, 0


_HEADERS = {"h264": _h264_header, "hevc": _hevc_header, "vp8": _vp8_header}
"""Per codec: whether a packet's frame is never shown, whether no other refers to it, and its temporal layer."""
