"""Weights, fetched ahead of the runs that need them: what there is, what a run needs, and bringing it here.

A folder that weights are brought to has a `SHA256SUMS`, as `sha256sum -c` reads it. What lies in the hub's cache is
checked against the sums that its files are named after.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from opensora_core import net
from opensora_core.assets import fetch, hub
from opensora_core.assets.bringing import Bring, Cache, Copy, HubFile, Link
from opensora_core.assets.search import BUNDLED_FOLDER, Located, Wanted, find, weights_folder
from opensora_core.assets.sums import add_sum, is_right
from opensora_core.assets.table import ASSETS, BUNDLED, Asset, Kind
from opensora_core.config import Config, DownloadConfig
from opensora_core.errors import CheckpointError, InputError, OsoraError, WeightsError
from opensora_core.files import MANIFEST, free_bytes, readable, require_space, verify_manifest
from opensora_core.notice import Notice

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


@dataclass(frozen=True)
class WeightsPlan:
    """What fetching would do.

    Attributes:
        items: that are needed.
        target: the folder that what is missing would go to.
        missing_bytes: of those that are missing, about; those of unknown size are not in it.
        free_bytes: of that folder's disk.
    """

    items: tuple[Holding, ...]
    target: Path
    missing_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class WeightsReady:
    """Weights are here, and `is_new` if they were not before."""

    name: str
    path: Path
    size_bytes: int
    is_new: bool


@dataclass(frozen=True)
class WeightsVerified:
    """What a check of sums found: `whole`, `damaged`, `missing`, or `unknown` where there is no sum to check by."""

    name: str
    status: Literal["whole", "damaged", "missing", "unknown"]
    reason: str
    path: Path | None


Event = Notice | WeightsListed | WeightsPlan | WeightsReady | WeightsVerified | net.DownloadProgress


@dataclass(frozen=True)
class WeightsRequest:
    """Which weights, and from where to where.

    Attributes:
        words: which.
        to: a folder that `OSORA_WEIGHTS` may name; None is where runs look anyway.
        source: a folder that an earlier `to` or another machine's cache was, or the address of a mirror; empty is
            where they are published.
    """

    words: tuple[Word, ...]
    to: Path | None = None
    source: str = ""


@dataclass(frozen=True)
class _Job:
    """One file to bring."""

    word: str
    name: str
    target: Path  # of weights that are brought to a folder; the hub's cache knows its own
    bring: Bring


# what there is --------------------------------------------------------------------------------------------------------


def known_words() -> tuple[Word, ...]:
    """All names of the table."""
    return tuple((asset.name, asset.kind) for asset in ASSETS.values())


def needed_words(config: Config, verb: Literal["sample", "train"]) -> tuple[Word, ...]:
    """What a run of these settings reads: its model and encoders, or what training starts from and its encoders."""
    model = config.model.weights if verb == "sample" else config.train.init
    words: list[Word] = [(model, "model"), (config.vae.weights, "vae"), (config.text.weights, "text")]
    return tuple((word, kind) for word, kind in words if word)


def holdings(words: Iterable[Word]) -> tuple[Holding, ...]:
    """What is known of weights, without the network.

    Raises:
        UsageError: an unknown word.
    """
    return tuple(_holding(word, kind) for word, kind in dict.fromkeys(words))


def _holding(word: str, kind: Kind, found: Located | None = None) -> Holding:
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


# bringing it here -----------------------------------------------------------------------------------------------------


def plan_weights(request: WeightsRequest) -> WeightsPlan:
    """Say what `fetch_weights` would do; the network is not asked.

    Raises:
        UsageError: an unknown word.
        ResourceError: no space for what is missing.
    """
    target = _target(request)
    items = tuple(_present(request, word, kind) for word, kind in dict.fromkeys(request.words))
    missing = sum(item.size_bytes or 0 for item in items if item.path is None)
    return WeightsPlan(items, target, missing, free_bytes(target))


def _target(request: WeightsRequest) -> Path:
    if request.to is not None:
        return request.to
    is_hub = any(ASSETS[word].repo if word in ASSETS else word.startswith("hf:") for word, _ in request.words)
    return hub.cache_folder() if is_hub and not _is_folder(request.source) else weights_folder()


def _is_folder(source: str) -> bool:
    return bool(source) and "://" not in source


def _present(request: WeightsRequest, word: str, kind: Kind) -> Holding:
    """What is here; with `to`, what is there."""
    found = _holding(word, kind)
    wanted = Wanted.parse(word, kind)
    if request.to is None or wanted.path is not None:
        return found
    path = _place(request.to, wanted)
    if not path.exists():
        size = ASSETS[word].size_bytes if word in ASSETS else None
        return Holding(word, kind, found.about, found.licence, size, None, found.source)
    return _holding(word, kind, Located(path))


def _place(folder: Path, wanted: Wanted) -> Path:
    """Where the search looks for weights in a folder that `OSORA_WEIGHTS` names."""
    if wanted.asset is not None:
        return folder / wanted.asset.file_name
    assert wanted.place is not None
    return folder / wanted.place.repo.replace("/", "--") / wanted.place.inner


def fetch_weights(config: DownloadConfig, request: WeightsRequest, *, offline: bool = False) -> Iterator[Event]:
    """Bring weights to this machine. What is here is left; what was begun goes on.

    Raises:
        UsageError: an unknown word, or a setting that makes no sense.
        WeightsError: some cannot be had; the others are here.
        ResourceError: no space or no permission.
    """
    if _is_folder(request.source) and not Path(request.source).expanduser().is_dir():
        raise InputError(f"there is no folder {request.source} to bring weights from", "name a folder or a mirror")
    plan = plan_weights(request)
    require_space(plan.target, plan.missing_bytes)
    missing: list[Holding] = []
    for item in plan.items:
        if item.path is None:
            missing.append(item)
        else:
            yield WeightsReady(item.name, item.path, item.size_bytes or 0, is_new=False)
    if missing and not _is_folder(request.source) and (offline or hub.is_offline()):
        raise WeightsError(
            f"{', '.join(item.name for item in missing)} cannot be had: this is an offline run",
            "--from FOLDER brings them from a disk",
        )
    if missing:
        with _mirror(request.source):
            yield from _bring(config, request, missing)
    folder = request.to
    if folder is not None and folder.expanduser().resolve() != weights_folder().resolve():
        yield Notice(f"runs find these weights with OSORA_WEIGHTS={folder}")


@contextmanager
def _mirror(source: str) -> Iterator[None]:
    """Ask a mirror instead of the hub for a while."""
    before = os.environ.get("HF_ENDPOINT")
    if source and not _is_folder(source):
        os.environ["HF_ENDPOINT"] = source
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("HF_ENDPOINT", None)
        else:
            os.environ["HF_ENDPOINT"] = before


def _bring(config: DownloadConfig, request: WeightsRequest, missing: Sequence[Holding]) -> Iterator[Event]:
    stop = threading.Event()
    trusted = [hub.endpoint(), *(ASSETS[item.name].url for item in missing if item.name in ASSETS)]
    client = net.client_of(config, stop=stop, trusted=filter(None, trusted))
    failures: dict[str, str] = {}
    jobs: list[_Job] = []
    for item in missing:
        try:
            jobs += _jobs(request, item)
        except fetch.Unavailable as error:
            failures[item.name] = str(error)
    left = {item.name: sum(job.word == item.name for job in jobs) for item in missing}

    def carry(job: _Job, tell: net.Progress) -> net.Received:
        with hub.translated(job.word, job.name):
            return job.bring(job.target, client, tell)

    porters = net.Porters(
        carry, name=lambda job: f"{job.word}: {job.name}", num_workers=min(config.workers, len(jobs) or 1), stop=stop
    )
    meter = net.Meter(len(jobs), sum(item.size_bytes or 0 for item in missing))
    for word in porters.run(jobs):
        meter.hear(word)
        if isinstance(word, net.Ended):
            job: _Job = word.job
            if isinstance(word.error, fetch.Unavailable):
                failures[job.word] = str(word.error)
            elif word.error is not None:
                raise word.error
            else:
                received: Any = word.result
                if received.sha256:
                    add_sum(request.to or weights_folder(), received.path, received.sha256)
                left[job.word] -= 1
                if not left[job.word]:
                    item = next(item for item in missing if item.name == job.word)
                    found = _present(request, item.name, item.kind)
                    if found.path is not None:
                        yield WeightsReady(found.name, found.path, found.size_bytes or 0, is_new=True)
        if (event := meter.event()) is not None:
            yield event
    if failures:
        raise WeightsError(
            "; ".join(f"{name} cannot be had: {reason}" for name, reason in failures.items()),
            "run it again to go on where it stopped; --from names a folder or a mirror, HF_ENDPOINT another hub",
        )


def _jobs(request: WeightsRequest, item: Holding) -> list[_Job]:
    wanted = Wanted.parse(item.name, item.kind)
    asset, folder = wanted.asset, request.to or weights_folder()
    place = _place(folder, wanted)
    if _is_folder(request.source):
        origin = _lies(Path(request.source).expanduser(), wanted)
        if origin is None:
            raise fetch.Unavailable(f"it is not in {request.source}")
        if origin.is_file():
            return [_Job(item.name, origin.name, place, Copy(origin))]
        files = sorted(path for path in origin.rglob("*") if path.is_file() and not path.name.startswith("."))
        return [_Job(item.name, path.name, place / path.relative_to(origin).as_posix(), Copy(path)) for path in files]
    if asset is not None and asset.url:
        url = f"{request.source.rstrip('/')}/{asset.file_name}" if request.source else asset.url
        return [_Job(item.name, asset.file_name, place, Link(url, asset.sha256))]
    if asset is not None:
        repo, revision, names = asset.repo, asset.revision, list(asset.files)
    else:
        assert wanted.place is not None
        repo, revision = wanted.place.repo, wanted.place.revision
        names = hub.listed(wanted.place, item.kind)
    if request.to is None:
        return [_Job(item.name, name.partition("|")[0], place, Cache(repo, revision, name)) for name in names]
    if len(names) == 1 and place.name == names[0].rpartition("/")[2]:
        return [_Job(item.name, names[0], place, HubFile(repo, revision, names[0]))]
    shared = os.path.commonpath([str(PurePosixPath(name).parent) for name in names])
    jobs = []
    for name in names:
        inner = PurePosixPath(name.partition("|")[0]).relative_to(shared)
        jobs.append(_Job(item.name, name.partition("|")[0], place / inner, HubFile(repo, revision, name)))
    return jobs


def _lies(folder: Path, wanted: Wanted) -> Path | None:
    """Where weights are in a folder: one that weights were brought to, or a cache of the hub."""
    if (by_hand := _place(folder, wanted)).exists():
        return by_hand
    for cache in (folder, folder / "hub"):
        if wanted.asset is not None and wanted.asset.repo:
            path = hub.cached_files(wanted.asset.repo, wanted.asset.revision, wanted.asset.files, cache)
            if path is not None:
                return path
    return None


# checking it ----------------------------------------------------------------------------------------------------------


def verify_weights(words: Iterable[Word], folder: Path | None = None) -> Iterator[Event]:
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
            place = _place(folder, wanted)
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
