"""Raw videos -> clips: where shots begin, what is cut out of which source, and an account of all of it."""

from __future__ import annotations

from opensora_core.curation import filters
from opensora_core.curation.boundaries import DETECTORS
from opensora_core.curation.events import (
    Event,
    PlannedSource,
    SourceSplit,
    SplitDone,
    SplitPlan,
    SplitProgress,
    WorkerState,
)
from opensora_core.curation.plan import Request
from opensora_core.curation.split import examine, split

__all__ = [
    "DETECTORS",
    "Event",
    "PlannedSource",
    "Request",
    "SourceSplit",
    "SplitDone",
    "SplitPlan",
    "SplitProgress",
    "WorkerState",
    "examine",
    "filters",
    "split",
]
