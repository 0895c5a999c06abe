"""The sums that weights are checked by: a folder's `SHA256SUMS`, and the names of the files in the hub's cache."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from opensora_core.assets import hub
from opensora_core.files import write_bytes

SUMS = "SHA256SUMS"
"""As `sha256sum -c` reads it."""


def read_sums(folder: Path) -> dict[str, str]:
    """The sums of a folder's files by their paths in it; none where it has no `SHA256SUMS`."""
    with suppress(OSError, UnicodeDecodeError):
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        return {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}
    return {}


def add_sum(folder: Path, path: Path, digest: str) -> None:
    """Take note of the sum of a file that was brought to a folder."""
    sums = read_sums(folder) | {_relative(path, folder): digest}
    write_bytes(folder / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def expected_sum(path: Path) -> str:
    """The SHA-256 that a file should have; empty where nothing tells."""
    for folder in path.parents:
        if (folder / SUMS).is_file():
            return read_sums(folder).get(_relative(path, folder), "")
    name = path.resolve().name  # in the hub's cache a name leads to a file that is named after its sum
    return name if path.is_symlink() and len(name) == 64 else ""


def is_right(path: Path) -> bool | None:
    """Whether a file is as it came; None where nothing tells."""
    if path.is_symlink():
        return hub.is_whole(path, path.resolve().name)
    expected = expected_sum(path)
    return hub.is_whole(path, expected) if expected else None
