"""Prompts -> files: `plan` checks and says what will be done, `sample` does it and yields events."""

from __future__ import annotations

from opensora_core.sampling.events import Done, Event, Gallery, Loading, Notice, Progress, Saved, Sheet
from opensora_core.sampling.planning import Part, Plan, Request, plan
from opensora_core.sampling.run import sample

__all__ = [
    "Done",
    "Event",
    "Gallery",
    "Loading",
    "Notice",
    "Part",
    "Plan",
    "Progress",
    "Request",
    "Saved",
    "Sheet",
    "plan",
    "sample",
]
