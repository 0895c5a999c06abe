"""The manifest: the table of clips that curation writes and training reads.

It is held by columns, so that a million clips fit in a few hundred megabytes and a loader's workers share them. A
column that no row fills is not there at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from opensora_core.data.columns import NO_TEXT, NumbersInMaking, Texts, TextsInMaking, present

WHOLE = ("num_frames", "width", "height")
REAL = ("fps", "duration_seconds", "start_seconds", "end_seconds")
TEXT = ("sha256", "source", "status", "reason")
FIELDS = (
    *("path", "caption", "num_frames", "fps", "width", "height", "duration_seconds"),
    *("sha256", "source", "start_seconds", "end_seconds", "status", "reason"),
)
"""The names of a clip's fields in files, in the order they are written. Scores come after them."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A video, a picture, or a range of a video, with its words.

    Attributes:
        path: of the file; absolute.
        caption: its words; None where the row has none, which is not the same as empty ones.
        num_frames: as many as decoding gave.
        fps: frames per second that decoding gave.
        width: in pixels.
        height: in pixels.
        duration_seconds: of the clip.
        sha256: of the file, in hex; empty if unknown.
        source: what it was cut from; empty if unknown.
        start_seconds: where the range begins in the file.
        end_seconds: where the range ends in the file.
        scores: what filters found, such as `aesthetic`.
        status: empty or `ok` for clips that can be used.
        reason: why it is not.
        folder: that `id` is relative to; a manifest gives its own.
    """

    path: Path
    caption: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    duration_seconds: float | None = None
    sha256: str = ""
    source: str = ""
    start_seconds: float | None = None
    end_seconds: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)
    status: str = ""
    reason: str = ""
    folder: Path | None = field(default=None, repr=False, compare=False)

    @property
    def id(self) -> str:
        """Its name in the manifest: `clips/a.mp4`, absolute if not in its folder; of a range `clips/a.mp4#1.5-4.25`."""
        name = self.path.as_posix() if self.folder is None else within(str(self.folder), str(self.path))
        if self.start_seconds is None and self.end_seconds is None:
            return name
        return f"{name}#{_seconds(self.start_seconds or 0)}-{_seconds(self.end_seconds)}"


def _seconds(value: float | None) -> str:
    return "" if value is None else repr(float(value)).removesuffix(".0")


def _column_for(name: str) -> TextsInMaking | NumbersInMaking:
    if name in WHOLE or name in REAL:
        return NumbersInMaking(is_whole=name in WHOLE)
    return TextsInMaking(NO_TEXT if name == "caption" else b"")


def within(folder: str, path: str) -> str:
    """A path relative to a folder that it lies in, and otherwise as it is."""
    return path.removeprefix(folder.rstrip("/") + "/")


class Manifest(Sequence[Clip]):
    """An immutable sequence of clips; made by `read_manifest`, `Manifest.of` or a `ManifestBuilder`.

    Attributes:
        folder: that paths are relative to; absolute.
        format: what it was read as, in words.
        notes: what the reader should know, such as columns that were ignored.
    """

    def __init__(
        self,
        folder: Path,
        format: str,
        notes: tuple[str, ...],
        *,
        length: int,
        columns: Mapping[str, Texts | NDArray[Any]],
        scores: Mapping[str, NDArray[np.float64]],
    ) -> None:
        self.folder, self.format, self.notes = folder, format, notes
        self._length, self._columns, self._scores = length, columns, scores

    @classmethod
    def of(cls, clips: Iterable[Clip], *, folder: Path, format: str = "clips") -> Manifest:
        """Make a manifest of clips, which may come one after the other."""
        builder = ManifestBuilder(folder, format)
        for clip in clips:
            builder.add(clip)
        return builder.build()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the fields that some clip has, in the order of `FIELDS`, then `scores.NAME` for every score."""
        return (
            *(name for name in FIELDS if name in self._columns or name == "path"),
            *(f"scores.{name}" for name in self._scores),
        )

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Clip: ...
    @overload
    def __getitem__(self, index: slice) -> Manifest: ...
    def __getitem__(self, index: int | slice) -> Clip | Manifest:
        if isinstance(index, slice):
            return self.select(range(*index.indices(self._length)))
        if not -self._length <= index < self._length:
            raise IndexError(f"clip {index} of {self._length}")
        row = self._row(index % self._length)
        row["path"] = self.folder / row["path"]
        return Clip(**row, folder=self.folder)

    def __iter__(self) -> Iterator[Clip]:
        return (self[index] for index in range(self._length))

    def __repr__(self) -> str:
        return f"<Manifest of {self._length} clips in {self.folder}, {self.format}>"

    def rows(self, folder: Path) -> Iterator[dict[str, Any]]:
        """The clips as tables of the fields they have; paths are relative to `folder` where they lie in it."""
        target, own = str(folder), str(self.folder)
        for index in range(self._length):
            row = self._row(index)
            if target != own:
                row["path"] = within(target, os.path.join(own, row["path"]))  # noqa: PTH118 - a million Paths are slow
            if ":" in row["path"] and not row["path"].startswith("/"):
                row["path"] = f"./{row['path']}"  # which tells `movie:1.mp4` from an address
            yield row

    def select(self, indices: Iterable[int]) -> Manifest:
        """A manifest of some of the clips, in the order given.

        Raises:
            IndexError: there is no such clip.
        """
        chosen = np.fromiter(indices, np.int64)
        if len(chosen) and not -self._length <= chosen.min() <= chosen.max() < self._length:
            raise IndexError(f"clips {chosen.min()} to {chosen.max()} of {self._length}")
        chosen[chosen < 0] += self._length
        return Manifest(
            self.folder,
            self.format,
            self.notes,
            length=len(chosen),
            columns={
                name: column.select(chosen) if isinstance(column, Texts) else column[chosen]
                for name, column in self._columns.items()
            },
            scores={name: column[chosen] for name, column in self._scores.items()},
        )

    def _row(self, index: int) -> dict[str, Any]:
        """The fields that a clip has; the path is as the manifest holds it."""
        row: dict[str, Any] = {}
        for name in FIELDS:
            column = self._columns.get(name)
            if isinstance(column, Texts):
                text = column[index]
                if text or (text is not None and name not in TEXT):
                    row[name] = text
            elif column is not None and (number := present(column.item(index))) is not None:
                row[name] = number
        if self._scores:
            found = {name: column.item(index) for name, column in self._scores.items()}
            if scores := {name: value for name, value in found.items() if not math.isnan(value)}:
                row["scores"] = scores
        return row


class ManifestBuilder:
    """Collects clips, column by column.

    Args:
        folder: that paths are relative to.
        format: what is read, in words.
        notes: what the reader should know; more may be appended.
    """

    def __init__(self, folder: Path, format: str = "clips", notes: Iterable[str] = ()) -> None:
        self.folder = Path(without_dots(str(folder.absolute())))
        self.format, self.notes = format, list(notes)
        self._length = 0
        self._columns: dict[str, TextsInMaking | NumbersInMaking] = {}
        self._scores: dict[str, NumbersInMaking] = {}
        self._parents: dict[str, str] = {}

    def __len__(self) -> int:
        return self._length

    def add(self, clip: Clip) -> None:
        """Append a clip. Scores that are NaN are left out."""
        fields = {name: value for name in FIELDS if (value := getattr(clip, name)) is not None}
        self.append(fields | {"path": str(clip.path.absolute())}, clip.scores)

    def append(self, fields: Mapping[str, str | float], scores: Mapping[str, float]) -> None:
        """Append a clip given by its fields.

        Args:
            fields: `path`, absolute or relative to the folder, and what else it has; numbers are 0 or more.
            scores: finite numbers.
        """
        row = self._length
        for name, value in fields.items():
            column = self._columns.get(name)
            if column is None:
                if value == "" and name in TEXT:
                    continue
                column = self._columns[name] = _column_for(name)
            column.put(row, self.name(value) if name == "path" else value)  # type: ignore[arg-type]
        for name, score in scores.items():
            if name not in self._scores:
                self._scores[name] = NumbersInMaking(is_whole=False)
            self._scores[name].put(row, score)
        self._length = row + 1

    def name(self, path: str) -> str:
        """A path as the manifest holds it: without `.` and `..`, relative if it lies in the folder, else absolute."""
        if path.startswith("/"):
            path = within(str(self.folder), path)
        # only these can hold a '.', a '..' or an empty part, and hardly any path does
        if path.startswith(".") or "/." in path or "//" in path:
            parent, name = os.path.split(os.path.join(str(self.folder), path))  # noqa: PTH118
            if parent not in self._parents:
                self._parents[parent] = without_dots(parent)
            path = within(str(self.folder), os.path.join(self._parents[parent], name))  # noqa: PTH118
        return path

    def build(self) -> Manifest:
        """The manifest of all clips so far. It shares their memory, so nothing can be added any more."""
        return Manifest(
            self.folder,
            self.format,
            tuple(self.notes),
            length=self._length,
            columns={name: column.done(self._length) for name, column in self._columns.items()},
            scores={name: column.done(self._length) for name, column in self._scores.items()},
        )


def without_dots(folder: str) -> str:
    """The same folder without `.` and `..`. A `..` after a link leads elsewhere than the text says, so look."""
    plain, real = os.path.normpath(folder), os.path.realpath(folder)
    return plain if os.path.realpath(plain) == real else real


def read_manifest(source: Path) -> Manifest:
    """Read the clips that a path means, whatever form they have.

    JSON lines, CSV and TSV with or without a header, Parquet, a folder in the layout of Hugging Face `datasets`, a
    folder with a `manifest.jsonl`, a folder of videos or pictures (with captions beside them, or in folders named after
    classes), or one video or picture.

    Args:
        source: the file or folder. Relative paths in a file are relative to the folder it lies in.

    Raises:
        InputError: it is none of these, is empty, or has a row that cannot be used; file, row and column are named.
        UsageError: it is Parquet, and pyarrow is not installed.
    """
    from opensora_core.data.formats import read  # the formats know the table, not the other way round

    return read(Path(source))


def write_clips(clips: Iterable[Clip], path: Path) -> None:
    """Write a manifest that is whole or absent: JSON lines, CSV, TSV or Parquet by the suffix of `path`.

    Paths of clips are written relative to the folder of `path` where they lie in it, else absolute. `read_manifest`
    gives the same clips back.

    Args:
        clips: a manifest, or clips that may come one after the other.
        path: `.jsonl`, `.csv`, `.tsv` or `.parquet`.

    Raises:
        InputError: another suffix, or a text that the format cannot hold.
        UsageError: Parquet, and pyarrow is not installed.
        ResourceError: the file system refuses it.
    """
    from opensora_core.data.formats import write

    write(clips if isinstance(clips, Manifest) else Manifest.of(clips, folder=Path(path).parent), Path(path))
