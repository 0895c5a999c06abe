"""How the camera moves, from optical flow: one similarity transform for the whole picture between two frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opensora_core.media.pixels import Frames

WIDTH = 256
"""Pixels that are enough to see it."""

NUM_PAIRS = 6

_FEWEST_POINTS = 12
_LEAST_AGREED = 0.5  # share of the points that move as one; below, the picture has no common motion
_LEAST_SPREAD = 0.15  # of the picture, as a standard deviation; of less, it may be an object that moves
_STILL, _MOVING = 0.012, 0.035  # of the picture's width, or of its scale, in a second
_STEADY = 0.7  # share of the pairs that go the same way
_CORNER_QUALITY = 0.01
_NEAR = 1.5  # pixels of a picture of that width, within which a point is where the others say


@dataclass(frozen=True)
class Motion:
    """Of the picture, in a second: to the right and down in widths, and the logarithm of how much it grows."""

    right: float
    down: float
    growth: float


def pairs(num_frames: int, fps: float) -> list[tuple[int, int]]:
    """Frames to compare, about an eighth of a second apart, spread over a clip."""
    gap = min(max(round(fps / 8), 1), num_frames - 1)
    if gap < 1:
        return []
    firsts = np.unique(np.linspace(0, num_frames - 1 - gap, NUM_PAIRS).round().astype(int))
    return [(int(first), int(first) + gap) for first in firsts]


def motion_between(before: Frames, after: Frames, seconds: float) -> Motion | None:
    """The common motion of two frames (H, W, 3) uint8; None where there is none, or nothing to see it by.

    An object before an empty ground tells nothing of the camera, so what moves as one must be all over the picture.
    """
    import cv2

    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (before, after)]
    corners = cv2.goodFeaturesToTrack(grey[0], 200, _CORNER_QUALITY, 6)
    if corners is None or len(corners) < _FEWEST_POINTS:
        return None
    moved, found, _ = cv2.calcOpticalFlowPyrLK(grey[0], grey[1], corners, np.empty_like(corners))
    good = found.ravel() == 1
    if good.sum() < _FEWEST_POINTS:
        return None
    height, width = before.shape[:2]
    centre = np.array([width / 2, height / 2], np.float32)  # so that a zoom is no shift
    here, there = corners[good].reshape(-1, 2) - centre, moved[good].reshape(-1, 2) - centre
    near = _NEAR * width / WIDTH  # in a small picture a pixel is far
    matrix, agreed = cv2.estimateAffinePartial2D(here, there, method=cv2.RANSAC, ransacReprojThreshold=near)
    if matrix is None or agreed.mean() < _LEAST_AGREED:
        return None
    if (here[agreed.ravel() == 1].std(axis=0) < _LEAST_SPREAD * np.array([width, height])).any():
        return None
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    if not 0.5 < scale < 2:
        return None
    return Motion(
        float(matrix[0, 2]) / width / seconds, float(matrix[1, 2]) / width / seconds, math.log(scale) / seconds
    )


def describe(motions: Sequence[Motion | None]) -> str:
    """A sentence on how the camera moves; empty where the pairs do not agree."""
    known = [motion for motion in motions if motion is not None]
    if len(known) < max(len(motions) / 2, 1):
        return ""
    values = np.array([(motion.right, motion.down, motion.growth) for motion in known])
    middle = np.median(values, axis=0)
    # the picture moves against the camera
    names = (("pans left", "pans right"), ("tilts up", "tilts down"), ("zooms in", "zooms out"))
    said = []
    for axis in np.argsort(-np.abs(middle)):
        if abs(middle[axis]) >= _MOVING and _share_going(values[:, axis], middle[axis]) >= _STEADY:
            forward = middle[axis] > 0
            said.append(names[axis][0 if forward else 1])
    if said:
        return f"The camera {' and '.join(said[:2])}."
    if np.abs(values).max(initial=0) < _MOVING and (np.abs(middle) < _STILL).all():
        return "The camera is static."
    if (np.abs(values[:, :2]).max(axis=1) >= _MOVING).mean() >= 0.5:
        return "The camera is handheld and shakes."
    return ""


def _share_going(values: NDArray[np.float64], towards: float) -> float:
    return float((np.sign(values) == np.sign(towards)).mean())
