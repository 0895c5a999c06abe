"""The job: a source in, files and their manifest out, in a folder that any number of runs may complete."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from opensora_core import net
from opensora_core.config import DownloadConfig
from opensora_core.curation.download.events import DataDone, DataPlan, DataRequest, Event, ItemFailed
from opensora_core.curation.download.item import Brought, Item, suffix_of
from opensora_core.curation.download.journal import Journal
from opensora_core.curation.download.session import Rejected, Session, sync
from opensora_core.curation.download.sources import find_source
from opensora_core.curation.records import MANIFEST_FILE, REJECTS_FILE
from opensora_core.errors import InputError, OsoraError, ResourceError, UsageError
from opensora_core.files import free_bytes, refusal
from opensora_core.notice import Notice
from opensora_core.runs import only_writer

_NAMED = re.compile(r"-([0-9a-f]{16})\.[^.]+")


@dataclass(frozen=True)
class _Whole:
    """A file that came, before it has its place."""

    path: Path
    size: int
    sha256: str
    brought: Brought


@dataclass(frozen=True)
class _Known:
    """An item whose file is here already."""

    item: Item


def download_data(config: DownloadConfig, request: DataRequest) -> Iterator[Event]:
    """Fetch what a source has; what is here is not fetched again. A run may be stopped in whatever way.

    Args:
        config: the settings.
        request: what to get, and where to.

    Yields:
        Notices, how far it is, every item that failed, and at the end what there is.

    Raises:
        UsageError, ConfigError, InputError: a request that cannot be carried out.
        ResourceError: no space or no permission; what is here is kept.
        OsoraError: not a single item could be had.
    """
    source = find_source(request)
    _require(request)
    source.doing(request)  # refuses a request that lacks something, before the folder is made
    stop = threading.Event()
    client = net.client_of(config, stop=stop, trusted=source.trusted(config, request))
    began = time.monotonic()
    with only_writer(request.output):
        journal = Journal(request.output)
        journal.open()
        run = _Run(config, request, client, journal)
        num_rows = 0
        try:
            yield from run.go(source.items(run.session))
        except ResourceError:
            shutil.rmtree(run.session.state / "parts", ignore_errors=True)  # what cannot grow is only in the way
            raise
        finally:
            if journal.statuses:  # else it did not even begin
                with suppress(ResourceError):  # the disk may be full; the next run writes them
                    num_rows = journal.write_tables()
        if not journal.statuses:
            num_rows = journal.write_tables()
        run.tidy()
        if not num_rows and run.num_failed:
            raise OsoraError(
                f"not a single file came: {run.last_reason}", f"all reasons are in {request.output / REJECTS_FILE}"
            )
        yield DataDone(
            output=request.output,
            manifest=request.output / MANIFEST_FILE,
            num_new=run.num_new,
            num_before=run.num_before,
            num_duplicates=run.num_duplicates,
            num_failed=run.num_failed,
            num_bytes=run.num_bytes,
            num_rows=num_rows,
            seconds=time.monotonic() - began,
        )


def examine_data(config: DownloadConfig, request: DataRequest) -> Iterator[Event]:
    """Tell what `download_data` would do. Nothing is written, and the network is not asked.

    Raises:
        UsageError, ConfigError, InputError: as `download_data`.
    """
    source = find_source(request)
    _require(request)
    client = net.client_of(config, stop=threading.Event())
    journal = Journal(request.output)
    notices: list[Notice] = []
    rejected: list[Rejected] = []

    def say(word: object) -> None:
        if isinstance(word, Notice):
            notices.append(word)
        elif isinstance(word, Rejected):
            rejected.append(word)

    session = Session(config, request, client, journal, say, lambda name: lambda done, total: None, is_examined=True)
    total, done = None, 0
    if source.is_offline(request):
        total = 0
        for item in islice(source.items(session), request.limit):
            total += 1
            done += journal.is_done(item.id)
    yield from notices
    yield from (ItemFailed(word.item.source, word.reason) for word in rejected)
    yield DataPlan(request.source, request.output, total, done, free_bytes(request.output), source.doing(request))


def _require(request: DataRequest) -> None:
    if request.limit is not None and request.limit < 1:
        raise UsageError(f"--limit {request.limit} is nothing", "--limit 100")
    if request.output.exists() and not request.output.is_dir():
        raise UsageError(f"{request.output} is no folder", "name another --output")


class _Run:
    """Works through the items of a source. Files and journal are touched by one thread alone."""

    def __init__(self, config: DownloadConfig, request: DataRequest, client: net.Client, journal: Journal) -> None:
        self.config, self.request, self.journal = config, request, journal
        self.num_new = self.num_before = self.num_duplicates = self.num_failed = self.num_bytes = 0
        self.last_reason = ""
        self._seen: set[str] = set()
        self._waiting: dict[str, list[Item]] = {}  # items whose file another one is bringing
        self._lock = threading.Lock()
        self._left = self._unlisted()
        self._porters: net.Porters[Item, _Whole] = net.Porters(
            self._carry, name=lambda item: item.name or item.source, num_workers=config.workers, stop=client.stop
        )
        self.session = Session(config, request, client, journal, self._porters.say, self._porters.tell)

    def go(self, items: Iterator[Item]) -> Iterator[Event]:
        """Until every item is accounted for."""
        meter = net.Meter()
        for word in self._porters.run(self._chosen(items)):
            meter.hear(word)
            if isinstance(word, net.Ended):
                yield from self._end(word)
            elif isinstance(word, _Known):
                self._commit(word.item, word.item.row(*self.journal.files[word.item.file_id], {}))
            elif isinstance(word, Rejected):
                yield self._reject(word.item, word.reason)
            elif isinstance(word, Notice):
                yield word
            if (event := meter.event()) is not None:
                yield event

    def tidy(self) -> None:
        """After a run that nothing stopped: archives of which nothing failed are not needed any more."""
        if self.num_failed or self.request.limit is not None:
            return
        for key, path in self.session.archives:
            self.journal.add(key, key, "unpacked", {"source": key})
            with suppress(OSError):
                path.unlink()
        for name in ("parts", "archives"):
            with suppress(OSError):
                (self.session.state / name).rmdir()

    def _chosen(self, items: Iterator[Item]) -> Iterator[Item]:
        """Of the source's items those whose file has to be brought. Runs in the thread that makes them."""
        for item in islice(items, self.request.limit):
            if item.id in self._seen:
                self.session.note("some items are listed twice; they are taken once")
                continue
            self._seen.add(item.id)
            if self.journal.is_done(item.id):
                self.num_before += 1
                continue
            with self._lock:
                if item.file_id in self._waiting:
                    self._waiting[item.file_id].append(item)
                    continue
                if item.file_id in self.journal.files:
                    self.session.say(_Known(item))
                    continue
                self._waiting[item.file_id] = []
            yield item

    def _carry(self, item: Item, tell: net.Progress) -> _Whole:
        """Bring a file, unless an earlier run was killed after it had."""
        whole, brought = self.session.whole(item), Brought()
        if not whole.is_file() and (placed := self._placed(item)) is not None:
            whole = placed
        elif not whole.is_file():
            brought = item.bring(whole, self.session, tell)
        digest = brought.sha256
        try:
            if not digest:
                with whole.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                sync(whole)
            return _Whole(whole, whole.stat().st_size, digest, brought)
        except OSError as error:
            raise refusal(whole, error) from error

    def _placed(self, item: Item) -> Path | None:
        """A file that took its place just before an earlier run was killed."""
        if not item.path:
            return self._left.get(item.file_id)
        path = self.request.output / self._place(item, "")
        return path if path.is_file() else None

    def _unlisted(self) -> dict[str, Path]:
        """Files that are in their place, and that the journal does not know."""
        found = {}
        with suppress(OSError), os.scandir(self.request.output / "files") as entries:
            for entry in entries:
                named = _NAMED.search(entry.name)
                if named and named[1] not in self.journal.files and entry.is_file(follow_symlinks=False):
                    found[named[1]] = Path(entry.path)
        return found

    def _place(self, item: Item, suffix: str) -> str:
        """Where a file goes; what names are equal once they are safe, or what a new version has, is kept apart."""
        place = Path(item.place(suffix))
        if self.journal.owners.get(place.as_posix(), item.file_id) != item.file_id:
            place = place.with_name(f"{place.stem}-{item.file_id}{place.suffix}")
        return place.as_posix()

    def _end(self, word: net.Ended[Item, _Whole]) -> Iterator[Event]:
        with self._lock:
            items = [word.job, *self._waiting.pop(word.job.file_id, [])]
            if word.result is not None:
                whole = word.result
                try:
                    path, is_copy = self._put(word.job, whole)
                except InputError as error:
                    reason = error.message
                else:
                    for item in items:
                        row = item.row(path, whole.size, whole.sha256, whole.brought.fields)
                        self._commit(item, row, is_copy=is_copy)
                    return
            elif isinstance(word.error, net.Unavailable | InputError):
                reason = word.error.message if isinstance(word.error, InputError) else str(word.error)
            else:
                assert word.error is not None
                raise word.error
        for item in items:
            yield self._reject(item, reason)

    def _put(self, item: Item, whole: _Whole) -> tuple[str, bool]:
        """Give a file its place, unless its content is here already.

        Returns:
            The path of the content, and whether it was here.

        Raises:
            InputError: it is of no known kind.
            ResourceError: no space or no permission.
        """
        suffix = Path(item.path).suffix if item.path else suffix_of(whole.path, Path(item.name).suffix)
        if not suffix and not item.path:
            whole.path.unlink()
            raise InputError("it is neither a video nor a picture of a known kind")
        place = self._place(item, suffix)
        target = self.request.output / place
        try:
            same = self.journal.sums.get(whole.sha256)
            if same is not None and same != place and (self.request.output / same).is_file():
                whole.path.unlink()
                return same, True
            if whole.path != target:
                target.parent.mkdir(parents=True, exist_ok=True)
                whole.path.replace(target)
        except OSError as error:
            raise refusal(target, error) from error
        self.num_bytes += whole.size
        return place, False

    def _commit(self, item: Item, row: dict[str, Any], *, is_copy: bool = False) -> None:
        """Write the row of an item whose content is here."""
        path = row["path"]
        if is_copy and (path, item.start_seconds, item.end_seconds) in self.journal.spans:
            told = {"source": item.source, "reason": f"the same content as {path}", "duplicate_of": path}
            self.journal.add(item.id, item.file_id, "duplicate", told)
            self.num_duplicates += 1
            return
        self.journal.add(item.id, item.file_id, "ok", row)
        self.num_new += 1

    def _reject(self, item: Item, reason: str) -> ItemFailed:
        self.last_reason = reason
        reason = reason.removeprefix(f"{item.source} ")
        row: dict[str, Any] = {"source": item.source, "reason": reason}
        if item.start_seconds is not None or item.end_seconds is not None:
            row |= {"start_seconds": item.start_seconds, "end_seconds": item.end_seconds}
        self.journal.add(item.id, item.file_id, "failed", row)
        self.num_failed += 1
        return ItemFailed(item.source, reason)
