"""The scores of every frame, as CSV or Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opensora_core.errors import UsageError
from opensora_core.files import replacing

if TYPE_CHECKING:
    from opensora_core.curation.boundaries import Detection

SUFFIXES = (".csv", ".parquet")

_Columns = dict[str, NDArray[Any]]


def keep_scores(path: Path, found: Detection) -> None:
    """Keep the scores of a source where `write_stats` finds them.

    Raises:
        ResourceError: the file system refuses it.
    """
    curves = {f"score.{name}": np.asarray(curve, np.float32) for name, curve in found.scores.items()}
    with replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, seconds=found.seconds, keyframe=found.is_keyframe, **curves)


def check_stats(path: Path) -> None:
    """Check before anything is done that statistics can be written to a path.

    Raises:
        UsageError: it is Parquet, and pyarrow is not installed.
    """
    if path.suffix.lower() == ".parquet":
        try:
            import_module("pyarrow.parquet")
        except ImportError:
            raise UsageError("Parquet needs pyarrow", 'pip install "osora[parquet]", or name a .csv') from None


def write_stats(path: Path, kept: Iterable[tuple[str, str, Path]]) -> None:
    """Write a row per frame: source, frame, seconds, whether it is a keyframe, and every score.

    Args:
        path: a `.csv` or `.parquet` for all sources, or a folder for a CSV file per source.
        kept: (source, name, file of `keep_scores`), in order. Those that have no such file are passed by.

    Raises:
        ResourceError: the file system refuses it.
    """
    tables = ((source, name, _read(file)) for source, name, file in kept if file.is_file())
    if path.suffix.lower() == ".csv":
        with replacing(path) as part:
            _write_csv(part, ((source, columns) for source, _, columns in tables))
    elif path.suffix.lower() == ".parquet":
        with replacing(path) as part:
            _write_parquet(part, ((source, columns) for source, _, columns in tables))
    else:
        for source, name, columns in tables:
            with replacing(path / f"{name}.csv") as part:
                _write_csv(part, [(source, columns)])


def _read(file: Path) -> _Columns:
    with np.load(file, allow_pickle=False) as kept:
        columns: _Columns = {"frame": np.arange(len(kept["seconds"])), "seconds": kept["seconds"]}
        columns["keyframe"] = kept["keyframe"].astype(np.int8)
        return columns | {name.removeprefix("score."): kept[name] for name in kept.files if name.startswith("score.")}


def _write_csv(path: Path, tables: Iterable[tuple[str, _Columns]]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer, names = csv.writer(file, lineterminator="\n"), list[str]()
        for source, columns in tables:
            if not names:
                names = list(columns)
                writer.writerow(["source", *names])
            texts = [_texts(columns[name]) for name in names]
            writer.writerows([source, *values] for values in zip(*texts, strict=True))


def _texts(column: NDArray[Any]) -> list[str]:
    """Scores with the digits that their kind has; times and numbers of frames keep all of theirs."""
    return [f"{value:.7g}" if column.dtype == np.float32 else repr(value) for value in column.tolist()]


def _write_parquet(path: Path, tables: Iterable[tuple[str, _Columns]]) -> None:
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    writer: Any = None
    try:
        for source, columns in _safe(tables):
            table = arrow.table(
                {"source": arrow.array([source] * len(columns["frame"])).dictionary_encode(), **columns}
            )
            if writer is None:
                writer = parquet.ParquetWriter(path, table.schema)
            writer.write_table(table.cast(writer.schema))
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        parquet.write_table(arrow.table({"source": arrow.array([], arrow.string())}), path)


def _safe(tables: Iterable[tuple[str, _Columns]]) -> Iterator[tuple[str, _Columns]]:
    """Names that are not UTF-8 as Parquet can hold them."""
    for source, columns in tables:
        yield source.encode("utf-8", "backslashreplace").decode(), columns
