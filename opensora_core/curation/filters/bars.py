"""Black bars around the picture."""

from __future__ import annotations

from opensora_core.config import FilterConfig
from opensora_core.curation.filters.look import Filter, Look


def measure(look: Look, settings: FilterConfig) -> float | None:
    """Share of the picture that is bars, black in every frame that is looked at."""
    footage = look.footage
    if footage.crop is None:
        return 0.0
    return 1 - footage.crop[2] * footage.crop[3] / (footage.height * footage.width)


BARS = Filter(
    about="share of the picture that is black bars around it; `--crop-black-bars` cuts them off",
    unit="of the picture",
    measure=measure,
    most="max_bars",
    made_by=lambda settings: f"1 {settings.frames}",
)
