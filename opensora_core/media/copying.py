"""Clips made of a source's own packets: which packets can be taken, and how they become a file."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from opensora_core.errors import InputError
from opensora_core.files import replacing, require_space
from opensora_core.media.entries import ParameterSets, is_entry
from opensora_core.media.exact import Source
from opensora_core.media.packets import packets_from, prefix_bytes
from opensora_core.media.pieces import Cut, Encoding, Piece
from opensora_core.media.piecework import Event, Job, Patience, Work, carried_out, checked, clip_container, ticks_of
from opensora_core.media.proof import Proof
from opensora_core.media.read import opened
from opensora_core.media.soundtrack import Sound

LOST, HIDDEN = -1, -2
"""Instead of a frame's number: it does not decode or is not shown; it is there only for others to refer to."""

_MP4 = {"h264", "hevc", "av1", "libdav1d", "mpeg4"}
_WEBM = {"vp8", "vp9", "libvpx", "libvpx-vp9"}
_SOUNDS = {
    "mp4": {"aac", "mp3", "mp3float", "ac3", "eac3", "opus", "libopus", "flac", "alac"},
    "webm": {"opus", "libopus", "vorbis", "libvorbis"},
}
_FORMATS = {"mp4": ".mp4", "webm": ".webm", "matroska": ".mkv"}
_MATROSKA_TICK = 0.001


@dataclass(frozen=True)
class Index:
    """The packets of a source in the order of decoding, each of which holds one frame."""

    pts: list[int]
    sizes: list[int]
    frames: list[int]  # their numbers, or LOST or HIDDEN
    positions: NDArray[np.int64]  # (N,) of the packet of each frame; -1 where there is none
    entries: list[int]  # positions of keyframes that decoding can begin at
    strange: list[int]  # positions of packets that bring parameter sets which the header has not

    def stretch(self, piece: Piece) -> Stretch | None:
        """The longest run of packets that begins at a keyframe and gives frames of the piece without a gap."""
        for number in range(bisect_left(self.entries, 0), len(self.entries)):
            first = self.entries[number]
            start = self.frames[first]
            if start >= piece.end_frame:
                break
            if start >= piece.start_frame:
                return self._stretch(first, start, piece.end_frame)
        return None

    def _stretch(self, first: int, start: int, end: int) -> Stretch | None:
        count, top, best = 0, start - 1, None
        for position in range(first, len(self.pts)):
            frame = self.frames[position]
            if self._leads(position, first) or frame == HIDDEN:
                continue
            if frame < start or frame >= end:
                break
            count, top = count + 1, max(top, frame)
            if top - start + 1 == count:
                best = Stretch(first, position, start, top + 1)
        return best

    def _leads(self, position: int, first: int) -> bool:
        """Shown before the keyframe that it follows, so that it refers to what comes before that."""
        return self.pts[position] < self.pts[first] and self.frames[position] != HIDDEN

    def taken(self, stretch: Stretch) -> list[int]:
        """The positions of a stretch, without pictures that are shown before it."""
        run = range(stretch.first, stretch.last + 1)
        return [position for position in run if not self._leads(position, stretch.first)]


@dataclass(frozen=True)
class Stretch:
    """Packets [first, last], but for leading ones, which hold the frames [start, end)."""

    first: int
    last: int
    start: int
    end: int


def indexed(source: Source) -> Index:
    """Read all packets of a source and find the known frames in them.

    Raises:
        InputError: its packets do not say which frame they hold.
    """
    index = Index([], [], [], np.full(len(source.seconds), -1, np.int64), [], [])
    patience = Patience(source.path, source.limits)
    with opened(source.path, source.limits.max_pixels) as (container, stream):
        base = stream.time_base
        assert base is not None
        codec, reorders = stream.codec_context.name, bool(stream.codec_context.has_b_frames)
        if container.format.name == "avi" and reorders:
            raise InputError("its packets do not say when their frames are shown")
        ticks = np.round(source.seconds / float(base)).astype(np.int64).tolist()
        numbers = {tick: number for number, tick in enumerate(ticks)}
        length_bytes = prefix_bytes(codec, stream.codec_context.extradata)
        sets = ParameterSets(codec, stream.codec_context.extradata, length_bytes)
        for position, packet in enumerate(packets_from(container, stream, float("-inf"))):
            patience.check(position + 1)
            if packet.pts is None:
                raise InputError("its packets do not say when their frames are shown")
            is_told = sets.follow(packet)
            if sets.is_strange:
                index.strange.append(position)
            hidden = codec == "vp8" and not memoryview(packet)[0] >> 4 & 1
            frame = HIDDEN if hidden else LOST if packet.is_discard else numbers.get(packet.pts, LOST)
            if frame >= 0:
                if index.positions[frame] >= 0:
                    raise InputError("two of its packets hold one frame")
                index.positions[frame] = position
                if packet.is_keyframe and is_told and is_entry(packet, codec, length_bytes):
                    index.entries.append(position)
            index.pts.append(packet.pts)
            index.sizes.append(packet.size)
            index.frames.append(frame)
    # pictures overtake others, but their times do not: they were written in the order of coding
    if reorders and len(index.pts) > 1 and index.pts == sorted(index.pts):
        raise InputError("its packets do not say when their frames are shown")
    return index


def copied(
    container: InputContainer, source: Source, pieces: Sequence[Piece], encoding: Encoding, threads: int
) -> Iterator[tuple[Job, Cut | str]]:
    """Cut pieces by copying packets alone."""
    try:
        index = indexed(source)
    except InputError as error:
        yield from refused(pieces, f"cannot be copied: {error}")
        return
    jobs = []
    for piece in pieces:
        if (stretch := index.stretch(piece)) is None:
            yield from refused([piece], "cannot be copied: it holds no keyframe that decoding can begin at")
        else:
            jobs.append(copy_job(source, index, piece, stretch, "copy" if encoding.audio else ""))
    yield from carried_out(jobs, packets(container, source, index, jobs))


def refused(pieces: Sequence[Piece], reason: str) -> Iterator[tuple[Job, str]]:
    """Jobs that nobody begins."""
    for piece in pieces:
        yield Job(piece, lambda *_: False, _nothing), reason


def _nothing() -> Work:
    raise InputError("no clip can be made")
    yield


def packets(container: InputContainer, source: Source, index: Index, jobs: Sequence[Job]) -> Iterator[Event]:
    """All packets of a source, up to the last that a job may want."""
    if jobs:
        for position, packet in enumerate(packets_from(container, source.stream, float("-inf"))):
            require_same(index, position, packet)
            yield -1, position, packet


def require_same(index: Index, position: int, packet: Packet[VideoStream]) -> None:
    """Check a packet against what the first reading found.

    Raises:
        InputError: the file changed.
    """
    if position >= len(index.pts) or (packet.pts, packet.size) != (index.pts[position], index.sizes[position]):
        raise InputError("the file reads differently the second time")


def copy_job(source: Source, index: Index, piece: Piece, stretch: Stretch, audio: Literal["copy", "encode", ""]) -> Job:
    """The job of copying a stretch. Sound is encoded only into .mp4."""
    times = source.seconds
    end = float(times[stretch.end]) if stretch.end < piece.end_frame else piece.end_seconds
    real = replace(
        piece,
        start_frame=stretch.start,
        end_frame=stretch.end,
        start_seconds=float(times[stretch.start]),
        end_seconds=end,
    )
    taken = frozenset(index.taken(stretch))
    return Job(piece, lambda _, position: position in taken, partial(_copy, source, index, real, stretch, audio))


def _copy(source: Source, index: Index, piece: Piece, stretch: Stretch, audio: Literal["copy", "encode", ""]) -> Work:
    codec, track, sound = source.stream.codec_context.name, source.track, None
    format = _format(codec, None)
    if audio == "encode" and format == "mp4":
        sound = track.encoded(piece.start_seconds, piece.end_seconds)
    elif audio:
        sound = track.copied(piece.start_seconds, piece.end_seconds)
        format = _format(codec, track.stream if sound is not None else None)
    path = piece.path.with_suffix(_FORMATS[format])
    taken = index.taken(stretch)
    require_space(path, sum(index.sizes[position] for position in taken))
    writer = PacketWriter(source, index, piece, head=[], taken=taken, tail=[])
    packet = yield
    with replacing(path) as part:
        with clip_container(part, path, format) as container:
            writer.attach(container, source.stream.codec_context.extradata, sound)
            for position in taken:
                assert isinstance(packet, Packet)
                if position != taken[0] and packet.has_sidedata("new_extradata"):
                    raise InputError("its parameter sets change on the way")
                writer.copy(packet)
                if position != taken[-1]:
                    packet = yield
            writer.finish()
        tolerance = max(float(source.base) / 2, _MATROSKA_TICK if format != "mp4" else 0.0)
        proof = writer.proof if source.is_decoded else None
        num_copied = len(writer.times)
        return checked(
            part, path, piece, writer.times, source.limits, num_copied=num_copied, tolerance=tolerance, proof=proof
        )


def _format(codec: str, sound: AudioStream | None) -> str:
    """The container that holds both."""
    format = "mp4" if codec in _MP4 else "webm" if codec in _WEBM else "matroska"
    if sound is not None and sound.codec_context.name not in _SOUNDS.get(format, {sound.codec_context.name}):
        return "matroska"
    return format


class PacketWriter:
    """Writes packets, with times of decoding that ascend and never lie behind those of showing."""

    def __init__(
        self,
        source: Source,
        index: Index,
        piece: Piece,
        *,
        head: Sequence[int],
        taken: Sequence[int],
        tail: Sequence[int],
    ) -> None:
        """Plan a clip.

        Args:
            source: of the packets.
            index: of its packets.
            piece: what is really in the clip.
            head: numbers of frames that come before the copied ones, in their order.
            taken: positions of the packets that are copied.
            tail: numbers of frames that come after them.
        """
        self._source = source
        ticks = ticks_of(piece, source.seconds, source.base)
        self._durations = [later - tick for tick, later in pairwise(ticks)]
        self._first = piece.start_frame
        self._numbers = [*head, *(index.frames[position] for position in taken), *tail]
        own, base = source.stream.time_base, source.base
        assert own is not None
        origin = round(piece.start_seconds / own)
        hidden = {
            len(head) + place: round((index.pts[position] - origin) * own / base)
            for place, position in enumerate(taken)
            if index.frames[position] == HIDDEN
        }
        self._pts = [
            hidden[place] if number < 0 else ticks[number - self._first] for place, number in enumerate(self._numbers)
        ]
        self._dts = _decoding_times(self._pts)
        self.times = [tick * base.numerator / base.denominator for tick in ticks[:-1]]
        context = source.stream.codec_context
        self.proof = Proof(context.name, prefix_bytes(context.name, context.extradata))
        self._copied = range(len(head), len(head) + len(taken))
        self._place = 0
        self._end = float(ticks[-1] * base)

    def attach(self, container: OutputContainer, extradata: bytes | None, sound: Sound | None) -> None:
        """Add the streams: like the source's, with parameter sets of `extradata`."""
        self._container, self._sound = container, sound
        self._stream = container.add_stream_from_template(self._source.stream, opaque=True)
        self._stream.time_base = self._source.base
        if extradata is not None:
            self._stream.codec_context.extradata = extradata
        if sound is not None:
            sound.attach(container)

    def copy(self, packet: Packet[VideoStream]) -> None:
        """Write the next packet."""
        number, place = self._numbers[self._place], self._place
        self._place += 1
        self.proof.add(packet, is_new=place not in self._copied, is_hidden=number < 0)
        packet.pts, packet.dts = self._pts[place], self._dts[place]
        packet.time_base = self._source.base
        packet.duration = self._durations[number - self._first] if number >= 0 else 0
        packet.stream = self._stream
        if self._sound is not None:
            base = self._source.base
            for other in self._sound.until(max(0.0, self._dts[place] * base.numerator / base.denominator)):
                self._container.mux(other)
        self._container.mux(packet)

    def finish(self) -> None:
        """Write the sound up to the end of the clip."""
        if self._sound is not None:
            for packet in self._sound.until(self._end + 1):
                self._container.mux(packet)


def _decoding_times(pts: Sequence[int]) -> list[int]:
    """Ascending times, the latest ones for which no packet is decoded after it is shown."""
    ordered = sorted(pts)
    delay = max((place - bisect_right(ordered, time) + 1 for place, time in enumerate(pts)), default=0)
    step = max(1, (ordered[-1] - ordered[0]) // max(1, len(ordered) - 1))
    before = [ordered[0] - (delay - place) * step for place in range(delay)]
    return [*before, *ordered][: len(ordered)]
