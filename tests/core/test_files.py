"""A file is whole or absent."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_core.errors import ResourceError
from opensora_core.files import append_line, readable, replacing, replacing_folder, require_space, write_bytes

REPO = Path(__file__).parents[2]


def test_a_file_appears_whole_in_a_folder_that_is_made_for_it(tmp_path):
    path = tmp_path / "new" / ("x" * 250)
    write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("reason", [ValueError, KeyboardInterrupt])
def test_whatever_goes_wrong_the_old_file_stays_and_nothing_else(reason, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(reason), replacing(path) as part:
        part.write_bytes(b"ha")
        raise reason
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_more_than_the_disk_holds_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(ResourceError, match=r"needed 1000000000\.0 GB, free .* (GB|MB)"):
        require_space(tmp_path / "a" / "b", 10**18)


def test_lines_are_appended(tmp_path):
    for line in ("a", "é"):
        append_line(tmp_path / "lines", line)
    assert (tmp_path / "lines").read_text(encoding="utf-8") == "a\né\n"
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="cannot write"):
        append_line(tmp_path / "folder", "a")


def test_bytes_are_said_in_the_unit_people_use():
    assert [readable(n) for n in (12, 3e3, 4.4e6, 1.23e9, 5e12)] == ["12 bytes", "3 kB", "4 MB", "1.2 GB", "5000.0 GB"]


# ---------------------------------------------------------------------- folders


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(part: Path, text: bytes = b"new") -> None:
    (part / "sub").mkdir()
    (part / "sub" / "deep").write_bytes(text)
    (part / "top").write_bytes(text)


def test_a_folder_appears_whole_with_all_that_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "step-1"
    with replacing_folder(folder) as part:
        fill(part)
        assert not folder.exists() and part.parent == folder.parent and part.name.startswith(".")
    assert content(folder) == {"sub/deep": b"new", "top": b"new"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_is_replaced_and_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    for text, extra in ((b"old", "gone"), (b"new", "added")):
        with replacing_folder(folder) as part:
            fill(part, text)
            (part / extra).touch()
            assert not folder.exists() or content(folder)["top"] == b"old"
    assert content(folder) == {"sub/deep": b"new", "top": b"new", "added": b""}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("reason", [ValueError, KeyboardInterrupt, MemoryError, OSError])
@pytest.mark.parametrize("is_new", [True, False])
def test_whatever_goes_wrong_the_old_folder_stays_and_nothing_else(
    reason: type[BaseException], is_new: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "step-1"
    if not is_new:
        folder.mkdir()
        fill(folder, b"old")
    before = content(tmp_path)
    with pytest.raises(ResourceError if reason is OSError else reason), replacing_folder(folder) as part:
        fill(part)
        raise reason
    assert content(tmp_path) == before and list(tmp_path.iterdir()) == ([] if is_new else [folder])


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from opensora_core.files import replacing_folder\n"
        "with replacing_folder(Path(sys.argv[1])) as part:\n"
        "    (part / 'leftover').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    folder = tmp_path / "step-1"
    done = subprocess.run([sys.executable, "-c", script, folder], cwd=REPO, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1
    with replacing_folder(folder) as part:
        fill(part)
    assert content(tmp_path) == {"step-1/sub/deep": b"new", "step-1/top": b"new"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    fill(folder, b"old")
    script = (
        "import sys; from pathlib import Path; from opensora_core.errors import ResourceError\n"
        "from opensora_core.files import replacing_folder\n"
        "try:\n"
        "    with replacing_folder(Path(sys.argv[1])) as part:\n"
        "        (part / 'small').write_bytes(bytes(100)); (part / 'large').write_bytes(bytes(10**6))\n"
        "except ResourceError as error: print(error.message)"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, folder],
        cwd=REPO,
        timeout=60,
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)),
    )
    assert done.stdout.startswith(f"no space left for {folder}: free ")
    assert content(tmp_path) == {"step-1/sub/deep": b"old", "step-1/top": b"old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write"), replacing_folder(tmp_path / "file" / "step-1"):
        pytest.fail("there is no such folder")


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    fill(folder, b"old")
    rename = Path.rename

    def refuse_the_new(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            raise PermissionError(1, "not permitted")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(ResourceError, match="no permission"), replacing_folder(folder) as part:
        fill(part)
    assert content(tmp_path) == {"step-1/sub/deep": b"old", "step-1/top": b"old"}
