"""What `osora split` tells as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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


Event = Notice | SplitProgress | SourceSplit | SplitDone | SplitPlan
