"""The rows of a manifest that is filtered: those that are kept, and those that were refused before.

    OUT/manifest.jsonl    the clips that are kept, with their scores
    OUT/rejects.jsonl     the refused ones, each with its whole row, its place and the reason; rows of others stay

The two are replaced one after the other. Rejects are written first, with all clips that were or are refused, and once
more when the manifest is there: a clip of both is not refused yet, so at no moment is a clip in neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_core.curation.filters.scoring import STATE
from opensora_core.curation.records import MANIFEST_FILE, REJECTS_FILE, line
from opensora_core.errors import UsageError
from opensora_core.files import replacing

if TYPE_CHECKING:
    from opensora_core.data.manifest import Manifest, ManifestBuilder

_REFUSED, _MARK = "clip", b'"what": "clip"'
_OURS = ("what", "position", "status", "reason")


@dataclass(frozen=True)
class Rows:
    """All clips of a manifest, in their order, those that were refused before among them.

    Attributes:
        folder: of the manifest that is written.
        lines: a row of JSON for each.
        clips: the same rows, checked.
        refused: numbers of those that are in the rejects and not in the manifest.
        others: lines of the rejects that are not ours.
    """

    folder: Path
    lines: list[bytes]
    clips: Manifest
    refused: frozenset[int]
    others: list[bytes]

    def row(self, number: int) -> dict[str, Any]:
        """A row as it is in the file."""
        found: dict[str, Any] = json.loads(self.lines[number])
        return found


def manifest_of(source: Path) -> Path:
    """The manifest that a path means: the file itself, or that of a folder.

    Raises:
        UsageError: there is none.
    """
    path = source / MANIFEST_FILE if source.is_dir() else source
    if not path.is_file():
        raise UsageError(f"there is no manifest {path}", "name a manifest, or a folder with a manifest.jsonl")
    return path


def output_of(manifest: Path, output: Path | None) -> Path:
    """The folder that is written.

    Raises:
        UsageError: none was named, and the manifest cannot be replaced where it is.
    """
    if output is None and manifest.name != MANIFEST_FILE:
        raise UsageError(
            f"{manifest.name} is not replaced: what is written is a {MANIFEST_FILE}", "name a folder: --output FOLDER"
        )
    found = output or manifest.parent
    other = found / MANIFEST_FILE
    if other.exists() and not (found / STATE).exists() and not other.samefile(manifest):
        raise UsageError(f"{other} is there and no filter made it", "choose another --output")
    return found


def read_rows(manifest: Path, output: Path, rejects: Path | None = None) -> Rows:
    """Read a manifest, and what was refused of it before.

    Args:
        manifest: in any form that `data` reads.
        output: the folder that is written.
        rejects: that belong to the manifest, where it is a whole one that is to take the place of the folder's own;
            paths are relative to the folder. None are the folder's own.

    Raises:
        InputError: a row cannot be used.
    """
    from opensora_core.data.formats.rows import read_lines
    from opensora_core.data.manifest import ManifestBuilder, read_manifest

    is_own = (output / MANIFEST_FILE).exists() and (output / MANIFEST_FILE).samefile(manifest)
    if rejects is not None:
        return _read_whole(manifest, output, rejects)
    others, held = _read_rejects(output / REJECTS_FILE)
    if not is_own:  # the manifest is whole as it is
        held = {}
    is_empty = held and not manifest.stat().st_size  # everything was refused
    listed = ManifestBuilder(output).build() if is_empty else read_manifest(manifest)
    if is_own:
        lines = [text.strip().encode(errors="surrogatepass") for text in read_lines(manifest) if text.strip()]
    else:
        lines = list(_moved(manifest, listed, output))
    refused: frozenset[int] = frozenset()
    if held:
        names = {clip.id for clip in listed}
        own = ManifestBuilder(output)
        _fill(own, output / REJECTS_FILE, held.values())
        gone = [clip.id in names for clip in own.build()]
        kept = {place: text for (place, text), is_there in zip(sorted(held.items()), gone, strict=True) if not is_there}
        lines, refused = _merged(lines, kept)
    builder = ManifestBuilder(output)
    _fill(builder, manifest, lines)
    return Rows(output, lines, builder.build(), refused, others)


def _read_whole(manifest: Path, output: Path, rejects: Path) -> Rows:
    """A manifest with all clips; those that the folder has in its rejects stay there until its own is written."""
    from opensora_core.data.formats.rows import read_lines
    from opensora_core.data.manifest import ManifestBuilder

    lines = [text.strip().encode(errors="surrogatepass") for text in read_lines(manifest) if text.strip()]
    builder = ManifestBuilder(output)
    _fill(builder, manifest, lines)
    gone = {_span(text) for text in _read_rejects(output / REJECTS_FILE)[1].values()}
    refused = frozenset(number for number, text in enumerate(lines) if gone and _span(text) in gone)
    return Rows(output, lines, builder.build(), refused, _read_rejects(rejects)[0])


def _span(text: bytes) -> tuple[Any, ...]:
    """What tells a row from others."""
    row = json.loads(text)
    return row.get("path"), row.get("start_seconds"), row.get("end_seconds")


def _moved(manifest: Path, listed: Manifest, output: Path) -> Iterator[bytes]:
    """Rows of another manifest, with columns that we do not know, and paths as seen from here."""
    from opensora_core.data.formats.rows import read_lines

    rows = listed.rows(output.absolute())
    if manifest.suffix.lower() not in (".jsonl", ".ndjson"):
        yield from (line(row).strip() for row in rows)
        return
    texts = (text for text in read_lines(manifest) if text.strip())
    for text, row in zip(texts, rows, strict=True):
        told = json.loads(text)
        yield line({**told, "path": row["path"]}).strip()


def _read_rejects(path: Path) -> tuple[list[bytes], dict[int, bytes]]:
    """Lines of others, and by their places the rows of clips that were refused."""
    others: list[bytes] = []
    held: dict[int, bytes] = {}
    if not path.is_file():
        return others, held
    for text in path.read_bytes().splitlines():
        row = None
        if _MARK in text:
            try:
                row = json.loads(text)
            except ValueError:  # somebody else's
                row = None
        if isinstance(row, dict) and row.get("what") == _REFUSED and isinstance(row.get("position"), int):
            was = row.pop("was", {})
            held[row["position"]] = line({**{k: v for k, v in row.items() if k not in _OURS}, **was}).strip()
        else:
            others.append(text)
    return others, dict(sorted(held.items()))


def _fill(builder: ManifestBuilder, source: Path, lines: Iterable[bytes]) -> None:
    from opensora_core.data.formats.rows import RowReader

    reader = RowReader(source, builder)
    for number, text in enumerate(lines, 1):
        reader.add(number, json.loads(text))
    reader.finish("JSON lines")


def _merged(lines: list[bytes], held: Mapping[int, bytes]) -> tuple[list[bytes], frozenset[int]]:
    """Put rows back to their places among the others."""
    merged: list[bytes] = []
    refused: set[int] = set()
    rest = iter(lines)
    for place, text in held.items():
        while len(merged) < place and (following := next(rest, None)) is not None:
            merged.append(following)
        refused.add(len(merged))
        merged.append(text)
    return [*merged, *rest], frozenset(refused)


def write_rows(rows: Rows, scored: Iterable[bytes], reasons: Mapping[int, str]) -> None:
    """Write manifest and rejects, in steps that each leave every clip in one of the two.

    Args:
        rows: all of them.
        scored: their lines, with the scores that they have now.
        reasons: number -> why it is refused.

    Raises:
        ResourceError: the file system refuses it.
    """
    lines = list(scored)
    manifest, rejects = rows.folder / MANIFEST_FILE, rows.folder / REJECTS_FILE
    coming_back = {number: "being judged anew" for number in rows.refused if number not in reasons}
    _write_rejects(rejects, rows.others, lines, {**reasons, **coming_back})
    with replacing(manifest) as part, part.open("wb") as file:
        file.writelines(text + b"\n" for number, text in enumerate(lines) if number not in reasons)
    if coming_back:
        _write_rejects(rejects, rows.others, lines, reasons)


def _write_rejects(path: Path, others: Iterable[bytes], lines: list[bytes], reasons: Mapping[int, str]) -> None:
    with replacing(path) as part, part.open("wb") as file:
        file.writelines(text + b"\n" for text in others)
        for number in sorted(reasons):
            row = json.loads(lines[number])
            was = {name: row.pop(name) for name in _OURS if name in row}
            told = {"what": _REFUSED, "status": "refused", "reason": reasons[number], "position": number}
            file.write(line({**row, **told, **({"was": was} if was else {})}))
