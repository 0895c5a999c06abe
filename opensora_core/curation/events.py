"""What `osora split` tells as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora_core.notice import Notice


@dataclass(frozen=True)
class WorkerState:
    """What one process does: `phase` is `detecting`, `cutting` or empty, `fraction` how much of the source is done."""

    source: str = ""
    phase: str = ""
    fraction: float = 0.0


@dataclass(frozen=True)
class SplitProgress:
    """How far the whole job is, in seconds of the sources that are left to do.

    Attributes:
        done_seconds: of sources, parts of those in work included.
        total_seconds: of all; an estimate from bytes for those that have not been opened.
        speed: source seconds per second of wall time.
        seconds_left: of wall time; None before there is a speed.
        done, total: sources.
        workers: what each process does.
    """

    done_seconds: float
    total_seconds: float
    speed: float
    seconds_left: float | None
    done: int
    total: int
    workers: tuple[WorkerState, ...]


@dataclass(frozen=True)
class SourceSplit:
    """A source is finished and committed.

    Attributes:
        source: its path.
        status: `ok`; `damaged` if only a part of it could be used; `rejected` if nothing could; `failed` if its process
            died or hung, which the next run tries again.
        reason: why it is not `ok`.
        num_frames: that were decoded.
        num_boundaries, num_clips: that it has.
        seconds: of the source.
    """

    source: str
    status: str
    reason: str
    num_frames: int
    num_boundaries: int
    num_clips: int
    seconds: float


@dataclass(frozen=True)
class SplitDone:
    """The job is done, and this is what lies in the output now, earlier runs included.

    Attributes:
        output: the folder.
        sources: how many there are, by status.
        skipped: sources that an earlier run had finished.
        num_clips, clip_seconds: in the manifest.
        source_seconds: of the sources that could be decoded.
        left_out: reason -> (how many ranges, their seconds) of what is in no clip.
        seconds: of wall time.
        speed: source seconds per second of wall time, of this run.
        manifest: to train on.
        preview: the page, if one was asked for.
    """

    output: Path
    sources: Mapping[str, int]
    skipped: int
    num_clips: int
    clip_seconds: float
    source_seconds: float
    left_out: Mapping[str, tuple[int, float]]
    seconds: float
    speed: float
    manifest: Path
    preview: Path | None = None


@dataclass(frozen=True)
class PlannedSource:
    """A source that would be split. `num_clips` is what its length makes of it if it had no cut."""

    source: str
    seconds: float | None
    width: int
    height: int
    fps: float
    codec: str
    num_clips: int | None
    reason: str = ""


@dataclass(frozen=True)
class SplitPlan:
    """What a run would do."""

    output: Path
    sources: tuple[PlannedSource, ...]
    skipped: int
    making: str
    notices: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class FilterProgress:
    """How far the measuring of clips is.

    Attributes:
        done, total: clips of this run; those that were measured before are not among them.
        speed: clips per second of wall time.
        seconds_left: of wall time; None before there is a speed.
    """

    done: int
    total: int
    speed: float
    seconds_left: float | None


@dataclass(frozen=True)
class ClipRefused:
    """A clip is left out of the manifest.

    Attributes:
        clip: its name.
        filters: the limits that it does not keep, such as `min_motion`; `unreadable` if it cannot be decoded.
        reason: in words.
    """

    clip: str
    filters: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class FilterPlan:
    """What filtering would do.

    Attributes:
        manifest: that would be filtered.
        output: the folder that would be written.
        num_clips: kept and refused ones.
        num_missing: of them that have to be measured first.
        limits: setting -> value, of those that are on.
    """

    manifest: Path
    output: Path
    num_clips: int
    num_missing: int
    limits: Mapping[str, float]


@dataclass(frozen=True)
class FilterDone:
    """The clips of a manifest are judged.

    Attributes:
        manifest: of those that are kept.
        num_clips, num_kept: how many there are, and how many of them are kept.
        kept_seconds: their length, as far as the rows say it.
        refused: limit -> (how many clips do not keep it, their seconds). A clip may count several times.
        limits: setting -> value, of those that are on.
        measured: clips that this run measured.
        seconds: of wall time.
        report: the page, if one was asked for.
    """

    manifest: Path
    num_clips: int
    num_kept: int
    kept_seconds: float
    refused: Mapping[str, tuple[int, float]]
    limits: Mapping[str, float]
    measured: int
    seconds: float
    report: Path | None = None


@dataclass(frozen=True)
class ClipExplained:
    """What the filters say of one clip.

    Attributes:
        clip: its name.
        is_kept: whether it stays in the manifest.
        verdicts: of every limit; see `filters.Verdict`.
        reason: in words; empty if it is kept.
    """

    clip: str
    is_kept: bool
    verdicts: tuple[Any, ...]
    reason: str


Event = (
    Notice
    | SplitProgress
    | SourceSplit
    | SplitDone
    | SplitPlan
    | FilterProgress
    | ClipRefused
    | FilterPlan
    | FilterDone
    | ClipExplained
)
