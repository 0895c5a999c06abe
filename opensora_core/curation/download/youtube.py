"""Videos of YouTube, by yt-dlp: an extra of the package that is imported when it is needed.

Only YouTube's own extractor is allowed: others follow a link to wherever it leads, this machine included.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from opensora_core import net
from opensora_core.curation.download.item import Brought, Item
from opensora_core.curation.download.session import Session
from opensora_core.errors import UsageError
from opensora_core.files import append_line, refusal

EXTRACTORS = ["youtube"]
"""What yt-dlp may use, by its own names."""

_HOSTS = ("youtube.com", "youtu.be", "youtube-nocookie.com")
_ID = re.compile(r"[\w-]{11}", re.ASCII)


def video_of(link: str) -> str | None:
    """The id of the video that a link of YouTube leads to; None for other links.

    Raises:
        ValueError: a link of YouTube that leads to no video.
    """
    try:
        parts = urlsplit(link)
        host = (parts.hostname or "").lower()
    except ValueError:
        return None
    if parts.scheme.lower() not in ("http", "https") or not any(host == h or host.endswith(f".{h}") for h in _HOSTS):
        return None
    words = [word for word in parts.path.split("/") if word]
    found = parse_qs(parts.query).get("v", [""])[0]
    if not found and words:
        found = words[-1] if host == "youtu.be" or words[0] in ("embed", "shorts", "v", "live") else ""
    if not _ID.fullmatch(found):
        raise ValueError(f"{net.redacted(link)} is no video of YouTube: a channel or a list")
    return found


def item(video: str, start: float | None, end: float | None, session: Session, told: Mapping[str, Any]) -> Item:
    """A video, or a range of it.

    Of a range only the section is fetched, if ffmpeg is there to cut it; else the whole video, once for all its ranges,
    which the manifest then tells.
    """
    link = f"https://www.youtube.com/watch?v={video}"
    is_range = start is not None or end is not None
    is_section = is_range and not session.config.youtube_whole
    if is_section and shutil.which("ffmpeg") is None:
        session.note(
            "there is no ffmpeg, which yt-dlp cuts sections with: whole videos are fetched, and the manifest has their "
            "ranges, as --set download.youtube_whole=true asks for"
        )
        is_section = False
    if is_section:
        span = f"{start or 0:g}-{'' if end is None else f'{end:g}'}"
        return Item(
            key=f"youtube:{video}#{span}",
            source=f"{link}#t={span.replace('-', ',')}",
            bring=_Video(link, video, start, end),
            name=f"{video}.mp4",
            **told,
        )
    return Item(
        key=f"youtube:{video}",
        source=link,
        bring=_Video(link, video),
        name=f"{video}.mp4",
        start_seconds=start,
        end_seconds=end,
        **told,
    )


@dataclass(frozen=True)
class _Video:
    """How a video, or a section of it, is had."""

    link: str
    video: str
    start: float | None = None
    end: float | None = None

    def __call__(self, target: Path, session: Session, tell: net.Progress) -> Brought:
        yt_dlp = _library()
        is_section = self.start is not None or self.end is not None
        archive = session.config.youtube_archive
        if archive and not is_section and self.video in _archived(Path(archive)):
            raise net.Unavailable(f"{self.video} is in {archive}")
        folder = target.with_suffix(".video")
        options = _options(session, folder, tell)
        if is_section:
            span = (self.start or 0.0, float("inf") if self.end is None else self.end)
            options["download_ranges"] = yt_dlp.utils.download_range_func(None, [span])
            options["force_keyframes_at_cuts"] = True
            shutil.rmtree(folder, ignore_errors=True)  # what there is of a section cannot be continued
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with yt_dlp.YoutubeDL(options) as loader:
                found = loader.extract_info(self.link, download=True)
            files = [path for path in folder.iterdir() if path.suffix not in (".part", ".ytdl")]
            if len(files) != 1:
                raise net.Unavailable(f"yt-dlp brought {len(files)} files of {self.link}, not one")
            files[0].replace(target)
        except yt_dlp.utils.DownloadError as error:
            if session.client.stop.is_set():
                raise net.Cancelled from None
            raise net.Unavailable(_reason(error)) from error
        except OSError as error:
            raise refusal(target, error) from error
        shutil.rmtree(folder, ignore_errors=True)
        if archive and not is_section:
            append_line(Path(archive), f"youtube {self.video}")
        known = found if isinstance(found, dict) else {}
        fields = {"attribution": f"{known.get('uploader') or 'an unnamed maker'} on YouTube"}
        if licence := known.get("license"):
            fields["licence"] = str(licence)
        return Brought(fields=fields)


def _library() -> Any:
    try:
        return import_module("yt_dlp")
    except ImportError:
        raise UsageError(
            "videos of YouTube need yt-dlp, which is not installed", 'pip install "osora[youtube]"'
        ) from None


def _options(session: Session, folder: Path, tell: net.Progress) -> dict[str, Any]:
    config = session.config
    height = config.youtube_height
    has_ffmpeg = shutil.which("ffmpeg") is not None
    single = f"best[height<={height}][ext=mp4]/best[height<={height}]/best"
    options: dict[str, Any] = {
        "allowed_extractors": EXTRACTORS,
        "format": f"bestvideo[height<={height}]+bestaudio/{single}" if has_ffmpeg else single,
        "merge_output_format": "mp4/mkv",
        "outtmpl": str(folder / "video.%(ext)s"),
        "noplaylist": True,
        "quiet": True,
        "no_warnings": True,
        "noprogress": True,
        "logger": _Silent(),
        "progress_hooks": [_hook(session, tell)],
        "retries": min(config.max_retries, 5),
        "fragment_retries": min(config.max_retries, 5),
        "extractor_retries": 1,
        "socket_timeout": config.answer_seconds,
        "max_filesize": config.file_bytes,
        "throttledratelimit": None,
        "cachedir": False,
        "ignoreconfig": True,
    }
    if config.max_bytes_per_second:
        options["ratelimit"] = config.max_bytes_per_second / config.workers
    if config.cookies:
        if not Path(config.cookies).expanduser().is_file():
            raise UsageError(f"there is no file of cookies {config.cookies}", "yt-dlp's manual says how to make one")
        # in memory, because yt-dlp writes back what servers set
        options["cookiefile"] = io.StringIO(
            Path(config.cookies).expanduser().read_text(encoding="utf-8", errors="replace")
        )
    return options


def _hook(session: Session, tell: net.Progress) -> Any:
    def hear(state: Mapping[str, Any]) -> None:
        if session.client.stop.is_set():
            raise net.Cancelled
        total = state.get("total_bytes") or state.get("total_bytes_estimate") or 0
        tell(int(state.get("downloaded_bytes") or 0), int(total))

    return hear


class _Silent:
    """The core does not print."""

    def debug(self, message: str) -> None:
        """Say nothing."""

    info = warning = error = debug


def _archived(path: Path) -> set[str]:
    with suppress(OSError, UnicodeDecodeError):
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        return {parts[1] for parts in words if len(parts) == 2 and parts[0] == "youtube"}
    return set()


def _reason(error: Exception) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).removeprefix("ERROR: ").strip()
    return " ".join(text.split())[:300] or "yt-dlp could not fetch it"
