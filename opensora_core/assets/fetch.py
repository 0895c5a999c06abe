"""Plain HTTP: is a server there, and a download that resumes and is whole or absent."""

from __future__ import annotations

import hashlib
import http.client
import queue
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from opensora_core.files import refusal, require_space

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all, 0 where unknown) while a download runs."""


NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)

_PROBE_SECONDS = 4.0
_READ_SECONDS = 20.0
_MAX_RETRIES = 5
_CHUNK = 1 << 20
_HEADERS = {"User-Agent": "osora", "Accept-Encoding": "identity"}


class Unavailable(Exception):  # noqa: N818 - a reason within a message for users, never seen on its own
    """A download that cannot be had; its text completes a sentence."""


def probe(url: str) -> None:
    """Check within four seconds that a server answers at all, with whatever status.

    The name is looked up in a thread of its own: a resolver has its own timeouts, which nothing can shorten.

    Raises:
        Unavailable: it does not.
    """
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(_request(url, "HEAD"), timeout=_PROBE_SECONDS):
                answers.put(None)
        except (urllib.error.HTTPError, ssl.SSLError):
            answers.put(None)  # somebody is there; the client that follows may know another certificate
        except urllib.error.URLError as error:
            answers.put(None if isinstance(error.reason, ssl.SSLError) else error)
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        failure = answers.get(timeout=_PROBE_SECONDS)
    except queue.Empty:
        failure = TimeoutError("timed out")
    if failure is not None:
        raise Unavailable(f"{url} cannot be reached: {getattr(failure, 'reason', failure)}") from failure


def download(url: str, target: Path, *, sha256: str = "", on_progress: Progress | None = None) -> None:
    """Download a file; what an interrupted run left in `<target>.part` is continued, not fetched again.

    Args:
        url: http or https.
        target: appears only once whole.
        sha256: checked, if given.
        on_progress: told (bytes done, bytes in all) about every megabyte.

    Raises:
        Unavailable: the server cannot be reached, refuses, or sends something else than a file of this size.
        ResourceError: no space or no permission.
    """
    probe(url)
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(_MAX_RETRIES + 1):
            try:
                _continue(url, part, on_progress)
                break
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise Unavailable(f"{url} answered {error.code} {error.reason}") from error
                failure: Exception = error
            except NETWORK_ERRORS as error:
                failure = error
            if attempt == _MAX_RETRIES:
                raise Unavailable(f"{url} broke off {_MAX_RETRIES + 1} times: {failure}") from failure
            time.sleep(min(0.2 * 2**attempt, 3))
        if sha256:
            with part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                part.unlink()
                raise Unavailable(f"{url} sent a file whose SHA-256 is {found}, not {sha256}")
        part.replace(target)
        _validator_file(part).unlink(missing_ok=True)
    except OSError as error:
        raise refusal(target, error) from error


def _continue(url: str, part: Path, on_progress: Progress | None) -> None:
    """Fetch what is missing of a part; a part of another version of the file is begun anew."""
    validator = _validator_file(part)
    done = part.stat().st_size if part.exists() and validator.exists() else 0
    request = _request(url, "GET")
    if done:
        request.add_header("Range", f"bytes={done}-")
        request.add_header("If-Range", validator.read_text())
    try:
        answer = urllib.request.urlopen(request, timeout=_READ_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # longer than the file is now
        raise ConnectionError("the file on the server changed") from error
    with answer:
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise Unavailable(f"{url} sent a web page instead of the file")
        if answer.status != 206:
            done = 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else 0
        require_space(part, total - done)
        # without a strong validator there is nothing to tell a changed file by, so nothing to resume
        etag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if etag and not etag.startswith("W/"):
            validator.write_text(etag)
        else:
            validator.unlink(missing_ok=True)
        with part.open("ab" if done else "wb") as file:
            done += _copy(answer, file, lambda count: on_progress(done + count, total) if on_progress else None)
    if total and done != total:
        raise ConnectionError(f"{done} of {total} bytes came")


def _copy(source: Any, target: IO[bytes], tell: Callable[[int], None]) -> int:
    count = 0
    while chunk := source.read(_CHUNK):
        target.write(chunk)
        count += len(chunk)
        tell(count)
    return count


def _validator_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _request(url: str, method: str) -> urllib.request.Request:
    return urllib.request.Request(url, method=method, headers=_HEADERS)
