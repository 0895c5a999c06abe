"""How sharp the picture is."""

from __future__ import annotations

import cv2

from opensora_core.config import FilterConfig
from opensora_core.curation.filters.look import Filter, Look, median


def measure(look: Look, settings: FilterConfig) -> float | None:
    """Variance of the Laplacian of brightness 0..255: low where no edge is sharp (Pech-Pacheco et al. 2000)."""
    return median([float(cv2.Laplacian(look.grays[place], cv2.CV_64F).var()) for place in look.firsts])


SHARPNESS = Filter(
    about="variance of the Laplacian: low where no edge is sharp",
    unit="levels squared",
    measure=measure,
    least="min_sharpness",
    made_by=lambda settings: f"1 {settings.frames}",
)
