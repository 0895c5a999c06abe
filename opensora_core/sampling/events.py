"""What a run of sampling tells as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opensora_core.notice import Notice

__all__ = [
    "Done",
    "Event",
    "Gallery",
    "Loading",
    "Notice",
    "Progress",
    "Saved",
    "Sheet",
]


@dataclass(frozen=True)
class Loading:
    """A part of the model is being downloaded or loaded."""

    part: str
    detail: str = ""


@dataclass(frozen=True)
class Progress:
    """A step of the sampler; `seconds_left` is of this prompt, or of those that are drawn along with it."""

    prompt: str
    step: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True)
class Saved:
    """A video or picture on the disk; `seconds` is its share of the time since the last one."""

    path: Path
    prompt: str
    seed: int
    seconds: float


@dataclass(frozen=True)
class Sheet:
    """The contact sheet on the disk."""

    path: Path


@dataclass(frozen=True)
class Gallery:
    """The page that shows the samples of a folder."""

    path: Path


@dataclass(frozen=True)
class Done:
    """The end of the run."""

    num_files: int
    seconds: float


Event = Notice | Loading | Progress | Saved | Sheet | Gallery | Done
