"""What weights there are, and where they lie on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from opensora_core.assets.search import BUNDLED_FOLDER, Located, Wanted, find
from opensora_core.assets.table import ASSETS, BUNDLED, Asset, Kind
from opensora_core.config import Config

Word = tuple[str, Kind]
"""What settings call weights, and the part that they are."""


@dataclass(frozen=True)
class Holding:
    """Weights, and whether they are here.

    Attributes:
        name: of the table, or as given.
        kind: the part that they are.
        about: what they are for.
        licence: as published; `unknown` where nothing says.
        size_bytes: on the disk if they are here, else about that much; None where unknown.
        path: where they are; None if they are not.
        source: where they come from.
    """

    name: str
    kind: Kind
    about: str
    licence: str
    size_bytes: int | None
    path: Path | None
    source: str


@dataclass(frozen=True)
class WeightsListed:
    """All weights that there are, or that were asked for."""

    items: tuple[Holding, ...]


def known_words() -> tuple[Word, ...]:
    """All names of the table."""
    return tuple((asset.name, asset.kind) for asset in ASSETS.values())


def needed_words(config: Config, verb: Literal["sample", "train"]) -> tuple[Word, ...]:
    """What a run of these settings reads: its model and encoders, or what training starts from and its encoders."""
    model = config.model.weights if verb == "sample" else config.train.init
    words: list[Word] = [(model, "model"), (config.vae.weights, "vae"), (config.text.weights, "text")]
    return tuple((word, kind) for word, kind in words if word)


def holdings(words: Iterable[Word], folder: Path | None = None) -> tuple[Holding, ...]:
    """What is known of weights, without the network.

    Args:
        words: which.
        folder: that they may have been brought to; None is wherever runs look.

    Raises:
        UsageError: an unknown word.
    """
    return tuple(_holding_in(folder, word, kind) for word, kind in dict.fromkeys(words))


def _holding_in(folder: Path | None, word: str, kind: Kind) -> Holding:
    found, wanted = holding_of(word, kind), Wanted.parse(word, kind)
    if folder is None or wanted.path is not None:
        return found
    path = place_in(folder, wanted)
    if path.exists():
        return holding_of(word, kind, Located(path))
    size = ASSETS[word].size_bytes if word in ASSETS else None
    return replace(found, size_bytes=size, path=None)


def holding_of(word: str, kind: Kind, found: Located | None = None) -> Holding:
    """What is known of weights, which were found there if it is said where."""
    found = found or find(word, kind=kind)
    asset = ASSETS.get(word)
    size = _size(found.path, asset) if found else asset.size_bytes if asset else None
    wanted = Wanted.parse(word, kind)
    if asset is not None:
        source = asset.url or (f"hf:{asset.repo}@{asset.revision}" if asset.repo else "this package")
    else:
        source = word if wanted.place else "this disk"
    return Holding(
        word,
        kind,
        asset.about if asset else "",
        asset.licence if asset else "unknown",
        size,
        found.path if found else None,
        source,
    )


def _size(path: Path, asset: Asset | None) -> int:
    if asset is not None and asset.name == BUNDLED:
        path = BUNDLED_FOLDER
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def place_in(folder: Path, wanted: Wanted) -> Path:
    """Where the search looks for weights in a folder that `OSORA_WEIGHTS` names."""
    if wanted.asset is not None:
        return folder / wanted.asset.file_name
    assert wanted.place is not None
    return folder / wanted.place.repo.replace("/", "--") / wanted.place.inner
