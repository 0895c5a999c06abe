import random
from pathlib import Path

import av
import numpy as np
import pytest

from opensora_core.errors import InputError
from opensora_core.media import Limits, write_video
from opensora_core.media.glance import Chunk, Glance
from opensora_core.media.skim import skimmed

VIDEOS = Path(__file__).parents[4] / "shared" / "videos"


def _frames(count: int, height: int = 72, width: int = 128) -> np.ndarray:
    """A ramp of luma from left to right whose blue side is the lower half; frame n is shifted by n."""
    ramp = np.linspace(30, 200, width).astype(np.uint8)
    frames = np.repeat(np.stack([np.roll(ramp, n) for n in range(count)])[:, None, :, None], height, axis=1)
    frames = np.repeat(frames, 3, axis=3)
    frames[:, height // 2 :, :, 2] = 250
    return frames


def _write(path: Path, frames: np.ndarray, codec: str, pixels: str, rate: int = 25) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _pixels(plane: av.video.plane.VideoPlane) -> np.ndarray:
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def _seen(glance: Glance) -> Chunk:
    chunks = list(glance)
    parts = (
        np.concatenate([getattr(c, name) for c in chunks]) for name in ("seconds", "is_keyframe", "luma", "chroma")
    )
    return Chunk(0, *parts, None)


@pytest.mark.parametrize(
    ("codec", "pixels"),
    [
        ("ffv1", "yuv420p"),
        ("ffv1", "yuv422p"),
        ("ffv1", "yuv444p"),
        ("ffv1", "yuv420p10le"),
        ("ffv1", "yuv444p16le"),
        ("ffv1", "bgr0"),
        ("rawvideo", "nv12"),
    ],
)
def test_samples_are_those_of_the_picture_whatever_the_planes(tmp_path: Path, codec: str, pixels: str) -> None:
    path = tmp_path / "v.mkv"
    _write(path, _frames(3), codec, pixels)
    seen = _seen(Glance(path))
    _write(path, _frames(3), "ffv1", "yuv420p")
    with av.open(str(path)) as container:
        planes = [[_pixels(plane) for plane in frame.planes] for frame in container.decode(video=0)]
    expected = np.stack([frame[0][::2, 1::2] for frame in planes]).astype(int)
    assert np.abs(seen.luma - expected).mean() < 3
    blue = np.stack([frame[1][::2, ::2] for frame in planes]).astype(int)
    assert np.abs(seen.chroma[:, 0] - blue).mean() < 4


def test_times_are_those_of_the_source_and_numbers_count_its_frames(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, _frames(600, 36, 64), 24)
    chunks = list(glance := Glance(path))
    assert [chunk.first for chunk in chunks] == [0, 256, 512]
    np.testing.assert_allclose(np.concatenate([chunk.seconds for chunk in chunks]), np.arange(600) / 24, atol=1e-4)
    assert chunks[0].is_keyframe[0]
    assert (glance.num_frames, glance.fps, glance.damage) == (600, 24.0, "")
    assert set(glance.even) <= set(glance.thumbnails)
    assert glance.thumbnails[0].shape == (36, 64, 3)


def test_bars_are_found_to_the_pixel(tmp_path: Path) -> None:
    frames = _frames(30)
    frames[:, :10], frames[:, 64:], frames[:, :, :6] = 0, 0, 0
    write_video(tmp_path / "v.mp4", frames, 25)
    list(glance := Glance(tmp_path / "v.mp4"))
    assert glance.crop == (10, 6, 54, 122)
    write_video(tmp_path / "w.mp4", _frames(5), 25)
    list(glance := Glance(tmp_path / "w.mp4"))
    assert glance.crop is None


def test_what_is_lost_is_told(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (60, 72, 128, 3)).astype(np.uint8)
    write_video(path, noise, 25)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])
    list(glance := Glance(path))
    assert 20 < glance.num_frames < 50
    assert "60 frames" in glance.damage
    torn = bytearray(whole)
    rng = random.Random(0)
    for place in range(len(torn) * 45 // 100, len(torn) * 60 // 100):
        torn[place] = rng.randrange(256)
    path.write_bytes(torn)
    list(glance := Glance(path))
    assert glance.num_frames < 60
    assert glance.damage


def test_a_source_beyond_its_limits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, _frames(20), 25)
    with pytest.raises(InputError, match="max_frames=10"):
        list(Glance(path, Limits(max_frames=10)))
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(InputError, match="cannot read"):
        list(Glance(tmp_path / "empty.mp4"))


def test_a_skim_knows_all_frames_by_decoding_few(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "20", "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = 72, 128, "yuv420p"
        for picture in _frames(70):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = _seen(Glance(path))
    with skimmed(Glance(path)) as skim:
        np.testing.assert_array_equal(skim.seconds, whole.seconds)
        np.testing.assert_array_equal(skim.keys, np.flatnonzero(whole.is_keyframe))
        np.testing.assert_array_equal(skim.luma, whole.luma[skim.keys])
        stretch = skim.stretch(1)
        assert stretch is not None
        np.testing.assert_array_equal(stretch.luma, whole.luma[20:41])
        assert skim.sizes[skim.keys].min() > np.median(skim.sizes)


@pytest.mark.skipif(not VIDEOS.exists(), reason="needs ../shared/videos")
@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("mb_rotate-buck-bunny.mp4", 45, None),
        ("mb_sar_2x1.mp4", 150, (360, 1280)),
        ("tc_av1_video.mkv", 125, (360, 640)),
        ("tc_h265_10bits.mp4", 30, (200, 200)),
        ("ocv_tree.avi", 68, (240, 320)),
        ("mb_no-initial-keyframe.ts", 15, None),
    ],
)
def test_real_files_of_all_kinds_are_seen_whole(name: str, count: int, size: tuple[int, int] | None) -> None:
    seen = _seen(glance := Glance(VIDEOS / name))
    assert glance.num_frames == len(seen.seconds) == count
    assert (np.diff(seen.seconds) > 0).all()
    assert size is None or (glance.height, glance.width) == size
    assert bool(glance.damage) == (name == "mb_no-initial-keyframe.ts")
