"""What `osora caption` tells as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opensora_core.notice import Notice


@dataclass(frozen=True)
class CaptionLoading:
    """Something is fetched or loaded. `done` of `total` bytes; both 0 where that is unknown."""

    what: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class CaptionProgress:
    """How far the job is.

    Attributes:
        done, total: clips of this run.
        clips_per_second, tokens_per_second: since the captioner was ready; tokens are those that it wrote.
        seconds_left: None before there is a speed.
        clip: the one described last.
        text: what was said of it.
    """

    done: int
    total: int
    clips_per_second: float
    tokens_per_second: float
    seconds_left: float | None
    clip: str
    text: str


@dataclass(frozen=True)
class CaptionRejected:
    """A clip that has no caption. `status` is `rejected`, or `failed` where the captioner is to blame."""

    clip: str
    status: str
    reason: str


@dataclass(frozen=True)
class CaptionDone:
    """The job is done, and this is what lies in the output now, earlier runs included.

    Attributes:
        output: the manifest with captions.
        captioned: clips described by this run.
        finished_before: by earlier runs.
        kept: captions that the manifest had.
        passed: rows that an earlier step had left out, which stay as they are.
        rejected: reason -> clips, of all that have no caption.
        rejects: where they are listed; None if there are none.
        seconds: of wall time.
        clips_per_second, tokens_per_second: since the captioner was ready.
        tokens_in, tokens_out: read and written by this run.
        cost: by the prices that were given; 0 without any.
        outside: share of the time, since the captioner was ready, in which it waited for the rest of the program.
        preview: the page, if one was asked for.
    """

    output: Path
    captioned: int
    finished_before: int
    kept: int
    passed: int
    rejected: Mapping[str, int]
    rejects: Path | None
    seconds: float
    clips_per_second: float
    tokens_per_second: float
    tokens_in: int
    tokens_out: int
    cost: float
    outside: float
    preview: Path | None = None


@dataclass(frozen=True)
class CaptionPlan:
    """What a run would do.

    Attributes:
        source: what the manifest was read as.
        output: that would be written.
        captioner: in words.
        prompt: that it would be given; empty for captioners that take none.
        clips: in the manifest.
        todo: of them to be described.
        finished, kept, passed, rejected: the others; see `CaptionDone`. Rejected ones wait for `--retry-failed`.
        tokens: most that would be written.
        cost: most that this would come to, by the prices that were given; what is read is not in it.
        notices: what the reader should know.
    """

    source: str
    output: Path
    captioner: str
    prompt: str
    clips: int
    todo: int
    finished: int
    kept: int
    passed: int
    rejected: int
    tokens: int
    cost: float
    notices: tuple[str, ...] = ()


Event = Notice | CaptionLoading | CaptionProgress | CaptionRejected | CaptionDone | CaptionPlan
