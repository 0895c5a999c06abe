"""The same crew on a cluster: each of its members is a Ray actor that leads a process of the local crew.

So whatever a task can do to its process (die, hang, take all memory) is met where it happens, with the same words as
on one machine, and Ray only has to survive what is beyond a process: its own workers and whole nodes. These are plain
actors and not Ray Data: a task here has a clock of its own, says how far it is, and may be lost with a reason that
belongs to it alone, where a dataset gives a block of rows an all-or-nothing outcome without words in between. It also
spares pandas and pyarrow.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import opensora_core
from opensora_core.curation.cluster import POLL_SECONDS, SEE_SECONDS, Actor, connected, require_same, told, unseen_error
from opensora_core.curation.crew import Again, Crew, Lost, Returned, Said, Tell, Waited, Word
from opensora_core.errors import OsoraError, ResourceError

J = TypeVar("J")
T = TypeVar("T")
R = TypeVar("R")

MOST_TRIES = 2
"""Workers of Ray that a task may lose before it is given up."""

_START_SECONDS = 300.0  # in which some worker has to be placed: a cluster may have to fetch a machine first
_GRACE_SECONDS = 5.0
_MOST_FALSE_STARTS = 3  # one after the other
_TOKEN, _STALE_SECONDS = ".ray-", 3600.0


class _Member(Actor):  # pragma: no cover - another process
    """Leads one process of the local crew."""

    def __init__(
        self, folder: str, function: Callable[[Any, Any, Tell], Any], job: Any, limits: dict[str, Any]
    ) -> None:
        super().__init__(folder)
        self._crew: Crew[Any, Any, Any] = Crew(function, job, num_workers=1, **limits)

    def work(self, task: Any, needed: Sequence[tuple[str, int]]) -> Iterator[tuple[str, Any]]:
        """Do a task, unless this machine lacks a file of it, or has another of this name."""
        for path, size in needed:
            if not _has(path, size):
                yield "unseen", (path, size)
                return
        try:
            for word in self._crew.work([task]):
                if isinstance(word, Said):
                    yield "said", word.word
                elif isinstance(word, Returned):
                    yield "returned", word.result
                elif isinstance(word, Lost):
                    yield "lost", word.reason
        except OsoraError as error:
            yield "stopped", (type(error), error.message, error.hint)

    def end(self) -> None:
        """End the process, so that it writes nothing more."""
        self._crew.close()


def _has(path: str, size: int) -> bool:  # pragma: no cover - another process
    end = time.monotonic() + SEE_SECONDS
    while True:
        with suppress(OSError):
            if os.stat(path).st_size == size:  # noqa: PTH116 - names of any bytes, as they came
                return True
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class _Errand(Generic[T]):
    task: T
    tries: int = 0
    is_unseen: bool = False  # by the driver as well, so that it is for the task to say what is wrong


@dataclass
class _Post(Generic[T]):
    """A member as the driver knows it."""

    actor: Any
    starting: Any  # the answer to `begin`, until it is there
    token: str = ""
    name: str = "a worker"
    errand: _Errand[T] | None = None
    words: Any = None  # the stream of the errand


class RayCrew(Generic[J, T, R]):
    """A number of workers of a Ray cluster, for which see `Crew`.

    Args:
        function, job, stall_seconds, task_seconds, task_bytes: as of `Crew`.
        num_workers: at most; 0 is as many as the cluster has room for.
        address: as of `connected`.
        cpus: of Ray that a worker takes.
        needs: the files of a task, which have to be the same wherever it is done.
        folder: that is written, which has to be the same everywhere; None if tasks write nothing.
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
        address: str,
        cpus: int,
        needs: Callable[[T], Sequence[Path]],
        folder: Path | None,
    ) -> None:
        limits = {"stall_seconds": stall_seconds, "task_seconds": task_seconds, "task_bytes": task_bytes}
        self._arguments = (str(Path.cwd()), function, job, limits)
        self._num_workers, self._address, self._cpus = num_workers, address, cpus
        self._needs, self._folder = needs, folder
        self._posts: list[_Post[T]] = []
        self._again: deque[_Errand[T]] = deque()
        self._false_starts = 0
        self._alone_since = time.monotonic()  # without a worker that has started

    def run(self, tasks: Iterable[T]) -> Iterator[Word[T, R]]:
        """Work through tasks, in their order as far as workers are free.

        A task whose worker or node is lost is tried again, by others, and is `Lost` after `MOST_TRIES` of them.

        Yields:
            `Returned` or `Lost` once for each, and what it says before.

        Raises:
            OsoraError: a task raised it, such as for a full disk. All others end with it.
            ResourceError: no cluster, no worker, or one that does not see the files.
            UsageError: Ray is not installed.
        """
        with connected(self._address, self._num_workers * self._cpus) as library:
            self._ray, self._alone_since = library, time.monotonic()
            self._kind = library.remote(num_cpus=self._cpus, max_restarts=0, max_concurrency=2)(_Member)
            most = self._num_workers or max(1, int(library.cluster_resources().get("CPU", 1)) // self._cpus)
            try:
                self._remove_stale_tokens()
                yield from self._work((_Errand(task) for task in tasks), most)
            finally:
                self.close()

    def in_work(self) -> list[T]:
        """Tasks that have been begun and not ended."""
        return [post.errand.task for post in self._posts if post.errand is not None] + [e.task for e in self._again]

    def close(self) -> None:
        """End all workers, and wait until they write no more."""
        posts, self._posts = self._posts, []
        with suppress(Exception):  # whatever is wrong with them by now
            if ends := [post.actor.end.remote() for post in posts if post.starting is None]:
                self._ray.wait(ends, num_returns=len(ends), timeout=_GRACE_SECONDS)
        for post in posts:
            self._remove_token(post)
            with suppress(Exception):
                self._ray.kill(post.actor)

    def _work(self, queue: Iterator[_Errand[T]], most: int) -> Iterator[Word[T, R]]:
        upcoming = next(queue, None)
        while upcoming is not None or self._again or any(post.errand for post in self._posts):
            if (upcoming is not None or self._again) and len(self._posts) < most:
                self._posts.append(self._start())
            for post in self._posts:
                if post.starting is None and post.errand is None:
                    if self._again:
                        self._send(post, self._again.popleft())
                    elif upcoming is not None:
                        self._send(post, upcoming)
                        upcoming = next(queue, None)
            waited_for = [post.words or post.starting for post in self._posts if post.words or post.starting]
            heard, _ = self._ray.wait(waited_for, num_returns=1, timeout=POLL_SECONDS)
            if not heard:
                yield Waited()
            for number, post in enumerate(self._posts):
                if post.words in heard or post.starting in heard:
                    yield from self._listen(number)
            if self._is_alone():
                raise ResourceError(
                    f"no worker of Ray has started in {_START_SECONDS:g} s",
                    "ray status says what the cluster has free",
                )

    def _is_alone(self) -> bool:
        if any(post.starting is None for post in self._posts):
            self._alone_since = time.monotonic()
        return time.monotonic() - self._alone_since > _START_SECONDS

    def _start(self) -> _Post[T]:
        token = ""
        if self._folder is not None:
            path = self._folder / f"{_TOKEN}{uuid.uuid4().hex}"
            try:
                path.touch()
            except OSError as error:
                raise ResourceError(f"cannot write to {self._folder}: {error}") from error
            token = str(path)
        actor = self._kind.remote(*self._arguments)
        return _Post(actor, actor.begin.remote(token), token)

    def _send(self, post: _Post[T], errand: _Errand[T]) -> None:
        needed = []
        for path in () if errand.is_unseen else self._needs(errand.task):
            with suppress(OSError):  # what is not here is for the task to say
                needed.append((str(path), path.stat().st_size))
        post.errand = errand
        post.words = post.actor.work.options(num_returns="streaming").remote(errand.task, needed)

    def _listen(self, number: int) -> Iterator[Word[T, R]]:
        post = self._posts[number]
        try:
            if post.starting is not None:
                self._greet(post, *self._ray.get(post.starting))
                return
            assert post.errand is not None
            kind, content = self._ray.get(next(post.words))
        except StopIteration:  # the worker ended, and Ray has not noticed
            yield from self._replace(number, "it ended without a word")
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            yield from self._replace(number, told(error))
        else:
            yield from self._hear(number, post, post.errand, kind, content)

    def _hear(self, number: int, post: _Post[T], errand: _Errand[T], kind: str, content: Any) -> Iterator[Word[T, R]]:
        if kind == "said":
            yield Said(number, errand.task, content)
            return
        if kind == "stopped":
            error, message, hint = content
            raise error(message, hint)
        post.errand = post.words = None
        if kind == "returned":
            yield Returned(number, errand.task, content)
        elif kind == "lost":
            yield Lost(number, errand.task, content)
        else:
            path, size = content
            with suppress(OSError):
                if Path(path).stat().st_size == size:
                    raise unseen_error(post.name, path)
            self._again.append(replace(errand, is_unseen=True))  # it changes, or is gone

    def _greet(self, post: _Post[T], name: str, version: str, unseen: str) -> None:
        self._remove_token(post)
        post.name, post.starting, self._false_starts = name, None, 0
        require_same(name, version, unseen)

    def _replace(self, number: int, reason: str) -> Iterator[Lost[T] | Again[T]]:
        post = self._posts[number]
        self._remove_token(post)
        with suppress(Exception):
            self._ray.kill(post.actor)
        if post.starting is not None:
            self._false_starts += 1
            if self._false_starts >= _MOST_FALSE_STARTS:
                raise ResourceError(
                    f"workers of Ray do not start: {reason}",
                    f"every machine needs osora {opensora_core.__version__} and the same Python",
                )
        self._posts[number] = self._start()
        if post.errand is None:
            return
        errand = replace(post.errand, tries=post.errand.tries + 1)
        if errand.tries < MOST_TRIES:
            self._again.append(errand)
            yield Again(number, errand.task, f"its worker of Ray was lost: {reason}")
        else:
            yield Lost(number, errand.task, f"its worker of Ray was lost {errand.tries} times: {reason}")

    def _remove_stale_tokens(self) -> None:
        """Those that a killed run left; another one may be starting in the same folder."""
        for path in self._folder.glob(f"{_TOKEN}*") if self._folder is not None else ():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()

    def _remove_token(self, post: _Post[T]) -> None:
        if post.token:
            with suppress(OSError):
                Path(post.token).unlink(missing_ok=True)
            post.token = ""
