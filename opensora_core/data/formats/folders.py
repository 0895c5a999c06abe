"""Folders of videos and pictures: captions beside the files, or classes as the names of folders."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from opensora_core.data.formats.rows import MAX_BYTES, decoded
from opensora_core.data.manifest import Manifest, ManifestBuilder
from opensora_core.errors import InputError

VIDEOS = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".gif"))
PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
MEDIA = VIDEOS | PICTURES
"""Suffixes, in lower case, of the files that are clips."""

_TABLES = frozenset((".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"))
_WORDNET_ID = re.compile(r"n\d{8}")
_CAPITALS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_IMAGENET_ENDS = ("n01440764", "n15075141")


@dataclass
class _Found:
    """What a walk met: paths relative to its root, and how much it passed by."""

    media: list[str] = field(default_factory=list)
    captions: set[str] = field(default_factory=set)
    tables: list[str] = field(default_factory=list)
    num_hidden: int = 0
    num_outside: int = 0
    num_links: int = 0

    def notes(self) -> list[str]:
        """What was passed by, for people."""
        counts = (
            (self.num_hidden, "hidden files or folders skipped"),
            (self.num_outside, "links that lead out of the folder skipped"),
            (self.num_links, "links to folders skipped: what they lead to is read where it lies"),
        )
        return [f"{count} {what}" for count, what in counts if count] + [
            f"{name} was not read: name it to read it" for name in self.tables
        ]


def read_one(path: Path) -> Manifest:
    """One video or picture, with the caption beside it if there is one.

    Raises:
        InputError: the caption cannot be read.
    """
    builder = ManifestBuilder(path.parent, "one video" if path.suffix.lower() in VIDEOS else "one picture")
    beside = path.with_suffix(".txt")
    fields = {"caption": _caption(beside)} if beside.is_file() else {}
    builder.append({"path": path.name, **fields}, {})
    return builder.build()


def read_folder(folder: Path) -> Manifest:
    """All videos and pictures below a folder, in the order of their paths, with their captions.

    A caption is the text of a file of the same name that ends in `.txt`. If there are none at all, and every file lies
    in a folder below, its caption is the name of that folder, as words: `ApplyEyeMakeup` is "Apply Eye Makeup". Folders
    with the WordNet ids of all 1000 classes of ImageNet have the names of these.

    Raises:
        InputError: there are no clips, or something cannot be read.
    """
    found = _walk(folder)
    notes = found.notes()
    if not found.media:
        raise InputError(
            f"{folder} has no clips: looked for manifest.jsonl, metadata.jsonl, .csv or .parquet, and files ending in "
            f"{' '.join(sorted(MEDIA))}" + (f" ({'; '.join(notes)})" if notes else ""),
            f"name the file: {folder / found.tables[0]}" if found.tables else "name a folder that has some",
        )
    if not found.captions and all("/" in name for name in found.media):
        return _read_classes(folder, found.media, notes)
    builder = ManifestBuilder(folder, "folder of clips", notes)
    num_without = 0
    for name in found.media:
        beside = _stem(name) + ".txt"
        fields = {"caption": _caption(folder / beside)} if beside in found.captions else {}
        num_without += not fields
        builder.append({"path": name, **fields}, {})
    if found.captions and num_without:
        builder.notes.append(f"{num_without} of {len(builder)} clips have no .txt with a caption beside them")
    return builder.build()


def _read_classes(folder: Path, media: list[str], notes: list[str]) -> Manifest:
    classes = sorted({_class(name) for name in media})
    captions = {name: _CAPITALS.sub(" ", name).replace("_", " ") for name in classes}
    notes = [*notes, f"captions are the names of the {len(classes)} folders that clips lie in"]
    if all(_WORDNET_ID.fullmatch(name) for name in classes):
        if len(classes) == 1000 and (classes[0], classes[-1]) == _IMAGENET_ENDS:
            captions = dict(zip(classes, _imagenet(), strict=True))
            notes[-1] = (
                "captions are the names of the 1000 classes of ImageNet, which folders are sorted in the order of"
            )
        else:
            notes[-1] = (
                f"captions are the WordNet ids of {len(classes)} folders: "
                "names are known only where exactly the 1000 classes of ImageNet are there"
            )
    builder = ManifestBuilder(folder, "class folders", notes)
    for name in media:
        builder.append({"path": name, "caption": captions[_class(name)]}, {})
    return builder.build()


def _class(name: str) -> str:
    return name.rsplit("/", 2)[-2]


def _stem(name: str) -> str:
    return name[: name.rindex(".")]


def _imagenet() -> list[str]:
    from opensora_core.text.labels import CLASS_LISTS  # torch comes with it, which most manifests do without

    return resources.files("opensora_core.text").joinpath(CLASS_LISTS[1000]).read_text("utf-8").splitlines()


def _walk(root: Path) -> _Found:
    found, waiting = _Found(), [""]
    inside = os.path.realpath(root).rstrip("/") + "/"
    try:
        while waiting:
            folder = waiting.pop()
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if entry.name.startswith("."):
                        found.num_hidden += 1
                    elif entry.is_symlink() and not f"{os.path.realpath(entry)}/".startswith(inside):
                        found.num_outside += 1
                    elif _is_folder(entry):
                        if entry.is_symlink():
                            found.num_links += 1
                        else:
                            waiting.append(f"{name}/")
                    else:  # what is no file, or a link to nothing, is told when it is looked at
                        _sort_in(found, name, is_top=not folder)
    except OSError as error:
        raise InputError(f"cannot read the folder {error.filename or root}: {error.strerror}") from None
    found.media.sort()
    found.tables.sort()
    found.captions.intersection_update(_stem(name) + ".txt" for name in found.media)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _sort_in(found: _Found, name: str, is_top: bool) -> None:
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a million Paths are slow
    if suffix in MEDIA:
        found.media.append(name)
    elif name.endswith(".txt"):
        found.captions.add(name)
    elif is_top and suffix in _TABLES:
        found.tables.append(name)


def _caption(path: Path) -> str:
    """The text of a file, without the line feed that ends it."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read the caption {path}: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"the caption {path} is larger than {MAX_BYTES >> 20} MB")
    text = decoded(path, content)
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
