"""One thing to be had, and how; what came of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_core.curation.sources import SUFFIXES, slug
from opensora_core.net import Progress

if TYPE_CHECKING:
    from opensora_core.curation.download.session import Session

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
MEDIA = SUFFIXES | PICTURES | {".gif"}
"""Suffixes, in lower case, of what is taken for a video or a picture."""

_MAGIC = (
    (4, b"ftyp", ".mp4"),
    (4, b"moov", ".mov"),
    (4, b"mdat", ".mov"),
    (0, b"\x1a\x45\xdf\xa3", ".mkv"),
    (8, b"AVI ", ".avi"),
    (0, b"FLV\x01", ".flv"),
    (0, b"OggS", ".ogv"),
    (0, b"\x00\x00\x01\xba", ".mpg"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", ".wmv"),
    (188, b"\x47", ".ts"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"\x89PNG\r\n", ".png"),
    (8, b"WEBP", ".webp"),
    (0, b"GIF8", ".gif"),
)
_SAFE = re.compile(r"[^\w.+-]+")
_MOST_BYTES, _MOST_PARTS = 150, 16  # of a name, and names of a path


@dataclass(frozen=True)
class Brought:
    """What bringing a file found out about it.

    Attributes:
        sha256: in hex; empty if nobody computed it on the way.
        fields: of its row in the manifest.
    """

    sha256: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


Bring = Callable[[Path, "Session", Progress], Brought]
"""Puts a file at a path, whole or not at all; raises `net.Unavailable` or an `InputError` where it cannot be had."""


@dataclass(frozen=True)
class Item:
    """A row of a manifest to be, and how its file is had.

    Attributes:
        key: names the file, the same in every run; items with one key share the file.
        source: where it is from, as it is shown; without secrets.
        bring: how the file is had.
        path: of the file in the output; empty is a name made of `name`, the key, and what the file turns out to be.
        name: for people.
        caption: its words, if the source gives any.
        start_seconds: where the range begins in the file; None is the whole file.
        end_seconds: where it ends.
        licence: under which it may be used, as the source says; empty where it does not.
        attribution: whom to name.
        fields: more of its row.
    """

    key: str
    source: str
    bring: Bring
    path: str = ""
    name: str = ""
    caption: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    licence: str = ""
    attribution: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Names the row, the same in every run."""
        return _sum(f"{self.key}\0{self.start_seconds}\0{self.end_seconds}", 24)

    @property
    def file_id(self) -> str:
        """Names the file, the same in every run."""
        return _sum(self.key, 16)

    def place(self, suffix: str) -> str:
        """Where the file goes, relative to the output."""
        named = Path(self.name)
        name = named.stem if named.suffix.lower() in MEDIA else self.name
        return self.path or f"files/{slug(name)}-{self.file_id}{suffix}"

    def row(self, path: str, size: int, sha256: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Its row in the manifest, of a file that is here."""
        told = {
            "path": path,
            "caption": self.caption,
            **self.fields,
            "sha256": sha256,
            "source": self.source,
            "start_seconds": self.start_seconds,
            "end_seconds": self.end_seconds,
            "bytes": size,
            "licence": self.licence or None,
            "attribution": self.attribution or None,
            **fields,
        }
        return {name: value for name, value in told.items() if value is not None}


def _sum(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def suffix_of(path: Path, named: str) -> str:
    """The suffix that a file should have: the one it was named with, or what its first bytes say; empty for neither."""
    if named.lower() in MEDIA:
        return named.lower()
    with path.open("rb") as file:
        head = file.read(512)
    return next((suffix for at, mark, suffix in _MAGIC if head[at : at + len(mark)] == mark), "")


def safe_path(name: str) -> str:
    """A relative path of letters that every file system takes; no part of it leads anywhere else.

    Raises:
        ValueError: it is absolute, leads out of its folder, or has nothing left.
    """
    plain = name.replace("\\", "/")
    parts = [part for part in plain.split("/") if part not in ("", ".")]
    if plain.startswith("/") or re.match(r"[A-Za-z]:", plain) or ".." in parts or "\0" in name or not parts:
        raise ValueError(f"{name!r} leads out of its folder")
    if len(parts) > _MOST_PARTS:
        raise ValueError(f"{name[:80]!r}... lies in {len(parts) - 1} folders, and {_MOST_PARTS - 1} are the most")
    return "/".join(_short(_SAFE.sub("_", part)).lstrip(".") or "_" for part in parts)


def _short(part: str) -> str:
    """The end of a name, with its suffix, in as many bytes as a file system takes."""
    return part.encode(errors="replace")[-_MOST_BYTES:].decode(errors="ignore")
