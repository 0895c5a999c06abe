"""How long is waited: for servers that ask for it, for those that fail, and for a bandwidth that others share."""

from __future__ import annotations

import email.utils
import http.client
import math
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime

from opensora_core.net.wire import Cancelled


class Throttle:
    """A bandwidth that everybody who holds it shares.

    Args:
        bytes_per_second: 0 is no limit.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, count: int, stop: threading.Event) -> None:
        """Wait until so many bytes are paid for.

        Raises:
            Cancelled: the work is no longer wanted.
        """
        if self.bytes_per_second <= 0:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self.bytes_per_second
            seconds = self._free_at - now
        if stop.wait(seconds):
            raise Cancelled


class TryAgain(Exception):  # noqa: N818 - told to the loop that tries
    """A failure that may pass.

    Attributes:
        after: seconds that the server asked to wait; None where it did not.
    """

    def __init__(self, reason: str, after: float | None = None, status: int = 0) -> None:
        super().__init__(reason)
        self.after, self.status = after, status


class Patience:
    """When nothing more is tried: after so much time without a gain, and at the deadline at the latest."""

    def __init__(self, seconds: float, deadline: float) -> None:
        self.seconds, self.deadline = seconds, deadline
        self.renew()

    def renew(self) -> None:
        """Something was gained."""
        self._end = time.monotonic() + self.seconds

    def until(self) -> float:
        """By `time.monotonic`."""
        return min(self._end, self.deadline)


def counted(reason: str, count: int) -> str:
    """A reason, with how often it was met."""
    told_once = reason.replace(" broke off: ", f" broke off {count} times: ", 1)
    return told_once if told_once != reason else f"{reason} ({count} times)"


def retry_after(headers: Mapping[str, str] | http.client.HTTPMessage) -> float | None:
    """Seconds that a server asks to wait, said as seconds or as a date; None where it does not."""
    word = (headers.get("Retry-After") or "").strip()
    with suppress(ValueError):
        seconds = float(word)
        return None if math.isnan(seconds) else max(seconds, 0.0)
    with suppress(ValueError, TypeError, OverflowError):
        when = email.utils.parsedate_to_datetime(word)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return max((when - datetime.now(UTC)).total_seconds(), 0.0)
    return None
