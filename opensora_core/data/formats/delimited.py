"""Manifests as CSV and TSV, with a row of names or, as Open-Sora writes them, without: path, caption[, num_frames].

An empty cell is no caption, and an empty cell in quotes is an empty caption, as in pandas.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from opensora_core.data.formats.rows import COLUMNS, MAX_BYTES, RowReader, read_lines
from opensora_core.data.manifest import Manifest, ManifestBuilder
from opensora_core.errors import InputError

_PUBLISHED = ("path", "caption", "num_frames")
_PATHS = {name for name, field in COLUMNS.items() if field == "path"}
_TAB = "\t"
_EXPECTED = "rows are path,caption[,num_frames], or the first row names the columns, among them path or file_name"


def read(path: Path, builder: ManifestBuilder) -> None:
    """Read a file into a builder; `.tsv` has tabs between its cells.

    Raises:
        InputError: a row of another length, an open quote, or a value that cannot be used; row and column are named.
    """
    delimiter = _TAB if path.suffix.lower() == ".tsv" else ","
    rows = RowReader(path, builder)
    header: list[str] = []
    is_named = False
    with _large_cells():
        for row, cells, record in _records(path, delimiter):
            if not header:
                names = [word if (word := cell.strip().lower()) in COLUMNS else cell for cell in cells]
                is_named = bool(_PATHS & set(names))
                header = _named(path, row, names) if is_named else list(_PUBLISHED[: len(cells)])
                if not is_named and len(cells) not in (2, 3):
                    raise InputError(f"{path}, row {row}: {len(cells)} columns and no names for them", _EXPECTED)
                if is_named:
                    continue
            if len(cells) != len(header):
                missing = f"column '{header[len(cells)]}' is missing, " if len(cells) < len(header) else ""
                raise InputError(
                    f"{path}, row {row}: {missing}{len(cells)} columns where {len(header)} are expected",
                    f"quote cells that hold {'tabs' if delimiter == _TAB else 'commas'} or quotes; {_EXPECTED}",
                )
            found = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            for column, name in enumerate(header):
                if COLUMNS.get(name) == "caption" and not cells[column] and _is_quoted(record, column, delimiter):
                    found[name] = ""
            rows.add(row, found)
    for name in header:
        if name not in COLUMNS and not name.startswith("scores."):
            rows.ignore(name or "(no name)")
    rows.finish(f"{'TSV' if delimiter == _TAB else 'CSV'} with header" if is_named else "Open-Sora CSV without header")


def _named(path: Path, row: int, names: list[str]) -> list[str]:
    for name in names:
        if name and names.count(name) > 1:
            raise InputError(f"{path}, row {row}: two columns are named '{name}'", "rename one of them")
    return names


@contextmanager
def _large_cells() -> Iterator[None]:
    before = csv.field_size_limit(MAX_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """Number of its first line, cells and lines of every row that is not empty."""
    record: list[str] = []

    def lines() -> Iterator[str]:
        for line in read_lines(path):
            record.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    row = 1
    try:
        for cells in reader:
            if cells:
                yield row, cells, record
            row = reader.line_num + 1
            record.clear()
    except csv.Error as error:
        column, problem, hint = _misquoted("".join(record), delimiter, str(error))
        raise InputError(f"{path}, row {row}, column {column}: {problem}", hint) from None


def _misquoted(record: str, delimiter: str, problem: str) -> tuple[int, str, str]:
    """Which cell of a broken record is broken, what about it, and what to do."""
    column, start = 1, 0
    while (found := _cell(delimiter).match(record, start)) and found[2] == delimiter:
        column, start = column + 1, found.end()
    if "new-line" in problem:
        return column, "a carriage return outside of quotes", "end lines in a line feed, and quote cells that hold one"
    if "limit" in problem:
        problem = f"a cell of more than {MAX_BYTES >> 20} MB; is a quote never closed?"
    elif "end of data" in problem:
        problem = "a quote is opened and never closed"
    else:
        problem = "text after a closing quote"
    return column, problem, 'a quote inside of a quoted cell is written twice: "a ""big"" dog"'


@lru_cache
def _cell(delimiter: str) -> re.Pattern[str]:
    """A whole cell and what ends it."""
    return re.compile(rf'("(?:[^"]++|"")*+"|[^"{delimiter}\r\n][^{delimiter}\r\n]*+|)({delimiter}|\r?\n|\Z)')


def _is_quoted(record: Sequence[str], column: int, delimiter: str) -> bool:
    """Whether a cell of a record is in quotes."""
    text, start = "".join(record), 0
    for _ in range(column):
        found = _cell(delimiter).match(text, start)
        assert found is not None
        start = found.end()
    return text.startswith('"', start)


def write(manifest: Manifest, path: Path, folder: Path, delimiter: str = ",") -> None:
    """Write a manifest to `path`, with paths relative to `folder`.

    Raises:
        InputError: a text that CSV cannot hold.
    """
    columns = manifest.columns
    with path.open("wb") as file:
        file.write((delimiter.join(_quoted(name, delimiter) for name in columns) + "\n").encode())
        for number, row in enumerate(manifest.rows(folder), 1):
            row |= {f"scores.{name}": value for name, value in row.get("scores", {}).items()}
            cells = [_quoted(row[name], delimiter) if name in row else "" for name in columns]
            line = delimiter.join(cells)
            try:
                content = line.encode()
            except UnicodeEncodeError:
                content = b"\0"
            if b"\0" in content:
                raise InputError(
                    f"clip {number}, {row['path']!r}, holds characters that CSV cannot", "write a .jsonl instead"
                )
            file.write(content + b"\n")


def write_tabs(manifest: Manifest, path: Path, folder: Path) -> None:
    """Write a manifest as TSV; see `write`."""
    write(manifest, path, folder, _TAB)


def _quoted(value: object, delimiter: str) -> str:
    """A cell. Empty texts are quoted, which tells them from absent ones."""
    text = value if isinstance(value, str) else repr(value)
    if text and not any(letter in text for letter in (delimiter, '"', "\r", "\n")):
        return text
    return '"' + text.replace('"', '""') + '"'
