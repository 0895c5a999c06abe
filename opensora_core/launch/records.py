"""What each process of a run leaves beside its log, so that whoever started it can say how it ended.

RUN/logs/
    rank-N.log      what rank N said
    rank-N.json     its host and pid, and in the end its exit code and error
    launcher.log    what torchrun said; of several machines launcher-N.log, and node-N.log of what leads there
    .lock           held by whoever started them
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from opensora_core.files import refusal, write_bytes

LOGS = "logs"
LAUNCHER_LOG = "launcher.log"
TAIL_BYTES = 16384


@dataclass(frozen=True)
class Record:
    """How a process began and ended.

    Attributes:
        rank, host, pid: which one.
        machine: see `machine`.
        code: that it ended with; None while it runs, and for ever if it was killed.
        at: seconds since 1970 at its end.
        message: of its error.
        ranks: whom it blames, where it ended for others.
    """

    rank: int
    host: str
    pid: int
    machine: str
    code: int | None = None
    at: float = 0.0
    message: str = ""
    ranks: tuple[int, ...] = ()

    @property
    def is_gone(self) -> bool:
        """Whether it ran on this machine, runs no more, and has left no word."""
        return self.code is None and self.machine == machine() and not is_alive(self.pid)


def machine() -> str:
    """What process ids are unique on: containers on one machine, or of one name on several, have others."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs, or waits to be buried."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def own_folder(run: Path) -> Iterator[Path]:
    """A folder of a run for logs that no other start writes to: `logs`, or `logs-2` and so on while that one is used.

    Two starts in one folder would take the records of each other's processes for their own, and end for them.

    Raises:
        ResourceError: the folder cannot be written.
    """
    for number in count(1):
        logs = run / (LOGS if number == 1 else f"{LOGS}-{number}")
        try:
            logs.mkdir(parents=True, exist_ok=True)
            lock = FileLock(logs / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            continue
        except OSError as error:
            raise refusal(logs, error) from error
        try:
            yield logs
        finally:
            lock.release()
        return


def log_of(logs: Path, rank: int) -> Path:
    """Where a rank's log is."""
    return logs / f"rank-{rank}.log"


def begin(logs: Path, rank: int) -> None:
    """Write down that this process is a rank.

    Raises:
        ResourceError: the folder cannot be written.
    """
    _write(logs, _own(rank))


def end(logs: Path, rank: int, code: int, message: str = "", ranks: tuple[int, ...] = ()) -> None:
    """Write down how this process ends; a disk that refuses it is no reason to end differently."""
    found = read(logs).get(rank) or _own(rank)
    if found.code is None:
        with suppress(Exception):
            _write(logs, replace(found, code=code, at=time.time(), message=message, ranks=ranks))


def read(logs: Path) -> dict[int, Record]:
    """What all ranks left, by rank; a file that cannot be read is passed over."""
    found = {}
    for path in logs.glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError):
            values = json.loads(path.read_text(encoding="utf-8"))
            record = Record(**{**values, "ranks": tuple(values["ranks"])})
            found[record.rank] = record
    return found


def clear(logs: Path) -> None:
    """Take away what an earlier start left; the logs stay."""
    for path in logs.glob("rank-*.json"):
        path.unlink(missing_ok=True)


def tail(path: Path, lines: int = 8) -> tuple[str, ...]:
    """The last lines of a log that say something."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple([line for line in text.splitlines() if line.strip()][-lines:])


def _own(rank: int) -> Record:
    return Record(rank, socket.gethostname(), os.getpid(), machine())


def _write(logs: Path, record: Record) -> None:
    write_bytes(logs / f"rank-{record.rank}.json", (json.dumps(asdict(record)) + "\n").encode())
