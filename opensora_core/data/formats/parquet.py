"""Manifests as Parquet, through pyarrow, which is an extra of the package and is imported when it is needed."""

from __future__ import annotations

import math
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from opensora_core.data.formats.rows import COLUMNS, RowReader
from opensora_core.data.manifest import REAL, WHOLE, Manifest, ManifestBuilder
from opensora_core.errors import InputError, UsageError

_ROWS = 8192  # that are held as objects at a time


def _pyarrow() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError("Parquet needs pyarrow, which is not installed", 'pip install "osora[parquet]"') from None


def read(path: Path, builder: ManifestBuilder) -> None:
    """Read a file into a builder. Columns that are not known, which may hold whole videos, are not loaded.

    Raises:
        InputError: it is torn, or a value cannot be used; row and column are named.
        UsageError: pyarrow is not installed.
    """
    pyarrow, parquet = _pyarrow()
    rows = RowReader(path, builder)
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in COLUMNS or name == "scores" or name.startswith("scores.")]
            if not any(COLUMNS.get(name) == "path" for name in names):
                raise InputError(f"{path} has no column 'path' or 'file_name'", f"its columns: {', '.join(names)}")
            for batch in file.iter_batches(_ROWS, columns=wanted):
                for cells in batch.to_pylist(maps_as_pydicts="strict"):
                    row += 1
                    rows.add(row, {name: None if _is_nan(value) else value for name, value in cells.items()})
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path} as Parquet: {error}", "write or fetch it again") from None
    for name in names:
        if name not in wanted:
            rows.ignore(name)
    rows.finish("Parquet")


def _is_nan(value: object) -> bool:
    """Whether a value is what pandas writes for a missing number."""
    return isinstance(value, float) and math.isnan(value)


def write(manifest: Manifest, path: Path, folder: Path) -> None:
    """Write a manifest to `path`, with paths relative to `folder`.

    Raises:
        InputError: a text that Parquet cannot hold.
        UsageError: pyarrow is not installed.
    """
    pyarrow, parquet = _pyarrow()
    kinds = dict.fromkeys(WHOLE, pyarrow.int64()) | dict.fromkeys(REAL, pyarrow.float64())
    schema = pyarrow.schema(
        [
            (name, pyarrow.float64() if name.startswith("scores.") else kinds.get(name, pyarrow.string()))
            for name in manifest.columns
        ]
    )
    found = manifest.rows(folder)
    with parquet.ParquetWriter(path, schema) as writer:
        while rows := list(islice(found, _ROWS)):
            for row in rows:
                row |= {f"scores.{name}": value for name, value in row.get("scores", {}).items()}
            try:
                arrays = [pyarrow.array([row.get(field.name) for row in rows], field.type) for field in schema]
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{error.object!r} holds characters that Parquet cannot", "write a .jsonl instead"
                ) from None
            writer.write_batch(pyarrow.RecordBatch.from_arrays(arrays, schema=schema))
