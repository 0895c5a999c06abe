"""The network: one client that checks every address, survives servers that misbehave, and shows no secrets."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from opensora_core.net.address import Refused, Unavailable, is_private, redacted
from opensora_core.net.client import Client, Limits
from opensora_core.net.patience import Throttle
from opensora_core.net.porters import Ended, Moved, Porters
from opensora_core.net.progress import DownloadProgress, Meter, TransferState
from opensora_core.net.settings import client_of
from opensora_core.net.transfer import Progress, Received, Wanted, download
from opensora_core.net.wire import Cancelled

__all__ = [
    "Cancelled",
    "Client",
    "DownloadProgress",
    "Ended",
    "Limits",
    "Meter",
    "Moved",
    "Porters",
    "Progress",
    "Received",
    "Refused",
    "Throttle",
    "TransferState",
    "Unavailable",
    "Wanted",
    "client_of",
    "download",
    "is_private",
    "post_json",
    "redacted",
]


def post_json(
    url: str,
    body: Mapping[str, Any],
    *,
    headers: Mapping[str, str],
    seconds: float,
    max_retries: int = 5,
    allow_private: bool = True,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Send JSON to an API and return the object that it answers with.

    Tried again after 408, 425, 429 and 5xx (as long as `Retry-After` says, up to 20 s), broken lines, and answers that
    are no JSON.

    Args:
        url: of an API that the user named.
        body: sent as JSON.
        headers: credentials among them; they stay with the server of `url`.
        seconds: of wall time for everything, retries and waiting included.
        max_retries: after the first try.
        allow_private: whether the server may be in a local network, or on this machine.
        stop: set to make a waiting call end with `Cancelled`.

    Raises:
        Unavailable: no answer, a refusal, or an answer that is no object. `status` is the server's; no secret in it.
        Cancelled: `stop` was set.
    """
    limits = dataclasses.replace(Limits(), answer_seconds=seconds, stall_seconds=seconds, patience_seconds=seconds)
    client = Client(limits, allow_private=allow_private, stop=stop)
    value, _ = client.json(url, method="POST", headers=headers, body=body, seconds=seconds, max_retries=max_retries)
    if not isinstance(value, dict):
        raise Unavailable(f"{redacted(url)} answered with something that is no JSON object")
    return value
