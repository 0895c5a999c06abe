"""Archives, unpacked so that nothing in them can write elsewhere, or grow beyond all measure.

Members come one by one, in the order of the archive. What leads out of its folder, links, devices, and what grows too
large is refused; of the rest only videos and pictures are read.
"""

from __future__ import annotations

import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from opensora_core.errors import InputError, UsageError
from opensora_core.files import require_space

_CHUNK = 1 << 20
_HARMLESS = 256 * 2**20  # bytes that may come of next to nothing without being a bomb
_MOST_TOLD = 2**20  # bytes of a tar's header that tells of the next one
_TELLING = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_TORN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


@dataclass(frozen=True)
class Limits:
    """What an archive may be.

    Attributes:
        bytes: of all its members.
        files: members.
        ratio: of what comes out to what went in.
        file_bytes: of one member.
    """

    bytes: int
    files: int
    ratio: float
    file_bytes: int


@dataclass(frozen=True)
class Member:
    """A file in an archive.

    Attributes:
        name: as the archive has it; of an archive in the archive `inner.tar/name`.
        size: in bytes, as the archive says.
        refusal: why it is not unpacked; empty if it may be.
        write: puts it at a path; to be called before the next member is asked for.
    """

    name: str
    size: int
    refusal: str
    write: Callable[[Path], None]


def members(path: Path, limits: Limits) -> Iterator[Member]:
    """The files of a .zip, .tar (compressed or not) or .rar, and of tars that lie in a tar.

    Raises:
        InputError: it is none of these, torn, locked, or larger than the limits.
        UsageError: a .rar, and no library for it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if head.startswith(b"Rar!"):
            yield from _rar(path, limits)
        elif zipfile.is_zipfile(path):
            yield from _zip(path, limits)
        else:
            yield from _tar(path, limits)
    except _TORN as error:
        raise InputError(
            f"the archive {path} cannot be read: {error or type(error).__name__}", "fetch it again"
        ) from None
    except FileNotFoundError:
        raise InputError(f"there is no archive {path}", "name a file, or an http(s) link") from None


class _Account:
    """Adds up what comes out of an archive."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self.limits = path, limits
        self.bytes = self.files = 0

    def add(self, size: int, packed: int) -> str:
        """Count a member; returns why it may not be read, if so.

        Raises:
            InputError: the archive is beyond its limits.
        """
        limits = self.limits
        self.bytes += size
        self.files += 1
        if self.bytes > limits.bytes or self.files > limits.files:
            raise InputError(
                f"the archive {self.path} unpacks to more than {limits.bytes} bytes or {limits.files} files",
                "raise download.archive_bytes or download.archive_files if it is to be trusted",
            )
        if size > limits.file_bytes:
            return f"it has {size} bytes, and {limits.file_bytes} are allowed (download.file_bytes)"
        if size > _HARMLESS and size > limits.ratio * max(packed, 1):
            return f"{packed} bytes become {size}, which is no video (download.archive_ratio)"
        return ""

    def check_ratio(self, read: int, left: int = 0) -> None:
        """Of a whole archive or stream: what came out, less what of the last member is still to come.

        Raises:
            InputError: much more comes out than went in.
        """
        came = self.bytes - left
        if came > _HARMLESS and came > self.limits.ratio * max(read, 1):
            raise InputError(
                f"{read} bytes of the archive {self.path} become {came}, which is no video",
                "raise download.archive_ratio if it is to be trusted",
            )


def _writer(
    open_member: Callable[[], IO[bytes] | None],
    size: int,
    name: str,
    watch: Callable[[int], None] = lambda count: None,
) -> Callable[[Path], None]:
    """What writes a member to a path; `watch` is told how much has come."""

    def write(target: Path) -> None:
        require_space(target, size)
        source = open_member()
        if source is None:
            raise InputError(f"{name} has no content")
        count = 0
        with source, target.open("wb") as file:
            while chunk := source.read(_CHUNK):
                count += len(chunk)
                if count > size:
                    raise InputError(f"{name} has more than the {size} bytes that the archive says")
                watch(count)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if count != size:
            raise InputError(f"{name} has {count} bytes, and the archive says {size}")

    return write


def _zip(path: Path, limits: Limits) -> Iterator[Member]:
    account = _Account(path, limits)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            reason = account.add(info.file_size, info.compress_size)
            account.check_ratio(path.stat().st_size)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                reason = "a link or device, not a file"
            elif info.flag_bits & 0x1:
                reason = "it is locked with a password"
            opened = lambda info=info: archive.open(info)  # noqa: E731
            yield Member(info.filename, info.file_size, reason, _writer(opened, info.file_size, info.filename))


class _Header(tarfile.TarInfo):
    """A header of a tar. Those that only tell of the next one are read into memory, so they may not be large."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _TELLING and self.size > _MOST_TOLD:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return found


def _tar(path: Path, limits: Limits) -> Iterator[Member]:
    account = _Account(path, limits)
    with path.open("rb") as raw:
        raw.seek(257)
        is_plain = raw.read(5) == b"ustar"  # members can then be passed over without reading them
        raw.seek(0)
        with tarfile.open(fileobj=raw, mode="r:" if is_plain else "r|*", tarinfo=_Header) as archive:
            yield from _tar_members(archive, "", account, None if is_plain else raw)


def _tar_members(archive: tarfile.TarFile, folder: str, account: _Account, raw: IO[bytes] | None) -> Iterator[Member]:
    """`raw` is what a compressed archive is read from."""
    for info in archive:
        archive.members = []  # type: ignore[attr-defined]  # a million of them need not be kept
        if info.isdir():
            continue
        name = folder + info.name
        if info.isreg() and info.name.lower().endswith(".tar") and not folder:
            inner = archive.extractfile(info)
            assert inner is not None
            with inner, tarfile.open(fileobj=inner, mode="r|", tarinfo=_Header) as inside:
                yield from _tar_members(inside, f"{info.name.removesuffix('.tar')}/", account, raw)
            continue
        reason = account.add(info.size, info.size)
        if not info.isreg():
            reason = "a link or device, not a file"
        elif info.issparse():
            reason = "a file with holes, which is no video"

        touched: list[bool] = []

        def opened(info: tarfile.TarInfo = info, touched: list[bool] = touched) -> IO[bytes] | None:
            touched.append(True)
            return archive.extractfile(info)

        def watch(count: int, size: int = info.size) -> None:
            if raw is not None:
                account.check_ratio(raw.tell(), size - count)

        yield Member(name, info.size, reason, _writer(opened, info.size, name, watch))
        if raw is not None and not touched and info.isreg() and info.size > _HARMLESS:
            with opened() or io.BytesIO() as source:  # to pass it over is to unpack it, which is to be watched too
                count = 0
                while chunk := source.read(_CHUNK):
                    count += len(chunk)
                    watch(count)


def _rar(path: Path, limits: Limits) -> Iterator[Member]:
    try:
        rarfile: Any = import_module("rarfile")
    except ImportError:
        raise UsageError(
            f"{path} is a .rar, and there is no library for these",
            "pip install rarfile, and install unrar or bsdtar; or unpack it and name the folder to osora split",
        ) from None
    account = _Account(path, limits)
    try:
        with rarfile.RarFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                reason = account.add(info.file_size, info.compress_size)
                if not info.is_file():
                    reason = "a link or device, not a file"
                opened = lambda info=info: archive.open(info)  # noqa: E731
                yield Member(info.filename, info.file_size, reason, _writer(opened, info.file_size, info.filename))
    except rarfile.RarCannotExec:
        raise UsageError(
            f"{path} is a .rar, and no program that unpacks it is installed",
            "install unrar, unar, 7z or bsdtar; or unpack it and name the folder to osora split",
        ) from None
    except rarfile.Error as error:
        raise InputError(f"the archive {path} cannot be read: {error}", "fetch it again") from None


def torn(error: Exception) -> str | None:
    """What a failure within a member says about the archive; None if it is no matter of the archive."""
    with suppress(AttributeError):
        return str(error.message)  # type: ignore[attr-defined]
    is_torn = isinstance(error, _TORN) or (isinstance(error, OSError) and error.errno is None)  # as bz2 says it
    return f"it is torn: {error or type(error).__name__}" if is_torn else None
