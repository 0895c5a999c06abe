"""From a word such as `--model` takes to a file or folder on this disk.

A word is a name of the table, a path, or `hf:owner/repo[/file or folder][@revision]`. Looked at in this order: the path
itself; what was put by hand into `$OSORA_WEIGHTS` (`~/.cache/osora/weights`); the hub's cache; the network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from opensora_core.assets import fetch, hub
from opensora_core.assets.table import ASSETS, BUNDLED, Asset, Kind
from opensora_core.errors import ResourceError, UsageError, WeightsError, nearest
from opensora_core.files import readable

BUNDLED_FOLDER = Path(__file__).parents[1] / "bundled"


@dataclass(frozen=True)
class Located:
    """Weights on this disk; `asset` is their entry of the table, if they came by its name."""

    path: Path
    asset: Asset | None = None


@dataclass(frozen=True)
class Wanted:
    """A word, understood: an entry of the table, a path, or a place on the hub."""

    word: str
    kind: Kind
    asset: Asset | None = None
    path: Path | None = None
    place: hub.Place | None = None

    @classmethod
    def parse(cls, word: str, kind: Kind) -> Wanted:
        """Understand a word.

        Raises:
            UsageError: neither a name of the table nor a path that exists; the nearest names are offered.
        """
        if word == BUNDLED:
            folder = BUNDLED_FOLDER if kind == "model" else BUNDLED_FOLDER / kind
            return cls(word, kind, asset=ASSETS[BUNDLED], path=folder)
        if word.startswith("hf:"):
            return cls(word, kind, place=hub.Place.parse(word))
        # a name wins over a file of the same name: ./name is always the file
        if word in ASSETS:
            if ASSETS[word].kind != kind:
                raise UsageError(
                    f"'{word}' is {ASSETS[word].about}, not weights of kind '{kind}'",
                    nearest(word, [name for name, asset in ASSETS.items() if asset.kind == kind]),
                )
            return cls(word, kind, asset=ASSETS[word])
        path = Path(word).expanduser()
        if path.exists():
            return cls(word, kind, path=path)
        if path.suffix or len(path.parts) > 1 or word in (".", "~"):
            raise UsageError(f"no such file or folder: {word}", "a repository of the hub is written hf:owner/repo")
        known = [name for name, asset in ASSETS.items() if asset.kind == kind]
        raise UsageError(f"unknown weights '{word}': no name of the table, no file, no folder", nearest(word, known))


def weights_folder() -> Path:
    """Where weights are put by hand, and where those that are on no hub are downloaded to."""
    return Path(os.environ.get("OSORA_WEIGHTS") or "~/.cache/osora/weights").expanduser()


def find(word: str, *, kind: Kind) -> Located | None:
    """Look on this disk only; at once, and without the network.

    Raises:
        UsageError: an unknown word.
    """
    return _find(Wanted.parse(word, kind))


def _find(wanted: Wanted) -> Located | None:
    if wanted.path is not None:
        return Located(wanted.path, wanted.asset) if wanted.path.exists() else None
    if wanted.asset is not None:
        by_hand = weights_folder() / wanted.asset.file_name
        if by_hand.exists():
            return Located(by_hand, wanted.asset)
        if wanted.asset.repo:
            path = hub.cached_files(wanted.asset.repo, wanted.asset.revision, wanted.asset.files)
            return Located(path, wanted.asset) if path else None
        return None
    assert wanted.place is not None
    by_hand = weights_folder() / wanted.place.repo.replace("/", "--") / wanted.place.inner
    if by_hand.exists():
        return Located(by_hand)
    path = hub.cached_place(wanted.place, wanted.kind)
    return Located(path) if path else None


def locate(word: str, *, kind: Kind, offline: bool = False, on_progress: fetch.Progress | None = None) -> Located:
    """Find weights, and download those that are missing.

    Args:
        word: a name of `ASSETS`, a path, or `hf:owner/repo[/file or folder][@revision]`.
        kind: which part they are to be; decides what is taken from a repository that holds several.
        offline: never touch the network; `HF_HUB_OFFLINE=1` says the same.
        on_progress: is told of the bytes as they come.

    Raises:
        UsageError: an unknown word.
        WeightsError: they cannot be had. It comes within five seconds where the network cannot be reached, and names
            the file, the places looked at, and how to put it in place by hand.
        ResourceError: no space or no permission.
    """
    wanted = Wanted.parse(word, kind)
    if (found := _find(wanted)) is not None:
        return found
    if word == BUNDLED:
        raise WeightsError(
            f"this installation has no bundled model: {BUNDLED_FOLDER} is empty",
            "install the package again, or name another model with --model",
        )
    if offline or hub.is_offline():
        raise _missing(wanted, "and the network is not asked: this is an offline run")
    try:
        if wanted.asset is None:
            assert wanted.place is not None
            return Located(hub.download_place(wanted.place, kind, on_progress))
        if wanted.asset.repo:
            files = wanted.asset.files
            return Located(hub.download(wanted.asset.repo, wanted.asset.revision, files, on_progress), wanted.asset)
        target = weights_folder() / wanted.asset.file_name
        fetch.download(wanted.asset.url, target, sha256=wanted.asset.sha256, on_progress=on_progress)
        return Located(target, wanted.asset)
    except fetch.Unavailable as error:
        raise _missing(wanted, f"and {error}") from error
    except ResourceError as error:
        raise ResourceError(f"cannot download '{word}': {error.message}", error.hint) from error


def _missing(wanted: Wanted, reason: str) -> WeightsError:
    folder = weights_folder()
    looked = [str(folder)]
    if wanted.asset is not None:
        asset = wanted.asset
        what = f"'{asset.name}' ({asset.file_name}, about {readable(asset.size_bytes)})"
        source = asset.url or hub.address(asset.repo, asset.revision, asset.files)
        target = folder / asset.file_name
    else:
        assert wanted.place is not None
        what = f"'{wanted.word}'"
        place = wanted.place
        source = hub.address(place.repo, place.revision, (place.inner,) if place.inner else ())
        target = folder / place.repo.replace("/", "--") / place.inner
    if not (wanted.asset and wanted.asset.url):
        looked.append(f"the hub's cache {hub.cache_folder()}")
    return WeightsError(
        f"the weights {what} cannot be had: they are not in {' nor in '.join(looked)}, {reason}",
        f"fetch {source} where there is a network and put it at {target}; "
        "HF_ENDPOINT names a mirror of the hub, OSORA_WEIGHTS another folder; the model that ships needs no download",
    )
