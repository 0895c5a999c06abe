"""A file is whole or absent."""

from __future__ import annotations

import pytest

from opensora_core.errors import ResourceError
from opensora_core.files import append_line, readable, replacing, require_space, write_bytes


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
