"""Manifests as JSON lines, as `osora` writes them: one object on a line, with only the fields that the clip has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opensora_core.data.formats.rows import RowReader, read_lines
from opensora_core.data.manifest import Manifest, ManifestBuilder
from opensora_core.errors import InputError

_EXAMPLE = 'a line is one object, such as {"path": "a.mp4", "caption": "a dog"}'
_DECODER = json.JSONDecoder()


def read(path: Path, builder: ManifestBuilder) -> None:
    """Read a file into a builder.

    Raises:
        InputError: a line is no object, or a value cannot be used; row and column are named.
    """
    rows = RowReader(path, builder)
    for row, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            cells = _parse(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, row {row}, column {error.colno}: not JSON: {error.msg}", _EXAMPLE) from None
        except (RecursionError, ValueError) as error:
            raise InputError(f"{path}, row {row}: cannot be read as JSON: {error}") from None
        if not isinstance(cells, dict):
            raise InputError(f"{path}, row {row}: not an object", _EXAMPLE)
        rows.add(row, cells)
    rows.finish("JSON lines")


def _parse(line: str) -> Any:
    """What json.loads does, in less time; it speaks where this does not understand."""
    try:
        value, end = _DECODER.raw_decode(line)
    except json.JSONDecodeError:
        return json.loads(line.rstrip())
    return value if line[end:] in ("\n", "\r\n", "") else json.loads(line.rstrip())


def write(manifest: Manifest, path: Path, folder: Path) -> None:
    """Write a manifest to `path`, with paths relative to `folder`."""
    with path.open("wb") as file:
        for row in manifest.rows(folder):
            try:
                line = json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # a lone surrogate has no UTF-8, but it has an escape
                line = json.dumps(row).encode()
            file.write(line + b"\n")
