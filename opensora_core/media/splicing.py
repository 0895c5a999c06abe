"""H.264 clips that are copied where they can be and encoded like their source where they cannot."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Literal

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from opensora_core.errors import InputError
from opensora_core.files import replacing
from opensora_core.media.copying import Index, PacketWriter, Stretch, copy_job, indexed, refused, require_same
from opensora_core.media.decoding import Decoder
from opensora_core.media.encoding import REPEATABLE_X264, prepare
from opensora_core.media.entries import header_sets
from opensora_core.media.exact import Source, encoded
from opensora_core.media.packets import DamageError, is_droppable, packets_from, prefix_bytes, whole_units
from opensora_core.media.pieces import Cut, Encoding, Piece
from opensora_core.media.piecework import Event, Job, Patience, Work, carried_out, checked, clip_container, ticks_of
from opensora_core.media.soundtrack import Soundtrack

_EIGHT_BITS = ("yuv420p", "yuvj420p")
_PROGRESSIVE = (0, 1)
_SLICES = (1, 5)
_SPS, _PPS = 7, 8
_LACKING = "its frames do not decode as they did before"
_PROFILES = {66: "baseline", 77: "main"}  # by their numbers; "high" otherwise


@dataclass(frozen=True)
class _Sets:
    """Sequence and picture parameter sets, as whole units."""

    sequence: list[bytes]
    picture: list[bytes]


class _Twin:
    """An encoder of what can stand beside a source's packets: the same size, format, colours and shape of pixels.

    Its parameter sets have a number of their own and join the source's in the header, so that a decoder takes at each
    keyframe those which belong to it.
    """

    def __init__(self, source: Source, encoding: Encoding) -> None:
        """Look at a source.

        Raises:
            InputError: it is not of the kind that can be imitated.
        """
        stream = source.stream
        context = stream.codec_context
        extradata = context.extradata
        if context.name != "h264" or stream.pix_fmt not in _EIGHT_BITS or context.field_order not in _PROGRESSIVE:
            raise InputError("only H.264 of 8 bits, 4:2:0 and progressive is joined with new frames")
        if not extradata or (extradata[0] == 1 and extradata[4] & 3 != 3):
            raise InputError("its header has no parameter sets to join others with")
        self._source, self._encoding = source, replace(encoding, codec="libx264")
        self._length_bytes = prefix_bytes("h264", extradata)
        self._sets = _sets(extradata)
        if len(self._sets.sequence) != 1 or len(self._sets.sequence[0]) < 8:
            raise InputError("its header has not one sequence parameter set")
        used = {_number(unit, 4) for unit in self._sets.sequence} | {_number(unit, 1) for unit in self._sets.picture}
        self._number = max(set(range(32)) - used)
        encoder = self._encoder()
        encoder.open()
        own = _sets(encoder.extradata or b"")
        self.extradata = _joined(extradata, self._sets, own)

    def _encoder(self) -> VideoCodecContext:
        stream = self._source.stream
        like = stream.codec_context
        encoder = av.CodecContext.create("libx264", "w")
        assert isinstance(encoder, VideoCodecContext)
        prepare(encoder, self._encoding, (like.height, like.width), self._source.base)
        encoder.pix_fmt, encoder.max_b_frames = stream.pix_fmt, 0  # the times of packets are known beforehand then
        encoder.framerate = stream.average_rate or Fraction(25)
        if shape := stream.sample_aspect_ratio or like.sample_aspect_ratio:
            encoder.sample_aspect_ratio = shape
        encoder.colorspace, encoder.color_range = like.colorspace, like.color_range
        encoder.color_primaries, encoder.color_trc = like.color_primaries, like.color_trc
        profile = _PROFILES.get(self._sets.sequence[0][1], "high")
        params = f"{REPEATABLE_X264}:sps-id={self._number}"
        encoder.options = encoder.options | {"x264-params": params, "profile": profile}
        return encoder

    def run(self) -> _Run:
        """An encoder for consecutive frames, the first of which becomes a keyframe."""
        return _Run(self._encoder(), self._length_bytes, self._source.base)


class _Run:
    """Encodes consecutive frames into packets like the source's."""

    def __init__(self, encoder: VideoCodecContext, length_bytes: int, base: Fraction) -> None:
        self._encoder, self._length_bytes, self._base = encoder, length_bytes, base

    def encode(self, frame: VideoFrame, tick: int) -> Iterator[Packet[VideoStream]]:
        """Packets that are ready once another frame is there.

        Raises:
            InputError: it is not of the source's size or format, or has two fields.
        """
        encoder = self._encoder
        if (frame.height, frame.width, frame.format.name) != (encoder.height, encoder.width, encoder.pix_fmt):
            raise InputError("its frames change their size or format")
        if frame.interlaced_frame:
            raise InputError("its frames have two fields")
        frame.pts, frame.time_base, frame.pict_type = tick, self._base, 0
        yield from map(self._framed, encoder.encode(frame))

    def rest(self) -> Iterator[Packet[VideoStream]]:
        """Packets that waited for others."""
        yield from map(self._framed, self._encoder.encode(None))

    def _framed(self, packet: Packet[VideoStream]) -> Packet[VideoStream]:
        """A packet in the source's way of parting units, with the picture alone."""
        slices = [unit for unit in whole_units(bytes(packet), 0) if unit[0] & 31 in _SLICES]
        if self._length_bytes:
            content = b"".join(len(unit).to_bytes(4, "big") + unit for unit in slices)
        else:
            content = b"".join(b"\0\0\0\1" + unit for unit in slices)
        framed: Packet[VideoStream] = Packet(content)  # type: ignore[assignment]
        framed.is_keyframe = packet.is_keyframe
        return framed


def _sets(extradata: bytes) -> _Sets:
    units = header_sets("h264", extradata)
    return _Sets([unit for unit in units if unit[0] & 31 == _SPS], [unit for unit in units if unit[0] & 31 == _PPS])


def _joined(extradata: bytes, sets: _Sets, own: _Sets) -> bytes:
    """A header with the parameter sets of both."""
    if extradata[0] != 1:
        return extradata + b"".join(b"\0\0\0\1" + unit for unit in (*own.sequence, *own.picture))

    def listed(units: list[bytes]) -> bytes:
        return b"".join(len(unit).to_bytes(2, "big") + unit for unit in units)

    sequence, picture = sets.sequence + own.sequence, sets.picture + own.picture
    rest = extradata[5 + 2 + len(listed(sets.sequence)) + len(listed(sets.picture)) :]
    start = extradata[:3] + bytes([max(extradata[3], own.sequence[0][3]), extradata[4]])  # the higher level
    return start + bytes([0xE0 | len(sequence)]) + listed(sequence) + bytes([len(picture)]) + listed(picture) + rest


def _number(unit: bytes, place: int) -> int:
    """The number of a parameter set: an Exp-Golomb code that begins at a byte."""
    bits = "".join(f"{byte:08b}" for byte in unit[place : place + 4])
    zeros = bits.index("1")
    return int(bits[zeros : 2 * zeros + 1], 2) - 1


def spliced(
    container: InputContainer, source: Source, pieces: Sequence[Piece], encoding: Encoding, threads: int
) -> Iterator[tuple[Job, Cut | str]]:
    """Cut pieces by copying what can be copied and encoding what lies before and after it.

    Yields:
        Every piece with its clip, or with the reason why it has to be cut otherwise.
    """
    try:
        index = indexed(source)
    except InputError as error:
        yield from refused(pieces, str(error))
        return
    try:
        twin: _Twin | None = _Twin(source, encoding)
    except (InputError, av.FFmpegError, IndexError, ValueError):
        twin = None
    audio: Literal["copy", "encode", ""] = "encode" if encoding.audio else ""
    with ExitStack() as stack:
        copying = source
        if audio and _is_as_encoded(source.track):
            # packets that are copied and samples that are encoded would take them from each other
            track = stack.enter_context(Soundtrack(source.path, source.limits.max_pixels))
            audio, copying = "copy", replace(source, track=track)
        jobs: list[Job] = []
        wanted: list[int] = []  # frames that have to be decoded
        for piece in pieces:
            stretch = index.stretch(piece)
            if stretch is not None and (stretch.start, stretch.end) == (piece.start_frame, piece.end_frame):
                jobs.append(copy_job(copying, index, piece, stretch, audio))
                continue
            numbers = list(range(piece.start_frame, piece.end_frame))
            if index.strange and index.strange[0] <= index.positions[numbers].max():
                # a decoder that passes packets over would miss them, and a clip has the header's
                yield from refused([piece], "its parameter sets change on the way")
                continue
            if stretch is not None:
                numbers = [number for number in numbers if not stretch.start <= number < stretch.end]
            first = index.entries[0] if index.entries else len(index.pts)
            if twin is None or (index.positions[numbers] < first).any():
                yield from refused([piece], "it cannot be joined of copied and new frames")
                continue
            wanted += numbers
            if stretch is None:
                wants = partial(_is_frame_in, piece.start_frame, piece.end_frame)
                jobs.append(Job(piece, wants, partial(encoded, source, piece, encoding)))
            else:
                jobs.append(_splice_job(copying, index, piece, stretch, twin, audio=audio))
        yield from carried_out(jobs, _events(container, source, index, wanted, threads))


def _is_as_encoded(track: Soundtrack) -> bool:
    """Whether its packets can stand where encoded ones would: AAC with its header apart."""
    return (
        track.stream is not None
        and track.stream.codec_context.name == "aac"
        and bool(track.stream.codec_context.extradata)
    )


def _is_frame_in(start: int, end: int, frame: int, position: int) -> bool:
    return start <= frame < end


def _events(
    container: InputContainer, source: Source, index: Index, wanted: Sequence[int], threads: int
) -> Iterator[Event]:
    """All packets of a source, and among them the wanted frames; only groups of pictures that have some are decoded."""
    until: dict[int, int] = {}  # the last packet that has to be decoded, by the first
    for number in wanted:
        position = int(index.positions[number])
        entry = index.entries[bisect_right(index.entries, position) - 1]
        until[entry] = max(until.get(entry, 0), position)
    numbers = {pts: number for pts, number in zip(index.pts, index.frames, strict=True) if number >= 0}
    chosen = set(wanted)
    patience = Patience(source.path, source.limits)
    codec = source.stream.codec_context.name
    length_bytes = prefix_bytes(codec, source.stream.codec_context.extradata)
    decoder, last, is_sound = Decoder(source.stream, threads, patience), -1, True
    for position, packet in enumerate(packets_from(container, source.stream, float("-inf"))):
        require_same(index, position, packet)
        patience.renew()
        if position in until:
            last, is_sound = until[position], True
        # what no other refers to is passed over; but what stands in for a lost picture may come of any other
        if position <= last and not (
            source.is_decoded and index.frames[position] not in chosen and is_droppable(packet, codec, length_bytes)
        ):
            for step in (packet, None) if position == last else (packet,):
                try:
                    frames = decoder.feed(step)
                except DamageError:  # who needs the frame, or one that refers to it, will miss it
                    is_sound = False
                    continue
                for frame in frames:
                    is_sound &= frame.pts is not None and not frame.is_corrupt
                    number = numbers.get(frame.pts, -1) if frame.pts is not None and is_sound else -1
                    if number in chosen:
                        yield number, -1, frame
            if position == last:
                decoder.restart()
        yield -1, position, packet


def _splice_job(source: Source, index: Index, piece: Piece, stretch: Stretch, twin: _Twin, *, audio: str) -> Job:
    taken = frozenset(index.taken(stretch))

    def wants(frame: int, position: int) -> bool:
        if position >= 0:
            return position in taken
        return piece.start_frame <= frame < stretch.start or stretch.end <= frame < piece.end_frame

    return Job(piece, wants, partial(_splice, source, index, piece, stretch, twin, audio=audio))


def _splice(source: Source, index: Index, piece: Piece, stretch: Stretch, twin: _Twin, *, audio: str) -> Work:
    path = piece.path.with_suffix(".mp4")
    start = float(source.seconds[piece.start_frame])
    piece = replace(piece, start_seconds=start)
    ticks = ticks_of(piece, source.seconds, source.base)
    head, tail = range(piece.start_frame, stretch.start), range(stretch.end, piece.end_frame)
    taken = index.taken(stretch)
    writer = PacketWriter(source, index, piece, head=head, taken=taken, tail=tail)
    payload = yield
    with replacing(path) as part:
        with clip_container(part, path, "mp4") as container:
            of_way = source.track.copied if audio == "copy" else source.track.encoded
            writer.attach(container, twin.extradata, of_way(start, piece.end_seconds) if audio else None)
            left = len(head) + len(taken) + len(tail)
            for run in (head, taken, tail):
                encoder = None if run is taken else twin.run()
                for number in run:
                    if encoder is None:
                        if not isinstance(payload, Packet):
                            raise InputError(_LACKING)
                        writer.copy(payload)
                    else:
                        if not isinstance(payload, VideoFrame):
                            raise InputError(_LACKING)
                        for packet in encoder.encode(payload, ticks[number - piece.start_frame]):
                            writer.copy(packet)
                    left -= 1
                    if encoder is not None and number == run[-1]:
                        for packet in encoder.rest():
                            writer.copy(packet)
                    if left:
                        payload = yield
            writer.finish()
        return checked(
            part,
            path,
            piece,
            writer.times,
            source.limits,
            num_copied=stretch.end - stretch.start,
            tolerance=float(source.base) / 2,
            proof=writer.proof if source.is_decoded else None,
        )
