"""Frame i is frame i: in every codec, container, order of coding and place to begin at; or it is refused."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from opensora_core.errors import InputError
from opensora_core.media import Limits, decoding, packets, probe, read_frames, write_video
from opensora_core.media.pixels import Frames
from opensora_core.media.shown import Screen
from tests.core.media.synthetic import numbers, picture, write_numbered

VIDEOS = Path(__file__).parents[4] / "shared" / "videos"
QUICK = ("mb_no-initial-keyframe.ts", "mb_sar_2x1.mp4", "ocv_tree.avi", "tc_av1_video.mkv", "tc_h265_10bits.mp4")
NUM_FRAMES = 60
_VFR = [33 * number + number * number * 7 % 20 for number in range(NUM_FRAMES)]
_X265 = "log-level=none"
KINDS: dict[str, dict[str, object]] = {
    "long_gop.mp4": {},
    "short_gop.mp4": {"gop": 12},
    "open_gop.mp4": {"gop": 12, "options": {"x264-params": "open-gop=1"}},
    "no_true_keyframes.mp4": {"gop": 12, "options": {"intra-refresh": "1"}},
    "deep_pyramid.mkv": {"gop": 20, "b_frames": 7, "options": {"x264-params": "b-pyramid=normal"}},
    "vfr.mkv": {"milliseconds": _VFR, "gop": 15},
    "starts_late.mp4": {"milliseconds": [5000 + 40 * number for number in range(NUM_FRAMES)], "gop": 15},
    "starts_late.mkv": {"milliseconds": [3700 + 40 * number for number in range(NUM_FRAMES)]},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le"},
    "interlaced.mp4": {"options": {"x264-params": "interlaced=1"}},
    "h264.ts": {"gop": 12},
    "open_gop.ts": {"gop": 12, "options": {"x264-params": "open-gop=1"}},
    "open_gop.avi": {"gop": 12, "options": {"x264-params": "open-gop=1"}},
    "h264.mpg": {"gop": 20},
    "h264.flv": {"gop": 12},
    "h264.avi": {"gop": 12},
    "hevc.mp4": {"codec": "libx265", "gop": 20, "options": {"x265-params": _X265}},
    "hevc_open_gop.mp4": {"codec": "libx265", "gop": 12, "options": {"x265-params": f"open-gop=1:{_X265}"}},
    "hevc_layers.mp4": {"codec": "libx265", "gop": 20, "options": {"x265-params": f"temporal-layers=3:{_X265}"}},
    "hevc.ts": {"codec": "libx265", "gop": 12, "options": {"x265-params": _X265}},
    "vp8_hidden_frames.webm": {"codec": "libvpx", "gop": 30, "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "vp9_hidden_frames.webm": {
        "codec": "libvpx-vp9",
        "gop": 30,
        "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "6"},
    },
    "av1.mp4": {"codec": "libsvtav1", "gop": 20, "options": {"preset": "12"}},
    "mpeg4.avi": {"codec": "mpeg4", "gop": 12, "b_frames": 2},
    "mpeg4.mp4": {"codec": "mpeg4", "gop": 12, "b_frames": 2},
    "mpeg2.ts": {"codec": "mpeg2video", "gop": 12, "b_frames": 2},
}
Numbered = Callable[[str], tuple[Path, list[float]]]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Numbered:
    """Videos of KINDS and the times of their frames, each written once."""
    folder = tmp_path_factory.mktemp("numbered")
    times: dict[str, list[float]] = {}

    def get(name: str) -> tuple[Path, list[float]]:
        if name not in times:
            times[name] = write_numbered(folder / name, NUM_FRAMES, **KINDS[name])  # type: ignore[arg-type]
        return folder / name, times[name]

    return get


def index_sets(num_frames: int, seed: int = 0, count: int = 8) -> list[list[int]]:
    """Runs as training reads them, ends, single frames, and a mess."""
    draw = random.Random(seed)
    last = num_frames - 1
    sets = [[0], [last], [last, 0, last], list(range(num_frames // 2, num_frames, 3)), [min(12, last), min(11, last)]]
    return sets + [draw.choices(range(num_frames), k=4) for _ in range(count)]


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_one_asked_for(name, numbered):
    path, times = numbered(name)
    found = probe(path)
    assert (found.num_frames, found.width, found.height) == (NUM_FRAMES, 96, 72)
    assert found.fps == pytest.approx((NUM_FRAMES - 1) / (times[-1] - times[0]), rel=1e-3)
    everything = read_frames(path, range(NUM_FRAMES))
    assert numbers(everything) == list(range(NUM_FRAMES))
    for indices in index_sets(NUM_FRAMES):
        assert np.array_equal(read_frames(path, indices), everything[indices]), indices
    indices = [41, 8, 9]
    assert np.array_equal(read_frames(path, indices, threads=2), everything[indices])


@pytest.mark.parametrize("name", KINDS)
def test_a_range_begins_and_ends_at_its_times(name, numbered):
    path, _ = numbered(name)
    with av.open(str(path)) as container:  # containers shift times; within AVI they are numbers of packets
        stamps = [packet.pts for packet in container.demux(container.streams.video[0]) if packet.size]
        base = container.streams.video[0].time_base
    if name.startswith("vp8"):
        pytest.skip("hidden packets have times of their own")
    if None in stamps:
        pytest.skip("not every packet has a time")
    shown = sorted(stamps)
    times = [pts * base.numerator / base.denominator for pts in shown]
    for first, end in [(0, 1), (7, 31), (12, 13), (23, 60), (36, 50)]:
        # exactly at a frame, and between two
        for shift in (0.0, 1e-4):
            start = times[first] - shift
            stop = times[end] - shift if end < NUM_FRAMES else times[-1] + 1
            expected = list(range(first, end))
            assert numbers(read_frames(path, range(end - first), start_seconds=start, end_seconds=stop)) == expected
            assert numbers(read_frames(path, [end - first - 1], start_seconds=start, end_seconds=stop)) == expected[-1:]
            assert probe(path, start_seconds=start, end_seconds=stop).num_frames == end - first
            with pytest.raises(InputError, match=f"{end - first} frames"):
                read_frames(path, [end - first], start_seconds=start, end_seconds=stop)


def test_times_in_the_order_of_coding_do_not_shuffle_frames(tmp_path):
    write_numbered(tmp_path / "ordered.mkv", NUM_FRAMES)
    path = tmp_path / "shuffled.mkv"
    with av.open(str(tmp_path / "ordered.mkv")) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.pts = packet.dts = 40 * number
            packet.stream = stream
            container.mux(packet)
    assert probe(path).fps == pytest.approx(25)
    assert numbers(read_frames(path, range(NUM_FRAMES))) == list(range(NUM_FRAMES))
    assert numbers(read_frames(path, [2, 0], start_seconds=0.8, end_seconds=1.0)) == [22, 20]


def test_what_does_not_exist_is_refused(numbered, tmp_path):
    path, _ = numbered("short_gop.mp4")
    for indices in ([60], [0, 1000], [-1], []):
        with pytest.raises(InputError):
            read_frames(path, indices)
    for start, end in [(100, None), (None, -1), (2, 1), (1, 1), (float("nan"), None)]:
        for attempt in (lambda **window: probe(path, **window), lambda **window: read_frames(path, [0], **window)):
            with pytest.raises(InputError):
                attempt(start_seconds=start, end_seconds=end)
    for height, width in [(32, None), (None, 32), (0, 32)]:
        with pytest.raises(InputError, match="of height"):
            read_frames(path, [0], height=height, width=width)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile canary.mp4\n")
    os.mkfifo(tmp_path / "fifo.mp4")
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("list.mp4", "fifo.mp4", "fifo.png", ".", "absent.mp4", "absent.jpg", "a" * 300 + ".mp4", "nul\0.mp4"):
        with pytest.raises(InputError):
            probe(tmp_path / name)


@contextmanager
def opens_of(path: Path) -> Iterator[list[bytes]]:
    """What the kernel tells of a file's being opened, once the block has ended."""
    libc = ctypes.CDLL(None)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(descriptor, os.fsencode(path), 0x20) >= 0  # IN_OPEN
    told: list[bytes] = []
    try:
        yield told
        with suppress(BlockingIOError):
            told.append(os.read(descriptor, 4096))
    finally:
        os.close(descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify")
def test_files_that_name_others_are_refused_and_the_others_not_opened(numbered, tmp_path):
    canary = tmp_path / "canary1.mp4"
    canary.write_bytes(numbered("short_gop.mp4")[0].read_bytes())
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n"
    contents = {
        "ffconcat.mp4": f"ffconcat version 1.0\nfile {canary.name}\n",
        "ffconcat.mkv": f"ffconcat version 1.0\nfile '{canary}'\n",
        "hls.mp4": f"{head}{canary.name}\n#EXT-X-ENDLIST\n",
        "hls.ts": f"{head}file://{canary}\n#EXT-X-ENDLIST\n",
        "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "dash.mp4": "<?xml version='1.0'?><MPD><Period><AdaptationSet><Representation>"
        f"<BaseURL>{canary.name}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    paths = [
        *(tmp_path / name for name in contents),
        *(Path(f"concat:{canary}|{canary}"), Path(f"subfile,,start,0,end,0,,:{canary}"), Path("pipe:0")),
        *(tmp_path / "canary%d.mp4", tmp_path / "canary*.mp4", tmp_path, Path("/dev/zero")),
    ]
    with opens_of(canary) as told:
        for path in paths:
            with pytest.raises(InputError):
                probe(path)
            with pytest.raises(InputError):
                read_frames(path, [0])
    assert not told
    with opens_of(canary) as told:
        probe(canary)
    assert told


def test_a_name_is_a_name(numbered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "http:a.mp4", "-i", "%d.mp4", "a?b#c.mp4", "data:,a.mp4"):
        Path(name).write_bytes(numbered("short_gop.mp4")[0].read_bytes())
        assert numbers(read_frames(Path(name), [probe(Path(name)).num_frames - 1])) == [NUM_FRAMES - 1]


def test_only_what_wanted_frames_need_is_decoded(numbered, monkeypatch):
    fed = []
    feed = decoding.Decoder.feed

    def count(self, packet):
        fed.append(packet)
        return feed(self, packet)

    monkeypatch.setattr(decoding.Decoder, "feed", count)
    for name, indices, most in [
        ("short_gop.mp4", [48], 2),  # a keyframe, and the end
        ("short_gop.mp4", [0, 48], 4),
        ("short_gop.mp4", list(range(NUM_FRAMES)), NUM_FRAMES + 1),
        ("long_gop.mp4", [50], 40),  # what no other picture refers to is passed over
        ("hevc.mp4", [19], 16),
        ("open_gop.mp4", [50], 12),  # nor is the damage that leading pictures seem to have
    ]:
        fed.clear()
        read_frames(numbered(name)[0], indices)
        assert len(fed) <= most, (name, indices)


def test_a_long_stretch_is_read_twice_instead_of_kept(numbered, monkeypatch):
    monkeypatch.setattr(packets, "_MAX_KEPT_BYTES", 0)
    for name in ("short_gop.mp4", "h264.ts", "vfr.mkv"):
        assert numbers(read_frames(numbered(name)[0], [55, 3])) == [55, 3]


def damage(path: Path, position: int, target: Path) -> Path:
    """Copy a video with the data of one packet, counted in the order of decoding, replaced by zeros."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(container.streams.video[0]) if packet.size][position]
        data, start, size = bytearray(path.read_bytes()), packet.pos, packet.size
    data[start : start + size] = bytes(size)
    target.write_bytes(data)
    return target


def test_frames_that_rest_on_damage_are_refused_and_no_others(numbered, tmp_path):
    path = damage(numbered("short_gop.mp4")[0], 13, tmp_path / "damaged.mp4")  # refers to the keyframe of frame 12
    whole = read_frames(numbered("short_gop.mp4")[0], range(NUM_FRAMES))
    refused = set()
    for index in range(NUM_FRAMES):
        try:
            frame = read_frames(path, [index])
        except InputError as error:
            assert f"frame {index} of {path}" in error.message
            refused.add(index)
        else:
            assert np.array_equal(frame[0], whole[index]), index
    assert refused and refused <= set(range(12, 24))
    with pytest.raises(InputError, match="damaged"):
        probe(path)
    assert probe(path, start_seconds=24 / 25).num_frames == 36


def test_a_file_that_breaks_off_ends_with_its_last_sound_frame(tmp_path):
    """A picture that overtook others may be there while they are not: numbers go by what is there."""
    write_numbered(tmp_path / "whole.mkv", NUM_FRAMES, gop=12)
    data = (tmp_path / "whole.mkv").read_bytes()
    path = tmp_path / "torn.mkv"
    for share in (0.3, 0.5, 0.8):
        path.write_bytes(data[: int(len(data) * share)])
        num_frames = probe(path).num_frames
        assert 5 < num_frames < NUM_FRAMES
        shown = numbers(read_frames(path, range(num_frames)))
        with av.open(str(path)) as container:
            plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert shown == numbers(np.stack(plain))[:num_frames]
        assert shown[:-3] == list(range(num_frames - 3))
        with pytest.raises(InputError):
            read_frames(path, [NUM_FRAMES - 1])


# -- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_turned_videos_stand_upright(degrees, tmp_path):
    write_numbered(tmp_path / "turned.mp4", 5, rotation=degrees)
    found = probe(tmp_path / "turned.mp4")
    assert (found.height, found.width) == ((72, 96) if degrees == 180 else (96, 72))
    frames = read_frames(tmp_path / "turned.mp4", [4])
    assert frames.shape == (1, found.height, found.width, 3)
    assert numbers(np.rot90(frames, -degrees // 90, axes=(1, 2))) == [4]
    small = read_frames(tmp_path / "turned.mp4", [4], height=24, width=24)
    assert small.shape == (1, 24, 24, 3)
    top, left = (found.height - 72) // 2, (found.width - 72) // 2
    middle = Image.fromarray(frames[0, top : top + 72, left : left + 72])
    assert np.abs(np.asarray(middle.resize((24, 24), Image.Resampling.BICUBIC)).astype(int) - small[0]).mean() < 3


def test_mirrored_videos_are_mirrored_back(tmp_path):
    write_numbered(tmp_path / "plain.mp4", 3)
    with av.open(str(tmp_path / "plain.mp4")) as source, av.open(str(tmp_path / "mirror.mp4"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(0, hflip=True)
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    plain, mirror = (read_frames(tmp_path / f"{name}.mp4", [2]) for name in ("plain", "mirror"))
    assert np.array_equal(plain[:, :, ::-1], mirror)


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(2), 192), (Fraction(1, 2), 48), (Fraction(64, 45), 137)])
def test_pixels_become_square(aspect, width, tmp_path):
    write_numbered(tmp_path / "a.mp4", 4, pixel_aspect=aspect)
    found = probe(tmp_path / "a.mp4")
    assert (found.height, found.width) == (72, width)
    frames = read_frames(tmp_path / "a.mp4", [3])
    assert frames.shape == (1, 72, width, 3)
    assert numbers(frames) == [3]
    # the wanted shape has the shown aspect: nothing is cut off, so that all blocks of the number are there
    assert numbers(read_frames(tmp_path / "a.mp4", [3], height=36, width=width // 2)) == [3]


def write_still(path: Path, pixels: Frames, **settings: object) -> None:
    """Write one picture (H, W, 3) losslessly as seen after conversion to YUV."""
    pix_fmt = str(settings.pop("pix_fmt", "yuv444p"))
    matrix, full = int(settings.pop("matrix", 1)), bool(settings.pop("full", False))  # type: ignore[call-overload]
    tag = int(settings.pop("tag", matrix))  # type: ignore[call-overload]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = tag, 2 if full else 1
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
            format=pix_fmt, dst_colorspace={1: 1, 5: 5, 9: 9}[matrix], dst_color_range=2 if full else 1
        )
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("matrix", "tag", "height"), [(1, 1, 96), (5, 5, 96), (9, 9, 96), (5, 2, 96), (1, 2, 720)])
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le"])
def test_colours_survive_whatever_the_matrix_and_the_range(*, full, matrix, tag, height, pix_fmt, tmp_path):
    colours = np.array([[220, 30, 30], [30, 200, 40], [40, 60, 220], [250, 250, 250], [2, 2, 2]], np.uint8)
    pixels = np.repeat(np.repeat(colours[None], height, 0), 32, 1)
    write_still(tmp_path / "a.mp4", pixels, matrix=matrix, tag=tag, full=full, pix_fmt=pix_fmt)
    for frames in (
        read_frames(tmp_path / "a.mp4", [0]),
        read_frames(tmp_path / "a.mp4", [0], height=height // 2, width=80),
    ):
        middles = frames[0, frames.shape[1] // 2, frames.shape[2] // 10 :: frames.shape[2] // 5]
        assert np.abs(middles.astype(int) - colours).max() <= 4


@pytest.mark.parametrize(("wanted", "worst"), [((256, 256), 1.0), ((96, 160), 1.0), ((31, 57), 1.5), ((720, 800), 2.0)])
def test_shrunk_frames_are_those_of_a_good_resize(wanted, worst, tmp_path):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:540, 0:960]
    chirp = 127 + 100 * np.sin((x - 480) ** 2 / 900 + y / 9)
    pixels = np.stack([chirp, chirp.T.copy().reshape(540, 960), rng.integers(0, 255, (540, 960))], -1).astype(np.uint8)
    write_still(tmp_path / "a.mp4", pixels)
    scale = max(wanted[0] / 540, wanted[1] / 960)
    covered = max(round(540 * scale), wanted[0]), max(round(960 * scale), wanted[1])
    top, left = (covered[0] - wanted[0]) // 2, (covered[1] - wanted[1]) // 2
    ours = read_frames(tmp_path / "a.mp4", [0], height=wanted[0], width=wanted[1])[0].astype(int)
    source = Image.fromarray(read_frames(tmp_path / "a.mp4", [0])[0])
    for filter, factor in ((Image.Resampling.BICUBIC, 1), (Image.Resampling.LANCZOS, 3)):
        good = np.asarray(source.resize(covered[::-1], filter)).astype(int)
        assert np.abs(ours - good[top : top + wanted[0], left : left + wanted[1]]).mean() < worst * factor


@pytest.mark.parametrize("size", [(33, 47), (35, 96), (2, 2)])
def test_odd_sizes_lose_nothing(size, tmp_path):
    write_numbered(tmp_path / "a.webm", 3, codec="libvpx-vp9", size=size)
    assert read_frames(tmp_path / "a.webm", [2]).shape == (1, *size, 3)
    assert read_frames(tmp_path / "a.webm", [2], height=17, width=19).shape == (1, 17, 19, 3)


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "PNG"])
def test_a_picture_is_a_video_of_one_frame(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture(9, 144, 192)).save(path)
    found = probe(path)
    assert (found.num_frames, found.fps, found.width, found.height) == (1, 1.0, 192, 144)
    assert numbers(read_frames(path, [0, 0])) == [9, 9]
    assert numbers(read_frames(path, [0], height=36, width=48)) == [9]
    with pytest.raises(InputError, match="1 frames"):
        read_frames(path, [1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture(5, 720, 960)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found, frames = probe(tmp_path / "a.jpg"), read_frames(tmp_path / "a.jpg", [0])
    assert frames.shape == (1, found.height, found.width, 3)
    assert (found.height > found.width) == (orientation > 4)
    small = read_frames(tmp_path / "a.jpg", [0], height=60, width=60)[0]
    upright = Image.fromarray(frames[0])
    top, left = (found.height - 720) // 2, (found.width - 720) // 2
    good = upright.crop((left, top, left + 720, top + 720)).resize((60, 60), Image.Resampling.BICUBIC)
    assert np.abs(small.astype(int) - np.asarray(good)).mean() < 2


def test_pictures_of_sixteen_bits_and_grey_ones_are_seen_right(tmp_path):
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_frames(tmp_path / "deep.png", [0])[0, :, :, 1], deep >> 8)
    Image.fromarray((deep >> 8).astype(np.uint8)).save(tmp_path / "grey.jpg", quality=100)
    assert np.abs(read_frames(tmp_path / "grey.jpg", [0])[0, :, :, 2].astype(int) - (deep >> 8)).max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_are_videos(suffix, tmp_path):
    frames = np.stack([picture(number) for number in range(12)])
    path = tmp_path / f"a.{suffix}"
    write_video(path, frames, 10)
    found = probe(path)
    assert (found.num_frames, found.fps) == (12, pytest.approx(10))
    assert numbers(read_frames(path, [11, 0, 5])) == [11, 0, 5]
    assert numbers(read_frames(path, [0, 2], start_seconds=0.5, end_seconds=0.8, height=36, width=48)) == [5, 7]
    with pytest.raises(InputError, match="3 frames"):
        read_frames(path, [3], start_seconds=0.5, end_seconds=0.8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_torn_and_mutated_pictures_are_refused_or_read(suffix, tmp_path):
    Image.fromarray(picture(3)).save(tmp_path / f"a.{suffix}")
    data = (tmp_path / f"a.{suffix}").read_bytes()
    draw = random.Random(0)
    path = tmp_path / f"b.{suffix}"
    for turn in range(60):
        mutated = bytearray(data)
        for _ in range(5):
            mutated[draw.randrange(min(len(data), 400))] = draw.randrange(256)
        path.write_bytes(mutated if turn % 2 else data[: draw.randrange(len(data))])
        for attempt in (probe, lambda path: read_frames(path, [0], height=16, width=16)):
            try:
                attempt(path)
            except InputError as error:
                assert str(path) in error.message


# -- limits -----------------------------------------------------------------------------------------------------------


def test_every_limit_is_named_with_its_value(numbered, tmp_path):
    path, _ = numbered("short_gop.mp4")
    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    write_numbered(tmp_path / "wide.mp4", 2, pixel_aspect=Fraction(20))
    write_video(tmp_path / "a.gif", np.stack([picture(number) for number in range(6)]), 10)
    for attempt, message in [
        (lambda: read_frames(path, [0], limits=Limits(max_pixels=6000)), "max_pixels=6000"),
        (lambda: probe(path, limits=Limits(max_pixels=6000)), "max_pixels=6000"),
        (lambda: probe(tmp_path / "a.png", limits=Limits(max_pixels=6000)), "max_pixels=6000"),
        (lambda: probe(tmp_path / "wide.mp4", limits=Limits(max_pixels=60000)), "max_pixels=60000"),
        (lambda: read_frames(path, [0], height=4000, width=4000, limits=Limits(max_pixels=10**7)), "max_pixels=10000"),
        (lambda: probe(path, limits=Limits(max_frames=59)), "max_frames=59"),
        (lambda: probe(tmp_path / "a.gif", limits=Limits(max_frames=5)), "max_frames=5"),
        (lambda: read_frames(path, [59], limits=Limits(max_frames=30)), "max_frames=30"),
        (lambda: read_frames(path, range(10), limits=Limits(max_bytes=10**5)), "max_bytes=100000"),
        (lambda: read_frames(path, range(10), height=90, width=90, limits=Limits(max_bytes=10**5)), "max_bytes=100000"),
        (lambda: probe(path, limits=Limits(max_seconds=0)), "max_seconds=0"),
        (lambda: read_frames(path, [0], limits=Limits(max_seconds=0)), "max_seconds=0"),
    ]:
        with pytest.raises(InputError, match=message):
            attempt()
    assert probe(path, limits=Limits(max_pixels=96 * 72, max_frames=60)).num_frames == 60


def test_a_picture_that_explodes_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (60_000, 2_000)).save(tmp_path / "bomb.png")
    begin = time.monotonic()
    for attempt in (probe, lambda path: read_frames(path, [0])):
        with pytest.raises(InputError):
            attempt(tmp_path / "bomb.png")
    assert time.monotonic() - begin < 1


def growth(path: Path, num_times: int) -> float:
    """Bytes that the process has grown by over so many reads, after a warm-up."""
    process = psutil.Process()
    for turn in range(num_times + 50):
        if turn == 50:
            before = process.memory_info().rss
        read_frames(path, [turn % 50], height=36, width=48)
        with pytest.raises(InputError):
            read_frames(path, [10**4])
    return process.memory_info().rss - before


def test_opening_clips_again_and_again_leaves_nothing_behind(numbered):
    assert growth(numbered("short_gop.mp4")[0], 150) < 6e6


def test_large_frames_do_not_wait_for_the_garbage_collector(tmp_path):
    write_numbered(tmp_path / "large.mp4", 16, size=(720, 1280), rotation=90)
    sizes = []
    gc.disable()
    try:
        for _ in range(15):
            read_frames(tmp_path / "large.mp4", range(16), height=36, width=48)
            probe(tmp_path / "large.mp4")
            sizes.append(psutil.Process().memory_info().rss)
    finally:
        gc.enable()
    assert sizes[-1] - sizes[4] < 15e6


@pytest.mark.slow
def test_a_thousand_opens_leave_nothing_behind(numbered):
    assert growth(numbered("short_gop.mp4")[0], 1000) < 10e6


# -- real and broken files --------------------------------------------------------------------------------------------


def real(names: tuple[str, ...] | None) -> list[object]:
    files = [path for path in sorted(VIDEOS.glob("*.*")) if path.suffix not in (".json", ".py")]
    return [path for path in files if names is None or path.name in names] or [
        pytest.param(None, marks=pytest.mark.skip(reason="no shared videos"))
    ]


def check_against_full_decoding(path: Path) -> None:
    num_frames = probe(path).num_frames
    sets = index_sets(num_frames, seed=len(path.name), count=4)
    needed = {index for indices in sets for index in indices}
    shown: dict[int, Frames] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        screen = Screen(path, stream, (90, 160), 2**30)
        count = -1
        for count, frame in enumerate(container.decode(stream)):
            if count in needed:
                shown[count] = screen.show(frame).copy()
    assert num_frames == count + 1
    for indices in sets:
        got = read_frames(path, indices, height=90, width=160)
        assert np.array_equal(got, np.stack([shown[index] for index in indices])), indices


@pytest.mark.parametrize("path", real(QUICK), ids=lambda path: getattr(path, "name", "absent"))
def test_real_files_equal_full_decoding(path):
    check_against_full_decoding(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", real(None), ids=lambda path: getattr(path, "name", "absent"))
def test_all_real_files_equal_full_decoding(path):
    check_against_full_decoding(path)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The folder that make_broken.py fills, which needs an ffmpeg command."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    if not (VIDEOS / "make_broken.py").exists():
        pytest.skip("no shared videos")
    commands, folder = tmp_path_factory.mktemp("commands"), tmp_path_factory.mktemp("broken") / "files"
    (commands / "ffmpeg").symlink_to(ffmpeg)
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, str(VIDEOS / "make_broken.py"), str(folder)], env=environment, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_broken_files_are_refused_or_read_right(broken):
    expected = json.loads((broken / "EXPECT.json").read_text())
    names = sorted(path.name for path in broken.iterdir())
    assert len(names) >= len(expected) - 1
    readable = {}
    for name in names:
        path, begin = broken / name, time.monotonic()
        try:
            readable[name] = probe(path).num_frames
            frames = read_frames(path, [0, readable[name] - 1], height=90, width=160)
            assert np.array_equal(frames, fully_decoded(path, readable[name])), name
        except InputError:
            pass
        assert time.monotonic() - begin < 10, name
    awkward = [name for name in names if expected.get(name, "").startswith("valid")]
    assert [readable.get(name) for name in awkward] == [2] * len(awkward)
    assert {"zero_byte.mp4", "audio_only.mp4", "fifo.mp4", "corrupt_middle.mp4"}.isdisjoint(readable)
    assert 100 < readable["truncated_faststart.mp4"] < 160


def fully_decoded(path: Path, num_frames: int) -> Frames:
    """The first and the last frame of those that decode without a complaint."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        screen = Screen(path, stream, (90, 160), 2**30)
        frames = []
        for packet in container.demux(stream):
            try:
                frames += [screen.show(frame).copy() for frame in packet.decode() if not frame.is_corrupt]
            except av.FFmpegError:
                continue
    return np.stack([frames[0], frames[num_frames - 1]])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mutated_videos_are_refused_or_read(numbered, tmp_path):
    draw = random.Random(0)
    for name in ("short_gop.mp4", "vfr.mkv", "h264.ts", "hevc.mp4", "vp9_hidden_frames.webm", "mpeg4.avi"):
        data = numbered(name)[0].read_bytes()
        for _ in range(35):
            mutated = bytearray(data)
            for _ in range(draw.choice([1, 10, 100])):
                mutated[draw.randrange(len(data))] = draw.randrange(256)
            path = tmp_path / name
            path.write_bytes(mutated)
            begin = time.monotonic()
            for attempt in (probe, lambda path: read_frames(path, [0, 30, 59], height=36, width=48)):
                try:
                    attempt(path)
                except InputError as error:
                    assert str(path) in error.message
            assert time.monotonic() - begin < 10
