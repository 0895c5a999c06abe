"""What has become of every item, one line each, written to the disk before anything else is believed.

OUT/
    files/              what came
    manifest.jsonl      a row for each item that can be used: for `osora split` and `osora train`
    rejects.jsonl       a row for each that cannot, and why
    .download/
        journal.jsonl   this journal; the last line about an item counts
        parts/          what has begun to come, and goes on in the next run
        archives/       archives that are being unpacked
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from opensora_core.curation.records import MANIFEST_FILE, REJECTS_FILE, line
from opensora_core.errors import UsageError
from opensora_core.files import refusal, replacing

STATE = ".download"

Status = Literal["ok", "duplicate", "failed", "unpacked"]


class Journal:
    """The journal of an output. One process writes it, in one thread.

    Args:
        output: the folder.

    Raises:
        UsageError: the folder has tables that no download made.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / STATE / "journal.jsonl"
        other = next((name for name in (MANIFEST_FILE, REJECTS_FILE) if (output / name).exists()), None)
        if other and not self.path.parent.is_dir():
            raise UsageError(f"{output / other} is there and no download made it", "choose another --output")
        self.statuses: dict[str, Status] = {}
        self.files: dict[str, tuple[str, int, str]] = {}
        self.sums: dict[str, str] = {}
        self.owners: dict[str, str] = {}  # path -> the file that it was given to
        self.spans: set[tuple[str, float | None, float | None]] = set()  # rows of the manifest
        for row in self._rows():
            self._take(row)

    def _rows(self) -> Iterator[dict[str, Any]]:
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            for text in file:
                with suppress(ValueError, TypeError):  # a line that a killed run tore
                    row = json.loads(text)
                    if text.endswith(b"\n") and isinstance(row, dict) and {"id", "file", "status", "row"} <= row.keys():
                        yield row

    def _take(self, row: dict[str, Any]) -> None:
        self.statuses[row["id"]] = row["status"]
        told = row["row"]
        if row["status"] == "ok":
            self.files[row["file"]] = told["path"], told["bytes"], told["sha256"]
            self.sums.setdefault(told["sha256"], told["path"])
            self.owners.setdefault(told["path"], row["file"])
            self.spans.add((told["path"], told.get("start_seconds"), told.get("end_seconds")))

    def open(self) -> None:
        """Prepare for writing: drop a torn line, and forget files that somebody removed.

        Raises:
            ResourceError: the folder cannot be written.
        """
        try:
            (self.path.parent / "parts").mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                content_end = 0
                with self.path.open("rb+") as file:
                    for text in file:
                        content_end += len(text) if text.endswith(b"\n") else 0
                    file.truncate(content_end)
            for part in self.output.glob(".osora-*.part"):
                part.unlink()
        except OSError as error:
            raise refusal(self.path, error) from error
        gone = {name for name, (path, _, _) in self.files.items() if not (self.output / path).is_file()}
        if gone:
            paths = {self.files.pop(name)[0] for name in gone}
            self.sums = {digest: path for digest, path in self.sums.items() if path not in paths}
            self.owners = {path: name for path, name in self.owners.items() if path not in paths}
            self.spans = {span for span in self.spans if span[0] not in paths}
            for row in self._rows():
                if row["file"] in gone or row["row"].get("duplicate_of") in paths:
                    self.statuses.pop(row["id"], None)
            self.statuses = {id: status for id, status in self.statuses.items() if status != "unpacked"}

    def is_done(self, id: str) -> bool:
        """Whether an item needs nothing more."""
        return self.statuses.get(id) in ("ok", "duplicate", "unpacked")

    def add(self, id: str, file: str, status: Status, row: dict[str, Any]) -> None:
        """Write what became of an item.

        Raises:
            ResourceError: no space or no permission.
        """
        told = {"id": id, "file": file, "status": status, "row": row}
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            before = os.fstat(descriptor).st_size
            try:
                content = line(told)
                if os.write(descriptor, content) < len(content):  # a full disk takes a part of it
                    os.ftruncate(descriptor, before)
                    os.write(descriptor, content)
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise refusal(self.path, error) from error
        self._take(told)

    def write_tables(self) -> int:
        """Write the manifest and the rejects, sorted by path and source; returns the rows of the manifest.

        Raises:
            ResourceError: no space or no permission.
        """
        last: dict[str, dict[str, Any]] = {}
        for row in self._rows():
            if row["id"] in self.statuses:
                last[row["id"]] = row
        rows = [row["row"] for row in last.values() if row["status"] == "ok"]
        rejects = [row["row"] for row in last.values() if row["status"] in ("failed", "duplicate")]
        rows.sort(key=lambda row: (row["path"], row.get("start_seconds", 0.0), row.get("end_seconds", 0.0)))
        rejects.sort(key=lambda row: (row["source"], row["reason"]))
        for name, table in ((MANIFEST_FILE, rows), (REJECTS_FILE, rejects)):
            with replacing(self.output / name) as part:
                part.write_bytes(b"".join(map(line, table)))
        return len(rows)
