"""Seeing processes to their end: nobody is left over, and whoever failed first is named with the end of its log."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from opensora_core.errors import ResourceError
from opensora_core.files import refusal
from opensora_core.launch import records
from opensora_core.launch.plan import NEEDED_HERE, SHUTDOWN_SECONDS, TERMINAL_VARIABLE, Command, LaunchPlan, travelling
from opensora_core.launch.records import Record

POLL_SECONDS = 0.2
TROUBLE_SECONDS = 15.0  # that the others have to notice that one of them failed, and to end
STOP_SECONDS = SHUTDOWN_SECONDS + 15.0
USAGE, INTERRUPTED, TERMINATED = 2, 130, 143
BARE = ("terminated", "interrupted")  # what a command says that has nothing to add to the signal
PR_SET_PDEATHSIG = 1
LAUNCHER_VARIABLE = "OSORA_LAUNCHER"
EXITED = re.compile(r"exitcode: (-?\d+)\) local_rank: \d+ \(pid: (\d+)\)")


@dataclass(frozen=True)
class Started:
    """Processes were started.

    Attributes:
        way: by which.
        nodes, processes: machines, and processes on each; 0 is one for each GPU.
        end_point: where they meet.
        logs: folder of what they say.
    """

    way: str
    nodes: int
    processes: int
    end_point: str
    logs: Path


@dataclass(frozen=True)
class Restarting:
    """They failed, and are started again."""

    number: int
    limit: int
    reason: str


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        code: its exit code.
        rank: whose failure was the first; None for no failure, or where nobody knows.
        reason: what failed; empty for no failure.
        log: of that rank, or of torchrun; None where nothing was written down.
        tail: last lines of it.
        told: whether rank 0 has said that itself, on the terminal.
    """

    code: int
    rank: int | None = None
    reason: str = ""
    log: Path | None = None
    tail: tuple[str, ...] = ()
    told: bool = False


class Supervisor:
    """Starts what a plan says, as often as is allowed.

    Args:
        plan: attempt, from 0 -> what is to be started.
        logs: folder of what the processes say.
        max_restarts: how often a job that failed is started again. One that was asked to stop, or whose command
            cannot be carried out as written, is not.

    Attributes:
        ended: how the last attempt ended, once `run` is through.
    """

    def __init__(self, plan: Callable[[int], LaunchPlan], logs: Path, max_restarts: int = 0) -> None:
        self._plan, self._logs, self._max_restarts = plan, logs, max_restarts
        self.ended = Ended(0)

    def run(self) -> Iterator[Started | Restarting | Ended]:
        """Start, watch, start again. Ends with `Ended` where a job failed.

        An exception at a `yield`, or a signal that raises one, stops the processes as SIGTERM does: they have time
        for a checkpoint. A second one kills them.

        Raises:
            ResourceError: the folder of the logs cannot be written, or a command does not start.
        """
        for attempt in range(self._max_restarts + 1):
            plan = self._plan(attempt)
            yield Started(plan.way, plan.nodes, plan.processes, plan.end_point, self._logs)
            self.ended = self._attempt(plan)
            if self.ended.code in (0, USAGE, INTERRUPTED, TERMINATED):
                break
            if attempt < self._max_restarts:
                yield Restarting(attempt + 1, self._max_restarts, self.ended.reason)
        if self.ended.reason:
            yield self.ended

    def _attempt(self, plan: LaunchPlan) -> Ended:
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            records.clear(self._logs)
        except OSError as error:
            raise refusal(self._logs, error) from error
        jobs: list[subprocess.Popen[bytes]] = []
        try:
            jobs += (self._start(command, node, plan) for node, command in enumerate(plan.commands))
            self._wait(jobs)
        finally:
            _stop(jobs, STOP_SECONDS)
        codes = [job.returncode for job in jobs]
        return self._judge(plan, codes)

    def _start(self, command: Command, node: int, plan: LaunchPlan) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != LAUNCHER_VARIABLE}
        if plan.clean_environment:
            kept = {name: value for name, value in os.environ.items() if name in NEEDED_HERE}
            environment = kept | travelling(os.environ)
        # torchrun's own words would go between those of rank 0, which gets at our stderr through the only descriptor
        # that torchrun hands on: its stdin
        is_local = plan.way == "torchrun"
        if is_local:
            environment |= {LAUNCHER_VARIABLE: str(os.getpid()), TERMINAL_VARIABLE: "0"}
        place = self._logs / (records.LAUNCHER_LOG if is_local else f"node-{node}.log")
        try:
            with place.open("ab") as log:
                return subprocess.Popen(
                    command.words,
                    stdin=2 if is_local else subprocess.PIPE if command.lifeline else subprocess.DEVNULL,
                    stdout=log if node else None,
                    stderr=log if is_local or node else None,
                    env=environment | dict(command.environment),
                    start_new_session=True,  # Ctrl-C is for us to pass on
                    preexec_fn=_end_with_launcher,  # noqa: PLW1509 - one system call, which takes no lock
                )
        except OSError as error:
            raise ResourceError(f"{command.words[0]} does not start: {error}") from error

    def _wait(self, jobs: list[subprocess.Popen[bytes]]) -> None:
        """Wait until all commands end, or one fails, or a process of this machine fails and the rest does not."""
        trouble: float | None = None
        while any(job.poll() is None for job in jobs):
            if any(job.poll() for job in jobs):
                _stop(jobs, TROUBLE_SECONDS)
                return
            if trouble is None and any(record.is_gone or record.code for record in records.read(self._logs).values()):
                trouble = time.monotonic()
            if trouble is not None and time.monotonic() - trouble > TROUBLE_SECONDS:
                _stop(jobs, 0)
                return
            time.sleep(POLL_SECONDS)

    def _judge(self, plan: LaunchPlan, codes: list[int]) -> Ended:
        """Who was the first to fail, and how."""
        if not any(codes):
            return Ended(0)
        found = records.read(self._logs)
        killed = [record for record in found.values() if record.is_gone]
        failed = sorted((record for record in found.values() if record.code), key=lambda record: record.at)
        blamed = {rank for record in failed for rank in record.ranks}
        own = [record for record in failed if not record.ranks and record.code not in (INTERRUPTED, TERMINATED)]
        stopped = [record for record in failed if record.code in (INTERRUPTED, TERMINATED)]
        # who is blamed by others comes before who has merely left no word: that may have been killed with the rest
        suspects = sorted(killed, key=lambda record: (record.rank not in blamed, not self._signal_of(record)))
        if own:
            first = own[0]
            return self._ended(first, first.code or 1, first.message)
        # torchrun asks the others to stop when one was killed, and what they leave looks as if all had been asked to
        if suspects and (blamed or not stopped or self._signal_of(suspects[0])):
            first = suspects[0]
            told = next((record.message for record in failed if first.rank in record.ranks), "")
            manner = self._signal_of(first) or "ended without a word"
            reason = f"rank {first.rank} ({first.host}, pid {first.pid}) {manner}"
            seen = told.partition("; ")[2]  # where others last saw it
            return self._ended(first, 1, f"{reason}; {seen}" if seen else reason)
        if failed and len(failed) == len(stopped):
            return self._of_stopped(failed)
        if failed:
            first = next((record for record in failed if record.ranks), failed[0])
            culprit = next((found[rank] for rank in first.ranks if rank in found), first)
            return self._ended(culprit, first.code or 1, first.message)
        return self._of_starter(plan, codes)

    def _of_stopped(self, stopped: list[Record]) -> Ended:
        """Nobody failed, and who started them was not asked to stop: somebody sent a signal to one of them, or all."""
        first = stopped[0]
        zero = next((record for record in stopped if record.rank == 0 and record.message not in BARE), None)
        if zero is not None:  # a run that stops as it should says so
            return self._ended(zero, zero.code or 1, zero.message)
        name = signal.Signals((first.code or TERMINATED) - 128).name
        return Ended(first.code or 1, first.rank, f"rank {first.rank} ({first.host}, pid {first.pid}) got {name}")

    def _of_starter(self, plan: LaunchPlan, codes: list[int]) -> Ended:
        """No process of the run has left a word; what was to start them has ended."""
        node = next(node for node, code in enumerate(codes) if code)
        named = plan.commands[node]
        reason = f"{named.words[0] if plan.way != 'torchrun' else 'torchrun'} on {named.node} ended with {codes[node]}"
        for name in (records.LAUNCHER_LOG, f"launcher-{node}.log", f"node-{node}.log"):
            if tail := records.tail(self._logs / name):
                return Ended(1, None, reason, self._logs / name, tail)
        return Ended(1, None, reason)  # of the first machine all is on the terminal

    def _ended(self, record: Record, code: int, reason: str) -> Ended:
        log = records.log_of(self._logs, record.rank)
        told = record.rank == 0 and record.code is not None
        return Ended(code, record.rank, reason, log, records.tail(log), told)

    def _signal_of(self, record: Record) -> str:
        """What ended a process, where torchrun saw that it was a signal; else nothing."""
        for log in self._logs.glob("launcher*.log"):
            for code, pid in EXITED.findall(log.read_text(encoding="utf-8", errors="replace")):
                if int(pid) == record.pid and int(code) < 0:
                    return f"was ended by {signal.Signals(-int(code)).name}"
        return ""


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends, however that ends.

    On Linux the kernel does it, elsewhere a thread that looks every second.
    """
    parent = os.getppid()
    if not _ask_kernel(signal.SIGKILL):
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if os.getppid() != parent or (launcher is not None and _parent_of(parent) not in (launcher, "")):
        os._exit(1)  # it ended before we asked: whoever adopted us is no child of the launcher


def _parent_of(pid: int) -> str:
    """The parent of a process; empty where the system does not tell."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        return status.partition("\nPPid:")[2].split()[0]
    return ""


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _ask_kernel(number: signal.Signals) -> bool:
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) == 0)


def _end_with_launcher() -> None:
    _ask_kernel(signal.SIGKILL)


def _stop(jobs: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Ask commands to stop, and kill those that have not after some seconds, or at the second Ctrl-C.

    Each has a group of its own, in which everything is that it started, as far as that did not leave it.
    """
    try:
        for job in jobs:
            if job.poll() is None:
                if job.stdin is not None:
                    job.stdin.close()
                elif seconds:
                    _signal(job, signal.SIGTERM)
        end = time.monotonic() + seconds
        while any(job.poll() is None for job in jobs) and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 4)
    finally:
        for job in jobs:
            if job.poll() is None:  # the number of one that has ended may be another's by now
                _signal(job, signal.SIGKILL)
                job.wait()


def _signal(job: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(job.pid, number)
