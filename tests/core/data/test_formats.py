"""Manifests of all forms, good and bad."""

from __future__ import annotations

import csv
import json
import os
import re
from importlib import import_module
from pathlib import Path

import pytest

from opensora_core.data.manifest import Clip, Manifest, read_manifest
from opensora_core.errors import InputError


def read(path: Path, content: str | bytes) -> Manifest:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_manifest(path)


def words(manifest: Manifest) -> list[tuple[str, str | None]]:
    return [(clip.id, clip.caption) for clip in manifest]


# JSON lines


def test_lines_with_the_names_of_others_are_understood(tmp_path: Path) -> None:
    manifest = read(
        tmp_path / "m.jsonl",
        '\ufeff{"file_name": "a.mp4", "text": "a", "frames": 3, "seed": 1}\r\n\n'
        ' {"path": "b.mp4", "caption": null, "text": "b", "num_frames": 4.0, "fps": "25", "file_name": "no.mp4"}\n'
        '{"path": "c.mp4", "scores": {"flow": 1, "none": null}, "scores.sharp": 2.5, "status": "", "mood": {}}',
    )
    assert list(manifest) == [
        Clip(tmp_path / "a.mp4", "a", 3),
        Clip(tmp_path / "b.mp4", "b", 4, 25.0),
        Clip(tmp_path / "c.mp4", scores={"flow": 1.0, "sharp": 2.5}),
    ]
    assert manifest.format == "JSON lines" and manifest.notes == ("ignored columns: seed, file_name, mood",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"path": "a.mp4", "caption": 5}', "column 'caption': 5 is not text"),
        ('{"path": "a.mp4", "text": ["a", "b"]}', "column 'text': .* is not text"),
        ('{"path": 7}', "column 'path': 7 is not text"),
        ('{"path": ""}', "column 'path': '' names no file"),
        ('{"path": "a/.."}', "column 'path': 'a/..' names no file"),
        ('{"path": "a\\u0000.mp4"}', "column 'path': .* NUL"),
        ('{"caption": "a"}', "column 'path': the row has none"),
        ('{"path": "https://x.org/a.mp4"}', "column 'path': 'https://x.org/a.mp4' is an address"),
        ('{"file_name": "concat:a.mp4|b.mp4"}', "column 'file_name': .* is an address"),
        ('{"path": "a.mp4", "num_frames": 1.5}', "column 'num_frames': 1.5 is not a whole number"),
        ('{"path": "a.mp4", "num_frames": -1}', "column 'num_frames': -1 is not a whole number"),
        ('{"path": "a.mp4", "width": true}', "column 'width': True is not a whole number"),
        ('{"path": "a.mp4", "height": 1e400}', "column 'height': inf is not a whole number"),
        (f'{{"path": "a.mp4", "frames": {10**30}}}', "column 'frames': 10+ is not a whole number"),
        ('{"path": "a.mp4", "fps": NaN}', "column 'fps': nan is not a number"),
        ('{"path": "a.mp4", "fps": "1_0"}', "column 'fps': '1_0' is not a number"),
        ('{"path": "a.mp4", "fps": "fast"}', "column 'fps': 'fast' is not a number"),
        ('{"path": "a.mp4", "start_seconds": 2, "end_seconds": 2}', "column 'end_seconds': 2.0 is not after"),
        ('{"path": "a.mp4", "scores": {"flow": "x"}}', "column 'scores.flow': 'x' is not a number"),
        ('{"path": "a.mp4", "scores": 3}', "column 'scores': 3 is not a table"),
        ('{"path": "a.mp4"', "column 17: not JSON"),
        ('{"path": }', "column 10: not JSON: Expecting value"),
        ('{"path": "a.mp4"} x', "column 19: not JSON: Extra data"),
        ('["a.mp4"]', "not an object"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_with_its_column(row: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}, row 3(, |: ){message}"):
        read(path, '{"path": "ok.mp4"}\n\n' + row + "\n")


def test_kinds_of_scores_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 257, column 'scores': there are more than 256"):
        read(tmp_path / "m.jsonl", "".join(f'{{"path": "a", "scores": {{"s{n}": 1}}}}\n' for n in range(300)))


# CSV


def test_open_soras_csv_is_read_with_and_without_counts(tmp_path: Path) -> None:
    manifest = read(tmp_path / "m.csv", 'b/a.mp4,"a dog, ""big""\nand old",48\n\n/x/p.png,NA,1\nc.mp4,,\nd.mp4,"",\r\n')
    assert list(manifest) == [
        Clip(tmp_path / "b/a.mp4", 'a dog, "big"\nand old', 48),
        Clip(Path("/x/p.png"), "NA", 1),
        Clip(tmp_path / "c.mp4"),
        Clip(tmp_path / "d.mp4", ""),
    ]
    assert manifest.format == "Open-Sora CSV without header"
    assert words(read(tmp_path / "n.csv", "a.mp4,null\nb.mp4,=1+1")) == [("a.mp4", "null"), ("b.mp4", "=1+1")]


def test_a_header_is_told_by_its_names_alone(tmp_path: Path) -> None:
    content = "\ufeffTEXT, Path ,num_frames,fps,aspect,scores.Flow\na,x.mp4,5,25.5,1.7,2\n,y.mp4,,,,\n"
    manifest = read(tmp_path / "m.csv", content)
    assert list(manifest) == [
        Clip(tmp_path / "x.mp4", "a", 5, 25.5, scores={"Flow": 2.0}),
        Clip(tmp_path / "y.mp4"),
    ]
    assert manifest.format == "CSV with header" and manifest.notes == ("ignored columns: aspect",)
    # neither the suffix nor the existence of a file in the first row says anything
    assert words(read(tmp_path / "n.csv", "file,words\nx.mp4,a\n")) == [("file", "words"), ("x.mp4", "a")]
    assert words(read(tmp_path / "o.tsv", 'path\ttext\na.mp4\ta, b\nb.mp4\t"c\td"\n')) == [
        ("a.mp4", "a, b"),
        ("b.mp4", "c\td"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.mp4,a\nb.mp4\n", "row 2: column 'caption' is missing, 1 columns where 2"),
        (b"a.mp4,a\nb.mp4,a dog, running\n", "row 2: 3 columns where 2"),
        (b'a.mp4,"a\nb"\nc.mp4\n', "row 3: column 'caption' is missing"),
        (b"a.mp4,a dog, running\n", "row 1, column 'num_frames': ' running' is not a whole number"),
        (b"path,caption\na.mp4\n", "row 2: column 'caption' is missing"),
        (b"a.mp4\n", "row 1: 1 columns and no names"),
        (b"a,b,c,d\n", "row 1: 4 columns and no names"),
        (b"path,text,text\na,b,c\n", "row 1: two columns are named 'text'"),
        (b'a.mp4,a\nb.mp4,"never closed\nc.mp4,c\n', "row 2, column 2: a quote is opened and never closed"),
        (b'a.mp4,a\nb.mp4,"open\nc.mp4,"c, d"\n', "row 2, column 2: text after a closing quote"),
        (b'a.mp4,"a"b,3\n', "row 1, column 2: text after a closing quote"),
        (b"a.mp4,a\rb.mp4,b\r", "row 1, column 2: a carriage return"),
        (b"a.mp4,a\nb\0.mp4,b\n", "row 2, byte 2: a NUL"),
        (b"a.mp4,a\nb.mp4,\xe9\n", "row 2, byte 7: not UTF-8"),
        (b"a.mp4,a\nhttp://x/b.mp4,b\n", "row 2, column 'path': 'http://x/b.mp4' is an address"),
        (b"a.mp4,a,nan\n", "row 1, column 'num_frames': 'nan' is not a whole number"),
        (b",a\n", "row 1, column 'path': the row has none"),
        (b"path,caption\n", "holds no clips"),
        (b"", "holds no clips"),
        ("a.mp4,a\n".encode("utf-16"), "UTF-16"),
        ("\ufeffa.mp4,a\n".encode("utf-16-be"), "UTF-16"),
        ("a.mp4,a\n".encode("utf-32"), "UTF-32"),
        ("a.mp4,a\n".encode("utf-16-le"), "row 1, byte 2: a NUL"),
    ],
)
def test_a_csv_that_cannot_be_used_is_named_with_row_and_column(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "m.csv")) + f".*{message}") as caught:
        read(tmp_path / "m.csv", content)
    assert caught.value.hint or "column" in message


def test_a_megabyte_in_a_cell_is_read_and_an_endless_one_is_not(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    large = "long words " * 100_000
    assert words(read(tmp_path / "m.csv", f'a.mp4,"{large}"\n')) == [("a.mp4", large)]
    with pytest.raises(InputError, match="row 2, column 2: a cell of more than 16 MB"):
        read(tmp_path / "m.csv", 'a.mp4,a\nb.mp4,"' + f"{'words ' * 1000}\n" * 3000)
    for suffix in (".csv", ".jsonl"):
        with pytest.raises(InputError, match="row 1: longer than 16 MB"):
            read(tmp_path / f"m{suffix}", b"x" * (2**24 + 1))
    assert csv.field_size_limit() == before


# Parquet


def write_table(path: Path, /, **columns: list[object]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import_module("pyarrow.parquet").write_table(pyarrow.table(columns), path)


def test_parquet_of_others_is_read_without_loading_what_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_table(
        path,
        file_name=["a.mp4", "b.mp4"],
        text=["NA", None],
        num_frames=[3.0, float("nan")],
        scores=[{"flow": 1.5}, {"flow": None}],
        video=[b"...", b"..."],
    )
    manifest = read_manifest(path)
    assert list(manifest) == [Clip(tmp_path / "a.mp4", "NA", 3, scores={"flow": 1.5}), Clip(tmp_path / "b.mp4")]
    assert (manifest.format, manifest.notes) == ("Parquet", ("ignored columns: video",))


def test_parquet_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_table(path, path=["a.mp4", "rtsp://x"])
    with pytest.raises(InputError, match="row 2, column 'path': 'rtsp://x' is an address"):
        read_manifest(path)
    content = path.read_bytes()
    for torn in (content[:-20], b"", b"PAR1" * 5):
        with pytest.raises(InputError, match="as Parquet"):
            read(path, torn)
    write_table(path, video=[b"1"], label=[1])
    with pytest.raises(InputError, match="no column 'path'") as caught:
        read_manifest(path)
    assert "video, label" in caught.value.hint


# folders


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("split", ["", "train"])
def test_folders_of_hugging_face_are_read(suffix: str, split: str, tmp_path: Path) -> None:
    place = tmp_path / split
    touch(place, "a.mp4", "b.mp4")
    if suffix == ".parquet":
        write_table(place / "metadata.parquet", file_name=["a.mp4"], text=["a"])
    else:
        row = json.dumps({"file_name": "a.mp4", "text": "a"}) if suffix == ".jsonl" else "file_name,text\na.mp4,a"
        (place / f"metadata{suffix}").write_text(row)
    manifest = read_manifest(tmp_path)
    assert words(manifest) == [("a.mp4", "a")] and manifest.folder == place
    assert manifest.format.startswith("Hugging Face folder")
    assert manifest.notes == (("only the split 'train' was read",) if split else ())


def test_the_manifest_of_a_folder_comes_first(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,metadata")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "lines"}')
    assert words(manifest := read_manifest(tmp_path)) == [("a.mp4", "lines")]
    assert manifest.notes == ("metadata.csv was not read: metadata.jsonl was",)
    (tmp_path / "manifest.jsonl").write_text('{"path": "a.mp4", "caption": "own"}')
    assert words(read_manifest(tmp_path)) == [("a.mp4", "own")]


def test_captions_lie_beside_the_files(tmp_path: Path) -> None:
    touch(tmp_path, "b/B.MOV", "a.mp4", "c.JPEG", "b/d.gif", "readme.txt", "e.wav")
    (tmp_path / "a.txt").write_bytes(b'"a"\n\n')
    (tmp_path / "b/B.txt").write_bytes("\ufeffé, 狗\r\n".encode())
    (tmp_path / "c.txt").write_bytes(b"")
    manifest = read_manifest(tmp_path)
    assert words(manifest) == [("a.mp4", '"a"\n'), ("b/B.MOV", "é, 狗"), ("b/d.gif", None), ("c.JPEG", "")]
    assert manifest.format == "folder of clips" and manifest.folder == tmp_path
    assert manifest.notes == ("1 of 4 clips have no .txt with a caption beside them",)
    (tmp_path / "a.txt").write_bytes("a".encode("utf-16"))
    with pytest.raises(InputError, match=r"a\.txt is UTF-16"):
        read_manifest(tmp_path)


def test_what_is_hidden_or_leads_out_is_skipped_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, "a.mp4", ".hidden.mp4", ".git/b.mp4", "sub/c.mp4", "list.csv")
    touch(tmp_path, "rootless/outside.mp4")
    (root / "out.mp4").symlink_to(tmp_path / "rootless/outside.mp4")
    (root / "out").symlink_to(tmp_path / "rootless")
    (root / "in.mp4").symlink_to(root / "a.mp4")
    (root / "sub/loop").symlink_to(root)
    manifest = read_manifest(root)
    assert words(manifest) == [("a.mp4", None), ("in.mp4", None), ("sub/c.mp4", None)]
    assert [note[:9] for note in manifest.notes] == ["2 hidden ", "2 links t", "1 links t", "list.csv "]


def test_folders_of_classes_give_captions(tmp_path: Path) -> None:
    touch(tmp_path, "train/ApplyEyeMakeup/v_1.avi", "train/golden_retriever/2.webm", "val/TVNews/3.mp4", "val/yo/4.mp4")
    manifest = read_manifest(tmp_path)
    assert [clip.caption for clip in manifest] == ["Apply Eye Makeup", "golden retriever", "TV News", "yo"]
    assert manifest.format == "class folders" and "4 folders" in manifest.notes[0]
    touch(tmp_path, "loose.mp4")
    assert {clip.caption for clip in read_manifest(tmp_path)} == {None}


def test_ids_of_wordnet_are_named_only_where_all_of_imagenet_is_there(tmp_path: Path) -> None:
    ids = ["n01440764", *(f"n{number:08}" for number in range(2_000_000, 2_000_998)), "n15075141"]
    touch(tmp_path, *(f"{name}/1.JPEG" for name in ids))
    manifest = read_manifest(tmp_path)
    names = Path(import_module("opensora_core.text").__file__ or "").with_name("imagenet.txt").read_text().splitlines()
    assert [clip.caption for clip in manifest] == names
    assert "ImageNet" in manifest.notes[0]
    (tmp_path / ids[5]).rename(tmp_path / "n99999999")
    for expected in (1000, 999):
        manifest = read_manifest(tmp_path)
        assert manifest[0].caption == "n01440764" and f"WordNet ids of {expected} folders" in manifest.notes[0]
        (tmp_path / "n99999999/1.JPEG").unlink(missing_ok=True)


def test_one_file_is_a_manifest_of_one_clip(tmp_path: Path) -> None:
    touch(tmp_path, "a.MP4", "b.png")
    (tmp_path / "b.txt").write_text("a dog\n")
    assert words(manifest := read_manifest(tmp_path / "a.MP4")) == [("a.MP4", None)]
    assert manifest.format == "one video" and manifest[0].path == tmp_path / "a.MP4"
    assert words(read_manifest(tmp_path / "b.png")) == [("b.png", "a dog")]


def test_sources_are_found_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.csv").write_text("a.mp4,a\n")
    monkeypatch.chdir(tmp_path)
    assert read_manifest(Path("m.csv"))[0].path == tmp_path / "a.mp4"


@pytest.mark.parametrize("name", ["missing", "missing.jsonl", "empty", "notes.docx", "pipe"])
def test_a_source_that_holds_nothing_says_what_was_looked_for(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "notes.docx", "empty/.hidden.mp4", "empty/list.csv")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=name) as caught:
        read_manifest(tmp_path / name)
    assert caught.value.hint
    if name == "empty":
        assert "metadata.jsonl" in caught.value.message and "1 hidden" in caught.value.message
        assert str(tmp_path / "empty/list.csv") in caught.value.hint


def test_what_is_no_file_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a")
    (tmp_path / "round.mp4").symlink_to("about.mp4")
    (tmp_path / "about.mp4").symlink_to("round.mp4")
    (tmp_path / "nowhere.mp4").symlink_to("nothing.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    names = [clip.id for clip in read_manifest(tmp_path)]
    assert names == ["a.mp4", "about.mp4", "nowhere.mp4", "pipe.mp4", "round.mp4"]
