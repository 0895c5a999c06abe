"""How far many transfers are, as one event."""

from __future__ import annotations

import time
from dataclasses import dataclass

from opensora_core.net.porters import FEEDER, Ended, Moved

_TELL_SECONDS = 0.5
_SPEED_SECONDS = 10.0  # that a speed is the mean of


@dataclass(frozen=True)
class TransferState:
    """What one thread does: bytes done, and bytes in all, 0 where unknown. The name is empty while it waits."""

    name: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class DownloadProgress:
    """How far everything is.

    Attributes:
        done, total: files; the total is 0 where it is not known yet.
        done_bytes: that came in this run.
        total_bytes: that are to come; 0 where unknown.
        bytes_per_second: of late.
        seconds_left: None where it cannot be told.
        workers: what each thread does.
    """

    done: int
    total: int
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    seconds_left: float | None
    workers: tuple[TransferState, ...]


class Meter:
    """Counts what threads tell.

    Args:
        total: files; 0 where unknown.
        total_bytes: of all of them; 0 where unknown.
    """

    def __init__(self, total: int = 0, total_bytes: int = 0) -> None:
        self.total, self.total_bytes = total, total_bytes
        self.done = 0
        self._bytes = 0
        self._states: dict[int, TransferState] = {}
        self._first: dict[int, int] = {}
        self._history: list[tuple[float, int]] = [(time.monotonic(), 0)]
        self._told = 0.0

    def hear(self, word: object) -> None:
        """Take a word of `Porters.run`."""
        if isinstance(word, Moved):
            before = self._states.get(word.worker)
            if before is None or before.name != word.name or word.done < before.done_bytes:
                self._first[word.worker] = -1
            elif self._first[word.worker] >= 0:
                self._bytes += word.done - before.done_bytes
            if self._first[word.worker] < 0 and word.done:
                self._first[word.worker] = word.done  # what an earlier run left is not of this one's speed
                self._bytes += min(word.done, 1 << 20)
            self._states[word.worker] = TransferState(word.name, word.done, word.total)
        elif isinstance(word, Ended):
            self.done += word.error is None
            self._states[word.worker] = TransferState()

    def event(self) -> DownloadProgress | None:
        """What there is to tell, twice a second at most."""
        now = time.monotonic()
        if now - self._told < _TELL_SECONDS:
            return None
        self._told = now
        self._history = [item for item in self._history if now - item[0] <= _SPEED_SECONDS] or [(now, self._bytes)]
        self._history.append((now, self._bytes))
        span = now - self._history[0][0]
        speed = (self._bytes - self._history[0][1]) / span if span > 0 else 0.0
        left = None
        if self.total_bytes and speed > 0:
            left = max(self.total_bytes - self._bytes, 0) / speed
        states = [self._states[number] for number in sorted(self._states) if number != FEEDER]
        if (feeder := self._states.get(FEEDER)) is not None and feeder.done_bytes != feeder.total_bytes:
            states.append(feeder)
        return DownloadProgress(self.done, self.total, self._bytes, self.total_bytes, speed, left, tuple(states))
