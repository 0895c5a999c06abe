"""Weights, fetched ahead of the runs that need them.

A folder that weights are brought to has a `SHA256SUMS`, as `sha256sum -c` reads it. What lies in the hub's cache is
checked against the sums that its files are named after.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from opensora_core import net
from opensora_core.assets import fetch, hub
from opensora_core.assets.bringing import Bring, Cache, Copy, HubFile, Link
from opensora_core.assets.holdings import Holding, Word, holdings, place_in
from opensora_core.assets.search import Wanted, weights_folder
from opensora_core.assets.sums import add_sum
from opensora_core.assets.table import ASSETS
from opensora_core.config import DownloadConfig
from opensora_core.errors import InputError, WeightsError
from opensora_core.files import free_bytes, refusal, require_space, sha256
from opensora_core.notice import Notice


@dataclass(frozen=True)
class WeightsPlan:
    """What fetching would do.

    Attributes:
        items: that are needed.
        target: the folder that what is missing would go to.
        missing_bytes: of those that are missing, about, less what has come of them; those of unknown size are not in
            it.
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


Event = Notice | WeightsPlan | WeightsReady | net.DownloadProgress


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

    def received(self) -> net.Received | None:
        """The file, if an earlier run brought it to its folder, which was not finished."""
        for name in self.name.split("|"):
            path = self.target.with_name(name.rpartition("/")[2])
            if not isinstance(self.bring, Cache) and path.is_file():
                return net.Received(path, path.stat().st_size, sha256(path))
        return None


def plan_weights(request: WeightsRequest) -> WeightsPlan:
    """Say what `fetch_weights` would do; the network is not asked.

    Raises:
        UsageError: an unknown word.
        ResourceError: no space for what is missing.
    """
    target = _target(request)
    items = holdings(request.words, request.to)
    missing = sum(max((item.size_bytes or 0) - _begun(request, item), 0) for item in items if item.path is None)
    return WeightsPlan(items, target, missing, free_bytes(target))


def _begun(request: WeightsRequest, item: Holding) -> int:
    """Bytes that an earlier run brought of weights that are not whole yet."""
    wanted = Wanted.parse(item.name, item.kind)
    repo = wanted.asset.repo if wanted.asset is not None else wanted.place.repo if wanted.place is not None else ""
    if request.to is None and repo and not _is_folder(request.source):
        return hub.begun_bytes(repo)
    place = place_in(request.to or weights_folder(), wanted)
    parts = [*place.parent.glob(f"{place.name}.*part"), *_unfinished(place).rglob("*")]
    return sum(path.stat().st_size for path in parts if path.is_file())


def _unfinished(place: Path) -> Path:
    """Where the files of a folder are until it has all of them: who looks for weights takes a folder for whole."""
    return place.with_name(f".{place.name}.part")


def _target(request: WeightsRequest) -> Path:
    if request.to is not None:
        return request.to
    is_hub = any(ASSETS[word].repo if word in ASSETS else word.startswith("hf:") for word, _ in request.words)
    return hub.cache_folder() if is_hub and not _is_folder(request.source) else weights_folder()


def _is_folder(source: str) -> bool:
    return bool(source) and "://" not in source


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
    total = Counter(job.word for job in jobs)
    brought: dict[str, list[net.Received]] = {item.name: [] for item in missing}

    def carry(job: _Job, tell: net.Progress) -> net.Received:
        with hub.translated(job.word, job.name):
            return job.received() or job.bring(job.target, client, tell)

    porters = net.Porters(
        carry,
        name=lambda job: f"{job.word}: {job.name.partition('|')[0]}",
        num_workers=min(config.workers, len(jobs) or 1),
        stop=stop,
    )
    meter = net.Meter(len(jobs), sum(item.size_bytes or 0 for item in missing))
    for word in porters.run(jobs):
        meter.hear(word)
        if isinstance(word, net.Ended):
            job: _Job = word.job
            result: Any = word.result
            if isinstance(word.error, fetch.Unavailable):
                failures[job.word] = str(word.error)
            elif word.error is not None:
                raise word.error
            else:
                received: net.Received = result
                brought[job.word].append(received)
                if len(brought[job.word]) == total[job.word]:
                    item = next(item for item in missing if item.name == job.word)
                    _finish(request, item, brought[job.word])
                    found = holdings([(item.name, item.kind)], request.to)[0]
                    if found.path is not None:
                        yield WeightsReady(found.name, found.path, found.size_bytes or 0, is_new=True)
        if (event := meter.event()) is not None:
            yield event
    if failures:
        raise WeightsError(
            "; ".join(f"{name} cannot be had: {reason}" for name, reason in failures.items()),
            "run it again to go on where it stopped; --from names a folder or a mirror, HF_ENDPOINT another hub",
        )


def _finish(request: WeightsRequest, item: Holding, brought: Sequence[net.Received]) -> None:
    """Give a folder that has all of its files its name, and take note of their sums."""
    folder = request.to or weights_folder()
    place = place_in(folder, Wanted.parse(item.name, item.kind))
    unfinished = _unfinished(place)
    for received in brought:
        path = received.path
        if path.is_relative_to(unfinished):
            path = place / path.relative_to(unfinished)
        if received.sha256:  # else it is in the hub's cache, which knows it
            add_sum(folder, path, received.sha256)
    try:
        if unfinished.is_dir() and not place.exists():
            unfinished.rename(place)
        for received in brought if unfinished.is_dir() else ():  # a part of the repository is here by another name
            path = place / received.path.relative_to(unfinished)
            path.parent.mkdir(parents=True, exist_ok=True)
            received.path.replace(path)
    except OSError as error:
        raise refusal(place, error) from error
    shutil.rmtree(unfinished, ignore_errors=True)


def _jobs(request: WeightsRequest, item: Holding) -> list[_Job]:
    wanted = Wanted.parse(item.name, item.kind)
    asset, folder = wanted.asset, request.to or weights_folder()
    place = place_in(folder, wanted)
    if _is_folder(request.source):
        origin = _lies(Path(request.source).expanduser(), wanted)
        if origin is None:
            raise fetch.Unavailable(f"it is not in {request.source}")
        if origin.is_file():
            return [_Job(item.name, origin.name, place, Copy(origin))]
        files = sorted(path for path in origin.rglob("*") if path.is_file() and not path.name.startswith("."))
        inside = _unfinished(place)
        return [_Job(item.name, path.name, inside / path.relative_to(origin).as_posix(), Copy(path)) for path in files]
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
        jobs.append(_Job(item.name, name, _unfinished(place) / inner, HubFile(repo, revision, name)))
    return jobs


def _lies(folder: Path, wanted: Wanted) -> Path | None:
    """Where weights are in a folder: one that weights were brought to, or a cache of the hub."""
    if (by_hand := place_in(folder, wanted)).exists():
        return by_hand
    for cache in (folder, folder / "hub"):
        path = None
        if wanted.asset is not None and wanted.asset.repo:
            path = hub.cached_files(wanted.asset.repo, wanted.asset.revision, wanted.asset.files, cache)
        elif wanted.place is not None:
            path = hub.cached_place(wanted.place, wanted.kind, cache)
        if path is not None:
            return path
    return None
