"""What sources work with: settings, the client, the journal, and a place for what is not whole yet."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from opensora_core import net
from opensora_core.config import DownloadConfig
from opensora_core.curation.download.events import DataRequest
from opensora_core.curation.download.item import Bring, Brought, Item
from opensora_core.curation.download.journal import STATE, Journal
from opensora_core.curation.sources import slug
from opensora_core.errors import InputError
from opensora_core.notice import Notice


@dataclass
class Session:
    """One run.

    Attributes:
        config: the settings.
        request: what to get.
        client: what servers may do.
        journal: what is here.
        say: hands a notice, or a rejected item with its reason, to the run.
        tell: gives what progress of the source's own transfers is told to.
        is_examined: whether nothing may be written.
        archives: that were fetched to be unpacked; removed when nothing of them failed.
    """

    config: DownloadConfig
    request: DataRequest
    client: net.Client
    journal: Journal
    say: Callable[[object], None]
    tell: Callable[[str], net.Progress]
    is_examined: bool = False
    archives: list[tuple[str, Path]] = field(default_factory=list)
    noted: set[str] = field(default_factory=set)

    @property
    def state(self) -> Path:
        """The hidden folder."""
        return self.request.output / STATE

    def note(self, message: str) -> None:
        """Tell the user something, once."""
        if message not in self.noted:
            self.noted.add(message)
            self.say(Notice(message))

    def reject(self, key: str, source: str, reason: str) -> None:
        """Account for something that cannot even be tried."""
        self.say(Rejected(Item(key, source, _nothing), reason))

    def part(self, item: Item) -> Path:
        """Where an item's file is while it comes."""
        return self.state / "parts" / f"{item.file_id}.part"

    def whole(self, item: Item) -> Path:
        """Where an item's file is when it is whole, before it takes its place."""
        return self.state / "parts" / f"{item.file_id}.whole"

    def archive(self, word: str) -> tuple[str, Path | None]:
        """An archive by its path or link, fetched if need be.

        Returns:
            Its key, and where it lies; None if all of it was unpacked before.

        Raises:
            InputError: there is no such file.
            net.Unavailable: it cannot be had.
        """
        if "://" not in word:
            path = Path(word).expanduser()
            if not path.is_file():
                raise InputError(f"there is no archive {word}", "name a file, or an http(s) link")
            return f"archive:{path.resolve()}", path
        key = f"archive:{net.redacted(word)}"
        if self.journal.is_done(key):
            return key, None
        name = slug(unquote(urlsplit(word).path).rpartition("/")[2] or "archive")
        path = self.state / "archives" / f"{hashlib.sha256(word.encode(errors='replace')).hexdigest()[:12]}-{name}"
        if not path.is_file():
            net.download(self.client, word, path, on_progress=self.tell(name))
        self.archives.append((key, path))
        return key, path


@dataclass(frozen=True)
class Rejected:
    """An item that cannot be had, as its source found out."""

    item: Item
    reason: str


def _nothing(target: Path, session: Session, tell: net.Progress) -> Brought:
    raise AssertionError("a rejected item is not brought")


def by_link(url: str, *, is_media: bool = True, sha256: str = "", size: int = 0, is_hub: bool = False) -> Bring:
    """How a file is had over http."""

    def bring(target: Path, session: Session, tell: net.Progress) -> Brought:
        headers = {}
        if is_hub:
            from opensora_core.assets import hub

            headers = hub.headers()
        received = net.download(
            session.client,
            url,
            target,
            wanted=net.Wanted(sha256=sha256, size=size, is_media=is_media),
            part=target.with_suffix(".part"),
            headers=headers,
            on_progress=tell,
        )
        return Brought(received.sha256)

    return bring


def sync(path: Path) -> None:
    """Put a file's bytes on the disk for certain."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
