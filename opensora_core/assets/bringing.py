"""How one file of weights is brought: by a link, into the hub's cache, out of the hub to a folder, or from a disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from opensora_core import net
from opensora_core.assets import fetch, hub
from opensora_core.assets.sums import expected_sum
from opensora_core.errors import ResourceError
from opensora_core.files import replacing, require_space


class Bring:
    """How a file is brought to a path, or beside it where it has another name; the sum is empty if it is cached."""

    def __call__(self, target: Path, client: net.Client, tell: net.Progress) -> net.Received:
        """Bring it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Link(Bring):
    """A file at an address of the table, or of a mirror."""

    url: str
    sha256: str

    def __call__(self, target: Path, client: net.Client, tell: net.Progress) -> net.Received:
        """Bring it."""
        return fetch.download(self.url, target, sha256=self.sha256, on_progress=tell, client=client)


@dataclass(frozen=True)
class Cache(Bring):
    """A file of the hub, into its cache."""

    repo: str
    revision: str
    name: str

    def __call__(self, target: Path, client: net.Client, tell: net.Progress) -> net.Received:
        """Bring it."""
        return net.Received(hub.download(self.repo, self.revision, (self.name,), tell, client), 0, "")


@dataclass(frozen=True)
class HubFile(Bring):
    """A file of the hub, into a folder; of `a|b` the first that there is."""

    repo: str
    revision: str
    name: str

    def __call__(self, target: Path, client: net.Client, tell: net.Progress) -> net.Received:
        """Bring it."""
        from huggingface_hub.errors import EntryNotFoundError

        fetch.probe(hub.endpoint())
        names = self.name.split("|")
        for name in names:
            try:
                commit, etag, size = hub.metadata(self.repo, self.revision, name)
            except EntryNotFoundError:
                if name == names[-1]:
                    raise
                continue
            path = target.with_name(name.rpartition("/")[2])
            return hub.fetch_file(self.repo, commit, name, path, etag=etag, size=size, client=client, on_progress=tell)
        raise AssertionError("no name to download")


@dataclass(frozen=True)
class Copy(Bring):
    """A file of this disk, checked on the way."""

    origin: Path

    def __call__(self, target: Path, client: net.Client, tell: net.Progress) -> net.Received:
        """Bring it."""
        total, done = self.origin.stat().st_size, 0
        require_space(target, total)
        digest = hashlib.sha256()
        try:
            with replacing(target) as part, self.origin.open("rb") as source, part.open("wb") as copy:
                while chunk := source.read(1 << 20):
                    if client.stop.is_set():
                        raise net.Cancelled
                    digest.update(chunk)
                    copy.write(chunk)
                    done += len(chunk)
                    tell(done, total)
                copy.flush()
                expected = expected_sum(self.origin)
                if expected and expected != digest.hexdigest():
                    raise fetch.Unavailable(f"{self.origin} is damaged: its SHA-256 is {digest.hexdigest()}")
        except ResourceError as error:
            if not self.origin.is_file():
                raise fetch.Unavailable(f"{self.origin} is gone") from error
            raise
        return net.Received(target, done, digest.hexdigest())
