"""Threads that fetch, while the one who asked is told how far they are."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from opensora_core.net.transfer import Progress
from opensora_core.net.wire import Cancelled

J = TypeVar("J")
R = TypeVar("R")

_SLICE_SECONDS = 0.2
_END_SECONDS = 4.0  # that threads have to end in when the work is stopped
_QUEUED = 2  # jobs per thread that are asked for in advance
FEEDER = -1
"""The number of the thread that jobs come from, where it has to fetch something to know them."""


@dataclass(frozen=True)
class Moved:
    """How far a thread is with what it does: bytes done, and bytes in all, 0 where unknown."""

    worker: int
    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Ended(Generic[J, R]):
    """A job is over: with a result, or with an error."""

    worker: int
    job: J
    result: R | None
    error: Exception | None


class _Over:
    """A thread has no more to do."""


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class Porters(Generic[J, R]):
    """Carries out jobs in threads.

    Args:
        carry: does one job; is given it and what to tell its progress.
        name: of a job, for people.
        num_workers: threads.
        stop: set to make everything end; `Cancelled` is what a job raises then.
    """

    def __init__(
        self,
        carry: Callable[[J, Progress], R],
        *,
        name: Callable[[J], str],
        num_workers: int,
        stop: threading.Event,
    ) -> None:
        self.carry, self.name, self.num_workers, self.stop = carry, name, num_workers, stop
        self._jobs: queue.Queue[J | None] = queue.Queue(num_workers * _QUEUED)
        self._words: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def say(self, word: Any) -> None:
        """Hand a word of the one who makes the jobs to the one who runs them."""
        self._words.put(word)

    def tell(self, name: str) -> Progress:
        """What tells how far the one who makes the jobs is with something of this name."""
        return self._telling(FEEDER, name)

    def _telling(self, worker: int, name: str) -> Progress:
        return lambda done, total: self._words.put(Moved(worker, name, done, total))

    def run(self, jobs: Iterable[J]) -> Iterator[Any]:
        """Carry out the jobs, which are made in a thread of their own.

        Yields:
            `Moved`, `Ended`, what was said, and None where nothing happened for a moment.

        Raises:
            Whatever the jobs' own iterator raises.
        """
        threads = [threading.Thread(target=self._feed, args=(jobs,), daemon=True)]
        threads += [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(self.num_workers)]
        for thread in threads:
            thread.start()
        active, is_done = self.num_workers, False
        try:
            while active:
                try:
                    word = self._words.get(timeout=_SLICE_SECONDS)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(word, _Over):
                    active -= 1
                elif isinstance(word, _Failed):
                    raise word.error
                else:
                    yield word
            is_done = True
        finally:
            if not is_done:
                self.stop.set()
            end = time.monotonic() + _END_SECONDS
            for thread in threads:
                thread.join(max(end - time.monotonic(), 0.0))

    def _feed(self, jobs: Iterable[J]) -> None:
        try:
            for job in jobs:
                if not self._put(job):
                    break
            for _ in range(self.num_workers):
                self._put(None)
        except Cancelled:
            pass
        except BaseException as error:
            self._words.put(_Failed(error))
        finally:
            if isinstance(jobs, Generator):
                with suppress(Exception):
                    jobs.close()

    def _put(self, job: J | None) -> bool:
        while not self.stop.is_set():
            with suppress(queue.Full):
                self._jobs.put(job, timeout=_SLICE_SECONDS)
                return True
        return False

    def _work(self, number: int) -> None:
        while not self.stop.is_set():
            try:
                job = self._jobs.get(timeout=_SLICE_SECONDS)
            except queue.Empty:
                continue
            if job is None:
                break
            tell = self._telling(number, self.name(job))
            tell(0, 0)
            try:
                self._words.put(Ended(number, job, self.carry(job, tell), None))
            except Cancelled:
                break
            except Exception as error:
                self._words.put(Ended(number, job, None, error))
        self._words.put(_Over())
