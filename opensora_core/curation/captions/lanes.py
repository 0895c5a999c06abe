"""What happens between clips and their captions, all at the same time: read, put in batches, prepare, describe.

Every step hands on over a belt that holds little, so that memory is bounded and the captioner is never waited for by
more than a few batches. Whoever describes is a lane: a thread of this process, or a process with a device of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

from opensora_core.curation.captions.frames import Unseen
from opensora_core.curation.captions.protocol import Captioner, Shown, Words
from opensora_core.errors import OsoraError, ResourceError

T = TypeVar("T")

_POLL_SECONDS = 0.1
_AHEAD = 2  # batches that wait for each lane
_GRACE_SECONDS = 4.0
_MOST_WORDS = 256  # that wait to be heard, and that are heard at a time
_FORGET_FRAMES = 4  # batches' worth of clips of odd sizes that are kept waiting for others of their size


@dataclass(frozen=True)
class Described:
    """Clips that went through a lane, without their frames."""

    clips: Sequence[Shown]
    words: Sequence[Words]
    seconds: float  # in the captioner


@dataclass(frozen=True)
class Ready:
    """A lane can begin."""


@dataclass(frozen=True)
class Broken:
    """A step cannot go on."""

    error: BaseException


Word = Described | Unseen | Ready | Broken


class Stopping(Exception):  # noqa: N818 - the way out of a thread
    """The work is no longer wanted."""


class Belt(Generic[T]):
    """A queue that is given up when the work is stopped, and that has an end.

    Args:
        size: items that it holds.
        stop: set to give up.
    """

    def __init__(self, size: int, stop: threading.Event) -> None:
        self._queue: queue.Queue[T | None] = queue.Queue(size)
        self._stop = stop

    def put(self, item: T | None) -> None:
        """Hand on; None is the end.

        Raises:
            Stopping: the work is no longer wanted.
        """
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_SECONDS)
                return
        raise Stopping

    def __iter__(self) -> Iterator[T]:
        """Items until the end, which whoever else takes from the belt sees too."""
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                self.put(None)
                return
            yield item
        raise Stopping

    def get(self, seconds: float) -> T | None:
        """The next item, or None where there is none in time."""
        with suppress(queue.Empty):
            return self._queue.get(timeout=seconds)
        return None


class FarLane(Protocol):
    """Describes on another machine."""

    def drive(self, batches: Belt[list[Shown]], words: Belt[Word], stop: threading.Event) -> None:
        """Describe all batches and tell of it, on the thread that calls, until there are no more or `stop` is set."""
        ...


class Lanes:
    """Describes clips.

    Args:
        captioner: made, and not loaded.
        devices: one per process, of a captioner that is local; the first of one alone is used in this process.
        source: what `frames.see` yields.
        far: makes of a device who describes on it; None for processes of this machine.
    """

    def __init__(
        self,
        captioner: Captioner,
        devices: Sequence[str],
        source: Iterable[Shown | Unseen | None],
        far: Callable[[str], FarLane] | None = None,
    ) -> None:
        self._captioner, self._devices, self._source, self._far = captioner, devices, source, far
        self._stop = threading.Event()
        self._is_spread = captioner.is_local and (len(devices) > 1 or far is not None)
        self.num_lanes = len(devices) if self._is_spread else captioner.lanes
        self._batches: Belt[list[Shown]] = Belt(_AHEAD * self.num_lanes, self._stop)
        self._prepared: Belt[tuple[list[Shown], Any]] = Belt(self.num_lanes, self._stop)
        self._words: Belt[Word] = Belt(_MOST_WORDS, self._stop)
        self._is_ready = False  # in this process, and not told yet
        self._broken: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._processes: list[BaseProcess] = []

    def start(self) -> None:
        """Begin to read clips, and to load the captioner where that happens in other processes."""
        self._spawn(self._read)
        if self._is_spread:
            for device in self._devices:
                self._spawn(lambda device=device: self._drive(device))  # type: ignore[misc]
            return
        self._captioner.load(self._devices[0])
        self._is_ready = True  # not by the belt, which may be full, and whose only listener this is
        self._spawn(self._prepare)
        for _ in range(self.num_lanes):
            self._spawn(self._describe)

    def listen(self, seconds: float) -> list[Word]:
        """What was told since; at least one word, unless none comes in time.

        Raises:
            OsoraError: a step cannot go on.
        """
        if self._broken is not None:
            raise self._broken
        heard: list[Word] = [Ready()] if self._is_ready else []
        self._is_ready = False
        while len(heard) < _MOST_WORDS and (word := self._words.get(0 if heard else seconds)) is not None:
            if isinstance(word, Broken):
                self._broken = word.error
                if not heard:
                    raise word.error
                break  # what was described is to be kept first
            heard.append(word)
        return heard

    def close(self) -> None:
        """End everything."""
        self._stop.set()
        for process in self._processes:
            process.kill()
        end = time.monotonic() + _GRACE_SECONDS
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))
        for process in self._processes:
            process.join(_GRACE_SECONDS)

    # steps -------------------------------------------------------------------------------------------------------

    def _spawn(self, step: Callable[[], None]) -> None:
        def run() -> None:
            try:
                step()
            except Stopping:
                pass
            except BaseException as error:
                with suppress(Stopping):
                    self._words.put(Broken(error))

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read(self) -> None:
        source = iter(self._source)
        waiting: dict[tuple[int, ...], list[Shown]] = {}
        size = self._captioner.batch_size
        try:
            for item in source:
                if self._stop.is_set():
                    raise Stopping
                if isinstance(item, Unseen):
                    self._words.put(item)
                if not isinstance(item, Shown):
                    continue
                shape = item.frames[0].shape if item.frames else ()
                batch = waiting.setdefault(shape, [])
                batch.append(item)
                if len(batch) >= size:
                    self._batches.put(waiting.pop(shape))
                elif sum(map(len, waiting.values())) > _FORGET_FRAMES * size:
                    self._batches.put(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
            for batch in waiting.values():
                self._batches.put(batch)
            self._batches.put(None)
        finally:
            if hasattr(source, "close"):
                source.close()

    def _prepare(self) -> None:
        for batch in self._batches:
            self._prepared.put((batch, self._captioner.prepare(batch)))
        self._prepared.put(None)

    def _describe(self) -> None:
        for batch, prepared in self._prepared:
            began = time.monotonic()
            words = self._captioner.describe(prepared, self._stop.is_set)
            if self._stop.is_set():
                raise Stopping
            self._words.put(Described([without_frames(shown) for shown in batch], words, time.monotonic() - began))

    def _drive(self, device: str) -> None:
        """Keep a process with a captioner of its own busy: one batch in work there, and the next ones prepared."""
        if self._far is not None:
            self._far(device).drive(self._batches, self._words, self._stop)
            return
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._captioner, device), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is the parent's
        process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._processes.append(process)
        theirs.close()
        try:
            self._converse(process, ours, device)
        finally:
            process.kill()

    def _converse(self, process: BaseProcess, ours: Connection, device: str) -> None:
        sent: queue.SimpleQueue[list[Shown]] = queue.SimpleQueue()
        room = threading.Semaphore(_AHEAD)

        def feed() -> None:
            for batch in self._batches:
                while not room.acquire(timeout=_POLL_SECONDS):
                    if self._stop.is_set():
                        raise Stopping
                sent.put(batch)
                with suppress(OSError):  # its death is noticed below
                    ours.send(batch)
            with suppress(OSError):
                ours.send(None)

        is_fed = False
        while not self._stop.is_set():
            if not wait([ours], _POLL_SECONDS):
                continue
            try:
                kind, *content = ours.recv()
            except (EOFError, OSError):
                process.join(_GRACE_SECONDS)
                raise ResourceError(
                    f"the process that describes on {device} ended with code {process.exitcode}",
                    "captions so far are kept: run it again, with a smaller --batch-size if memory ran out",
                ) from None
            if kind == "ready":
                self._words.put(Ready())
                if not is_fed:
                    self._spawn(feed)
                    is_fed = True
            elif kind == "described":
                room.release()
                clips = [without_frames(shown) for shown in sent.get()]
                self._words.put(Described(clips, *content))
            elif kind == "broken":
                error, *words = content
                raise error(*words)
            else:
                return


def without_frames(shown: Shown) -> Shown:
    """A clip that has been described; nobody needs its frames any more."""
    return Shown(shown.index, shown.clip, (), shown.camera)


def _serve(connection: Connection, captioner: Captioner, device: str) -> None:  # pragma: no cover - another process
    """Describe what comes, in a process of its own; the next batch is prepared while one is described."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stop = threading.Event()
    prepared: Belt[Any] = Belt(1, stop)

    def prepare() -> None:
        with suppress(Stopping, EOFError, OSError):
            while (batch := connection.recv()) is not None:
                try:
                    prepared.put((captioner.prepare(batch),))
                except Stopping:
                    raise
                except BaseException as error:
                    prepared.put(error)
            prepared.put(None)

    try:
        captioner.load(device)
        connection.send(("ready",))
        threading.Thread(target=prepare, daemon=True).start()
        for item in prepared:
            if isinstance(item, BaseException):
                raise item
            began = time.monotonic()
            words = captioner.describe(item[0], stop.is_set)
            connection.send(("described", words, time.monotonic() - began))
        connection.send(("done",))
    except OsoraError as error:
        connection.send(("broken", type(error), error.message, error.hint))
    except Exception as error:
        connection.send(("broken", RuntimeError, f"{type(error).__name__}: {error}"))


def _die_with_parent() -> None:  # pragma: no cover - another process
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
