"""Weights that are here, checked against their sums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opensora_core.assets.holdings import Word, place_in
from opensora_core.assets.search import Wanted, find
from opensora_core.assets.sums import is_right
from opensora_core.errors import CheckpointError, OsoraError
from opensora_core.files import MANIFEST, readable, verify_manifest


@dataclass(frozen=True)
class WeightsVerified:
    """What a check of sums found: `whole`, `damaged`, `missing`, or `unknown` where there is no sum to check by."""

    name: str
    status: Literal["whole", "damaged", "missing", "unknown"]
    reason: str
    path: Path | None


def verify_weights(words: Iterable[Word], folder: Path | None = None) -> Iterator[WeightsVerified]:
    """Check weights that are here against their sums.

    Args:
        words: which.
        folder: that they were brought to; None is where runs find them.

    Raises:
        CheckpointError: some are damaged; all are told before.
    """
    damaged = []
    for word, kind in dict.fromkeys(words):
        wanted = Wanted.parse(word, kind)
        found = find(word, kind=kind)
        path = found.path if found else None
        if folder is not None and wanted.path is None:
            place = place_in(folder, wanted)
            path = place if place.exists() else None
        event = _verified(word, path, wanted)
        damaged += [event] if event.status == "damaged" else []
        yield event
    if damaged:
        raise CheckpointError(
            "; ".join(event.reason for event in damaged),
            f"remove what is damaged, then: osora download {' '.join(event.name for event in damaged)}",
        )


def _verified(word: str, path: Path | None, wanted: Wanted) -> WeightsVerified:
    if path is None:
        return WeightsVerified(word, "missing", "it is not here", None)
    folder = path if path.is_dir() else path.parent
    if (folder / MANIFEST).is_file():
        try:
            verify_manifest(folder)
        except OsoraError as error:
            return WeightsVerified(word, "damaged", error.message, path)
        return WeightsVerified(word, "whole", f"as {MANIFEST} says", path)
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    if wanted.asset is not None and path.is_dir():
        names = {name.rpartition("/")[2] for choice in wanted.asset.files for name in choice.split("|")}
        files = [file for file in files if file.name in names]
    unknown = 0
    for file in files:
        known = is_right(file)
        if known is False:
            return WeightsVerified(word, "damaged", f"{file} is damaged: its sum is not the one it came with", path)
        unknown += known is None
    if unknown:
        return WeightsVerified(word, "unknown", f"{unknown} of {len(files)} files have no sum to check by", path)
    size = readable(sum(file.stat().st_size for file in files))
    return WeightsVerified(word, "whole", f"{len(files)} files, {size}", path)
