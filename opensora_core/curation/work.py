"""One source, from its frames to its clips and its record. Runs in a process of its own."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora_core.config import SplitConfig
from opensora_core.curation.accounts import Accounts
from opensora_core.curation.boundaries import detect, read_boundaries
from opensora_core.curation.crew import Tell
from opensora_core.curation.preview import draw_sheet
from opensora_core.curation.records import CLIPS_FOLDER, Record, Records, Row
from opensora_core.curation.scenes import Gap, Range, choose_ranges, last_end
from opensora_core.curation.sources import Source, identified
from opensora_core.curation.stats import keep_scores
from opensora_core.errors import ConfigError, InputError, OsoraError
from opensora_core.files import refusal, sha256, write_bytes
from opensora_core.media import Limits
from opensora_core.media.cut import Encoding, Failure, Piece, cut
from opensora_core.media.read import opened

DETECTING, CUTTING = "detecting", "cutting"
_DETECTING_SHARE = {"exact": 0.25, "smart": 0.7, "copy": 0.9, "none": 1.0}
_TELL_SECONDS = 0.2
_MAX_CLAIM_SECONDS = 30 * 24 * 3600.0  # what a file says of its length beyond this is nonsense


@dataclass(frozen=True)
class Job:
    """What all sources share.

    Attributes:
        config: the settings.
        output: the folder that is written.
        limits: a sum of what a source may cost; see `records.Record`.
        with_scores: keep the scores of every frame.
    """

    config: SplitConfig
    output: Path
    limits: str
    with_scores: bool


@dataclass(frozen=True)
class Task:
    """A source, the name and the settings of its clips, and a file with its boundaries, if it has one."""

    source: Source
    name: str
    settings: str = ""
    boundaries: Path | None = None


@dataclass(frozen=True)
class Header:
    """What a file says of itself. Only decoding shows what is true of it."""

    container: str
    codec: str
    pixel_format: str
    width: int
    height: int
    fps: float
    duration_seconds: float | None
    num_frames: int | None
    has_audio: bool


@dataclass(frozen=True)
class Moved:
    """How far a source is: `fraction` of all that is to be done with it."""

    phase: str
    fraction: float


@dataclass(frozen=True)
class Result:
    """What became of a source, ready to be committed."""

    record: Record
    source: Row
    clips: list[Row]
    rejects: list[Row]
    seconds: float


def limits_of(config: SplitConfig, max_seconds: float) -> Limits:
    """What a source may cost. Times mean different things to who looks at a source and to who cuts it."""
    return Limits(max_pixels=config.source_pixels, max_frames=config.source_frames, max_seconds=max_seconds)


def read_header(path: Path, max_pixels: int = Limits.max_pixels) -> Header:
    """What a file says of itself; no frame is decoded.

    Raises:
        InputError: it is no video, or one of more than `max_pixels` a frame.
    """
    with opened(path, max_pixels) as (container, stream):
        seconds = None
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / 1e6
        if seconds is not None and not 0 < seconds < _MAX_CLAIM_SECONDS:
            seconds = None
        return Header(
            container=container.format.name,
            codec=stream.codec_context.name,
            pixel_format=stream.codec_context.pix_fmt or "",
            width=stream.width,
            height=stream.height,
            fps=float(stream.average_rate or 0),
            duration_seconds=seconds,
            num_frames=stream.frames or None,
            has_audio=bool(container.streams.audio),
        )


def look(job: Job, task: Task, tell: Tell) -> Header | str:
    """What a file says of itself, or why it cannot be used."""
    try:
        return read_header(task.source.path, job.config.source_pixels)
    except InputError as error:
        return reason_of(error, task.source.path)


def split_source(job: Job, task: Task, tell: Tell) -> Result:
    """Split a source: find its boundaries, write its clips, account for every frame.

    Whatever is wrong with the source is in the result.

    Raises:
        ResourceError: the disk is full, or refuses to be written.
        ConfigError: settings that the detector or the encoder refuses.
    """
    try:
        return _split(job, task, tell)
    except InputError as error:
        return given_up(job, task, "rejected", reason_of(error, task.source.path))
    except MemoryError:
        return given_up(job, task, "rejected", f"needs more memory than source_bytes={job.config.source_bytes}")
    except (OsoraError, BrokenPipeError):
        raise
    except Exception as error:  # a bug of ours, or of a decoder, costs this source and no other
        return given_up(job, task, "failed", f"internal error, {type(error).__name__}: {error}")


def reason_of(error: InputError, path: Path) -> str:
    """An error without the name of the file, which stands beside it, and without the numbers of FFmpeg."""
    text = error.message.replace(f": 'file:{path}'", "")
    text = text.removeprefix(f"cannot read {path} as a video: ").removeprefix(f"{path} ")
    return re.sub(r"^\[Errno -?\d+\] | returned \d+$", "", text)


def given_up(job: Job, task: Task, status: str, reason: str) -> Result:
    """The result of a source without clips."""
    source = str(task.source.path)
    row: Row = {"source": source, "status": status, "reason": reason, "size_bytes": task.source.size_bytes}
    row |= {"probe": None, "num_frames": 0, "num_clips": 0, "boundaries": []}
    reject: Row = {"source": source, "what": "source", "reason": reason}
    return Result(_record(job, task, status), row, [], [reject], 0.0)


def _record(job: Job, task: Task, status: str) -> Record:
    return Record(task.name, str(task.source.path), task.source.identity, task.settings, job.limits, status)


def _split(job: Job, task: Task, tell: Tell) -> Result:
    config, path, records = job.config, task.source.path, Records(job.output)
    header = read_header(path, config.source_pixels)
    tell(header)
    progress = _Progress(tell, _DETECTING_SHARE[config.cut])
    found = detect(
        path,
        config.detector,
        options=parse_options(config.detector_options),
        fast=config.fast,
        threads=config.decode_threads,
        limits=limits_of(config, config.source_seconds),
        on_progress=progress.detecting,
    )
    if task.boundaries is not None:
        found = dataclasses.replace(found, boundaries=tuple(read_boundaries(task.boundaries, found.seconds)))
    accounts = Accounts(path, found, last_end(found.seconds, found.fps))
    ranges, gaps = choose_ranges(
        found.boundaries,
        found.seconds,
        accounts.times[-1],
        min_seconds=config.min_seconds,
        max_seconds=config.max_seconds or math.inf,
        trim=config.trim,
        keyframes=found.is_keyframe if config.cut in ("copy", "smart") else None,
    )
    if config.cut == "none":
        content = sha256(path) if ranges else ""
        clips = [accounts.whole(item, content) for item in ranges]
    else:
        clips, lost = _cut(job, task, accounts, ranges, progress)
        if identified(path).identity != task.source.identity:  # what was decoded is not what was cut
            raise InputError(f"{path} changed while it was split")
        gaps = sorted([*gaps, *lost], key=lambda gap: gap.start)
    _remove_others(job.output / CLIPS_FOLDER / task.name, {job.output / row["path"] for row in clips})
    # what previews and statistics are made of, so that either can be asked for later
    spans = [(int(row["scores"]["source_start_frame"]), int(row["scores"]["source_end_frame"])) for row in clips]
    write_bytes(records.beside(task.name, ".svg"), draw_sheet(found, accounts.times[-1], spans, gaps).encode())
    if job.with_scores:
        keep_scores(records.beside(task.name, ".npz"), found)
    source = accounts.source(dataclasses.asdict(header), task.source.size_bytes, len(clips), gaps)
    record = _record(job, task, source["status"])
    return Result(record, source, clips, accounts.rejects(gaps), accounts.times[-1] - accounts.times[0])


def _cut(
    job: Job, task: Task, accounts: Accounts, ranges: Sequence[Range], progress: _Progress
) -> tuple[list[Row], list[Gap]]:
    """Write the clips. What a copy cannot begin with, and clips that fail, become gaps."""
    config, folder = job.config, job.output / CLIPS_FOLDER / task.name
    assert config.cut != "none"
    if not ranges:
        return [], []
    pieces = [
        Piece(folder / f"{number:05d}.mp4", item.start, item.end, accounts.times[item.start], accounts.times[item.end])
        for number, item in enumerate(ranges)
    ]
    # a container may have taken another suffix, never another stem
    left = {piece.path.stem: item for piece, item in zip(pieces, ranges, strict=True)}
    clips: list[Row] = []
    gaps: list[Gap] = []
    for made in cut(
        task.source.path,
        pieces,
        accounts.found.seconds,
        config.cut,
        encoding_of(config, accounts.found.crop),
        threads=config.decode_threads,
        limits=limits_of(config, config.stall_seconds),
        is_decoded=not config.fast and not accounts.found.damage,
        on_progress=progress.cutting,
    ):
        item = left.pop(made.path.stem)
        if isinstance(made, Failure):
            gaps.append(Gap(item.start, item.end, made.reason))
            continue
        if item.start < made.start_frame:
            gaps.append(Gap(item.start, made.start_frame, "before the first keyframe"))
        if made.end_frame < item.end:
            gaps.append(Gap(made.end_frame, item.end, "lost in cutting"))
        clips.append(accounts.clip(item, made, job.output))
    gaps += [Gap(item.start, item.end, "lost in cutting") for item in left.values()]
    return sorted(clips, key=lambda row: row["path"]), gaps


class _Progress:
    """Tells how far a source is, but not too often."""

    def __init__(self, tell: Tell, detecting_share: float) -> None:
        self._tell, self._share, self._last = tell, detecting_share, 0.0

    def detecting(self, fraction: float) -> None:
        """So much of the source has been looked at."""
        self._say(DETECTING, self._share * fraction)

    def cutting(self, fraction: float) -> None:
        """So much of its clips is written."""
        self._say(CUTTING, self._share + (1 - self._share) * fraction)

    def _say(self, phase: str, fraction: float) -> None:
        if (now := time.monotonic()) - self._last >= _TELL_SECONDS:
            self._last = now
            self._tell(Moved(phase, fraction))


def parse_options(words: str) -> dict[str, float]:
    """`name=value` words as a detector takes them.

    Raises:
        ConfigError: a word is not that.
    """
    options = {}
    for word in words.replace(",", " ").split():
        name, _, value = word.partition("=")
        try:
            options[name] = float(value)
        except ValueError:
            raise ConfigError(
                f"split.detector_options has '{word}', which is not NAME=NUMBER", "for example threshold=27"
            ) from None
    return options


def encoding_of(config: SplitConfig, crop: tuple[int, int, int, int] | None = None) -> Encoding:
    """How clips are encoded."""
    return Encoding(
        codec=config.codec,
        preset=config.codec_preset,
        crf=config.crf,
        fps=config.fps or None,
        short_side=config.short_side or None if config.cut == "exact" else None,
        crop=crop if config.crop_black_bars else None,
        audio=config.audio,
        fast_decode=config.fast_decode,
    )


def _remove_others(folder: Path, kept: set[Path]) -> None:
    """Remove what an earlier or killed run left in the folder of a source."""
    if not folder.is_dir():
        return
    try:
        for path in list(folder.iterdir()):
            if path not in kept:
                path.unlink(missing_ok=True)
        if not kept:
            folder.rmdir()
    except OSError as error:
        raise refusal(folder, error) from error
