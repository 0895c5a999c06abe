"""Where in a source a clip of copied packets can begin: at pictures that need none before them, and their header."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from av.packet import Packet
from av.video.stream import VideoStream

from opensora_core.media.packets import units_of, whole_units


class ParameterSets:
    """Parameter sets along a source, against those of its header, which are what a clip gets."""

    def __init__(self, codec: str, extradata: bytes | None, length_bytes: int) -> None:
        self._codec, self._extradata, self._length_bytes = codec, extradata or b"", length_bytes
        self._known = {unit.rstrip(b"\0") for unit in header_sets(codec, extradata)}
        self._is_other_header = self._has_changed = False
        self.is_strange = False

    def follow(self, packet: Packet[VideoStream]) -> bool:
        """Whether a clip that begins with this packet has all that decoding it needs."""
        self.is_strange = False
        if packet.has_sidedata("new_extradata"):  # also back to the first one
            self._is_other_header = bytes(packet.get_sidedata("new_extradata")) != self._extradata
            self.is_strange = True
        sets = _own_sets(packet, self._codec, self._length_bytes)
        if any(unit.rstrip(b"\0") not in self._known for unit in sets):
            self._has_changed = self.is_strange = True
        return not self._is_other_header and (not self._has_changed or _brings_all(sets, self._codec))


def is_entry(packet: Packet[VideoStream], codec: str, length_bytes: int) -> bool:
    """Whether what follows a keyframe, and is shown after it, refers to nothing before it."""
    if codec == "h264":  # other I pictures may stand amid a refresh that takes many frames
        return any(unit[0] & 31 == 5 for unit in units_of(packet, length_bytes) if unit)
    if codec == "hevc":
        return any(16 <= unit[0] >> 1 & 63 <= 21 for unit in units_of(packet, length_bytes) if unit)
    # some containers call every packet a keyframe, and some decoders begin at any, with grey
    if codec == "mpeg4":
        place = bytes(packet).find(b"\0\0\1\xb6")
        return place >= 0 and bytes(packet)[place + 4 : place + 5] < b"\x40"
    if codec in ("mpeg1video", "mpeg2video"):
        place = bytes(packet).find(b"\0\0\1\0")
        return place >= 0 and bytes(packet)[place + 5 : place + 6] != b"" and bytes(packet)[place + 5] >> 3 & 7 == 1
    if codec == "vp8":
        return not bytes(packet)[0] & 1
    return True


def header_sets(codec: str, extradata: bytes | None) -> list[bytes]:
    """The parameter sets of an H.264 or HEVC header, as whole units; none where it is torn."""
    kinds = _SETS.get(codec)
    if kinds is None or not extradata:
        return []
    if extradata[0] != 1:
        units = list(whole_units(extradata, 0))
    else:
        units = list(_boxed_sets(extradata) if codec == "h264" else _boxed_arrays(extradata))
    return [unit for unit in units if unit and _kind(codec, unit) in kinds]


def _boxed_sets(extradata: bytes) -> Iterator[bytes]:
    place = 5
    for mask in (31, 255):
        count = (extradata[place : place + 1] or b"\0")[0] & mask
        units, place = _listed(extradata, place + 1, count)
        yield from units


def _boxed_arrays(extradata: bytes) -> Iterator[bytes]:
    place = 23
    for _ in range((extradata[22:23] or b"\0")[0]):
        units, place = _listed(extradata, place + 3, int.from_bytes(extradata[place + 1 : place + 3], "big"))
        yield from units


def _listed(data: bytes, place: int, count: int) -> tuple[list[bytes], int]:
    units = []
    for _ in range(count):
        if place >= len(data):
            break
        length = int.from_bytes(data[place : place + 2], "big")
        units.append(data[place + 2 : place + 2 + length])
        place += 2 + length
    return units, place


def _own_sets(packet: Packet[VideoStream], codec: str, length_bytes: int) -> list[bytes]:
    """The parameter sets that an H.264 or HEVC packet brings, as whole units."""
    kinds = _SETS.get(codec)
    if kinds is None or not any(unit and _kind(codec, unit) in kinds for unit in units_of(packet, length_bytes)):
        return []
    return [unit for unit in whole_units(bytes(packet), length_bytes) if unit and _kind(codec, unit) in kinds]


def _brings_all(sets: Sequence[bytes], codec: str) -> bool:
    """Whether there is one of each kind that decoding cannot begin without."""
    return _SETS.get(codec, frozenset()) == {_kind(codec, unit) for unit in sets}


def _kind(codec: str, unit: bytes) -> int:
    return unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63


_SETS = {"h264": frozenset({7, 8}), "hevc": frozenset({32, 33, 34})}
