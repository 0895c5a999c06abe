"""Clips that do not move at all: slides, title cards, frozen streams."""

from __future__ import annotations

import numpy as np

from opensora_core.config import FilterConfig
from opensora_core.curation.filters.look import Filter, Look

_SAME_SHARE = 0.002  # of samples that may differ between frames that show the same


def measure(look: Look, settings: FilterConfig) -> float | None:
    """Share of frames that show what the one before showed; every frame counts."""
    changes = look.footage.changes
    return float(np.mean(changes <= _SAME_SHARE)) if len(changes) else None


STILL = Filter(
    about="share of frames that show what the one before showed",
    unit="of the frames",
    measure=measure,
    most="max_still",
)
