"""Lists of links: one a line, or a table with a column of links and perhaps captions and times."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from opensora_core.config import DownloadConfig
from opensora_core.curation.download import youtube
from opensora_core.curation.download.events import DataRequest
from opensora_core.curation.download.item import Item
from opensora_core.curation.download.session import Session, by_link
from opensora_core.curation.download.source import Source
from opensora_core.errors import ConfigError, InputError, nearest
from opensora_core.net import redacted

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson")

_NAMES = {
    "link": ("link", "url", "video_url", "contenturl", "href", "youtube_id", "video_id", "videoid", "video"),
    "caption": ("caption", "text", "description", "name"),
    "start": ("start", "start_seconds", "start_time", "begin"),
    "end": ("end", "end_seconds", "end_time", "stop"),
    "licence": ("licence", "license"),
    "attribution": ("attribution", "author", "credit"),
    "fps": (),
}
"""What a row has -> the columns that it is looked for in, if no setting says which."""

_TIME = re.compile(r"(?:(\d+):)?(?:(\d+):)?(\d+(?:\.\d*)?)")
_YOUTUBE_ID = re.compile(r"[\w-]{11}", re.ASCII)


def items_of(path: Path, session: Session, *, ids_are_youtube: bool = False) -> Iterator[Item]:
    """What a list has. A row that cannot be used is rejected, with its number.

    Args:
        path: of the list.
        session: the run.
        ids_are_youtube: whether eleven letters are a video of YouTube.

    Raises:
        InputError: it cannot be read, or has no column of links.
        ConfigError: `download.columns` makes no sense.
    """
    names = columns(session.config)
    for number, row in _rows(path, names):
        try:
            yield _item(row, names, session, ids_are_youtube=ids_are_youtube)
        except ValueError as error:
            session.reject(f"{path.resolve()}:{number}", f"{path.name}, row {number}", str(error))


def columns(config: DownloadConfig) -> dict[str, str]:
    """The columns that `download.columns` names.

    Raises:
        ConfigError: it is not `what=COLUMN ...`.
    """
    found = {}
    for word in config.columns.split():
        what, equals, column = word.partition("=")
        if not (equals and column):
            raise ConfigError(f"download.columns has {word!r}, which is not WHAT=COLUMN", "link=url caption=text")
        if what not in _NAMES:
            raise ConfigError(f"download.columns has no '{what}'", nearest(what, _NAMES))
        found[what] = column
    return found


def _rows(path: Path, names: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    from opensora_core.data.formats.rows import read_lines

    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        yield from _delimited(path, "\t" if suffix == ".tsv" else ",", names)
        return
    for number, line in enumerate(read_lines(path), 1):
        text = line.strip()
        if not text or (suffix not in (".jsonl", ".ndjson") and text.startswith("#")):
            continue
        if suffix not in (".jsonl", ".ndjson"):
            yield number, {names.get("link", "link"): text}
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, row {number}: not JSON: {error}", '{"link": "https://..."}') from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: not an object", '{"link": "https://..."}')
        yield number, row


def _delimited(path: Path, delimiter: str, names: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    from opensora_core.data.formats.rows import MAX_BYTES, read_lines

    before = csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(read_lines(path), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        lower = {cell.strip().lower() for cell in header}
        if names.get("link", "") not in header and not lower & set(_NAMES["link"]):
            raise InputError(
                f"{path} has no column of links: it has {', '.join(header)[:200] or 'nothing'}",
                "--set download.columns='link=COLUMN caption=COLUMN start=COLUMN end=COLUMN'",
            )
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{path}, row {reader.line_num}: {len(cells)} columns where {len(header)} are expected",
                    "quote cells that hold commas or quotes",
                )
            yield reader.line_num, {name.strip(): cell for name, cell in zip(header, cells, strict=True) if cell}
    except csv.Error as error:
        raise InputError(f"{path}, row {reader.line_num}: {error}", 'a quote in a cell is written twice: ""') from None
    finally:
        csv.field_size_limit(before)


def _item(row: Mapping[str, Any], names: Mapping[str, str], session: Session, *, ids_are_youtube: bool) -> Item:
    lower = {str(name).lower(): value for name, value in row.items()}

    def cell(what: str) -> Any:
        if what in names:
            return row.get(names[what])
        return next((lower[name] for name in _NAMES[what] if lower.get(name) not in (None, "")), None)

    link = cell("link")
    if not isinstance(link, str) or not link.strip():
        raise ValueError("the row has no link")
    link = link.strip()
    fps = _seconds(cell("fps"))
    start, end = _seconds(cell("start")), _seconds(cell("end"))
    if fps:
        start, end = None if start is None else start / fps, None if end is None else end / fps
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"the end, {end:g} s, is not after the start, {start or 0:g} s")
    texts = {what: value if isinstance(value := cell(what), str) else None for what in ("caption", "licence")}
    attribution = cell("attribution")
    told = {
        "caption": texts["caption"],
        "licence": texts["licence"] or "",
        "attribution": attribution if isinstance(attribution, str) else "",
    }
    if ids_are_youtube and _YOUTUBE_ID.fullmatch(link):
        return youtube.item(link, start, end, session, told)
    if (video := youtube.video_of(link)) is not None:
        return youtube.item(video, start, end, session, told)
    parts = urlsplit(link)
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{redacted(link)[:200]!r} is no http(s) link")
    name = unquote(parts.path).rpartition("/")[2] or parts.hostname
    return Item(
        key=link,
        source=redacted(link),
        bring=by_link(link),
        name=name,
        start_seconds=start,
        end_seconds=end,
        **told,  # type: ignore[arg-type]
    )


def _seconds(value: Any) -> float | None:
    """A time, as a number of seconds or as `H:MM:SS.s`."""
    if value is None or value == "":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    if isinstance(value, str) and (found := _TIME.fullmatch(value.strip())):
        first, second, last = found.groups()
        hours, minutes = (first, second) if second is not None else (None, first)
        return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(last)
    raise ValueError(f"{str(value)[:50]!r} is no time: seconds, or H:MM:SS")


def _paths(request: DataRequest) -> list[Path]:
    paths = [Path(word).expanduser() for word in (request.source, *request.inputs)]
    for path in paths:
        if not path.is_file():
            raise InputError(f"there is no list {path}", "a .txt with one link a line, a .csv or a .jsonl")
    return paths


def _items(session: Session) -> Iterator[Item]:
    for path in _paths(session.request):
        yield from items_of(path, session)


def _doing(request: DataRequest) -> str:
    return f"fetch the links of {', '.join(map(str, _paths(request)))}"


SOURCE = Source("links, one a line, or in a table with captions and times", _items, _doing)
