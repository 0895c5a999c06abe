"""Pictures that are too dark or too bright to show anything."""

from __future__ import annotations

import numpy as np

from opensora_core.config import FilterConfig
from opensora_core.curation.filters.look import Filter, Look

_DARK, _BRIGHT = 24, 243  # levels of brightness up to, and from, which nothing can be told apart


def _dark(look: Look, settings: FilterConfig) -> float | None:
    return float(np.mean([np.mean(look.grays[place] <= _DARK) for place in look.firsts]))


def _bright(look: Look, settings: FilterConfig) -> float | None:
    return float(np.mean([np.mean(look.grays[place] >= _BRIGHT) for place in look.firsts]))


DARK = Filter(
    about="share of the picture, without bars, that is black",
    unit="of the picture",
    measure=_dark,
    most="max_dark",
    made_by=lambda settings: f"1 {settings.frames}",
)
BRIGHT = Filter(
    about="share of the picture that is white",
    unit="of the picture",
    measure=_bright,
    most="max_bright",
    made_by=lambda settings: f"1 {settings.frames}",
)
