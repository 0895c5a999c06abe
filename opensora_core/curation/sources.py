"""What is to be split: files, folders, globs, manifests and lists become sources, each known by its content.

Nothing is opened that could hang or lead elsewhere: pipes, devices and links out of a folder are told, not read.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from opensora_core.errors import InputError

_NAMES = """
mp4 m4v mov qt mkv webm avi divx ts mts m2ts m2t mpg mpeg vob wmv asf flv f4v ogv ogm 3gp 3g2 mj2 mxf nut y4m ivf obu
h264 264 hevc h265 265
"""
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
"""Suffixes, in lower case, of the files that are taken for videos in a folder."""

MANIFESTS = frozenset((".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"))
STATE = ".split"
"""The folder inside an output in which `osora split` keeps its records; a folder that has one is no input."""

_END_BYTES = 16 * 2**10  # of the head and of the tail; the size and the time of change tell the rest
_SLUG_LENGTH = 40
# where a name has no suffix: (offset, bytes) of the containers that people strip it from
_MAGIC = (
    *((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (0, b"\x1a\x45\xdf\xa3"), (8, b"AVI "), (0, b"FLV\x01"), (0, b"OggS")),
    *((0, b"YUV4MPEG2 "), (0, b"\x00\x00\x01\xba"), (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"), (188, b"\x47")),
)
_KINDS = (
    (stat.S_ISFIFO, "a named pipe, not a file"),
    (stat.S_ISSOCK, "a socket, not a file"),
    (stat.S_ISCHR, "a device, not a file"),
    (stat.S_ISBLK, "a device, not a file"),
    (stat.S_ISDIR, "a folder, not a file"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """A file to split.

    Attributes:
        path: absolute, as it was named; links in it are kept.
        size_bytes: of the file; 0 if it cannot be used.
        identity: of its content, in hex: size, time of change, first and last bytes. Empty if it cannot be used.
        reason: why it cannot be used; empty if it can.
    """

    path: Path
    size_bytes: int = 0
    identity: str = ""
    reason: str = ""

    @property
    def sort_key(self) -> bytes:
        """Its place in every list: by the bytes of its path, the same on every machine."""
        return os.fsencode(self.path)

    def name(self, *, by_path: bool) -> str:
        """A name for its clips: safe letters of its own name, and a sum of its content, with its path if asked."""
        content = self.identity or "nothing"
        told = f"{content}\0".encode() + self.sort_key if by_path or not self.identity else content.encode()
        return f"{slug(self.path.stem)}-{hashlib.sha256(told).hexdigest()[:12]}"

    def shard(self, num_shards: int) -> int:
        """Which of so many machines splits it: of equal content all go to the same one."""
        told = self.identity.encode() or self.sort_key
        return int.from_bytes(hashlib.sha256(told).digest()[:8], "big") % num_shards


@dataclass
class Found:
    """What the inputs hold.

    Attributes:
        sources: by their paths, each file once.
        notices: what was passed by.
    """

    sources: list[Source] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def slug(text: str) -> str:
    """Letters of a name that are safe in every shell, file system and address."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain)[:_SLUG_LENGTH].strip("-") or "video"


def find_sources(inputs: Sequence[str | Path], *, listed: Iterable[str | Path] = (), output: Path) -> Found:
    """Find the videos that inputs mean.

    Args:
        inputs: files, folders (with all below them), globs, and manifests by their suffix.
        listed: more files and folders, of which those that are missing become sources with a reason.
        output: the folder that is written; what lies in it is no input.

    Returns:
        Sources by path. One that is a pipe, a device, empty, missing in a list, or another name of a file that is there
        already has a reason.

    Raises:
        InputError: an input that does not exist, or a manifest that cannot be read.
    """
    walk = _Walk(os.path.realpath(output))
    for word in inputs:
        walk.add_input(str(word))
    for path in listed:
        walk.add_path(str(path))
    found = Found(notices=walk.notices())
    paths = sorted(walk.paths.items(), key=lambda item: os.fsencode(item[0]))
    known: dict[tuple[int, int], Path] = {}
    for path, reason in paths:
        source = Source(Path(path), reason=reason) if reason else identified(Path(path))
        if source.identity and (inode := _inode(source.path)) is not None:
            first = known.setdefault(inode, source.path)
            if first != source.path:
                source = replace(source, identity="", reason=f"the same file as {first}")
        found.sources.append(source)
    return found


def identified(path: Path) -> Source:
    """A source with its identity, or with the reason why it has none; nothing but a regular file is opened."""
    try:
        kind = path.stat().st_mode
        if reason := next((words for holds, words in _KINDS if holds(kind)), ""):
            return Source(path, reason=reason)
        # what became a pipe since then must not block
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            facts = os.fstat(descriptor)
            if not facts.st_size:
                return Source(path, reason="an empty file")
            content = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns} ".encode())
            content.update(file.read(_END_BYTES))
            file.seek(max(facts.st_size - _END_BYTES, 0))
            content.update(file.read(_END_BYTES))
            return Source(path, facts.st_size, content.hexdigest())
    except (OSError, ValueError) as error:
        return Source(path, reason=_refusal(path, error))


def _refusal(path: Path, error: OSError | ValueError) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ELOOP:
        return "a link that leads to itself"
    if number in (errno.ENOENT, errno.ENOTDIR):
        return "a link to nothing" if path.is_symlink() else "there is no such file"
    if number in (errno.EACCES, errno.EPERM):
        return "no permission to read it"
    return f"cannot be read: {(error.strerror if isinstance(error, OSError) else None) or error}"


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return (facts.st_dev, facts.st_ino) if facts.st_ino else None


class _Walk:
    """Collects paths, each with the reason why it cannot be used, or none."""

    def __init__(self, output: str) -> None:
        self.paths: dict[str, str] = {}
        self._output = output
        self._notes: list[str] = []
        self._num_hidden = self._num_links = self._num_others = 0

    def notices(self) -> list[str]:
        """What was passed by, for people."""
        counts = (
            (self._num_others, "files passed by: no videos by their names"),
            (self._num_hidden, "hidden folders passed by"),
            (self._num_links, "links to folders passed by: what they lead to is read where it lies, or name it"),
        )
        return [f"{count} {words}" for count, words in counts if count] + self._notes

    def add_input(self, word: str) -> None:
        if os.path.lexists(word):
            suffix = os.path.splitext(word)[1].lower()  # noqa: PTH122 - also of names that Path would change
            if suffix in MANIFESTS and os.path.isfile(word):  # noqa: PTH113
                self._add_manifest(Path(word))
            else:
                self.add_path(word)
            return
        matches = sorted(glob.glob(word, recursive=True), key=os.fsencode) if glob.has_magic(word) else []  # noqa: PTH207
        if not matches:
            what = "matches no file" if glob.has_magic(word) else "does not exist"
            raise InputError(f"{word} {what}", "name a video, a folder, a glob, a manifest, or - for a list on stdin")
        for match in matches:
            self.add_path(match)

    def add_path(self, word: str) -> None:
        path = os.path.abspath(word)  # noqa: PTH100 - Path.absolute keeps the dots
        if os.path.isdir(path):  # noqa: PTH112
            self._add_folder(path)
        else:
            self.paths.setdefault(path, "")

    def _add_manifest(self, path: Path) -> None:
        from opensora_core.data import read_manifest  # torch comes with it, which folders do without

        clips = read_manifest(path)
        num_ranges = num_left = 0
        for clip in clips:
            if clip.status not in ("", "ok"):
                num_left += 1
                continue
            num_ranges += clip.start_seconds is not None or clip.end_seconds is not None
            self.paths.setdefault(os.path.abspath(clip.path), "")  # noqa: PTH100
        if num_ranges:
            self._notes.append(f"{num_ranges} rows of {path} are ranges of a file: the whole file is split")
        if num_left:
            self._notes.append(f"{num_left} rows of {path} passed by: their status is not ok")

    def _add_folder(self, root: str) -> None:
        inside = os.path.realpath(root).rstrip("/") + "/"
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            if os.path.realpath(folder) == self._output:
                continue
            if os.path.isdir(f"{folder}/{STATE}"):  # noqa: PTH112
                self._notes.append(
                    f"{folder} passed by: it is the output of a split; name its files to split them again"
                )
                continue
            try:
                with os.scandir(folder) as entries:
                    found = list(entries)
            except OSError as error:
                self.paths[folder] = _refusal(Path(folder), error)
                continue
            for entry in found:
                if _is_folder(entry):
                    if entry.name.startswith("."):
                        self._num_hidden += 1
                    elif entry.is_symlink():
                        self._num_links += 1
                    else:
                        waiting.append(entry.path)
                elif not _is_video(entry):
                    self._num_others += 1
                elif entry.is_symlink() and not f"{os.path.realpath(entry)}/".startswith(inside):
                    self.paths.setdefault(entry.path, "a link that leads out of the folder: name it to split it")
                else:
                    self.paths.setdefault(entry.path, "")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_video(entry: os.DirEntry[str]) -> bool:
    """By the suffix, or where there is none by the first bytes."""
    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
    if suffix or entry.name.startswith("."):
        return suffix in SUFFIXES
    return any(head[place : place + len(mark)] == mark for head in _head(entry) for place, mark in _MAGIC)


def _head(entry: os.DirEntry[str]) -> Iterator[bytes]:
    try:
        if entry.is_file(follow_symlinks=False):
            with open(entry.path, "rb") as file:  # noqa: PTH123
                yield file.read(256)
    except OSError:
        return
