"""What a server answers: its body, what its status means, and why it refuses."""

from __future__ import annotations

import http.client
import json
import ssl
from contextlib import suppress
from dataclasses import dataclass

from opensora_core.net.address import Unavailable, redacted
from opensora_core.net.patience import TryAgain, retry_after
from opensora_core.net.wire import Wire

NETWORK_ERRORS = (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError, OSError)
"""What a connection fails with; some of it is what a disk fails with, so these are caught where no file is written."""

MAX_BYTES = 64 * 2**20
"""Of an answer that is read into memory."""

_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_MAX_REASON = 100  # letters of a server's own words that are repeated


@dataclass
class Answer:
    """A server's answer, whose body is still to be read. To be closed."""

    url: str
    status: int
    headers: http.client.HTTPMessage
    _response: http.client.HTTPResponse
    wire: Wire

    def read(self, count: int) -> bytes:
        """Up to so many bytes, as soon as there are some; none at the end."""
        return self._response.read1(count)

    @property
    def length(self) -> int | None:
        """Bytes that the body is said to have."""
        return self._response.length

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in pieces, with an end that can be told from a torn line."""
        return bool(self._response.chunked)

    def check(self, *, good: tuple[int, ...] = (200,)) -> None:
        """Raise what a status other than a good one means.

        Raises:
            Unavailable: it will not change.
            TryAgain: it may.
        """
        if self.status in good:
            return
        words = "".join(char for char in self._response.reason[:_MAX_REASON] if char.isprintable())
        reason = f"{redacted(self.url)} answered {self.status} {words}".strip()
        if self.status in _AGAIN:
            raise TryAgain(reason, retry_after(self.headers), self.status)
        raise Unavailable(reason, self.status)

    def read_all(self) -> bytes:
        """The whole body, of something that is short.

        Raises:
            Unavailable: it is not short.
            TryAgain: the line broke.
        """
        content = bytearray()
        self.wire.clock.min_bytes_per_second = 0.0  # a model that thinks sends nothing, and then little
        self.wire.clock.stall_seconds = float("inf")
        try:
            while chunk := self.read(1 << 16):
                content += chunk
                if len(content) > MAX_BYTES:
                    raise Unavailable(f"{redacted(self.url)} sent more than {MAX_BYTES >> 20} MB")
            if self.length:
                raise TryAgain(f"{redacted(self.url)} broke off")
        except NETWORK_ERRORS as error:
            raise TryAgain(f"{redacted(self.url)} broke off: {told(error)}") from error
        return bytes(content)

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError, ValueError):
            self._response.close()
        self.wire.close()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def told(error: BaseException) -> str:
    """The reason of a failure, in words."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def said(raw: bytes, secrets: list[str]) -> str:
    """What an API says about its refusal, in a line."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    if isinstance(value, dict):
        value = value.get("message", "")
    if not isinstance(value, str):
        return ""
    for secret in secrets:
        value = value.replace(secret, "***")
    return "".join(char for char in " ".join(value.split()) if char.isprintable())[:200]
