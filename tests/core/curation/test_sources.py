"""What inputs mean: everything that could hang, loop or lead elsewhere, and that content tells sources apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from opensora_core.curation.sources import find_sources, identified, slug
from opensora_core.errors import InputError

VIDEO = b"\0\0\0\x18ftypisom" + bytes(range(256)) * 200


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    (folder / "b").mkdir(parents=True)
    for name in ("z.mp4", "a.MKV", "b/z.mp4"):
        (folder / name).write_bytes(VIDEO)
    (folder / "notes.txt").write_text("no video")
    return folder


def found(*inputs: str | Path, **options: object) -> dict[str, str]:
    return {item.path.name: item.reason for item in find_sources(inputs, output=Path("out"), **options).sources}  # type: ignore[arg-type]


def test_a_folder_is_walked_in_the_order_of_paths(videos: Path) -> None:
    sources = find_sources([videos], output=videos / "out")
    assert [item.path.relative_to(videos).as_posix() for item in sources.sources] == ["a.MKV", "b/z.mp4", "z.mp4"]
    assert sources.notices == ["1 files passed by: no videos by their names"]


def test_globs_files_and_folders_may_overlap(videos: Path) -> None:
    listed = find_sources([f"{videos}/**/z.mp4", videos / "z.mp4", videos], output=videos / "out").sources
    assert len(listed) == 3


def test_a_name_with_brackets_is_a_name_before_it_is_a_pattern(videos: Path) -> None:
    (videos / "[a].mp4").write_bytes(VIDEO)
    assert list(found(videos / "[a].mp4")) == ["[a].mp4"]


@pytest.mark.parametrize("word", ["nothing.mp4", "no*thing"])
def test_an_input_that_is_not_there_ends_the_run(videos: Path, word: str) -> None:
    with pytest.raises(InputError, match=r"nothing|no\*thing"):
        find_sources([videos / word], output=videos / "out")


def test_a_name_of_a_list_that_is_not_there_is_told(videos: Path) -> None:
    assert found(listed=[videos / "gone.mp4", videos / "z.mp4"]) == {"gone.mp4": "there is no such file", "z.mp4": ""}


def test_a_manifest_names_files(videos: Path) -> None:
    rows = '{"path": "z.mp4"}\n{"path": "gone.mp4"}\n{"path": "a.MKV", "start_seconds": 1, "end_seconds": 2}\n'
    (videos / "m.jsonl").write_text(rows)
    sources = find_sources([videos / "m.jsonl"], output=videos / "out")
    assert [item.path.name for item in sources.sources] == ["a.MKV", "gone.mp4", "z.mp4"]
    assert any("1 rows" in notice and "whole file" in notice for notice in sources.notices)


def test_nothing_that_could_hang_or_lead_elsewhere_is_opened(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(VIDEO)
    os.mkfifo(videos / "fifo.mp4")
    (videos / "empty.mp4").touch()
    (videos / "loop1.mp4").symlink_to("loop2.mp4")
    (videos / "loop2.mp4").symlink_to("loop1.mp4")
    (videos / "dangling.mp4").symlink_to("gone.mp4")
    (videos / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (videos / "zero.mp4").symlink_to("/dev/zero")
    (videos / "b" / "up").symlink_to("..")
    (videos / "alias.mp4").symlink_to("z.mp4")
    reasons = found(videos)
    assert reasons["fifo.mp4"] == "a named pipe, not a file"
    assert reasons["empty.mp4"] == "an empty file"
    assert reasons["loop1.mp4"] == reasons["loop2.mp4"] == "a link that leads to itself"
    assert reasons["dangling.mp4"] == "a link to nothing"
    assert "out of the folder" in reasons["out.mp4"] and "out of the folder" in reasons["zero.mp4"]
    assert reasons["z.mp4"] == f"the same file as {videos / 'alias.mp4'}"
    assert identified(Path("/dev/zero")).reason == "a device, not a file"
    assert identified(videos).reason == "a folder, not a file"
    assert identified(Path("a\0b")).reason


def test_a_name_that_is_not_utf8_is_a_name(videos: Path) -> None:
    try:
        (videos / os.fsdecode(b"latin-\xe9.mp4")).write_bytes(VIDEO)
    except OSError:
        pytest.skip("the file system takes only UTF-8")
    source = next(item for item in find_sources([videos], output=videos / "out").sources if "latin" in item.path.name)
    assert source.identity and source.name(by_path=False).isascii()


def test_a_file_without_suffix_is_known_by_its_first_bytes(videos: Path) -> None:
    (videos / "movie").write_bytes(VIDEO)
    (videos / "words").write_text("no video")
    assert "movie" in found(videos) and "words" not in found(videos)


def test_outputs_are_no_inputs(videos: Path) -> None:
    for name in ("mine/clips/a.mp4", "other/clips/a.mp4"):
        (videos / name).parent.mkdir(parents=True)
        (videos / name).write_bytes(VIDEO)
    (videos / "other" / ".split").mkdir()
    sources = find_sources([videos], output=videos / "mine")
    assert len(sources.sources) == 3
    assert any("output of a split" in notice for notice in sources.notices)


def test_identity_is_of_the_content_and_the_time_of_change(videos: Path) -> None:
    first = identified(videos / "z.mp4")
    shutil.copy2(videos / "z.mp4", videos / "copy.mp4")
    assert identified(videos / "copy.mp4").identity == first.identity
    os.utime(videos / "copy.mp4", ns=(1, 1))
    assert identified(videos / "copy.mp4").identity != first.identity
    facts = (videos / "z.mp4").stat()
    (videos / "z.mp4").write_bytes(VIDEO[:-1] + b"!")
    os.utime(videos / "z.mp4", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert identified(videos / "z.mp4").identity != first.identity


def test_shards_share_out_everything_and_keep_copies_together(videos: Path) -> None:
    shutil.copy2(videos / "z.mp4", videos / "copy.mp4")
    sources = find_sources([videos], output=videos / "out").sources
    parts = [[item for item in sources if item.shard(3) == number] for number in range(3)]
    assert sorted(item.path for part in parts for item in part) == sorted(item.path for item in sources)
    homes = {item.path.name: item.shard(3) for item in sources}
    assert homes["copy.mp4"] == next(item for item in sources if item.path == videos / "z.mp4").shard(3)


@pytest.mark.parametrize(
    ("name", "safe"), [("émoji 🎬 日本語", "emoji"), ("日本", "video"), ("-a/../b c", "a-b-c"), ("x" * 90, "x" * 40)]
)
def test_names_of_clips_are_safe(name: str, safe: str) -> None:
    assert slug(name) == safe
