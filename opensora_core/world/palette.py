"""What the world looks like: the sizes and colours that the renderer paints with and the verifier looks for.

Colours are RGB in 0..255. The six object colours keep apart from each other and from every sky and ground, by day and
by night: the closest pair (blue and purple) is 116 apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

NUM_FRAMES = 16
SIZE = 64
FPS = 8

HORIZON = 38
"""The row at which the sky ends on the sea; hills, dunes and mountains reach up to six rows above it."""

FLOOR = 57.0
"""The row on which the object stands when it stands."""

RADIUS: dict[str, float] = {"small": 8.0, "large": 13.0}

HALF_EXTENT: dict[str, tuple[float, float]] = {"ball": (1.0, 1.0), "cube": (0.92, 0.92), "pyramid": (1.12, 1.0)}
"""Half the width and half the height of a shape, in radii."""

OBJECT: dict[str, tuple[int, int, int]] = {
    "red": (228, 34, 38),
    "yellow": (255, 224, 24),
    "green": (4, 206, 112),
    "blue": (36, 72, 242),
    "purple": (142, 40, 206),
    "pink": (255, 112, 200),
}

LIGHT_ON_OBJECT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.94, 0.9),
    "night": (0.84, 0.86, 0.94),
}

LIGHT_ON_GROUND: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.98, 0.8, 0.74),
    "night": (0.4, 0.48, 0.66),
}

SKY: dict[str, tuple[tuple[int, int, int], ...]] = {
    "day": ((70, 146, 232), (128, 188, 244), (204, 232, 248)),
    "sunset": ((84, 78, 148), (228, 116, 104), (255, 200, 124)),
    "night": ((10, 14, 44), (22, 30, 74), (52, 64, 118)),
}
"""Colours at the top, in the middle and at the horizon."""

GROUND: dict[str, tuple[tuple[int, int, int], ...]] = {
    "grass": ((134, 178, 80), (72, 126, 44)),
    "sand": ((240, 216, 164), (212, 176, 112)),
    "sea": ((84, 174, 194), (18, 100, 140)),
    "snow": ((238, 244, 250), (200, 216, 236)),
}
"""Colours at the horizon and at the bottom."""

GREYING: dict[str, tuple[float, float]] = {"clear": (0.0, 1.0), "rain": (0.45, 0.88), "snow": (0.3, 1.02)}
"""How far bad weather takes the colour out of the sky (0..1), and the brightness that stays."""


def colour(rgb: tuple[float, ...] | tuple[tuple[int, int, int], ...]) -> Floats:
    """An RGB triple as a float32 array."""
    return np.asarray(rgb, dtype=np.float32)


def sky_column(sky: str) -> Floats:
    """The gradient of a clear sky from the top row to the horizon, (HORIZON, 3)."""
    at = np.linspace(0.0, 1.0, HORIZON)
    stops = colour(SKY[sky])
    knots = np.linspace(0.0, 1.0, len(stops))
    return np.stack([np.interp(at, knots, stops[:, channel]) for channel in range(3)], axis=-1).astype(np.float32)


def ground_column(ground: str, sky: str) -> Floats:
    """The gradient of the ground under the light of a sky, from the horizon to the bottom row, (SIZE - HORIZON, 3)."""
    at = np.linspace(0.0, 1.0, SIZE - HORIZON, dtype=np.float32)[:, None]
    far, near = colour(GROUND[ground])
    return np.asarray((far + (near - far) * at) * colour(LIGHT_ON_GROUND[sky]), dtype=np.float32)


def greyed(image: Floats, weather: str) -> Floats:
    """What bad weather makes of an image (..., 3): less colour, and a little darker in rain."""
    greying, brightness = GREYING[weather]
    grey = image @ colour((0.3, 0.5, 0.2))
    return np.asarray((image + (grey[..., None] - image) * greying) * brightness, dtype=np.float32)
