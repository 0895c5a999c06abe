"""The forms that a manifest has on disk. `READERS` and `WRITERS` are tables; a new form is a file and a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from opensora_core.data.formats import delimited, folders, jsonl, parquet
from opensora_core.data.manifest import Manifest, ManifestBuilder, without_dots
from opensora_core.errors import InputError
from opensora_core.files import replacing

READERS: dict[str, Callable[[Path, ManifestBuilder], None]] = {
    ".jsonl": jsonl.read,
    ".ndjson": jsonl.read,
    ".csv": delimited.read,
    ".tsv": delimited.read,
    ".parquet": parquet.read,
}
"""Suffix -> what fills a builder from such a file, and sets its `format` and `notes`."""

WRITERS: dict[str, Callable[[Manifest, Path, Path], None]] = {
    ".jsonl": jsonl.write,
    ".csv": delimited.write,
    ".tsv": delimited.write_tabs,
    ".parquet": parquet.write,
}
"""Suffix -> what writes a manifest to a file, with paths relative to a folder."""

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SPLITS = ("train", "validation", "test")


def read(source: Path) -> Manifest:
    """Read a file or a folder; see `read_manifest`."""
    if source.is_dir():
        return _read_folder(source)
    if not source.is_file():
        raise InputError(
            f"there is no file or folder {source}", "name a manifest, a folder of clips, or a video or picture"
        )
    if source.suffix.lower() in folders.MEDIA:
        return folders.read_one(source)
    return _read_file(source)


def write(manifest: Manifest, path: Path) -> None:
    """Write a manifest in the form that the suffix of `path` names; see `write_clips`."""
    if path.suffix.lower() not in WRITERS:
        raise InputError(f"cannot write a manifest as {path.name}", f"end its name in {' '.join(WRITERS)}")
    with replacing(path) as part:
        WRITERS[path.suffix.lower()](manifest, part, Path(without_dots(str(path.parent.absolute()))))


def _read_file(path: Path, layout: str = "", notes: Sequence[str] = ()) -> Manifest:
    if path.suffix.lower() not in READERS:
        raise InputError(
            f"{path} is neither a manifest ({' '.join(READERS)}) nor a video or picture",
            "give the file the suffix of what it holds",
        )
    builder = ManifestBuilder(path.parent)
    READERS[path.suffix.lower()](path, builder)
    if not len(builder):
        raise InputError(f"{path} holds no clips", "a row is a path and a caption")
    builder.format = f"{layout}{builder.format}"
    builder.notes += notes
    return builder.build()


def _read_folder(folder: Path) -> Manifest:
    own = folder / "manifest.jsonl"
    if own.is_file():
        return _read_file(own)
    for place in (folder, *(folder / split for split in _SPLITS)):
        found = [place / name for name in _METADATA if (place / name).is_file()]
        if not found:
            continue
        notes = [f"{path.name} was not read: {found[0].name} was" for path in found[1:]]
        if place != folder:
            notes.append(f"only the split '{place.name}' was read")
        return _read_file(found[0], "Hugging Face folder, ", notes)
    return folders.read_folder(folder)
