"""Data sets that are published as archives: given as files or links, unpacked safely, labelled by their folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urlsplit

from opensora_core import net
from opensora_core.curation.download.events import DataRequest
from opensora_core.curation.download.item import MEDIA, Brought, Item, safe_path
from opensora_core.curation.download.session import Session
from opensora_core.curation.download.source import Source
from opensora_core.curation.download.unpack import Limits, Member, members, torn
from opensora_core.errors import InputError, ResourceError, UsageError
from opensora_core.files import refusal

_CAPITALS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORDNET_ID = re.compile(r"n\d{8}")
_UCF101 = "https://www.crcv.ucf.edu/data/UCF101/UCF101.rar"


def _already(target: Path, session: Session, tell: net.Progress) -> Brought:
    raise net.Unavailable("it was not unpacked")  # the file is whole before its item is yielded


def _source(
    name: str, about: str, *, licence: str, page: str, link: str = "", captions: Callable[[str], str | None]
) -> Source:
    """A data set of archives.

    Args:
        name: of the source, and of the folder that its files go to.
        about: it, in a line.
        licence: of its files.
        page: where its archives are told of.
        link: of its archive, where there is one that anybody may fetch.
        captions: from the name of a member to its words.
    """

    def words(request: DataRequest) -> tuple[str, ...]:
        if not request.inputs and not link:
            raise UsageError(
                f"{name} has no address that anybody may fetch it from",
                f"get its archives by {page}, then: osora download data {name} ARCHIVE --output data/{name}",
            )
        return request.inputs or (link,)

    def items(session: Session) -> Iterator[Item]:
        config = session.config
        limits = Limits(config.archive_bytes, config.archive_files, config.archive_ratio, config.file_bytes)
        for word in words(session.request):
            try:
                key, path = session.archive(word)
            except net.Unavailable as error:
                session.reject(f"{name}:{word}", net.redacted(word) if "://" in word else word, str(error))
                continue
            if path is None:
                session.note(f"{net.redacted(word)} was unpacked before")
                continue
            try:
                yield from unpacked(session, path, f"{name}:{_file_name(word)}", limits)
            except InputError as error:
                session.reject(key, str(path), error.message)

    def unpacked(session: Session, path: Path, origin: str, limits: Limits) -> Iterator[Item]:
        others, seen = 0, set[str]()
        names = _class_names(path, limits) if name == "imagenet" else {}
        for member in members(path, limits):
            if Path(member.name).suffix.lower() not in MEDIA:
                others += 1
                if member.refusal:
                    session.reject(f"{origin}:{member.name}", f"{path.name}: {member.name}", member.refusal)
                continue
            try:
                place = safe_path(member.name)
            except ValueError as error:
                session.reject(f"{origin}:{member.name}", f"{path.name}: {member.name}", str(error))
                continue
            item = Item(
                key=f"{origin}:{member.name}",
                source=f"{origin}:{member.name}",
                bring=_already,
                path=f"files/{name}/{place}",
                name=place.rpartition("/")[2],
                caption=names.get(_folder(place)) or captions(place),
                licence=licence,
                attribution=page,
            )
            if member.refusal:
                session.reject(item.key, item.source, member.refusal)
                continue
            if item.file_id in seen:  # its first one may be in work at this moment
                session.reject(f"{item.key}#again", item.source, "the archive has it twice; the first one is taken")
                continue
            seen.add(item.file_id)
            if (reason := _unpack(item, member, session)) is None:
                yield item
            else:
                session.reject(item.key, item.source, reason)
        if others:
            session.note(f"{others} files of {path.name} are neither videos nor pictures, and are left in it")

    def doing(request: DataRequest) -> str:
        return f"unpack {', '.join(net.redacted(word) if '://' in word else word for word in words(request))}"

    return Source(
        about,
        items,
        doing,
        is_offline=lambda request: not any("://" in word for word in words(request)),
        trusted=lambda config, request: [word for word in request.inputs if "://" in word],
    )


def _unpack(item: Item, member: Member, session: Session) -> str | None:
    """Put a member where its item's file is expected; returns why that cannot be done."""
    if session.client.stop.is_set():
        raise net.Cancelled
    whole, part = session.whole(item), session.part(item)
    if session.is_examined or session.journal.is_done(item.id) or whole.is_file():
        return None
    try:
        member.write(part)
        part.replace(whole)
    except ResourceError:
        part.unlink(missing_ok=True)
        raise
    except InputError as error:
        part.unlink(missing_ok=True)
        return error.message
    except Exception as error:
        part.unlink(missing_ok=True)
        if (reason := torn(error)) is not None:
            return reason
        if isinstance(error, OSError):
            raise refusal(part, error) from error
        raise
    return None


def _file_name(word: str) -> str:
    """Of an archive by its path or link."""
    return unquote(urlsplit(word).path).rpartition("/")[2] if "://" in word else Path(word).name


def _folder(place: str) -> str:
    return place.rpartition("/")[0].rpartition("/")[2]


def _class_words(place: str) -> str | None:
    """The name of the folder, as words: `ApplyEyeMakeup` is "Apply Eye Makeup"."""
    name = _folder(place)
    return _CAPITALS.sub(" ", name).replace("_", " ") or None


def _nothing(place: str) -> str | None:
    return None


def _class_names(path: Path, limits: Limits) -> dict[str, str]:
    """The names of ImageNet's classes by their ids, if the archive has all of them: the list is in their order."""
    ids = {folder for member in members(path, limits) if _WORDNET_ID.fullmatch(folder := _folder(member.name))}
    if len(ids) != 1000:
        return {}
    from opensora_core.text.labels import CLASS_LISTS  # torch comes with it, which other sources do without

    words = resources.files("opensora_core.text").joinpath(CLASS_LISTS[1000]).read_text("utf-8").splitlines()
    return dict(zip(sorted(ids), words, strict=True))


UCF101 = _source(
    "ucf101",
    "UCF101: 13,320 videos of 101 actions, which are their captions",
    licence="unknown: published for research",
    page="https://www.crcv.ucf.edu/data/UCF101.php",
    link=_UCF101,
    captions=_class_words,
)
INTER4K = _source(
    "inter4k",
    "Inter4K: 1,000 videos in 4K, from its archive",
    licence="CC BY-NC 4.0, as its authors say",
    page="https://alexandrosstergiou.github.io/datasets/Inter4K/",
    captions=_nothing,
)
IMAGENET = _source(
    "imagenet",
    "ImageNet: pictures of 1,000 classes, from its archives",
    licence="ImageNet's terms of access: research, not commercial",
    page="https://image-net.org/download.php",
    captions=_nothing,
)
