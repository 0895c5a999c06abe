"""From the named cells of a row to a clip, and the lines of a text file that rows are read from."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora_core.data.manifest import FIELDS, REAL, WHOLE, ManifestBuilder
from opensora_core.errors import InputError

ALIASES = {"file_name": "path", "text": "caption", "frames": "num_frames"}
"""Names that others give to columns."""

COLUMNS = {**{name: name for name in FIELDS}, **ALIASES}
"""Name of a column -> the field of a clip that it holds."""

MAX_BYTES = 16 * 2**20
"""Of a line, and of a cell."""

_MAX_SCORES = 256
_MAX_WHOLE = 2**53  # up to here a float holds every whole number
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decoded(path: Path, content: bytes, row: int = 1) -> str:
    """Bytes of a text file as text; `row` is the line they are on.

    Raises:
        InputError: they are not UTF-8, or not text.
    """
    if row == 1:
        for mark, name in _MARKS.items():
            if content.startswith(mark):
                raise InputError(f"{path} is {name} text", f"save it as UTF-8: iconv -f {name} -t UTF-8 {path.name}")
        content = content.removeprefix(codecs.BOM_UTF8)
    if (at := content.find(b"\0")) >= 0:
        raise InputError(f"{path}, row {row}, byte {at + 1}: a NUL, so this is no text", "save the file as UTF-8 text")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, row {row}, byte {error.start + 1}: not UTF-8", "save the file as UTF-8 text"
        ) from None


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file in UTF-8, with their ends and without a byte order mark.

    Raises:
        InputError: it cannot be read, is not text in UTF-8, or has a line of more than `MAX_BYTES`.
    """
    row = 0
    try:
        with path.open("rb") as file:
            while content := file.readline(MAX_BYTES + 1):
                row += 1
                if len(content) > MAX_BYTES:
                    raise InputError(f"{path}, row {row}: longer than {MAX_BYTES >> 20} MB", "write one clip on a line")
                yield (
                    content.decode()
                    if row > 1 and content.isascii() and b"\0" not in content
                    else decoded(path, content, row)
                )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


class RowReader:
    """Checks the rows of a file and gives them to a builder.

    Args:
        source: the file, for errors.
        builder: takes the clips.
    """

    def __init__(self, source: Path, builder: ManifestBuilder) -> None:
        self.source, self.builder = source, builder
        self._ignored: dict[str, None] = {}
        self._score_names: set[str] = set()
        kinds: dict[str, Callable[[int, str, Any], str | float]] = {"path": self._path}
        kinds |= dict.fromkeys(WHOLE, self._whole) | dict.fromkeys(REAL, self._real)
        self._known: dict[str, tuple[str, Callable[[int, str, Any], str | float] | None]] = {
            column: (name, kinds.get(name, self._text)) for column, name in COLUMNS.items()
        }

    def add(self, row: int, cells: Mapping[str, Any]) -> None:
        """Take a row.

        Args:
            row: its number; the first one is 1.
            cells: name of a column -> its value; None is an empty cell.

        Raises:
            InputError: a value of the wrong kind, or no path; row and column are named.
        """
        values: dict[str, str | float] = {}
        scores: dict[str, float] = {}
        for column, value in cells.items():
            if value is None:
                continue
            name, check = self._known.get(column, ("", None))
            if check is None or (name != column and cells.get(name) is not None):
                if not self._add_scores(row, column, value, scores):
                    self.ignore(column)
            else:
                values[name] = check(row, column, value)
        if "path" not in values:
            raise self.refusal(row, "path", "the row has none", f"it has {', '.join(map(str, cells)) or 'nothing'}")
        if "end_seconds" in values:
            start, end = values.get("start_seconds", 0.0), values["end_seconds"]
            if not start < end:  # type: ignore[operator]
                raise self.refusal(row, "end_seconds", f"{end} is not after the start, {start}")
        self.builder.append(values, scores)

    def ignore(self, column: str) -> None:
        """Remember that a column was not used."""
        if len(self._ignored) < 1000:
            self._ignored[column] = None

    def finish(self, format: str) -> None:
        """Tell the builder what was read, and what was ignored."""
        self.builder.format = format
        if self._ignored:
            names = list(self._ignored)
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            self.builder.notes.append(f"ignored columns: {', '.join(names[:20])}{more}")

    def refusal(self, row: int, column: str, problem: str, hint: str = "") -> InputError:
        """The error of a cell."""
        return InputError(f"{self.source}, row {row}, column '{column}': {problem}", hint)

    def _text(self, row: int, column: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.refusal(row, column, f"{_short(value)} is not text")
        return value

    def _path(self, row: int, column: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.refusal(row, column, f"{_short(value)} is not text")
        if found := _URL.match(value):
            raise self.refusal(
                row,
                column,
                f"{_short(value)} is an address, not a file",
                f"download it first; if a file has that name, write ./{found[0]}...",
            )
        if "\0" in value:
            raise self.refusal(row, column, f"{_short(value)} holds a NUL")
        if (not value or value[-1] in "/.") and value.rpartition("/")[2] in ("", ".", ".."):
            raise self.refusal(row, column, f"{_short(value)} names no file", "write the path of a video or picture")
        return value

    def _real(self, row: int, column: str, value: Any) -> float:
        if type(value) is float and 0 <= value < math.inf:
            return value
        number = _number(value)
        if number is None or number < 0:
            raise self.refusal(row, column, f"{_short(value)} is not a number of 0 or more")
        return number

    def _whole(self, row: int, column: str, value: Any) -> int:
        if type(value) is int and 0 <= value <= _MAX_WHOLE:
            return value
        number = _number(value)
        if number is None or not 0 <= number <= _MAX_WHOLE or number != int(number):
            raise self.refusal(row, column, f"{_short(value)} is not a whole number of 0 or more")
        return int(number)

    def _add_scores(self, row: int, column: str, value: Any, scores: dict[str, float]) -> bool:
        """Take the table `scores`, or a column such as `scores.aesthetic`."""
        if column == "scores":
            if not isinstance(value, Mapping):
                raise self.refusal(row, column, f"{_short(value)} is not a table of numbers")
        elif column.startswith("scores."):
            value = {column.removeprefix("scores."): value}
        else:
            return False
        for name, score in value.items():
            if score is None:
                continue
            number = _number(score)
            if number is None:
                raise self.refusal(row, f"scores.{name}", f"{_short(score)} is not a number")
            scores[name] = number
            if name not in self._score_names:
                self._score_names.add(name)
                if len(self._score_names) > _MAX_SCORES:
                    raise self.refusal(row, column, f"there are more than {_MAX_SCORES} kinds of scores")
        return True


def _number(value: Any) -> float | None:
    """A finite number, or the one that a text spells; None for anything else."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            return None
    elif not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
