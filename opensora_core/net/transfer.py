"""From an address to a file that is whole or absent, and that goes on where it was broken off.

What has come lies in a part, and beside it, in `<part>.version`, which version of the file it is of. A part without
that cannot be told from another version's, so it is begun anew.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from opensora_core.files import readable, refusal, require_space
from opensora_core.net.address import Unavailable, redacted
from opensora_core.net.answer import Answer, told
from opensora_core.net.client import Client
from opensora_core.net.patience import Patience, TryAgain

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all, 0 where unknown) while a download runs."""

_CHUNK = 1 << 18
_TELL_BYTES = 1 << 20
_RENEWED_BYTES = 256 * 2**20  # after so much that came well, a broken line is a new misfortune
_PAGE = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
_SHOWN_TYPES = ("text/html", "application/xhtml")
_TEXT_TYPES = ("text/", "application/json", "application/xml", "application/problem")
_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)


@dataclass(frozen=True)
class Wanted:
    """What a file has to be.

    Attributes:
        sha256: in hex; empty if it is not known.
        size: in bytes; 0 if it is not known.
        max_bytes: that it may have; 0 is no limit.
        is_media: whether text of any kind is no answer.
    """

    sha256: str = ""
    size: int = 0
    max_bytes: int = 0
    is_media: bool = False


@dataclass(frozen=True)
class Received:
    """A file that came.

    Attributes:
        path: where it lies.
        size: in bytes.
        sha256: in hex.
    """

    path: Path
    size: int
    sha256: str


def download(
    client: Client,
    url: str,
    target: Path,
    *,
    wanted: Wanted | None = None,
    part: Path | None = None,
    headers: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
) -> Received:
    """Download a file; what an interrupted run left in its part is continued, not fetched again.

    Args:
        client: what servers may do.
        url: http or https.
        target: appears only once whole, and checked.
        wanted: what it has to be.
        part: where it lies until then; `<target>.part` if not given. On the same disk as `target`.
        headers: of the request; credentials stay with the server of `url`.
        on_progress: told (bytes done, bytes in all) about every megabyte.

    Raises:
        Unavailable: the server cannot be reached, refuses, or sends something else than this file.
        ResourceError: no space or no permission.
        Cancelled: the client was stopped; the part is kept.
    """
    transfer = _Transfer(client, url, part or target.with_name(f"{target.name}.part"), wanted or Wanted())
    transfer.headers = dict(headers or {})
    transfer.on_progress = on_progress
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        transfer.part.parent.mkdir(parents=True, exist_ok=True)
        transfer.run()
        received = transfer.checked(target)
        transfer.part.replace(target)
        transfer.version_file.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            with suppress(OSError):
                transfer.forget()  # a part that cannot grow is only in the way
        raise refusal(target, error) from error
    return received


class _Transfer:
    """One file on its way."""

    headers: Mapping[str, str]
    on_progress: Progress | None

    def __init__(self, client: Client, url: str, part: Path, wanted: Wanted) -> None:
        self.client, self.url, self.part, self.wanted = client, url, part, wanted
        self.version_file = part.with_name(f"{part.name}.version")
        self.total = 0  # bytes of the whole, as the server says; 0 where it does not
        self.best = 0  # bytes that were there at a time; only more than these are a gain
        self.name = redacted(url)
        self.is_page = url.partition("?")[0].lower().endswith((".html", ".htm"))

    def run(self) -> None:
        """Until everything has come."""
        limits = self.client.limits
        deadline = time.monotonic() + limits.total_seconds if limits.total_seconds else float("inf")
        patience = Patience(limits.patience_seconds, deadline)
        failures, self.best = 0, self._begin()[0]
        while True:
            before = self._begin()[0]
            try:
                self._attempt(patience)
                return
            except TryAgain as error:
                now = self._begin()[0]
                if now - before >= _RENEWED_BYTES and now >= self.best:
                    failures = 0
                self.client.wait_or_give_up(error, failures, limits.max_retries, patience)
                failures += 1

    def _begin(self) -> tuple[int, dict[str, Any]]:
        """Bytes that need not be fetched again, and what is known of their version."""
        with suppress(OSError, ValueError, TypeError):
            version = json.loads(self.version_file.read_text(encoding="utf-8"))
            if isinstance(version, dict) and isinstance(version.get("etag"), str):
                size = self.part.stat().st_size
                if size <= (version.get("total") or size):
                    return size, version
        return 0, {}

    def forget(self) -> None:
        """Begin anew."""
        self.version_file.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def _attempt(self, patience: Patience) -> None:
        done, version = self._begin()
        self.total = version.get("total") or 0
        if done and done == self.total:
            return  # stopped between its last byte and its name
        headers = dict(self.headers)
        if done:
            headers |= {"Range": f"bytes={done}-", "If-Range": version["etag"]}
        with self.client.open(self.url, headers=headers, deadline=patience.until()) as answer:
            answer.wire.clock.deadline = patience.deadline
            if answer.status == 416:
                self.forget()  # longer than the file is now
                raise TryAgain(f"{self.name} is shorter than what had come of it", status=416)
            answer.check(good=(200, 206) if done else (200,))
            self._require_file(answer)
            etag = _validator(answer)
            total = self.total = self._total(answer, done, version, etag)
            if answer.status != 206:
                done = 0
            self._require_size(total)
            require_space(self.part, max(total - done, 0))
            if done == 0:
                # without a validator there is nothing to tell a changed file by, so nothing to resume
                self.version_file.unlink(missing_ok=True)
                self.part.write_bytes(b"")
                if etag:
                    self.version_file.write_text(json.dumps({"etag": etag, "total": total}), encoding="utf-8")
            with self.part.open("ab") as file:
                done = self._copy(answer, file, done, total, patience)
            if answer.length or (total and done != total):
                raise TryAgain(f"{self.name} broke off: {done} of {total} bytes came")

    def _require_file(self, answer: Answer) -> None:
        """Refuse what is no file, whatever the status says."""
        kind = answer.headers.get("Content-Type", "").lower()
        if kind.startswith(_SHOWN_TYPES) and not self.is_page:
            raise Unavailable(f"{self.name} sent a web page instead of the file", answer.status)
        if self.wanted.is_media and kind.startswith(_TEXT_TYPES):
            raise Unavailable(f"{self.name} sent {kind.partition(';')[0]}, no video or picture", answer.status)
        encoding = answer.headers.get("Content-Encoding", "identity").lower()
        # servers say of an archive that it is what its name says
        is_own = encoding in ("gzip", "x-gzip", "bzip2", "x-bzip2") and self.url.partition("?")[0].endswith(_PACKED)
        if encoding != "identity" and not is_own:
            raise Unavailable(f"{self.name} sent the file packed as {encoding[:20]}, which was not asked for")
        if answer.length is None and not answer.is_chunked and not self.wanted.sha256 and not self.wanted.size:
            raise Unavailable(f"{self.name} does not say how long the file is, so a torn one could not be told")

    def _total(self, answer: Answer, done: int, version: Mapping[str, Any], etag: str) -> int:
        """Bytes of the whole file; 0 where unknown."""
        if answer.status != 206:
            return answer.length or 0
        span = _RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
        known = version.get("total") or 0
        total = int(span[3]) if span and span[3] != "*" else known
        is_right = span is not None and int(span[1]) == done and (not total or int(span[2]) == total - 1)
        is_right = is_right and (not known or total == known) and (not etag or etag == version["etag"])
        if not is_right or (answer.length is not None and total and answer.length != total - done):
            self.forget()
            raise TryAgain(f"{self.name} sent another part than was asked for, or of another version")
        return total

    def _require_size(self, total: int) -> None:
        most = self.wanted.max_bytes or self.client.limits.max_bytes
        if self.wanted.size and total and total != self.wanted.size:
            raise Unavailable(f"{self.name} has {total} bytes, not {self.wanted.size}")
        if most and total > most:
            raise Unavailable(f"{self.name} has {readable(total)}, more than the {readable(most)} that are allowed")

    def _copy(self, answer: Answer, file: IO[bytes], done: int, total: int, patience: Patience) -> int:
        most = self.wanted.max_bytes or self.client.limits.max_bytes or self.wanted.size
        limits = self.client.limits
        throttle, shown = self.client.throttle, done
        enough = limits.min_bytes_per_second * limits.window_seconds
        while True:
            try:
                chunk = answer.read(_CHUNK)
            except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
                raise TryAgain(f"{self.name} broke off: {told(error)}") from error
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
                raise TryAgain(f"{self.name} broke off: {told(error)}") from error
            if not chunk:
                break
            if done == 0 and not self.is_page and _PAGE.match(chunk):
                self.forget()
                raise Unavailable(f"{self.name} sent a web page instead of the file", answer.status)
            file.write(chunk)
            done += len(chunk)
            throttle.wait(len(chunk), self.client.stop)
            if most and done > most:
                self.forget()
                raise Unavailable(f"{self.name} sent more than the {readable(most)} that are allowed")
            if done - self.best > enough:
                self.best = done
                patience.renew()
            if self.on_progress is not None and done - shown >= _TELL_BYTES:
                shown = done
                self.on_progress(done, total)
        if self.on_progress is not None:
            self.on_progress(done, total)
        return done

    def checked(self, target: Path) -> Received:
        """The part, on the disk for certain, and what was wanted."""
        with self.part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            os.fsync(file.fileno())
        if self.wanted.sha256 and found != self.wanted.sha256.lower():
            self.forget()
            raise Unavailable(f"{self.name} sent a file whose SHA-256 is {found}, not {self.wanted.sha256}")
        if self.wanted.size and size != self.wanted.size:
            self.forget()
            raise Unavailable(f"{self.name} sent {size} bytes, not {self.wanted.size}")
        if self.total and size != self.total:  # nothing of ours does that
            self.forget()
            raise Unavailable(f"{self.name}: another process wrote to {self.part} at the same time")
        if not size:
            self.forget()
            raise Unavailable(f"{self.name} sent an empty file")
        return Received(target, size, found)


def _validator(answer: Answer) -> str:
    """What tells this version of a file from others: a strong ETag, or else the time of its last change."""
    etag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return "" if etag.startswith("W/") else etag
