"""Processes that work on one task each, so that a source that kills or hangs one costs nothing but itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from opensora_core.errors import OsoraError, ResourceError

J = TypeVar("J")
T = TypeVar("T")
R = TypeVar("R")
Tell = Callable[[Any], None]
"""Takes what a task says of itself on its way; it must be picklable."""

_POLL_SECONDS = 0.2
_START_SECONDS = 120.0  # a process may take to import what it needs, on a machine that has much to do
_GRACE_SECONDS = 10.0
_BEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Said(Generic[T]):
    """What a task told on its way. `worker` is the number of its process."""

    worker: int
    task: T
    word: Any


@dataclass(frozen=True)
class Returned(Generic[T, R]):
    """What became of a task."""

    worker: int
    task: T
    result: R


@dataclass(frozen=True)
class Lost(Generic[T]):
    """A task whose process died, or had to be ended."""

    worker: int
    task: T
    reason: str


@dataclass(frozen=True)
class Again(Generic[T]):
    """A task that begins anew, because what did it was lost. Only a crew of many machines tells it."""

    worker: int
    task: T
    reason: str


@dataclass(frozen=True)
class Waited:
    """Nothing was told for a moment."""


Word: TypeAlias = Said[T] | Returned[T, R] | Lost[T] | Again[T] | Waited


@dataclass
class _Worker(Generic[T]):
    process: BaseProcess
    connection: Connection
    ready: bool = False
    task: T | None = None
    began: float = 0.0
    heard: float = field(default_factory=time.monotonic)


class Crew(Generic[J, T, R]):
    """A number of spawned processes.

    Args:
        function: `(job, task, tell) -> result`, of a module that a fresh process can import.
        job: what all tasks share.
        num_workers: processes.
        stall_seconds: without a word, after which a task is given up.
        task_seconds: that a task may take in all.
        task_bytes: of memory that a process may take for tasks (Linux).
    """

    def __init__(
        self,
        function: Callable[[J, T, Tell], R],
        job: J,
        *,
        num_workers: int,
        stall_seconds: float,
        task_seconds: float,
        task_bytes: int,
    ) -> None:
        self._arguments = (function, job, task_bytes)
        self._num_workers = num_workers
        self._stall_seconds, self._task_seconds = stall_seconds, task_seconds
        self._workers: list[_Worker[T]] = []

    def run(self, tasks: Iterable[T]) -> Iterator[Word[T, R]]:
        """Work through tasks, in their order as far as processes are free, and end the processes.

        Yields:
            `Returned` or `Lost` once for each, and what it says before.

        Raises:
            OsoraError: a task raised it, such as for a full disk. All others end with it.
            ResourceError: processes do not start.
        """
        try:
            yield from self.work(tasks)
        finally:
            self.close()

    def work(self, tasks: Iterable[T]) -> Iterator[Word[T, R]]:
        """As `run`, but the processes are kept for more tasks, until `close`."""
        queue = iter(tasks)
        upcoming = next(queue, None)
        while upcoming is not None or any(worker.task is not None for worker in self._workers):
            if upcoming is not None and len(self._workers) < self._num_workers:
                self._workers.append(self._start())
            for worker in self._workers:
                if upcoming is not None and worker.ready and worker.task is None:
                    with suppress(BrokenPipeError):  # its death is noticed below
                        worker.connection.send(upcoming)
                        worker.task, upcoming = upcoming, next(queue, None)
                        worker.began = worker.heard = time.monotonic()
            if not wait([worker.connection for worker in self._workers], _POLL_SECONDS):
                yield Waited()
            for number in range(len(self._workers)):
                yield from self._listen(number)

    def in_work(self) -> list[T]:
        """Tasks that have been begun and not ended."""
        return [worker.task for worker in self._workers if worker.task is not None]

    def close(self) -> None:
        """End all processes, whatever they do."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(_GRACE_SECONDS)
            worker.connection.close()

    def _listen(self, number: int) -> Iterator[Said[T] | Returned[T, R] | Lost[T]]:
        worker = self._workers[number]
        try:
            while worker.connection.poll():
                kind, content = worker.connection.recv()
                worker.heard = time.monotonic()
                if kind == "ready":
                    worker.ready = True
                elif kind == "stopped":
                    error, message, hint = content
                    raise error(message, hint)
                elif worker.task is not None and kind == "said":
                    yield Said(number, worker.task, content)
                elif worker.task is not None and kind == "returned":
                    task, worker.task = worker.task, None
                    yield Returned(number, task, content)
        except (EOFError, OSError):
            yield from self._replace(number, "")
            return
        if reason := self._overdue(worker):
            yield from self._replace(number, reason)

    def _overdue(self, worker: _Worker[T]) -> str:
        now = time.monotonic()
        if worker.task is None:
            return "it takes too long" if not worker.ready and now - worker.heard > _START_SECONDS else ""
        if now - worker.heard > self._stall_seconds:
            return f"hung: nothing was read for stall_seconds={self._stall_seconds:g}"
        if now - worker.began > self._task_seconds:
            return f"took longer than source_seconds={self._task_seconds:g}"
        return ""

    def _replace(self, number: int, reason: str) -> Iterator[Lost[T]]:
        worker = self._workers[number]
        worker.process.kill()
        worker.process.join(_GRACE_SECONDS)
        worker.connection.close()
        reason = reason or _death(worker.process.exitcode)
        if not worker.ready:  # that is no task's fault, and the next process would fare no better
            raise ResourceError(
                f"a worker process does not start: {reason}",
                "a script that splits needs an `if __name__ == '__main__':`; see what the process said above",
            )
        self._workers[number] = self._start()
        if worker.task is not None:
            yield Lost(number, worker.task, reason)

    def _start(self) -> _Worker[T]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        with _without_interrupts():
            process.start()
        theirs.close()
        return _Worker(process, ours)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with code {code}"


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A new process inherits what is blocked: Ctrl-C is the parent's, which then ends the others in order."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    connection: Connection, function: Callable[[Any, Any, Tell], Any], job: Any, task_bytes: int
) -> None:  # pragma: no cover - another process
    lock = threading.Lock()

    def send(kind: str, content: Any) -> None:
        with lock:
            connection.send((kind, content))

    threading.Thread(target=_die_with_parent, daemon=True).start()
    threading.Thread(target=_beat, args=(send,), daemon=True).start()
    _limit_memory(task_bytes)
    with suppress(EOFError, BrokenPipeError):
        send("ready", None)
        while True:
            task = connection.recv()
            try:
                result = function(job, task, lambda word: send("said", word))
            except OsoraError as error:
                send("stopped", (type(error), error.message, error.hint))
            else:
                send("returned", result)


def _beat(send: Callable[[str, Any], None]) -> None:  # pragma: no cover - another process
    """Give a sign of life as long as something is read: what hangs does not, however slow a sound file may be.

    Where the system does not count what is read, the sign is given in any case, and only `task_seconds` ends a task.
    """
    counts, own, last = Path("/proc/self/io"), 0, -1
    with suppress(OSError):
        while True:
            try:
                text = counts.read_text()
                read = int(text.split(maxsplit=2)[1]) - own
                own += len(text)  # this is counted too
            except (OSError, ValueError, IndexError):
                read = last + 1
            if read != last:
                send("alive", None)
            last = read
            time.sleep(_BEAT_SECONDS)


def _die_with_parent() -> None:  # pragma: no cover - another process
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _limit_memory(num_bytes: int) -> None:  # pragma: no cover - another process
    """Let allocations fail beyond what the process has now and a task may take; only Linux counts them."""
    import resource

    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        soft = pages * os.sysconf("SC_PAGE_SIZE") + num_bytes
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard == resource.RLIM_INFINITY or soft < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
