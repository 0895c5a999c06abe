"""What is captioned already: the output itself, which grows by a line per clip and is put in order at the end.

    captions.jsonl          the rows of the manifest, with captions
    captions.rejects.jsonl  the rows that got none, with status and reason
    .captions.jsonl/        what the captions were made with, the lock, and what is not whole yet

A row is the commit mark of its clip. A line that was torn by a kill is cut off, and its clip described again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_core.curation.records import line
from opensora_core.errors import UsageError
from opensora_core.files import refusal, replacing, require_space, write_bytes

if TYPE_CHECKING:
    from opensora_core.data.manifest import Manifest

_SETTINGS_FILE = "settings.json"
_REDOING = "redoing"
_REJECTS = ".rejects.jsonl"
Row = dict[str, Any]


@dataclass
class Ledger:
    """The output of a run over a manifest.

    Attributes:
        output: the file of JSON lines.
        manifest: whose clips are described.
        finished: row -> where its line begins in the output.
        rejected: rows without a caption, as their line says.
        same: row without a caption -> the row of the same clip whose caption it gets.
        kept, passed: rows that have a caption already, or that an earlier step left out.
        others: lines of the output that belong to no row of this manifest.
        others_rejected: and those of the rejects.
    """

    output: Path
    manifest: Manifest
    finished: dict[int, int] = field(default_factory=dict)
    rejected: dict[int, Row] = field(default_factory=dict)
    same: dict[int, int] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    passed: set[int] = field(default_factory=set)
    others: list[bytes] = field(default_factory=list)
    others_rejected: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        from opensora_core.data.manifest import without_dots  # torch comes with it

        self.output = Path(without_dots(str(self.output.parent.absolute()))) / self.output.name
        self.rejects = self.output.with_name(f"{self.output.stem}{_REJECTS}")
        self.state = self.output.with_name(f".{self.output.name}")
        if self.output.suffix != ".jsonl":
            raise UsageError(f"captions are written as JSON lines, not as {self.output.name}", "end its name in .jsonl")
        if self.output.name.endswith(_REJECTS):
            raise UsageError(f"{self.output.name} is how the rejects of an output are named", "name another --output")
        self._settings: dict[str, str] = {}
        self._redo = self._is_fresh = False

    # before anything is written ----------------------------------------------------------------------------------

    def read(self, facts: Mapping[str, str], *, redo: bool, retry_failed: bool) -> None:
        """Learn what is there, without changing it.

        Raises:
            UsageError: the output is somebody else's, or was made with other settings, and `redo` is not asked for.
        """
        self._settings = dict(facts)
        before = self._before()
        for path in (self.output, self.rejects):
            if path.exists() and not (self.state / _SETTINGS_FILE).is_file():
                raise UsageError(f"{path} is there and no caption run made it", "choose another --output")
        was_redoing = before.pop(_REDOING, "") == "yes" and before == self._settings
        self._redo, self._is_fresh = redo or was_redoing, redo and not was_redoing
        if before and before != self._settings and not redo and not retry_failed:
            names = sorted(name for name in before.keys() | facts if before.get(name) != facts.get(name))
            told = ", ".join(
                f"{name} was {_short(before.get(name))} and is {_short(facts.get(name))}" for name in names
            )
            raise UsageError(f"{self.output} was captioned with other settings: {told}", "--redo, or another --output")
        rows = self._rows_by_key()

        if self._is_fresh:
            return
        for start, text, row in whole_lines(self.output):
            index = rows.get(_key(row))
            if index is None:
                self.others.append(text)
            # one without a caption was left out by an earlier step, and no longer is
            elif index not in self.kept and index not in self.passed and row.get("caption"):
                self.finished[index] = start
        for _, text, row in whole_lines(self.rejects):
            index = rows.get(_key(row))
            if index is None:
                self.others_rejected.append(text)
            elif not retry_failed and not any(index in group for group in (self.finished, self.kept, self.passed)):
                self.rejected[index] = row

    def _before(self) -> dict[str, str]:
        with suppress(OSError, ValueError):
            found = json.loads((self.state / _SETTINGS_FILE).read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        return {}

    def _rows_by_key(self) -> dict[str, int]:
        """The row that stands for each clip: one with a caption goes first, one that was left out last."""
        from opensora_core.data.survey import USABLE_STATUS

        rows: dict[str, int] = {}
        again: list[tuple[str, int]] = []
        for index, row in enumerate(self.manifest.rows(self.output.parent)):
            key = _key(row)
            if row.get("status", "") not in USABLE_STATUS:
                self.passed.add(index)
            elif row.get("caption") and not self._redo:
                self.kept.add(index)
            first = rows.setdefault(key, index)
            if first != index:
                again += [(key, first), (key, index)]
                rows[key] = min(first, index, key=lambda i: (i in self.passed, i not in self.kept, i))
        for key, index in again:
            if index != rows[key] and index not in self.passed and index not in self.kept:
                self.same[index] = rows[key]
        return rows

    def todo(self) -> list[int]:
        """Rows to describe, those of one size together, so that batches need little padding."""
        left = [
            index
            for index in range(len(self.manifest))
            if not any(index in group for group in (self.finished, self.rejected, self.same, self.kept, self.passed))
        ]
        clips = ((self.manifest[index], index) for index in left)
        return [index for *_, index in sorted((clip.height or 0, clip.width or 0, index) for clip, index in clips)]

    # while it grows ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Take the output: cut off what a kill tore, or all of it when it is made anew.

        Raises:
            ResourceError: the file system refuses it.
        """
        marks = {_REDOING: "yes"} if self._redo else {}
        for path in self.state.glob(".osora-*.part"):  # those beside the output may be another run's, and alive
            with suppress(OSError):
                path.unlink()
        if self._is_fresh:
            for path in (self.output, self.rejects):
                _truncate(path, 0)
        write_bytes(self.state / _SETTINGS_FILE, line({**self._settings, **marks}))
        _truncate(self.output, sum(len(text) for _, text, _ in whole_lines(self.output)))
        self._write_rejects()

    def row(self, index: int) -> Row:
        """A row of the manifest, as the output holds it."""
        return next(self.manifest.select([index]).rows(self.output.parent))

    def append(self, captions: Mapping[int, str], rejects: Sequence[tuple[int, str, str]]) -> None:
        """Commit captions, and (row, status, reason) of clips that got none; on the disk when it returns.

        Raises:
            ResourceError: the file system refuses it; the output ends with its last whole line.
        """
        lines = [(index, line(_with_caption(self.row(index), text))) for index, text in captions.items()]
        if lines:
            start = _append(self.output, b"".join(text for _, text in lines))
            for index, text in lines:
                self.finished[index] = start
                start += len(text)
        rows = {index: {**self.row(index), "status": status, "reason": reason} for index, status, reason in rejects}
        if rows:
            _append(self.rejects, b"".join(line(row) for row in rows.values()))
            self.rejected.update(rows)

    # when all is done --------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Put the output in the order of the manifest, with the rows that were not to be described in their places.

        Raises:
            ResourceError: the file system refuses it.
        """
        require_space(self.output, self.output.stat().st_size if self.output.exists() else 0)
        with self._replacing(self.output) as part, part.open("wb") as new, self.output.open("rb") as old:
            for index, row in enumerate(self.manifest.rows(self.output.parent)):
                first = self.same.get(index, index)
                if first in self.finished:
                    old.seek(self.finished[first])
                    new.write(line(_with_caption(row, json.loads(old.readline())["caption"])))
                elif first != index and first in self.kept:
                    new.write(line(_with_caption(row, self.manifest[first].caption or "")))
                elif self.is_written(index):
                    new.write(line(row))
            new.writelines(self.others)
        self._write_rejects()
        if not self.rejected and not self.others_rejected:
            with suppress(OSError):
                self.rejects.unlink(missing_ok=True)
        write_bytes(self.state / _SETTINGS_FILE, line(self._settings))

    def is_written(self, index: int) -> bool:
        """Whether a row is in the output, once that is in order."""
        first = self.same.get(index, index)
        return any(first in group for group in (self.finished, self.kept, self.passed))

    def _write_rejects(self) -> None:
        with self._replacing(self.rejects) as part, part.open("wb") as new:
            new.writelines(line(self.rejected[index]) for index in sorted(self.rejected))
            new.writelines(self.others_rejected)

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """As `files.replacing`, but what a kill leaves lies in our own folder, where no other run is disturbed by it.

        Raises:
            ResourceError: the file system refuses it.
        """
        whole = self.state / path.name
        with replacing(whole) as part:
            yield part
        try:
            whole.replace(path)
        except OSError as error:
            raise refusal(path, error) from error

    def reasons(self) -> dict[str, int]:
        """Reason -> clips of all that have no caption."""
        counts = Counter(str(row.get("reason", "")) for row in self.rejected.values())
        return dict(counts.most_common())


def whole_lines(path: Path) -> Iterator[tuple[int, bytes, Row]]:
    """Lines of a file up to the first that is torn: where each begins, its bytes, and the object in it.

    Raises:
        UsageError: something that is no row stands before the last line.
    """
    start, torn = 0, 0
    with suppress(FileNotFoundError), path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if torn:
                raise UsageError(
                    f"{path}, row {torn}: not a row of ours", "mend or remove it, or name another --output"
                )
            try:
                row = json.loads(text) if text.endswith(b"\n") else None
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("path"), str):
                torn = number
                continue
            yield start, text, row
            start += len(text)


def _key(row: Row) -> str:
    return f"{row['path']}\0{row.get('start_seconds')}\0{row.get('end_seconds')}"


def _with_caption(row: Row, caption: str) -> Row:
    """A row with its caption where manifests have it: after the path."""
    return {"path": row["path"], "caption": caption, **{k: v for k, v in row.items() if k not in ("path", "caption")}}


def _append(path: Path, content: bytes) -> int:
    """Append bytes that are on the disk when this returns; returns where they begin."""
    require_space(path, len(content))
    try:
        with path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                view = memoryview(content)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(start)
                raise
            return start
    except OSError as error:
        raise refusal(path, error) from error


def _truncate(path: Path, size: int) -> None:
    try:
        with path.open("ab") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    except OSError as error:
        raise refusal(path, error) from error


def _short(value: str | None) -> str:
    if not value:
        return "nothing"
    return value if len(value) <= 40 else f"{value[:37]}..."
