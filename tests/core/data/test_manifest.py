"""The table of clips: what goes in comes out, it is small, and it is read whatever its form."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opensora_core.data.manifest import Clip, Manifest, ManifestBuilder, read_manifest, write_clips
from opensora_core.errors import InputError, ResourceError, UsageError

CAPTIONS = (
    None,
    "",
    "NA",
    "null",
    "=cmd|' /C calc'!A0",
    'a "big" dog, running',
    "two\nlines\r\nand\ra half",
    " é 狗 🐕 ",
)
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def full(folder: Path) -> Clip:
    return Clip(
        folder / "clips/a.mp4",
        caption="a dog",
        num_frames=97,
        fps=24000 / 1001,
        width=640,
        height=360,
        duration_seconds=4.045708333333333,
        sha256="ab" * 32,
        source="raw/b.mp4",
        start_seconds=1.5,
        end_seconds=4.25,
        scores={"aesthetic": 5.1, "flow": -0.5},
        status="rejected",
        reason="too dark",
    )


def clips_of(folder: Path) -> list[Clip]:
    captioned = [Clip(folder / f"{number}.mp4", caption) for number, caption in enumerate(CAPTIONS)]
    odd = [
        folder / "a, b.mp4",
        folder / "movie:1.mp4",
        folder / ' "q".mp4 ',
        folder / "é.mp4",
        Path("/elsewhere/a.mp4"),
    ]
    return [*captioned, full(folder), *(Clip(path, "x") for path in odd), Clip(folder / "t", scores={"flow": 1e-300})]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("place", ["", "below", "/other"])
def test_what_is_written_is_read_back(suffix: str, place: str, tmp_path: Path) -> None:
    clips = clips_of(tmp_path / "data")
    target = (
        tmp_path / place.lstrip("/") / f"m{suffix}" if place[:1] == "/" else tmp_path / "data" / place / f"m{suffix}"
    )
    write_clips(iter(clips), target)
    assert list(read_manifest(target)) == clips
    again = target.with_name(f"n{suffix}")
    write_clips(read_manifest(target), again)
    assert again.read_bytes() == target.read_bytes()


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(NAMES, min_size=1, max_size=3), st.none() | TEXTS, st.none() | st.integers(0, 2**53)),
        min_size=1,
        max_size=4,
    )
)
def test_any_path_caption_and_count_survive(
    suffix: str, rows: list[tuple[list[str], str | None, int | None]], tmp_path
):
    clips = [Clip(tmp_path.joinpath(*parts), caption, num_frames) for parts, caption, num_frames in rows]
    write_clips(clips, tmp_path / f"m{suffix}")
    assert list(read_manifest(tmp_path / f"m{suffix}")) == clips


def test_lines_hold_only_what_a_clip_has_and_paths_that_move_with_the_folder(tmp_path: Path) -> None:
    write_clips([Clip(tmp_path / "a.mp4", "é"), Clip(Path("/x/b.mp4"), "")], tmp_path / "m.jsonl")
    assert (tmp_path / "m.jsonl").read_text(
        "utf-8"
    ) == '{"path": "a.mp4", "caption": "é"}\n{"path": "/x/b.mp4", "caption": ""}\n'
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "m.jsonl").rename(tmp_path / "moved/m.jsonl")
    assert [clip.path for clip in read_manifest(moved)] == [tmp_path / "moved/a.mp4", Path("/x/b.mp4")]


def test_lone_surrogates_survive_as_lines_and_are_refused_elsewhere(tmp_path: Path) -> None:
    clips = [Clip(tmp_path / "\udcff.mp4", "half an emoji \ud83d")]
    write_clips(clips, tmp_path / "m.jsonl")
    assert list(read_manifest(tmp_path / "m.jsonl")) == clips
    for suffix in (".csv", ".parquet"):
        with pytest.raises(InputError, match="characters that") as caught:
            write_clips(clips, tmp_path / f"m{suffix}")
        assert ".jsonl" in caught.value.hint and not (tmp_path / f"m{suffix}").exists()


def test_a_manifest_cannot_be_written_as_just_anything(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="xlsx") as caught:
        write_clips([], tmp_path / "m.xlsx")
    assert ".parquet" in caught.value.hint
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError):
        write_clips([], tmp_path / "file/m.csv")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    for act in (lambda: read_manifest(tmp_path / "m.parquet"), lambda: write_clips([], tmp_path / "n.parquet")):
        with pytest.raises(UsageError) as caught:
            act()
        assert caught.value.hint == 'pip install "osora[parquet]"'


def test_ids_are_paths_as_written_with_the_range(tmp_path: Path) -> None:
    inside = Clip(tmp_path / "clips/a.mp4", start_seconds=1.5, end_seconds=4.25)
    ranges = [inside, replace(inside, start_seconds=None, end_seconds=2.0), replace(inside, end_seconds=None)]
    ranges += [replace(inside, start_seconds=0.1 + 0.2), Clip(Path("/x/b.mp4")), Clip(tmp_path / "c.mp4")]
    manifest = Manifest.of(ranges, folder=tmp_path)
    assert [clip.id for clip in manifest] == [
        "clips/a.mp4#1.5-4.25",
        "clips/a.mp4#0-2",
        "clips/a.mp4#1.5-",
        "clips/a.mp4#0.30000000000000004-4.25",
        "/x/b.mp4",
        "c.mp4",
    ]
    assert replace(manifest[0], status="ok").id == "clips/a.mp4#1.5-4.25"
    assert inside.id == f"{tmp_path}/clips/a.mp4#1.5-4.25"


def test_dots_in_paths_are_resolved_as_the_file_system_does(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "data/link").symlink_to(tmp_path / "far/away")
    builder = ManifestBuilder(tmp_path / "data/../data")
    for path in (
        "./a.mp4",
        "b//c.mp4",
        "../d.mp4",
        f"{tmp_path}/data/x/../e.mp4",
        "link/../f.mp4",
        "link/g.mp4",
        ".h/..i",
    ):
        builder.append({"path": path}, {})
    far = (tmp_path / "far").resolve()
    expected = ["a.mp4", "b/c.mp4", f"{tmp_path}/d.mp4", "e.mp4", f"{far}/f.mp4", "link/g.mp4", ".h/..i"]
    assert [clip.id for clip in builder.build()] == expected


def test_it_is_a_sequence(tmp_path: Path) -> None:
    clips = clips_of(tmp_path)
    manifest = Manifest.of(clips, folder=tmp_path)
    count = len(clips)
    assert (len(manifest), manifest[-1], list(manifest[2:5])) == (count, clips[-1], clips[2:5])
    assert manifest.format == "clips" and manifest.folder == tmp_path and clips[3] in manifest
    for index in (count, -count - 1):
        with pytest.raises(IndexError, match=str(count)):
            manifest[index]


def test_a_selection_has_the_clips_asked_for_in_that_order(tmp_path: Path) -> None:
    clips = clips_of(tmp_path)
    manifest = Manifest.of(clips, folder=tmp_path)
    for indices in ([3, 0, 8, 8, -1], range(0, len(clips), 2), [], [-len(clips)]):
        assert list(manifest.select(indices)) == [clips[index] for index in indices]
    assert list(manifest.select([8, 0]).select([1])) == [clips[0]]
    with pytest.raises(IndexError):
        manifest.select([len(clips)])


def test_a_pickle_has_the_same_clips_and_no_object_per_clip(tmp_path: Path) -> None:
    manifest = Manifest.of((Clip(tmp_path / f"{n:05}.mp4", "words", n) for n in range(5000)), folder=tmp_path)
    content = pickle.dumps(manifest)
    # a path and a caption of 14 letters, where they end, and a number
    assert len(content) < 5000 * (14 + 8 + 8 + 8) + 2000
    again = pickle.loads(content)
    assert list(again) == list(manifest) and (again.folder, again.format, again.notes) == (tmp_path, "clips", ())


def test_a_column_that_no_clip_fills_is_not_there(tmp_path: Path) -> None:
    builder = ManifestBuilder(tmp_path)
    for number in range(3):
        builder.add(Clip(tmp_path / f"{number}.mp4"))
    assert builder.build().columns == ("path",)
    builder = ManifestBuilder(tmp_path, notes=["one"])
    builder.add(Clip(tmp_path / "0.mp4"))
    builder.add(full(tmp_path))
    builder.add(Clip(tmp_path / "2.mp4"))
    manifest = builder.build()
    assert manifest.columns[-2:] == ("scores.aesthetic", "scores.flow") and manifest.notes == ("one",)
    assert list(manifest) == [Clip(tmp_path / "0.mp4"), full(tmp_path), Clip(tmp_path / "2.mp4")]
    with pytest.raises(BufferError):
        builder.add(full(tmp_path))
    assert list(Manifest.of([], folder=tmp_path)) == []


def line(number: int) -> dict[str, object]:
    row: dict[str, object] = {
        "path": f"clips/{number % 100:02}/{number:07}.mp4",
        "caption": f"a harbour, number {number}" * 4,
    }
    return row | {"num_frames": number % 300, "fps": 24.0, "scores": {"flow": number / 7}}


def write_rows(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            row = line(number)
            cells = f'{row["path"]},"{row["caption"]}",{row["num_frames"]}'
            file.write((json.dumps(row) if path.suffix == ".jsonl" else cells) + "\n")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_every_row_of_twenty_thousand_is_right(suffix: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"m{suffix}", 20000)
    manifest = read_manifest(tmp_path / f"m{suffix}")
    assert len(manifest) == 20000
    for number, clip in enumerate(manifest):
        row = line(number)
        assert (clip.id, clip.caption, clip.num_frames) == (row["path"], row["caption"], row["num_frames"])
        assert suffix == ".csv" or (clip.fps, clip.scores) == (row["fps"], row["scores"])


MEASURE = """
import sys
from pathlib import Path
from opensora_core.data.manifest import read_manifest
manifest = read_manifest(Path(sys.argv[1]))
assert manifest[999_999].id == "clips/99/0999999.mp4" and len(manifest) == 1_000_000
assert len(manifest.select(range(0, 1_000_000, 2))) == 500_000
# ru_maxrss would begin with what the process that started this one had
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux counts it")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_million_rows_need_less_than_a_gibibyte(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    write_rows(path, 1_000_000)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    path.unlink()
    assert int(done.stdout) * 1024 < 2**30
