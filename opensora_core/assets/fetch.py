"""Weights that lie on no hub: is a server there, and a download that resumes and is whole or absent."""

from __future__ import annotations

import http.client
import time
from pathlib import Path

from opensora_core import net
from opensora_core.net import Progress, Unavailable

__all__ = ["NETWORK_ERRORS", "Progress", "Unavailable", "download", "probe"]

NETWORK_ERRORS = (http.client.HTTPException, TimeoutError, ConnectionError)

_PROBE_SECONDS = 4.0


def probe(url: str) -> None:
    """Check within four seconds that a server answers at all, with whatever status.

    Raises:
        Unavailable: it does not.
    """
    net.Client(allow_private=True).reach(url, time.monotonic() + _PROBE_SECONDS)


def download(
    url: str,
    target: Path,
    *,
    sha256: str = "",
    on_progress: Progress | None = None,
    client: net.Client | None = None,
) -> net.Received:
    """Download a file; what an interrupted run left in `<target>.part` is continued, not fetched again.

    Args:
        url: http or https, of the table.
        target: appears only once whole.
        sha256: checked, if given.
        on_progress: told (bytes done, bytes in all) about every megabyte.
        client: what servers may do.

    Raises:
        Unavailable: the server cannot be reached, refuses, or sends something else than a file of this size.
        ResourceError: no space or no permission.
    """
    probe(url)
    return net.download(
        client or net.Client(trusted=(url,)),
        url,
        target,
        wanted=net.Wanted(sha256=sha256),
        on_progress=on_progress,
    )
