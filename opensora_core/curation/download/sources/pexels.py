"""Pexels: a search of its videos. Its licence allows use and modification; the maker is kept in the manifest.

Protocol: https://www.pexels.com/api/documentation/ (v1/videos/search).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

from opensora_core import net
from opensora_core.config import DownloadConfig
from opensora_core.curation.download.events import DataRequest
from opensora_core.curation.download.item import Item
from opensora_core.curation.download.session import Session, by_link
from opensora_core.curation.download.source import Source
from opensora_core.errors import OsoraError, UsageError

KEY = "PEXELS_API_KEY"

_PER_PAGE = 80
_LICENCE = "Pexels License, https://www.pexels.com/license/"


def _query(request: DataRequest) -> str:
    if not request.query.strip():
        raise UsageError("pexels needs a search", "osora download data pexels --query 'ocean waves' --output data/sea")
    return request.query


def _items(session: Session) -> Iterator[Item]:
    query, key = _query(session.request), os.environ.get(KEY, "").strip()
    if not key:
        raise UsageError(f"pexels asks for a key, and {KEY} is not set", "https://www.pexels.com/api/ gives one")
    base = session.config.pexels_url.rstrip("/")
    per_page = min(_PER_PAGE, session.request.limit or _PER_PAGE)
    page = f"{base}/v1/videos/search?{urlencode({'query': query, 'per_page': per_page, 'page': 1})}"
    seen: set[str] = set()
    while page and page not in seen:
        seen.add(page)
        try:
            answer, headers = session.client.json(page, headers={"Authorization": key})
        except net.Unavailable as error:
            if error.status == 401:
                raise UsageError(f"pexels does not know the key of {KEY}", "https://www.pexels.com/api/") from None
            raise OsoraError(f"pexels cannot be searched: {error}", "run it again to go on") from error
        videos = answer.get("videos") if isinstance(answer, dict) else None
        if not isinstance(videos, list):
            raise OsoraError(f"{net.redacted(page)} answered with no list of videos", "see download.pexels_url")
        if not videos:
            return
        for video in videos:
            if isinstance(video, dict) and (item := _item(video, session)) is not None:
                yield item
        page = _next(page, answer.get("next_page"))
        if page and _header(headers, "X-Ratelimit-Remaining") == "0":
            session.note(f"pexels allows no more searches{_until(headers)}; run it again then to go on")
            return


def _next(page: str, link: object) -> str:
    """The next page, on the same server: the key goes nowhere else, and over nothing less safe."""
    if not isinstance(link, str) or not link:
        return ""
    link = urljoin(page, link)
    ours, theirs = urlsplit(page), urlsplit(link)
    if (ours.scheme, ours.netloc) != (theirs.scheme, theirs.netloc):
        link = theirs._replace(scheme=ours.scheme, netloc=ours.netloc).geturl()
    return link


def _header(headers: Mapping[str, str], name: str) -> str:
    return next((value.strip() for key, value in headers.items() if key.lower() == name.lower()), "")


def _until(headers: Mapping[str, str]) -> str:
    word = _header(headers, "X-Ratelimit-Reset")
    if not word.isdecimal() or len(word) > 11:
        return ""
    return f" until {datetime.fromtimestamp(int(word), UTC):%Y-%m-%d %H:%M} UTC"


def _item(video: Mapping[str, Any], session: Session) -> Item | None:
    number, page = video.get("id"), str(video.get("url") or "")
    file = _chosen(video.get("video_files"), session.request.min_height)
    if file is None:
        session.note(f"videos without a file of {session.request.min_height} lines or more are passed by")
        return None
    user = video.get("user")
    maker = str(user.get("name") or "") if isinstance(user, dict) else ""
    return Item(
        key=f"pexels:{number}",
        source=net.redacted(page or file["link"]),
        bring=by_link(file["link"]),
        name=f"pexels-{number}.mp4",
        licence=_LICENCE,
        attribution=f"Video by {maker or 'an unnamed maker'} on Pexels",
    )


def _chosen(files: object, min_height: int) -> dict[str, Any] | None:
    """The smallest file that is high enough; the largest where that is not asked for."""
    usable = []
    for file in files if isinstance(files, list) else []:
        if not isinstance(file, dict) or not isinstance(file.get("link"), str):
            continue
        height = file.get("height")
        height = height if isinstance(height, int) else 0
        if file.get("quality") != "hls" and height >= min_height:
            usable.append((height, file))
    if not usable:
        return None
    return (min if min_height else max)(usable, key=lambda pair: pair[0])[1]


def _trusted(config: DownloadConfig, request: DataRequest) -> list[str]:
    return [config.pexels_url]


SOURCE = Source(
    "a search of Pexels' videos; PEXELS_API_KEY has the key",
    _items,
    lambda request: f"search pexels for '{_query(request)}' and fetch what it finds",
    is_offline=lambda request: False,
    trusted=_trusted,
)
