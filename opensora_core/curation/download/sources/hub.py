"""Data sets of the Hugging Face hub: their files, and the captions of a `metadata.jsonl`, `.csv` or `.parquet`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opensora_core import net
from opensora_core.assets import fetch, hub
from opensora_core.config import DownloadConfig
from opensora_core.curation.download.events import DataRequest
from opensora_core.curation.download.item import MEDIA, Item, safe_path
from opensora_core.curation.download.session import Session, by_link
from opensora_core.curation.download.source import Source
from opensora_core.errors import OsoraError, UsageError

_METADATA = re.compile(r"(?:.*/)?metadata\.(jsonl|csv|parquet)")


def _place(request: DataRequest) -> hub.Place:
    return hub.Place.parse(request.source)


def _items(session: Session) -> Iterator[Item]:
    if hub.is_offline():
        raise UsageError("HF_HUB_OFFLINE is set, so the hub is not asked", "unset it")
    place = _place(session.request)
    api = f"{hub.endpoint()}/api/datasets/{place.repo}/revision/{quote(place.revision, safe='')}?blobs=true"
    try:
        fetch.probe(hub.endpoint())
        told, _ = session.client.json(api, headers=hub.headers())
    except net.Unavailable as error:
        hint = "log in with: hf auth login" if error.status in (401, 403) else "check its name, or HF_ENDPOINT"
        raise OsoraError(f"the data set {place.repo} cannot be had: {error}", hint) from error
    if not isinstance(told, dict) or not isinstance(told.get("siblings"), list):
        raise OsoraError(f"{hub.endpoint()} answered about {place.repo} with no list of files", "check HF_ENDPOINT")
    commit = str(told.get("sha"))
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):  # it becomes a part of paths
        raise OsoraError(f"{hub.endpoint()} answered about {place.repo} with no commit", "check HF_ENDPOINT")
    card = told.get("cardData")
    licence = card.get("license") if isinstance(card, dict) else None
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    files = [file for file in told["siblings"] if isinstance(file, dict) and isinstance(file.get("rfilename"), str)]
    if place.inner:
        files = [file for file in files if f"{file['rfilename']}/".startswith(f"{place.inner}/")]
    captions = _captions(session, place, commit, files)
    others = 0
    for file in files:
        name = file["rfilename"]
        if Path(name).suffix.lower() not in MEDIA:
            others += 1
            continue
        link = f"{hub.endpoint()}/datasets/{place.repo}/resolve/{commit}/{quote(name)}"
        source = f"hf:datasets/{place.repo}/{name}@{commit[:12]}"
        try:
            path = f"files/{place.repo.replace('/', '--')}/{safe_path(name)}"
        except ValueError as error:
            session.reject(source, source, str(error))
            continue
        yield Item(
            key=f"hf:{place.repo}/{name}@{commit}",
            source=source,
            bring=by_link(link, is_media=False, sha256=_sum(file), size=_size(file), is_hub=True),
            path=path,
            name=name.rpartition("/")[2],
            caption=captions.get(name),
            licence=str(licence or "unknown: see the card of the data set"),
            attribution=f"{hub.endpoint()}/datasets/{place.repo}",
        )
    if others:
        session.note(f"{others} files of {place.repo} are neither videos nor pictures, and are not fetched")


def _sum(file: dict[str, Any]) -> str:
    lfs = file.get("lfs")
    digest = str(lfs.get("sha256") or lfs.get("oid") or "") if isinstance(lfs, dict) else ""
    return digest if re.fullmatch(r"[0-9a-f]{64}", digest) else ""


def _size(file: dict[str, Any]) -> int:
    size = file.get("size")
    return size if isinstance(size, int) else 0


def _captions(session: Session, place: hub.Place, commit: str, files: list[dict[str, Any]]) -> dict[str, str]:
    """Captions by the names of files in the repository, from the tables that lie beside them."""
    from opensora_core.data import read_manifest

    captions: dict[str, str] = {}
    for file in files:
        name = file["rfilename"]
        if not _METADATA.fullmatch(name):
            continue
        folder = name.rpartition("/")[0]
        link = f"{hub.endpoint()}/datasets/{place.repo}/resolve/{commit}/{quote(name)}"
        target = session.state / "metadata" / commit / safe_path(name)
        try:
            if not target.is_file():
                net.download(
                    session.client,
                    link,
                    target,
                    wanted=net.Wanted(sha256=_sum(file), size=_size(file)),
                    headers=hub.headers(),
                    on_progress=session.tell(name),
                )
            for clip in read_manifest(target):
                if clip.caption is not None:
                    inner = clip.path.relative_to(target.parent.absolute()).as_posix()
                    captions[f"{folder}/{inner}" if folder else inner] = clip.caption
        except (net.Unavailable, OsoraError, ValueError) as error:
            session.note(f"captions of {name} are left out: {error}")
    return captions


def _trusted(config: DownloadConfig, request: DataRequest) -> list[str]:
    return [hub.endpoint()]


SOURCE = Source(
    "videos and pictures of a data set of the Hugging Face hub",
    _items,
    lambda request: f"fetch the videos and pictures of {_place(request).repo} from {hub.endpoint()}",
    is_offline=lambda request: False,
    trusted=_trusted,
)
