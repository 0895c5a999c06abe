"""Clips hold exactly their frames, at their times, upright and in their colours, however they are cut."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from opensora_core.errors import ConfigError, DeviceError, InputError, UsageError
from opensora_core.media import Limits, piecework, read_frames
from opensora_core.media.cut import Cut, Encoding, Failure, Piece, cut
from opensora_core.media.decoding import survey
from opensora_core.media.packets import Window
from opensora_core.media.proof import Proof
from opensora_core.media.read import Budget
from tests.core.media.synthetic import numbers, picture, write_numbered

VIDEOS = Path(__file__).parents[4] / "shared" / "videos"
NUM_FRAMES = 60
BORDERS = (0, 7, 19, 33, 45, NUM_FRAMES)
_VFR = [33 * number + number * number * 7 % 20 for number in range(NUM_FRAMES)]
_X265 = "log-level=none"
_QUICK = Encoding(preset="ultrafast")
KINDS: dict[str, dict[str, object]] = {
    "short_gop.mp4": {"gop": 12},
    "long_gop.mkv": {},
    "vfr.mkv": {"gop": 15, "milliseconds": _VFR},
    "starts_late.mp4": {"gop": 15, "milliseconds": [5000 + 40 * number for number in range(NUM_FRAMES)]},
    "open_gop.ts": {"gop": 12, "options": {"x264-params": "open-gop=1"}},
    "h264.ts": {"gop": 12},
    "ten_bits.mp4": {"gop": 12, "pix_fmt": "yuv420p10le"},
    "interlaced.mp4": {"gop": 12, "options": {"x264-params": "interlaced=1"}},
    "hevc_open_gop.mp4": {"codec": "libx265", "gop": 12, "options": {"x265-params": f"open-gop=1:{_X265}"}},
    "vp8.webm": {"codec": "libvpx", "gop": 12, "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "mpeg4.avi": {"codec": "mpeg4", "gop": 12, "b_frames": 2},
    "mpeg2.ts": {"codec": "mpeg2video", "gop": 12, "b_frames": 2},
}
SPLICED = ("short_gop.mp4", "vfr.mkv", "starts_late.mp4", "h264.ts")
NEVER_COPIED = ("ten_bits.mp4", "interlaced.mp4", "mpeg4.avi", "hevc_open_gop.mp4")
Numbered = Callable[[str], tuple[Path, np.ndarray]]


def times_of(path: Path) -> np.ndarray:
    """Seconds of all frames."""
    return np.array(survey(Window(), Budget(path, Limits())).times)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Numbered:
    """Videos of KINDS and the times of their frames, each written once."""
    folder = tmp_path_factory.mktemp("numbered")
    known: dict[str, np.ndarray] = {}

    def get(name: str) -> tuple[Path, np.ndarray]:
        if name not in known:
            write_numbered(folder / name, NUM_FRAMES, **KINDS[name])  # type: ignore[arg-type]
            known[name] = times_of(folder / name)
        return folder / name, known[name]

    return get


def pieces(folder: Path, seconds: np.ndarray, borders: tuple[int, ...] = BORDERS) -> list[Piece]:
    """Consecutive pieces."""
    ends = [*seconds, seconds[-1] + 0.04]
    return [
        Piece(folder / f"{first:03}.mp4", first, last, float(ends[first]), float(ends[last]))
        for first, last in pairwise(borders)
    ]


def shown(clip: Cut) -> list[int]:
    """The numbers that the frames of a clip show."""
    return numbers(read_frames(clip.path, range(clip.num_frames)))


def clips(outcomes: Iterator[Cut | Failure]) -> list[Cut]:
    """Clips in the order of the source, all of which have to be there."""
    made = list(outcomes)
    assert not [outcome for outcome in made if isinstance(outcome, Failure)]
    return sorted((clip for clip in made if isinstance(clip, Cut)), key=lambda clip: clip.start_frame)


@pytest.mark.parametrize("how", ["exact", "smart"])
@pytest.mark.parametrize("name", KINDS)
def test_consecutive_clips_neither_lose_nor_double_a_frame_and_keep_its_time(name, how, numbered, tmp_path) -> None:
    source, seconds = numbered(name)
    made = clips(cut(source, pieces(tmp_path, seconds), seconds, how, _QUICK))
    assert [number for clip in made for number in shown(clip)] == list(range(NUM_FRAMES))
    for clip in made:
        times = times_of(clip.path)
        own = seconds[clip.start_frame : clip.end_frame]
        assert np.abs((times - times[0]) - (own - own[0])).max() < 6e-4
        assert clip.num_frames == clip.end_frame - clip.start_frame == len(times)
    assert (sum(clip.num_copied for clip in made) > 0) == (how == "smart" and name not in NEVER_COPIED)


@pytest.mark.parametrize("name", KINDS)
def test_copied_clips_begin_at_a_keyframe_in_the_piece_and_say_what_is_in_them(name, numbered, tmp_path) -> None:
    source, seconds = numbered(name)
    wanted = pieces(tmp_path, seconds)
    made = list(cut(source, wanted, seconds, "copy"))
    first = read_frames(source, range(NUM_FRAMES))
    assert len(made) == len(wanted)
    for clip in made:
        if isinstance(clip, Failure):
            assert "cannot be copied" in clip.reason
            continue
        piece = next(piece for piece in wanted if piece.path.stem == clip.path.stem)
        assert piece.start_frame <= clip.start_frame < clip.end_frame <= piece.end_frame
        assert clip.num_copied == clip.num_frames
        frames = read_frames(clip.path, range(clip.num_frames))
        assert np.array_equal(frames, first[clip.start_frame : clip.end_frame])
        assert clip.start_seconds == seconds[clip.start_frame]
    assert any(isinstance(clip, Cut) for clip in made) == (name != "mpeg4.avi")


@pytest.mark.parametrize("name", SPLICED)
def test_frames_that_are_copied_are_the_same_bit_for_bit_and_the_others_look_the_same(name, numbered, tmp_path) -> None:
    source, seconds = numbered(name)
    original = read_frames(source, range(NUM_FRAMES)).astype(int)
    for clip in clips(cut(source, pieces(tmp_path, seconds), seconds, "smart", Encoding(crf=10))):
        frames = read_frames(clip.path, range(clip.num_frames)).astype(int)
        errors = ((frames - original[clip.start_frame : clip.end_frame]) ** 2).mean((1, 2, 3))
        assert clip.num_copied <= (errors == 0).sum()
        assert errors.max() < 255**2 / 10**3.8


@pytest.mark.parametrize("how", ["smart", "copy"])
@pytest.mark.parametrize("name", KINDS)
def test_a_clip_that_is_proved_by_its_bytes_is_the_one_that_was_decoded_back(
    name, how, numbered, tmp_path, monkeypatch
) -> None:
    source, seconds = numbered(name)
    decoded: list[Budget] = []
    monkeypatch.setattr(piecework, "survey", lambda window, budget: decoded.append(budget) or survey(window, budget))
    whole, proved = (
        [replace(clip, path=Path(clip.path.name)) for clip in made]
        for made in (
            list(cut(source, pieces(tmp_path / str(flag), seconds), seconds, how, _QUICK, is_decoded=flag))
            for flag in (False, True)
        )
    )
    assert proved == whole
    if name in SPLICED or (how == "copy" and name in ("hevc_open_gop.mp4", "vp8.webm", "ten_bits.mp4")):
        whole_decoded = [budget for budget in decoded if "True" in budget.path.parts]
        assert len(whole_decoded) == sum(not clip.num_copied for clip in proved if isinstance(clip, Cut))


def test_a_clip_that_is_not_what_was_written_is_not_proved(numbered, tmp_path) -> None:
    source, seconds = numbered("short_gop.mp4")
    known: list[Proof] = []
    real = piecework.proved
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piecework, "proved", lambda proof, budget: known.append(proof) or real(proof, budget))
        (clip,) = clips(cut(source, pieces(tmp_path, seconds, (5, 55)), seconds, "smart", _QUICK, is_decoded=True))
    (proof,) = known
    assert real(proof, Budget(clip.path, Limits())) is not None
    with av.open(str(clip.path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = clip.path.read_bytes()
    for pos, size in packets[::6]:
        torn = bytearray(content)
        torn[pos + size // 2] ^= 16
        clip.path.write_bytes(torn)
        assert real(proof, Budget(clip.path, Limits())) is None
    clip.path.write_bytes(content[:-200])
    assert real(proof, Budget(clip.path, Limits())) is None
    clip.path.write_bytes(content)
    proof.sums.append(1)
    assert real(proof, Budget(clip.path, Limits())) is None, "a packet is missing"


def test_the_same_pieces_give_the_same_bytes(numbered, tmp_path) -> None:
    source, seconds = numbered("short_gop.mp4")
    for how in ("exact", "smart", "copy"):
        one, other = (
            [clip.sha256 for clip in clips(cut(source, pieces(tmp_path / run, seconds), seconds, how, threads=threads))]
            for run, threads in (("a", 1), ("b", 2))
        )
        assert one == other


def test_pieces_may_overlap_and_come_in_any_order(numbered, tmp_path) -> None:
    source, seconds = numbered("short_gop.mp4")
    wanted = [
        Piece(tmp_path / f"{first}-{last}.mp4", first, last, float(seconds[first]), float(seconds[last]))
        for first, last in ((30, 50), (5, 40), (10, 20), (40, 41))
    ]
    made = clips(cut(source, wanted, seconds, "exact", _QUICK))
    assert sorted((clip.start_frame, clip.end_frame) for clip in made) == [(5, 40), (10, 20), (30, 50), (40, 41)]
    assert all(shown(clip) == list(range(clip.start_frame, clip.end_frame)) for clip in made)


def test_a_constant_rate_shows_at_each_time_the_nearest_frame(numbered, tmp_path) -> None:
    source, seconds = numbered("vfr.mkv")
    piece = pieces(tmp_path, seconds, (10, 40))
    (clip,) = clips(cut(source, piece, seconds, "exact", replace(_QUICK, fps=23.976)))
    times = seconds[10] + np.arange(clip.num_frames) * 1001 / 24000
    nearest = [10 + int(np.abs(seconds[10:40] - time).argmin()) for time in times]
    assert shown(clip) == nearest
    assert clip.fps == pytest.approx(24000 / 1001, abs=1e-6)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_clips_are_upright_with_square_pixels_cropped_and_reduced(rotation, tmp_path) -> None:
    source = tmp_path / "turned.mp4"
    write_numbered(source, 12, size=(72, 96), rotation=rotation, pixel_aspect=Fraction(4, 3), gop=12)
    seconds = times_of(source)
    whole = read_frames(source, [3])[0].astype(int)
    height, width = whole.shape[:2]
    for box, side in ((None, None), ((8, 16, height - 24, width - 40), 36)):
        encoding = Encoding(crf=1, crop=box, short_side=side)
        (clip,) = clips(cut(source, pieces(tmp_path, seconds, (0, 12)), seconds, "exact", encoding))
        top, left, rows, columns = box or (0, 0, height, width)
        expected = whole[top : top + rows, left : left + columns]
        if side is not None:
            assert min(clip.height, clip.width) == min(side, rows, columns)
        got = read_frames(clip.path, [3], height=rows, width=columns)[0].astype(int)
        assert clip.height % 2 == clip.width % 2 == 0
        assert abs(clip.width / clip.height - columns / rows) < 0.06
        assert np.abs(got - expected).mean() < 8


def test_odd_sides_lose_a_row_and_nothing_is_enlarged(tmp_path) -> None:
    source = tmp_path / "odd.mp4"
    write_numbered(source, 6, size=(73, 97), codec="libx264", pix_fmt="yuv444p")
    seconds = times_of(source)
    (clip,) = clips(cut(source, pieces(tmp_path, seconds, (0, 6)), seconds, "exact", Encoding(crf=1, short_side=512)))
    assert (clip.height, clip.width) == (72, 96)
    assert np.abs(read_frames(clip.path, [2])[0] - read_frames(source, [2])[0, :72, :96].astype(int)).mean() < 4


def colorful(path: Path, pix_fmt: str, *, matrix: int, color_range: int, size: tuple[int, int] = (64, 96)) -> None:
    """A still picture of strong colours, encoded as the tags say."""
    row = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], np.uint8)
    pixels = np.repeat(np.repeat(row[None], size[1] // 6, 1), size[0], 0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        (stream.height, stream.width), stream.pix_fmt = pixels.shape[:2], pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
        for _ in range(4):
            frame = VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format=pix_fmt, dst_colorspace=matrix, dst_color_range=color_range
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("pix_fmt", "matrix", "color_range"),
    [("yuv420p", 1, 1), ("yuv420p", 5, 1), ("yuv420p", 1, 2), ("yuv444p", 5, 2), ("yuv420p10le", 1, 1)],
)
def test_colours_survive_in_a_limited_range_of_eight_bits(pix_fmt, matrix, color_range, tmp_path) -> None:
    source = tmp_path / "colors.mp4"
    colorful(source, pix_fmt, matrix=matrix, color_range=color_range)
    seconds = times_of(source)
    encoding = Encoding(crf=1, short_side=32)
    (clip,) = clips(cut(source, pieces(tmp_path, seconds, (0, 4)), seconds, "exact", encoding))
    with av.open(str(clip.path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.format.name, frame.color_range, frame.colorspace) == ("yuv420p", 1, matrix)
    columns = np.arange(6) * 16 + 8
    expected = read_frames(source, [0])[0, 32, columns].astype(int)
    got = read_frames(clip.path, [0])[0, 16, columns // 2].astype(int)
    assert np.abs(got - expected).max() <= 6


def with_sound(path: Path, *, codec: str = "aac", rate: int = 44100, seconds: float = 2.4) -> np.ndarray:
    """A numbered video with noise, which fits itself at no other place. Returns the samples as they decode."""
    generator = np.random.default_rng(0)
    noise = (generator.standard_normal((1, int(rate * seconds))) * 0.1).astype(np.float32)
    noise = np.cumsum(noise, 1) % 0.5 - 0.25
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"g": "10"})
        video.height, video.width, video.pix_fmt = 72, 96, "yuv420p"
        audio = container.add_stream(codec, rate=rate)
        audio.codec_context.layout = "mono"
        format = audio.codec_context.format.name
        for number in range(int(25 * seconds)):
            frame = VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(format="yuv420p")
            container.mux(video.encode(frame))
        for first in range(0, noise.shape[1], 1024):
            block = np.ascontiguousarray(noise[:, first : first + 1024])
            if format.startswith("s16"):
                block = (block * 32767).astype(np.int16)
            sound = av.AudioFrame.from_ndarray(block, format=format, layout="mono")
            sound.sample_rate, sound.pts = rate, first
            container.mux(audio.encode(sound))
        container.mux(video.encode())
        container.mux(audio.encode())
    return samples_of(path)[0]


def samples_of(path: Path) -> tuple[np.ndarray, float]:
    """Samples (N,) of the first audio stream, and the second at which they begin, with the video's start as 0."""
    with av.open(str(path)) as container:
        start = float((container.streams.video[0].start_time or 0) * container.streams.video[0].time_base)
        frames = list(container.decode(audio=0))
        begin = float(frames[0].pts * frames[0].time_base) - start
        blocks = [frame.to_ndarray()[0].astype(np.float32) for frame in frames]
        scale = 32768 if frames[0].format.name.startswith("s16") else 1
    return np.concatenate(blocks) / scale, begin


@pytest.mark.parametrize("how", ["exact", "smart", "copy"])
def test_sound_is_cut_to_the_sample(how, tmp_path) -> None:
    source = tmp_path / "noisy.mp4"
    original = with_sound(source)
    seconds = times_of(source)
    wanted = pieces(tmp_path, seconds, (0, 20, 33, 60))
    for clip in clips(cut(source, wanted, seconds, how, _QUICK)):
        samples, begin = samples_of(clip.path)
        place = round((clip.start_seconds + begin) * 44100)
        assert 0 <= begin < 0.04
        middle = samples[4096:12288]
        scores = [float((middle * original[place + 4096 + off : place + 12288 + off]).sum()) for off in range(-40, 41)]
        assert abs(int(np.argmax(scores)) - 40) <= (0 if how == "exact" else 1)
        assert abs(len(samples) / 44100 + begin - (clip.end_seconds - clip.start_seconds)) < 0.05


def test_sound_that_mp4_does_not_hold_is_copied_into_matroska_and_dropped_on_request(tmp_path) -> None:
    source = tmp_path / "wave.mkv"
    with_sound(source, codec="pcm_s16le", seconds=1.0)
    seconds = times_of(source)
    (clip,) = clips(cut(source, pieces(tmp_path, seconds, (0, 20)), seconds, "copy"))
    assert clip.path.suffix == ".mkv"
    assert samples_of(clip.path)[1] < 0.04
    for how in ("exact", "smart", "copy"):
        (clip,) = clips(cut(source, pieces(tmp_path, seconds, (0, 20)), seconds, how, replace(_QUICK, audio=False)))
        with av.open(str(clip.path)) as container:
            assert clip.path.suffix == ".mp4" and not container.streams.audio


def test_broken_sound_costs_no_frame(tmp_path) -> None:
    source = tmp_path / "noisy.mkv"
    with_sound(source, seconds=2.0)
    with av.open(str(source)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.size]
    content = bytearray(source.read_bytes())
    for place, size in places:
        content[place + 8 : place + size] = os.urandom(max(size - 8, 0))
    source.write_bytes(bytes(content))
    seconds = times_of(source)
    made = clips(cut(source, pieces(tmp_path, seconds, (0, 20, 50)), seconds, "exact", _QUICK))
    assert [clip.num_frames for clip in made] == [20, 30]


def test_a_piece_that_fails_does_not_harm_the_others(numbered, tmp_path) -> None:
    source, seconds = numbered("short_gop.mp4")
    claimed = np.append(seconds, seconds[-1] + 0.04 * np.arange(1, 4))  # frames that do not decode
    made = list(cut(source, pieces(tmp_path, claimed, (0, 20, 55, 63)), claimed, "exact", _QUICK))
    assert [type(outcome) for outcome in made] == [Cut, Cut, Failure]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.mp4", "020.mp4"]


def test_what_cannot_be_done_is_said_before_anything_is_written(numbered, tmp_path) -> None:
    source, seconds = numbered("short_gop.mp4")
    some = pieces(tmp_path, seconds)
    for encoding in (Encoding(codec="libx246"), Encoding(preset="quick"), Encoding(crf=60), Encoding(fps=0)):
        with pytest.raises(ConfigError):
            list(cut(source, some, seconds, "exact", encoding))
    with pytest.raises(InputError, match="60 frames"):
        list(cut(source, [replace(some[0], end_frame=61)], seconds))
    with pytest.raises(UsageError, match="same path"):
        list(cut(source, [some[0], some[0]], seconds))
    (outcome,) = cut(source, some[:1], seconds, "exact", Encoding(crop=(0, 0, 100, 10)))
    assert isinstance(outcome, Failure) and "crop" in outcome.reason
    assert not list(tmp_path.iterdir())


def test_a_hardware_encoder_is_taken_only_if_it_opens(numbered, tmp_path) -> None:
    source, seconds = numbered("short_gop.mp4")
    assert clips(cut(source, pieces(tmp_path, seconds), seconds, "exact", Encoding(codec="auto")))
    with pytest.raises((DeviceError, ConfigError)):
        list(cut(source, pieces(tmp_path, seconds), seconds, "exact", Encoding(codec="hevc_videotoolbox")))


def test_files_that_decode_faster_hold_no_arithmetic_code(numbered, tmp_path) -> None:
    source, seconds = numbered("short_gop.mp4")
    sizes = []
    for fast in (False, True):
        encoding = Encoding(fast_decode=fast)
        (clip,) = clips(cut(source, pieces(tmp_path, seconds, (0, 60)), seconds, "exact", encoding))
        sizes.append(clip.path.stat().st_size)
        assert (b"cabac=0" in clip.path.read_bytes()) == fast
    assert sizes[1] > sizes[0]


def test_hevc_can_be_asked_for(numbered, tmp_path) -> None:
    source, seconds = numbered("short_gop.mp4")
    made = clips(cut(source, pieces(tmp_path, seconds), seconds, "exact", replace(_QUICK, codec="libx265")))
    assert [number for clip in made for number in shown(clip)] == list(range(NUM_FRAMES))
    with av.open(str(made[0].path)) as container:
        assert container.streams.video[0].codec_context.name == "hevc"


def test_stopping_midway_leaves_whole_clips_alone(numbered, tmp_path) -> None:
    source, seconds = numbered("short_gop.mp4")
    making = cut(source, pieces(tmp_path, seconds, (0, 10, 60)), seconds, "exact", _QUICK)
    next(making)
    making.close()
    assert [path.name for path in tmp_path.iterdir()] == ["000.mp4"]


def test_a_full_disk_leaves_nothing_torn(numbered, tmp_path) -> None:
    source, seconds = numbered("long_gop.mkv")
    script = (
        "import resource, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from opensora_core.errors import ResourceError\n"
        "from opensora_core.media.cut import Encoding, Piece, cut\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        f"seconds = np.array({seconds.tolist()})\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "pieces = [Piece(folder / 'a.mp4', 0, 2, 0.0, seconds[2]), Piece(folder / 'b.mp4', 2, 60, seconds[2], 9.0)]\n"
        "try:\n"
        f"    for clip in cut(Path({str(source)!r}), pieces, seconds, encoding=Encoding(crf=1)):\n"
        "        print(clip.path.name)\n"
        "except ResourceError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first == "a.mp4"
    assert second.startswith("no space left for") and "needed more than" in second and "free" in second
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("how", ["exact", "smart", "copy"])
@pytest.mark.parametrize(
    "name", ["mb_no-initial-keyframe.ts", "mb_sar_2x1.mp4", "ocv_tree.avi", "tc_av1_video.mkv", "tc_h265_10bits.mp4"]
)
def test_real_clips(name, how, tmp_path) -> None:
    source = VIDEOS / name
    if not source.exists():
        pytest.skip("no real clips here")
    seconds = times_of(source)[:60]
    borders = (0, len(seconds) // 3, len(seconds))
    made = list(cut(source, pieces(tmp_path, seconds, borders), seconds, how, _QUICK))
    assert len(made) == 2
    if how != "copy":
        assert [clip.num_frames for clip in clips(iter(made))] == np.diff(borders).tolist()
    for clip in made:
        if isinstance(clip, Cut) and clip.num_copied == clip.num_frames:
            original = read_frames(source, range(clip.start_frame, clip.end_frame))
            assert np.array_equal(read_frames(clip.path, range(clip.num_frames)), original)
