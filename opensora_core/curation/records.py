"""What lies where in the output of a split, and the records that mark a source as finished.

    OUT/
        clips/NAME/00000.mp4    the clips of a source; NAME is its name and a sum of its content
        manifest.jsonl          the clips, to train on
        sources.jsonl           the sources: what they are, what became of them, their boundaries
        rejects.jsonl           what is in no clip, and why
        preview.html            if asked for
        .split/settings.json    what the output was made with
        .split/sources/         per source NAME.record and what previews and statistics are made of

A record is written when the clips of its source are whole, so it is the commit mark. The three tables are nothing but
all records in the order of their sources' paths; whoever writes them writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_core.curation.sources import STATE
from opensora_core.errors import UsageError
from opensora_core.files import refusal, replacing, write_bytes

MANIFEST_FILE = "manifest.jsonl"
SOURCES_FILE = "sources.jsonl"
REJECTS_FILE = "rejects.jsonl"
PREVIEW_FILE = "preview.html"
CLIPS_FOLDER = "clips"

_SETTINGS_FILE = "settings.json"
_SUFFIX = ".record"
_OUR_FOLDER = re.compile(r".+-[0-9a-f]{12}")
_TABLES = (SOURCES_FILE, MANIFEST_FILE, REJECTS_FILE)

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What became of a source, without the rows themselves.

    Attributes:
        name: of its clips' folder.
        source: its path.
        identity: of its content; empty where there is none.
        settings: a sum of what its clips were made with.
        limits: a sum of what it was allowed to cost, which only counts where that was not enough.
        status: see `events.SourceSplit`.
    """

    name: str
    source: str
    identity: str
    settings: str
    limits: str
    status: str


def line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON, as manifests are written."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a name that is not UTF-8 has an escape
        return json.dumps(row).encode() + b"\n"


def sum_of(values: Mapping[str, Any]) -> str:
    """A short sum of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class Records:
    """The records of an output.

    Args:
        output: the folder.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / STATE / "sources"

    def require(self, settings: Mapping[str, Any], *, redo: bool) -> None:
        """Check that the folder is free, or ours with these settings.

        Raises:
            UsageError: it has tables of somebody else, or was made with other settings and `redo` is not asked for.
        """
        if not (self.output / STATE).is_dir() and (
            other := next((name for name in _TABLES if (self.output / name).exists()), None)
        ):
            raise UsageError(f"{self.output / other} is there and no split made it", "choose another --output")
        with suppress(OSError, ValueError):
            before = json.loads((self.output / STATE / _SETTINGS_FILE).read_text(encoding="utf-8"))
            if isinstance(before, dict) and before != settings and not redo:
                names = sorted(name for name in before.keys() | settings if before.get(name) != settings.get(name))
                told = ", ".join(f"{name} was {before.get(name)} and is {settings.get(name)}" for name in names)
                raise UsageError(f"{self.output} was split with other settings: {told}", "--redo, or another --output")

    def prepare(self, settings: Mapping[str, Any], *, redo: bool) -> None:
        """Take the folder for these settings.

        Raises:
            UsageError: as `require`.
            ResourceError: it cannot be written.
        """
        self.require(settings, redo=redo)
        write_bytes(self.output / STATE / _SETTINGS_FILE, line(settings))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refusal(self.folder, error) from error

    def beside(self, name: str, suffix: str) -> Path:
        """A file of a source that lies beside its record."""
        return self.folder / f"{name}{suffix}"

    def read(self) -> dict[str, Record]:
        """All records by name. What is no record is passed by, so that its source is done again."""
        found = {}
        for name in self._listed():
            with suppress(OSError, ValueError, TypeError), self.beside(name, _SUFFIX).open("rb") as file:
                record = Record(**json.loads(file.readline())["record"])
                if record.name == name:
                    found[name] = record
        return found

    def commit(self, record: Record, source: Row, clips: Iterable[Row], rejects: Iterable[Row]) -> None:
        """Mark a source as finished.

        Raises:
            ResourceError: the file system refuses it.
        """
        told = dataclasses.asdict(record)
        rows = [line(source), *map(line, clips)]
        head = line({"record": told, "num_clips": len(rows) - 1})
        write_bytes(self.beside(record.name, _SUFFIX), b"".join([head, *rows, *map(line, rejects)]))

    def rename(self, record: Record, source: str) -> None:
        """Take note that the file of a record has moved."""
        own, clips, rejects = self.rows(record.name)
        for row in (own, *clips, *rejects):
            row["source"] = source
            if row.get("path") == record.source:
                row["path"] = source
        self.commit(dataclasses.replace(record, source=source), own, clips, rejects)

    def rows(self, name: str) -> tuple[Row, list[Row], list[Row]]:
        """The row of a source, of its clips, and of what is in none of them."""
        head, *lines = self.beside(name, _SUFFIX).read_bytes().splitlines()
        rows = [json.loads(text) for text in lines]
        num_clips = json.loads(head)["num_clips"]
        return rows[0], rows[1 : num_clips + 1], rows[num_clips + 1 :]

    def forget(self, name: str) -> None:
        """Take a record back; its clips may be there still."""
        with suppress(OSError):
            self.beside(name, _SUFFIX).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove the clips of a source, and all that lies beside its record."""
        self.forget(name)
        shutil.rmtree(self.output / CLIPS_FOLDER / name, ignore_errors=True)
        for path in self.folder.glob(f"{name}.*"):
            with suppress(OSError):
                path.unlink()

    def remove_orphans(self, names: Collection[str]) -> None:
        """Remove clips and parts that a killed run left of sources without a record."""
        with suppress(OSError):
            for path in (self.output / CLIPS_FOLDER).iterdir():
                if path.name not in names and _OUR_FOLDER.fullmatch(path.name) and path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
        for folder in (self.output, self.output / STATE, self.folder):
            for path in folder.glob(".osora-*.part"):
                with suppress(OSError):
                    path.unlink()

    def write_tables(self, prefix: str = "") -> None:
        """Write the three tables from all records there are.

        Others may commit records and write tables at the same time: what was written is checked against the records
        afterwards, so that the last table that anyone writes has the last record that anyone committed.

        Args:
            prefix: of the names of manifest and rejects, for who leaves clips out of them before they take their place.

        Raises:
            ResourceError: the file system refuses it.
        """
        while True:
            before = self._state()
            records = sorted(self.read().values(), key=lambda item: (os.fsencode(item.source), item.name))
            with ExitStack() as stack:
                names = (SOURCES_FILE, f"{prefix}{MANIFEST_FILE}", f"{prefix}{REJECTS_FILE}")
                parts = [stack.enter_context(replacing(self.output / name)) for name in names]
                sources, clips, rejects = (stack.enter_context(part.open("wb")) for part in parts)
                for record in records:
                    with suppress(FileNotFoundError), self.beside(record.name, _SUFFIX).open("rb") as file:
                        num_clips = json.loads(file.readline())["num_clips"]
                        sources.write(file.readline())
                        clips.writelines(file.readline() for _ in range(num_clips))
                        rejects.writelines(file)
            if self._state() == before:
                return

    def _listed(self) -> Iterator[str]:
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX) and not entry.name.startswith("."):
                    yield entry.name.removesuffix(_SUFFIX)

    def _state(self) -> frozenset[tuple[str, int, int]]:
        state = set()
        for name in self._listed():
            with suppress(FileNotFoundError):
                facts = self.beside(name, _SUFFIX).stat()
                state.add((name, facts.st_mtime_ns, facts.st_ino))
        return frozenset(state)
