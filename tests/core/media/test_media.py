"""What is written is read back; what cannot be written leaves nothing."""

from __future__ import annotations

import html.parser
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opensora_core.errors import InputError, ResourceError
from opensora_core.media import (
    WRITERS,
    format_of,
    read_video,
    to_uint8,
    write,
    write_contact_sheet,
    write_gallery,
    write_video,
)
from opensora_core.media.gallery import Exhibit
from opensora_core.media.pixels import Frames
from opensora_core.media.sheet import pick

SETTINGS = {"prompt": 'a "ball" <b>&</b> 球 é', "seed": "42"}
GOLDEN = Path(__file__).parents[2] / "golden" / "fixtures" / "save_sample" / "io.safetensors"


def video(num_frames: int = 6, height: int = 48, width: int = 64) -> Frames:
    """A red disk that rolls over a shaded field."""
    row, column = np.mgrid[0:height, 0:width]
    frames = [
        np.stack([np.where((column - 12 - 4 * time) ** 2 + (row - 20) ** 2 < 80, 220, column), row * 3, 200 - row], -1)
        for time in range(num_frames)
    ]
    return np.stack(frames).astype(np.uint8)


def error(actual: Frames, expected: Frames) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual.astype(int) - expected.astype(int)).mean())


def test_bytes_are_rounded_as_published():
    io = load_file(GOLDEN)
    assert torch.equal(torch.from_numpy(to_uint8(io["video.in"])), io["video.u8_THWC"])
    assert torch.equal(torch.from_numpy(to_uint8(io["image.in"]))[0], io["image.u8_HWC"])


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("num_frames", [1, 6])
def test_a_file_gives_back_its_frames_rate_and_settings(suffix, num_frames, tmp_path):
    frames = video(num_frames)
    path = tmp_path / f"sample.{suffix}"
    write_video(path, frames, 8, SETTINGS)
    back = read_video(path)
    assert back.metadata == SETTINGS
    expected = frames if suffix != "png" else np.concatenate(list(frames), axis=1)[None]
    assert error(back.frames, expected) < {"mp4": 3, "gif": 3, "webp": 3, "png": 1e-9}[suffix]
    if num_frames > 1 and suffix != "png":
        assert back.fps == pytest.approx(8, rel=0.01)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_same_frames_give_the_same_bytes(suffix, tmp_path):
    contents = set()
    for index in range(40 if suffix == "mp4" else 2):  # x264's macroblock tree differs about once in ten
        path = tmp_path / f"{index}.{suffix}"
        write_video(path, video(), 8, SETTINGS)
        contents.add(path.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (32, 31)])
def test_odd_sides_lose_no_pixel_in_mp4(size, tmp_path):
    import av

    frames = video(3, *size)
    write_video(tmp_path / "odd.mp4", frames, 8)
    back = read_video(tmp_path / "odd.mp4")
    assert error(back.frames, frames) < 6
    assert back.metadata == {}
    with av.open(str(tmp_path / "odd.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.pix_fmt == "yuv420p"
        assert (stream.height, stream.width) == (size[0] + size[0] % 2, size[1] + size[1] % 2)


def test_pure_colours_survive_mp4(tmp_path):
    colours = np.array([[220, 30, 30], [30, 200, 40], [40, 60, 220], [250, 250, 250], [0, 0, 0]], np.uint8)
    frames = np.repeat(np.repeat(colours[None, :, None], 64, axis=2).repeat(16, axis=1), 2, axis=0)
    write_video(tmp_path / "colours.mp4", frames, 8)
    back = read_video(tmp_path / "colours.mp4").frames
    centres = back[0, 8::16, 32].astype(int)
    assert np.abs(centres - colours).max() <= 4


def test_more_than_eight_frames_of_a_png_are_rows_of_eight(tmp_path):
    frames = video(10)
    write_video(tmp_path / "strip.png", frames, 8)
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (2 * 48, 8 * 64, 3)
    assert np.array_equal(strip[48:, 64:128], frames[9])
    assert not strip[48:, 128:].any()


def test_suffix_and_format_must_agree():
    assert format_of(Path("a.MP4")) == "mp4"
    assert format_of(Path("a.gif"), "gif") == "gif"
    for path, format in [("a.mp4", "gif"), ("a", None), ("a.avi", None), ("a.mp4", "mp5")]:
        with pytest.raises(InputError):
            format_of(Path(path), format)


def test_a_writer_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "sample.mp4"
    write_video(path, video(), 8)
    before = path.read_bytes()

    def full(part: Path, *_: object) -> None:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(write.WRITERS, "mp4", full)
    with pytest.raises(ResourceError, match="no space left"):
        write_video(path, video(), 8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, signal, sys, numpy as np
from pathlib import Path
from opensora_core.errors import ResourceError
from opensora_core.media import write_video
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
for suffix in ("mp4", "gif", "webp", "png"):
    try:
        write_video(Path(sys.argv[1]) / f"a.{suffix}", noise, 8)
    except ResourceError as error:
        assert "no space left" in error.message, error
    else:
        raise SystemExit(f"{suffix} was written")
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_where_a_file_stands_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        write_video(tmp_path / "file" / "a.png", video(), 8)


def test_disguised_playlists_and_torn_files_are_refused(tmp_path):
    canary = tmp_path / "canary.mp4"
    write_video(canary, video(), 8)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile canary.mp4\n")
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ncanary.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "torn.mp4").write_bytes(canary.read_bytes()[:100])
    (tmp_path / "torn.webp").write_bytes(b"RIFF\0\0")
    os.mkfifo(tmp_path / "fifo.mp4")
    for name in ("list.mp4", "hls.mp4", "torn.mp4", "torn.webp", "fifo.mp4", "absent.mp4", "."):
        with pytest.raises(InputError):
            read_video(tmp_path / name)


def test_reading_stops_at_the_byte_limit(tmp_path):
    for suffix in ("mp4", "webp"):
        write_video(tmp_path / f"a.{suffix}", video(6), 8)
        with pytest.raises(InputError, match="larger than"):
            read_video(tmp_path / f"a.{suffix}", max_bytes=3 * 48 * 64 * 3)


def test_frames_of_a_sheet_are_evenly_spaced():
    assert pick(16, 8) == [0, 2, 4, 6, 9, 11, 13, 15]
    assert pick(1, 8) == [0]


@pytest.mark.parametrize(("num_frames", "size"), [(16, (64, 64)), (1, (64, 64)), (3, (300, 500))])
def test_a_sheet_shows_every_sample(num_frames, size, tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    samples = [
        (
            f"a caption that is long enough to be broken {index} 球 " * 5,
            np.full((num_frames, *size, 3), colour, np.uint8),
        )
        for index, colour in enumerate(colours)
    ]
    write_contact_sheet(samples, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    areas = [int((sheet == colour).all(-1).sum()) for colour in colours]
    assert areas[0] == areas[1] == areas[2] >= 96 * 96 * min(num_frames, 8)


class Sources(html.parser.HTMLParser):
    """Collects what a page refers to and the tags it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_gallery_points_to_the_files_and_escapes_prompts(tmp_path):
    prompt = "<script>alert('x')</script> & a ball"
    names = ["a ball#1.mp4", "sub/über 100%.gif", "javascript:x.png"]
    exhibits = [Exhibit(tmp_path / name, prompt, {"size": "64x64", "prompt": prompt}) for name in names]
    assert write_gallery(tmp_path / "index.html", exhibits)
    page = Sources()
    page.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert [unquote(source) for source in page.sources] == [f"./{name}" for name in names]
    assert "script" not in page.tags
    assert page.tags.count("video") == 1
    assert page.tags.count("img") == 2
    assert prompt in page.text
    assert "3 samples" in page.text


def test_a_page_that_is_not_ours_is_left_alone(tmp_path):
    path = tmp_path / "index.html"
    path.write_text("<html>mine</html>")
    assert not write_gallery(path, [Exhibit(tmp_path / "a.mp4", "a", {})])
    assert path.read_text() == "<html>mine</html>"
