"""Who has not arrived: every process tells each second where it is, and a run whose processes part ends by name.

    with joined(device, ...) as mesh, watching(mesh, timeout_seconds=..., lost_seconds=...) as watch:
        yield from check_fabric(mesh, facts)
        for ...:
            watch.step(step)                    # once a step, before its first collective

A collective that waits for a process which is dead, stopped or elsewhere tells only that it waits. So a thread of each
process writes to the store of the run, through a connection of its own: its step, where its main thread is and how many
collectives it has begun. Rank 0 reads what all of them wrote, the first process of each machine what its machine's
wrote, and everybody what rank 0 wrote: n + 2 small reads a second in all. Clocks are never compared: what counts is for
how long a reader has seen no change.

A process is given up when it left, failed, is gone, or has shown no sign of life for `lost_seconds`; so is one that
others have waited for in the same collective for `timeout_seconds`. The verdict goes to everybody. The main thread, if
it comes out of its collective by itself, raises it; otherwise the process ends with it from outside.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from opensora_core.errors import ConfigError, OsoraError, Stopped, TrainingError
from opensora_core.launch import records
from opensora_core.launch.plan import LOGS_VARIABLE
from opensora_core.parallel.mesh import Mesh, local_rank, processes_here

BEAT_SECONDS = 1.0
GRACE_SECONDS = 3.0  # that the main thread has to raise a verdict itself, which cleans up and reads better
MARGIN_SECONDS = 120.0  # by which torch's own limit for collectives may be longer than ours
PARTING_SECONDS = 10.0  # that the way out may take once a peer is lost: taking leave of it can hang as well
RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"
VERDICT = "verdict"
WORDS_OF_A_BROKEN_LINK = (
    "closed by peer", "reset by peer", "timed out waiting", "timeout", "broken pipe", "connectfullmesh", "nccl", "gloo",
)  # fmt: skip

_watches = itertools.count()
"""How often this process has begun to watch: what one run of a recipe said is nothing to the next."""

log = logging.getLogger(__name__)


class Parted(TrainingError):  # noqa: N818 - it is what happened to them
    """Processes of a run that do not work together any more.

    Attributes:
        ranks: of those who are to blame.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message, "go on from the last checkpoint with --resume, or let --max-restarts do it")
        self.ranks = ranks


@dataclass(frozen=True)
class Beat:
    """What a process tells of itself.

    Attributes:
        rank, host, pid: which one it is.
        machine: see `opensora_core.launch.records.machine`.
        number: grows with each beat.
        step: that it is in; -1 before the first.
        calls: collectives that it has begun.
        place: where its main thread is.
        waits: whether that is in a collective.
        still: seconds for which nothing of this has changed.
        state: one of those above.
        words: why it failed.
    """

    rank: int
    host: str
    pid: int
    machine: str
    number: int = 0
    step: int = -1
    calls: int = 0
    place: str = ""
    waits: bool = False
    still: float = 0.0
    state: str = RUNNING
    words: str = ""

    def named(self) -> str:
        """The process as a reader finds it."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def whereabouts(self) -> str:
        """What it was last seen at."""
        step = "before the first step" if self.step < 0 else f"in step {self.step}"
        return f"{step}, at {self.place}" if self.place else step


class Watch:
    """A process' own part of the watch; without others it does nothing."""

    def __init__(self, beat: Beat) -> None:
        self._step = beat.step
        self._beat = beat

    def step(self, number: int) -> None:
        """Tell the step that begins."""
        self._step = number

    def fail(self, error: BaseException) -> BaseException:
        """Say what an error on the way out means for the run: the same one, or the one that was its cause."""
        return error

    def close(self, state: str, words: str = "") -> None:
        """Tell the others how this process ended."""


@contextmanager
def watching(
    mesh: Mesh, *, timeout_seconds: float = 600.0, lost_seconds: float = 20.0, logs: Path | None = None
) -> Iterator[Watch]:
    """Watch over the processes of a run, and be watched.

    Args:
        mesh: of the run; one process has nobody to watch.
        timeout_seconds: that a collective may wait.
        lost_seconds: without a sign of life, after which a process counts as lost.
        logs: folder where the verdict is written down for whoever started the run; None is the one that they named.

    Raises:
        ConfigError: times that are too short to tell anything.
        Parted: another process left, failed, died, or did not arrive; it is named.
    """
    if min(timeout_seconds, lost_seconds) < 2 * BEAT_SECONDS:
        raise ConfigError(
            f"parallel.timeout_seconds = {timeout_seconds} and parallel.lost_seconds = {lost_seconds} are to be "
            f"{2 * BEAT_SECONDS:g} at least: a sign of life comes once in {BEAT_SECONDS:g} s"
        )
    if logs is None and LOGS_VARIABLE in os.environ:
        logs = Path(os.environ[LOGS_VARIABLE])
    own = Beat(mesh.rank, socket.gethostname(), os.getpid(), records.machine())
    watch = Watch(own) if mesh.size == 1 else _Thread(own, mesh.size, timeout_seconds, lost_seconds, logs)
    try:
        yield watch
    except Stopped:
        watch.close(STOPPED)
        raise
    except BaseException as error:
        cause = watch.fail(error)
        if cause is error:
            raise
        raise cause from error
    else:
        watch.close(DONE)


class _Thread(Watch):
    """The thread of one process among many."""

    def __init__(self, own: Beat, size: int, timeout_seconds: float, lost_seconds: float, logs: Path | None) -> None:
        super().__init__(own)
        self._timeout, self._lost, self._logs = timeout_seconds, lost_seconds, logs
        self._main = threading.get_ident()
        self._is_frozen = False  # what the main thread was at when its collective failed is what counts
        local, mates = local_rank(), processes_here()
        if own.rank == 0:
            watched = range(size)
        else:
            watched = range(own.rank, min(own.rank + mates, size)) if local == 0 else range(0)
        self._watched = sorted({0, *watched} - {own.rank})
        self._seen: dict[int, tuple[Beat, float]] = {}
        self._moved = time.monotonic()
        self._verdict: Parted | None = None
        self._judged = threading.Event()
        self._leaving = threading.Event()
        self._lock = threading.Lock()
        self._prefix = f"osora-watch-{next(_watches)}"
        self._store = self._connect()
        self._began = self._talked = time.monotonic()
        if own.rank == 0:
            self._store.set(VERDICT, "")
        self._tell(own)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    # what the main thread does ------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> BaseException:
        """See `Watch`."""
        is_broken_link = _is_broken_link(error)
        if is_broken_link:
            self._is_frozen = True
            self._judged.wait(self._lost + 3 * BEAT_SECONDS)  # whoever is to blame is known by then
        if isinstance(error, Exception) and not isinstance(error, OsoraError) and self._verdict is None:
            self._verdict = self._early() if is_broken_link else None
        if self._verdict is None or isinstance(error, OsoraError) or not isinstance(error, Exception):
            words = error.message if isinstance(error, OsoraError) else f"{type(error).__name__}: {error}"
            self.close(FAILED, words[:1000])
            return error
        self._leaving.set()
        parting = threading.Timer(PARTING_SECONDS, self._end)
        parting.daemon = True
        parting.start()
        return self._verdict

    def close(self, state: str, words: str = "") -> None:
        """See `Watch`."""
        self._leaving.set()
        with suppress(RuntimeError):  # the store may be gone: its owner ended first
            self._tell(replace(self._beat, step=self._step, state=state, words=words))

    # what its threads do ------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        while not self._leaving.wait(BEAT_SECONDS):
            try:
                self._tell(self._look())
                self._read()
            except RuntimeError:  # what it means is for the judge to say, who never waits for the network
                time.sleep(BEAT_SECONDS)
                with suppress(RuntimeError):
                    self._store = self._connect()

    def _tell(self, beat: Beat) -> None:
        with self._lock:
            if self._beat.state != RUNNING:
                return
            self._beat = replace(beat, number=self._beat.number + 1)
            self._store.set(f"beat/{beat.rank}", json.dumps(asdict(self._beat)))

    def _look(self) -> Beat:
        """Where the main thread is now."""
        if self._is_frozen:
            return replace(self._beat, still=round(time.monotonic() - self._moved, 1))
        place, group_seconds = _place(sys._current_frames().get(self._main))
        waits = 0 < group_seconds <= self._timeout + MARGIN_SECONDS  # groups that may wait for hours do so on purpose
        fresh = replace(self._beat, step=self._step, calls=_calls(), place=place, waits=waits)
        if (fresh.step, fresh.calls, fresh.place) != (self._beat.step, self._beat.calls, self._beat.place):
            self._moved = time.monotonic()
        return replace(fresh, still=round(time.monotonic() - self._moved, 1))

    def _read(self) -> None:
        keys = [rank for rank in self._watched if self._store.check([f"beat/{rank}"])]
        values = self._store.multi_get([f"beat/{rank}" for rank in keys]) if keys else []
        now = time.monotonic()
        for rank, value in zip(keys, values, strict=True):
            beat = Beat(**json.loads(value))
            if rank not in self._seen or self._seen[rank][0].number != beat.number:
                self._seen[rank] = beat, now
        told = self._store.get(VERDICT) if self._store.check([VERDICT]) else b""
        self._talked = time.monotonic()
        if told and not self._judged.is_set():
            found = json.loads(told)
            self._decide(Parted(found["message"], tuple(found["ranks"])), spread=False)

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._leaving.wait(BEAT_SECONDS):
            if time.monotonic() - looked > self._lost / 2:  # it was this process that was stopped
                self._talked = time.monotonic()
            looked = time.monotonic()
            verdict = self._verdict or self._find()
            if verdict is None:
                continue
            self._decide(verdict, spread=True)
            if not self._leaving.wait(GRACE_SECONDS):
                self._end()
            return

    def _find(self) -> Parted | None:
        """Look for a process that the run cannot go on with."""
        now = time.monotonic()
        for beat, since in list(self._seen.values()):
            if beat.state in (DONE, STOPPED):
                continue
            reason = None
            if beat.state == FAILED:
                reason = f"failed {beat.whereabouts()}: {beat.words}"
            elif beat.machine == self._beat.machine and not records.is_alive(beat.pid):
                reason = f"is gone; it was last seen {beat.whereabouts()}"
            elif now - since > self._lost and now - self._talked < self._lost:
                silent = f"gives no sign of life for {now - since:.0f} s; it was last seen {beat.whereabouts()}"
                reason = f"{silent}; it is stopped, or its machine is off or cut off"
            if reason:
                return Parted(f"{beat.named()} {reason}", (beat.rank,))
        for rank in self._watched:
            if rank not in self._seen and now - self._began > self._lost > now - self._talked:
                return Parted(f"rank {rank} has given no sign of life in {self._lost:.0f} s", (rank,))
        first = self._seen.get(0)
        if now - self._talked > self._lost and not (first and first[0].state in (DONE, STOPPED)):
            named = first[0].named() if first else "rank 0"
            silent = f"the store of the run at {_end_point()} does not answer for {now - self._talked:.0f} s"
            return Parted(f"{silent}: this machine, or the one of {named}, is off or cut off", (0,))
        return self._find_hang() if self._beat.rank == 0 else None

    def _early(self) -> Parted | None:
        ended = [beat for beat, _ in self._seen.values() if beat.state in (DONE, STOPPED)]
        if not ended:
            return None
        whom = ", ".join(f"{beat.named()} in step {beat.step}" for beat in ended)
        return Parted(f"ended before the others: {whom}", tuple(beat.rank for beat in ended))

    def _find_hang(self) -> Parted | None:
        everybody = [self._beat, *(beat for beat, _ in self._seen.values())]
        waiting = [beat for beat in everybody if beat.waits and beat.state == RUNNING]
        if not any(beat.still > self._timeout for beat in waiting):
            return None
        longest = max(waiting, key=lambda beat: beat.still)
        late = [beat for beat in everybody if beat not in waiting]
        if not late:  # all are in collectives, but not in the same one
            fewest = min(beat.calls for beat in everybody)
            late = [beat for beat in everybody if beat.calls == fewest]
            late = late if len(late) < len(everybody) else [b for b in everybody if b.place != longest.place] or late
        whom = "; ".join(
            f"{beat.named()} is {'done' if beat.state == DONE else beat.whereabouts()}, after {beat.calls} collectives"
            for beat in late
        )
        waits = f"{longest.named()} has waited {longest.still:.0f} s {longest.whereabouts()} (call {longest.calls})"
        return Parted(f"{waits}; not arrived: {whom}", tuple(beat.rank for beat in late))

    def _decide(self, verdict: Parted, *, spread: bool) -> None:
        if self._judged.is_set():
            return
        self._verdict = verdict
        self._judged.set()
        if spread:
            words = json.dumps({"message": verdict.message, "ranks": verdict.ranks})
            telling = threading.Thread(target=self._spread, args=(words,), daemon=True)
            telling.start()
            telling.join(BEAT_SECONDS)  # the network may be what is lost

    def _spread(self, words: str) -> None:
        with suppress(RuntimeError):
            self._connect().compare_set(VERDICT, "", words)

    def _connect(self) -> Any:
        host, _, port = _end_point().rpartition(":")
        seconds = timedelta(seconds=max(self._lost / 2, 1))
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=seconds)
        return PrefixStore(self._prefix, store)

    def _end(self) -> None:
        """End this process from outside its main thread, which is held by a collective."""
        assert self._verdict is not None
        log.critical("rank %d ends: %s", self._beat.rank, self._verdict.message)
        if self._logs is not None:
            records.end(self._logs, self._beat.rank, 1, self._verdict.message, self._verdict.ranks)
        os._exit(1)


def _end_point() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _calls() -> int:
    """How many collectives this process has begun, in all groups."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def _place(frame: FrameType | None) -> tuple[str, float]:
    """Where a thread is, in words, and how long the collective that it is in may take; 0 if it is in none."""
    call, seconds = "", 0.0
    chosen: FrameType | None = None  # the innermost of ours, or else of whoever calls torch
    inner = frame
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/distributed/" in file and frame.f_code.co_name not in ("wrapper", "inner"):
            call = frame.f_code.co_name if not call or "distributed_c10d" in file else call
            seconds = max(seconds, _seconds_of(frame.f_locals.get("group")))
        if "/torch/" not in file and "/parallel/watchdog" not in file:
            chosen = chosen or frame
            if "/opensora_core/" in file:
                chosen = frame
                break
        frame = frame.f_back
    chosen = chosen or inner
    if chosen is None:
        return "", 0.0
    where = f"{Path(chosen.f_code.co_filename).name}:{chosen.f_lineno} {chosen.f_code.co_name}"
    return f"{call} of {where}" if call else where, seconds


def _seconds_of(group: Any) -> float:
    """How long collectives of a group may take; what tells no time waits as long as all."""
    found = 1.0
    with suppress(Exception):
        group = group if isinstance(group, dist.ProcessGroup) else dist.group.WORLD
        found = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return found


def _is_broken_link(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in words for sign in WORDS_OF_A_BROKEN_LINK)
