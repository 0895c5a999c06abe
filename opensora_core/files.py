"""Files that are whole or absent: written under another name in the same folder, then moved into place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opensora_core.errors import CheckpointError, ResourceError

MANIFEST = "manifest.json"
"""SHA-256 sums of the files of a folder, by their relative paths. Written last, it says that the folder is whole."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` when the block ends, and vanishes if it fails.

    Missing parent folders are made. A reader, or a process killed at any moment, sees the old file or the new one.

    Raises:
        ResourceError: no space, no permission, or any other refusal of the file system.
    """
    part = path.with_name(f".osora-{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        part.replace(path)
    except OSError as error:
        raise refusal(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its name when the block ends, and vanishes if it fails.

    A folder that has the name already is replaced. What a killed process left of an earlier try is removed.

    Raises:
        ResourceError: no space, no permission, or any other refusal of the file system.
    """
    part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    try:
        if old.exists() and not folder.exists():  # killed between the two renames below
            old.rename(folder)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for path in part.rglob("*"):
            if path.is_file():
                _sync(path)
        if folder.exists():
            folder.rename(old)
        try:
            part.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except OSError as error:
        raise refusal(folder, error) from error
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is whole or absent.

    Raises:
        ResourceError: the file system refuses it.
    """
    require_space(path, len(content))
    with replacing(path) as part:
        part.write_bytes(content)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the sums of every file of a folder; call it last.

    Raises:
        ResourceError: the file system refuses it.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    sums = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    write_bytes(folder / MANIFEST, (json.dumps(sums, indent=1) + "\n").encode())


def verify_manifest(folder: Path, part: str | None = None) -> None:
    """Check a folder against its manifest.

    Args:
        folder: has the manifest.
        part: a folder in it, to check that alone; "" is the files beside the manifest; None is everything.

    Raises:
        CheckpointError: no readable manifest, or a file that is missing or differs; the file is named.
    """
    try:
        sums: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        items = sorted(sums.items())
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST}: it was never finished, or is torn") from error
    for name, expected in items:
        if part is not None and name.rpartition("/")[0].partition("/")[0] != part:
            continue
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", "fetch or export the model again")
        if sha256(path) != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}", "fetch or export the model again"
            )


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write, so that two processes do not mix their lines.

    Raises:
        ResourceError: the file system refuses it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise refusal(path, error) from error


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds `path`, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def require_space(path: Path, num_bytes: int) -> None:
    """Check that a file of so many bytes fits.

    Raises:
        ResourceError: it does not; says how much is needed and how much is free.
    """
    if num_bytes > (free := free_bytes(path)):
        raise ResourceError(
            f"no space left for {path}: needed {readable(num_bytes)}, free {readable(free)}",
            "free some space, or choose another disk",
        )


def refusal(path: Path, error: OSError) -> ResourceError:
    """The error of the file system, told for people."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        try:
            free = readable(free_bytes(path))
        except OSError:
            free = "unknown"
        return ResourceError(f"no space left for {path}: free {free}", "free some space, or choose another disk")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(f"no permission to write {path}: {error.strerror}", "choose another folder")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return ResourceError(f"cannot write {path}: {error.strerror}", "a file stands where a folder is needed")
    return ResourceError(f"cannot write {path}: {error.strerror or error}")


def readable(num_bytes: float) -> str:
    """A number of bytes in the unit that people say it in."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
