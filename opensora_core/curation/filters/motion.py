"""How much moves: by optical flow, or by what the encoder found."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from opensora_core.config import FilterConfig
from opensora_core.curation.filters.look import Filter, Gray, Look

_SIDE = 256  # of the longer side: in its pixels motion is told, whatever size a clip has
_LEAST_CONTRAST = 2.0  # standard deviation, in levels


def _flow(first: Gray, second: Gray) -> float:
    """Mean length of the flow from one picture to the next, in widths of the longer side."""
    longest = max(first.shape)
    scale = min(_SIDE / longest, 1)
    size: tuple[int, int] = max(round(first.shape[1] * scale), 16), max(round(first.shape[0] * scale), 16)
    small = [cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in (first, second)]
    if float(small[0].std()) < _LEAST_CONTRAST:  # in what shows nothing, noise would seem to move
        return 0.0
    dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    flow = np.asarray(dis.calc(small[0], small[1], None), np.float64)
    return float(np.hypot(flow[..., 0], flow[..., 1]).mean()) / max(size)


def measure(look: Look, settings: FilterConfig) -> float | None:
    """Mean motion of a clip; of a picture there is none."""
    if not look.footage.has_time:
        return None
    if len(vectors := look.footage.vectors):
        return float(vectors.mean()) * _SIDE
    if not look.pairs:
        return None
    return float(np.mean([_flow(look.grays[first], look.grays[second]) for first, second in look.pairs])) * _SIDE


MOTION = Filter(
    about="how far the picture moves from a frame to the next",
    unit="pixels per frame of a picture 256 wide",
    measure=measure,
    least="min_motion",
    most="max_motion",
    made_by=lambda settings: f"{settings.motion} {settings.frames}",
)
