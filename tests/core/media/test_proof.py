"""Sources that would give clips which do not decode, or decode to something else: none is listed, however it is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
import pytest
from av.packet import Packet
from av.video.stream import VideoStream

from opensora_core.curation.boundaries import detect
from opensora_core.media import Limits
from opensora_core.media.cut import Cut, Encoding, cut
from opensora_core.media.decoding import Decoder, counted, survey
from opensora_core.media.packets import Window, packets_from
from opensora_core.media.read import Budget, opened
from tests.core.media.synthetic import write_numbered
from tests.core.media.test_cut import clips, pieces, shown, times_of, with_sound

Source: TypeAlias = "Packet[VideoStream]"
_QUICK = Encoding(preset="ultrafast")
WAYS = ("copy", "smart")


def joined(
    path: Path,
    parts: Sequence[Path],
    change: Callable[[int, int, Source], Packet[VideoStream] | None] = lambda part, number, packet: packet,
    **options: str,
) -> None:
    """The packets of videos of 25 frames a second, one after the other, in one stream like the first one's.

    Args:
        path: of the video.
        parts: whose packets are taken.
        change: is given the number of the part, that of the packet within it, and the packet.
        options: of the container.
    """
    begin = 0.0
    with av.open(str(path), "w", container_options=options) as out:
        stream = None
        for part, source in enumerate(parts):
            with av.open(str(source)) as container:
                video = container.streams.video[0]
                stream = stream or out.add_stream_from_template(video, opaque=True)
                end = begin
                first = video.start_time * video.time_base if part else 0
                for number, packet in enumerate(p for p in container.demux(video) if p.size):
                    pts, dts, base = packet.pts, packet.dts, packet.time_base
                    new = change(part, number, packet)
                    if new is None:
                        continue
                    offset = round((begin - float(first)) / base)
                    new.pts, new.dts, new.time_base = pts + offset, dts + offset, base
                    end = max(end, float((new.pts + round(0.04 / base)) * base))
                    new.stream = stream
                    out.mux(new)
            begin = end


def decoded(source: Path) -> np.ndarray:
    """(N, H, W, 3) all frames of a source from its top on, without those that its decoder calls corrupt."""
    with opened(source) as (container, stream):
        decoder = Decoder(stream, 1, Budget(source, Limits()))
        frames = [frame for _, frame in counted(packets_from(container, stream, float("-inf")), decoder)]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames if frame is not None]).astype(int)


def require_listed_clips_are_the_source(
    source: Path, folder: Path, borders: tuple[int, ...], how: str, *, is_damaged: bool = False
) -> list[Cut]:
    """Cut as a split does, and decode each clip that is listed: its copied frames are the source's, the rest like."""
    found = detect(source)
    original = decoded(source)
    assert len(original) == len(found.seconds)
    seconds = found.seconds
    made = []
    for clip in cut(source, pieces(folder, seconds, borders), seconds, how, _QUICK, is_decoded=not found.damage):  # type: ignore[arg-type]
        if not isinstance(clip, Cut):
            continue
        made.append(clip)
        assert len(survey(Window(), Budget(clip.path, Limits())).times) == clip.num_frames
        frames = decoded(clip.path)
        errors = ((frames - original[clip.start_frame : clip.end_frame]) ** 2).mean((1, 2, 3))
        assert clip.num_copied <= (errors == 0).sum()
        # what stands in for a picture that was lost is not the same in every decoding
        assert is_damaged or errors.max() < 255**2 / 10**3.0
    return sorted(made, key=lambda clip: clip.start_frame)


@pytest.mark.parametrize("pyramid", ["none", "strict", "normal"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_of_a_group_that_a_clip_ends_within_only_the_last_pictures_are_not_copied(codec, pyramid, tmp_path) -> None:
    source = tmp_path / "long.mp4"
    name, log = ("x264", "") if codec == "libx264" else ("x265", ":log-level=none")
    pyramid = pyramid if codec == "libx264" else str(int(pyramid != "none"))
    write_numbered(source, 60, codec=codec, options={f"{name}-params": f"b-pyramid={pyramid}:b-adapt=0{log}"})
    seconds = times_of(source)
    for how in WAYS if codec == "libx264" else ("copy",):
        for end in range(30, 44, 2):
            (clip,) = clips(cut(source, pieces(tmp_path / how, seconds, (0, end)), seconds, how, _QUICK))
            assert end - 4 <= clip.num_copied <= end
            assert shown(clip) == list(range(end if how == "smart" else clip.num_copied))


@pytest.mark.parametrize("how", WAYS)
def test_parameter_sets_that_change_on_the_way_spoil_no_clip(how, tmp_path) -> None:
    for number, params in enumerate(("cabac=1:8x8dct=1", "cabac=0:8x8dct=0")):
        options = {"x264-params": f"{params}:scenecut=0", "qp": str(20 + 10 * number)}
        write_numbered(tmp_path / f"{number}.ts", 40, gop=10, options=options)
    parts = [tmp_path / "0.ts", tmp_path / "1.ts"]

    def stripped(part: int, number: int, packet: Source) -> Packet[VideoStream]:
        """Without the sets, but where they change."""
        if number == 0:
            return packet
        units = [unit for unit in bytes(packet).split(b"\0\0\1")[1:] if unit[0] & 31 not in (7, 8)]
        new: Packet[VideoStream] = Packet(b"".join(b"\0\0\0\1" + unit.rstrip(b"\0") for unit in units))  # type: ignore[assignment]
        return new  # not called a keyframe, for which the container would bring the first sets again

    borders = (0, 15, 33, 47, 55, 80)
    joined(tmp_path / "all.ts", parts)
    made = require_listed_clips_are_the_source(tmp_path / "all.ts", tmp_path / "told", borders, how)
    assert [clip.num_copied > 0 for clip in made] == [True] * 5 if how == "copy" else [True, True, False, False, False]
    joined(tmp_path / "once.ts", parts, stripped)
    made = require_listed_clips_are_the_source(tmp_path / "once.ts", tmp_path / "once", borders, how)
    assert made and all(clip.num_copied == 0 for clip in made if clip.start_frame > 40)
    assert how == "copy" or len(made) == 5


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
def test_not_every_packet_that_a_container_calls_a_keyframe_is_one(codec, how, tmp_path) -> None:
    write_numbered(tmp_path / "true.mkv", 40, codec=codec, gop=10, b_frames=0 if codec == "mpeg4" else 2)

    def lying(part: int, number: int, packet: Source) -> Packet[VideoStream]:
        packet.is_keyframe = True
        return packet

    joined(tmp_path / "lying.mkv", [tmp_path / "true.mkv"], lying)
    made = require_listed_clips_are_the_source(tmp_path / "lying.mkv", tmp_path / how, (0, 5, 17, 40), how)
    assert made
    with av.open(str(tmp_path / "true.mkv")) as container:
        keys = [number for number, frame in enumerate(container.decode(video=0)) if frame.pict_type == 1]
    assert how == "smart" or all(clip.start_frame in keys for clip in made)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".mkv"])
def test_damage_does_not_pass_into_a_clip(suffix, how, tmp_path) -> None:
    write_numbered(tmp_path / f"sound{suffix}", 48, gop=12)
    content = (tmp_path / f"sound{suffix}").read_bytes()
    with av.open(str(tmp_path / f"sound{suffix}")) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    num_clips = 0
    for number, seed in enumerate((2, 13, 20, 30)):
        pos, size = packets[seed]
        torn = bytearray(content)
        for place in range(pos + min(30, size // 2), min(pos + size, len(content)), 7):
            torn[place] ^= 0x55
        source = tmp_path / f"torn{number}{suffix}"
        source.write_bytes(torn)
        borders = (0, 9, 20, 31, 40)
        num_clips += len(
            require_listed_clips_are_the_source(source, tmp_path / str(number), borders, how, is_damaged=True)
        )
    assert num_clips


@pytest.mark.parametrize("how", WAYS)
def test_frames_before_an_edit_list_are_in_no_clip(how, tmp_path) -> None:
    write_numbered(tmp_path / "whole.mp4", 40, gop=10)

    with av.open(str(tmp_path / "whole.mp4")) as container:
        video = container.streams.video[0]
        with av.open(str(tmp_path / "edited.mp4"), "w", container_options={"avoid_negative_ts": "disabled"}) as out:
            stream = out.add_stream_from_template(video, opaque=True)
            shift = round(Fraction(7, 25) / video.time_base)
            for packet in container.demux(video):
                if packet.size:
                    packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                    out.mux(packet)
    source = tmp_path / "edited.mp4"
    assert len(times_of(source)) == 33
    made = require_listed_clips_are_the_source(source, tmp_path / how, (0, 8, 20, 33), how)
    assert made[-1].end_frame == 33
    if how == "smart":
        assert [number for clip in made for number in shown(clip)] == list(range(7, 40))


@pytest.mark.parametrize("how", WAYS)
def test_sound_that_goes_on_behind_the_pictures_costs_none(how, tmp_path) -> None:
    source = tmp_path / "tail.mp4"
    with_sound(source, seconds=2.0)
    with av.open(str(source)) as container, av.open(str(tmp_path / "cut.mp4"), "w") as out:
        streams = {stream: out.add_stream_from_template(stream, opaque=True) for stream in container.streams}
        for packet in container.demux():
            if packet.size and (packet.stream.type == "audio" or packet.pts * packet.time_base < 1):
                packet.stream = streams[packet.stream]
                out.mux(packet)
    made = require_listed_clips_are_the_source(tmp_path / "cut.mp4", tmp_path / how, (0, 12, 25), how)
    assert made[-1].end_frame == 25
    assert np.isclose(made[-1].end_seconds, 1.0)
