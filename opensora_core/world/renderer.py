"""Paint a scene: sixteen frames of 64x64, the same for everyone, in two to four milliseconds.

A small model must learn this world from some hundred thousand clips, so there is little chance in it: each sky and
ground is one picture, rain and snow are loops of sixteen frames that start in one of two places, and only where the
object is and how fast it goes are drawn afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from opensora_core.world.grammar import Scene
from opensora_core.world.palette import (
    FLOOR,
    HALF_EXTENT,
    HORIZON,
    LIGHT_ON_OBJECT,
    NUM_FRAMES,
    OBJECT,
    RADIUS,
    SIZE,
    Floats,
    colour,
    greyed,
    ground_column,
    sky_column,
)

Video = NDArray[np.uint8]

_NUM_PHASES = 2
_TILE = 32
"""Rain and snow repeat after this many pixels both ways, so that a fall of 8 px a frame comes round in 16 frames."""


def render(scene: Scene, rng: Generator) -> Video:
    """Paint one clip.

    Args:
        scene: what to paint.
        rng: draws the place and speed of the object, the moment of its hop and of the weather, and nothing else.

    Returns:
        (T, H, W, 3) uint8 with T = 16 and H = W = 64, at 8 frames per second.
    """
    half_width, half_height = (RADIUS[scene.size] * extent for extent in HALF_EXTENT[scene.shape])
    x, y = _path(scene, half_width, half_height, rng)
    phase = int(rng.integers(_NUM_PHASES))
    video = _weathered(scene.sky, scene.ground, scene.weather, phase).copy()

    # Only the columns around the object and its shadow are painted anew; the rest is a picture made once.
    reach = int(np.ceil(1.2 * half_width + 1))
    left = np.clip(np.round(x).astype(np.intp) - reach, 0, SIZE - 2 * reach)
    columns = left[:, None] + np.arange(2 * reach)
    at = (np.arange(NUM_FRAMES)[:, None, None], np.arange(SIZE)[None, :, None], columns[:, None, :])
    patch = _backdrop(scene.sky, scene.ground, scene.weather)[at]
    across = (columns[:, None, :] - x[:, None, None]).astype(np.float32)
    down = (np.arange(SIZE)[None, :, None] - y[:, None, None]).astype(np.float32)

    patch = patch * (1 - _shadow(columns, x, y + half_height, half_width))[..., None]
    cover, paint = _object(scene, across, down)
    patch = patch + cover[..., None] * (paint - patch)
    if scene.weather != "clear":
        falling, tone = _falling(scene.weather, phase)[at], _fall_colour(scene.weather, scene.sky)
        patch = patch + falling[..., None] * (tone - patch)
    video[at] = _quantised(patch)
    return video


def render_batch(scenes: Sequence[Scene], rngs: Sequence[Generator | int]) -> Video:
    """Paint several clips, each from its own generator or seed: (B, T, H, W, 3) uint8."""
    assert len(scenes) == len(rngs), "one generator or seed for each scene"
    videos = np.empty((len(scenes), NUM_FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    for index, (scene, rng) in enumerate(zip(scenes, rngs, strict=True)):
        videos[index] = render(scene, rng if isinstance(rng, Generator) else np.random.default_rng(rng))
    return videos


def _path(scene: Scene, half_width: float, half_height: float, rng: Generator) -> tuple[Floats, Floats]:
    """Where the centre of the object is in each frame, x (T,) and y (T,)."""
    time = np.arange(NUM_FRAMES, dtype=np.float32)
    progress = time / (NUM_FRAMES - 1)
    near, far = half_width + 1.5, SIZE - 2.5 - half_width
    ground = FLOOR - half_height
    travel = rng.uniform(24.0, 28.0)
    x, y = np.full(NUM_FRAMES, rng.uniform(near, far)), np.full(NUM_FRAMES, ground)
    if scene.motion in ("left", "right"):
        start = rng.uniform(near, far - travel)
        x = start + travel * (progress if scene.motion == "right" else 1 - progress)
    elif scene.motion == "up":
        y = ground - travel * progress
    elif scene.motion == "down":
        y = ground - travel * (1 - progress)
    elif scene.motion == "bouncing":
        flight = (time / 6.0 + rng.uniform()) % 1.0  # a hop takes six frames
        y = ground - rng.uniform(16.0, 18.0) * 4 * flight * (1 - flight)
    return x.astype(np.float32), y.astype(np.float32)


def _object(scene: Scene, across: Floats, down: Floats) -> tuple[Floats, Floats]:
    """The object as coverage (T, H, w) in 0..1 and paint (T, H, w, 3), from offsets to its centre in pixels."""
    radius = RADIUS[scene.size]
    half_width, half_height = (radius * extent for extent in HALF_EXTENT[scene.shape])
    if scene.shape == "ball":
        distance = np.sqrt(across**2 + down**2) - radius
        toward_light = np.sqrt((across + 0.34 * radius) ** 2 + (down + 0.38 * radius) ** 2) / radius
        shade = 1.14 - 0.3 * toward_light**1.5
        gloss = 0.75 * np.clip(1.25 - toward_light / 0.26, 0, 1)
    elif scene.shape == "cube":
        corner = 1.0
        over_x, over_y = np.abs(across) - half_width + corner, np.abs(down) - half_height + corner
        distance = np.hypot(np.maximum(over_x, 0), np.maximum(over_y, 0)) + np.minimum(np.maximum(over_x, over_y), 0)
        distance = distance - corner
        lid = np.clip(-down - 0.42 * half_height + 0.5, 0, 1)
        shade = 0.9 - 0.06 * down / half_height + 0.0 * across + 0.26 * lid
        gloss = 0.16 * lid + 0.0 * across
    else:
        slope = half_width / (2 * half_height)
        side = (np.abs(across) - (down + half_height) * slope) / np.float32(np.hypot(1, slope))
        distance = np.maximum(side, down - half_height)
        # the edge between the two faces runs from the tip to a little right of the middle of the bottom
        turned = np.clip(across - 0.3 * slope * (down + half_height) + 0.5, 0, 1)
        shade = 1.1 - 0.34 * turned
        gloss = 0.1 * (1 - turned)
    cover = np.clip(0.5 - distance, 0, 1)
    outline = np.clip(distance + 1.9, 0, 1)
    shade = shade * (1 - 0.5 * outline)
    gloss = gloss * (1 - outline)
    paint = colour(OBJECT[scene.color]) * colour(LIGHT_ON_OBJECT[scene.sky]) * shade[..., None]
    return cover, paint + gloss[..., None] * (np.float32(255) - paint)


def _shadow(columns: NDArray[np.intp], x: Floats, bottom: Floats, half_width: float) -> Floats:
    """How dark the soft shadow on the floor is, (T, H, w): wide and dark under an object that stands, fading as it
    rises."""
    height = np.clip((FLOOR - bottom) / 32, 0, 1)
    width = (half_width * (1.1 - 0.45 * height))[:, None, None]
    away_x = (columns[:, None, :] - x[:, None, None]) / width
    away_y = (np.arange(SIZE, dtype=np.float32)[None, :, None] - np.float32(FLOOR)) / 3.2
    depth = np.clip(1.15 - away_x**2 - away_y**2, 0, 1)
    return np.asarray(depth * (0.52 - 0.26 * height)[:, None, None], dtype=np.float32)


_GLITTER: dict[str, tuple[int, int, int]] = {
    "day": (236, 248, 250),
    "sunset": (255, 206, 150),
    "night": (164, 174, 214),
}


@cache
def _backdrop(sky: str, ground: str, weather: str) -> Floats:
    """Sky and ground in the light of a weather, before anything falls, (T, H, W, 3); only the sea moves."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    heavens = np.broadcast_to(
        sky_column(sky)[np.minimum(np.arange(SIZE), HORIZON - 1)][:, None], (SIZE, SIZE, 3)
    ).copy()
    _hang_lights(heavens, rows, columns, sky)
    earth = np.zeros_like(heavens)
    earth[HORIZON:] = ground_column(ground, sky)[:, None]
    earth[:HORIZON] = earth[HORIZON]
    frames: list[Floats] = []
    for frame in range(NUM_FRAMES):
        if ground != "sea" and frame:
            frames.append(frames[0])
            continue
        land = earth * _relief(ground, sky, frame, rows, columns)[..., None]
        if ground == "sea":
            land = land + _glitter(frame, rows, columns)[..., None] * (colour(_GLITTER[sky]) - land)
        ridge = HORIZON - _skyline(ground, columns[:1])
        blend = np.clip(rows - ridge + 0.5, 0, 1)[..., None]
        frames.append(greyed(heavens + blend * (land - heavens), weather))
    backdrop: Floats = np.clip(np.stack(frames), 0, 255).astype(np.float32)
    backdrop.setflags(write=False)
    return backdrop


_STARS = ((7, 8, 1.0), (17, 20, 0.8), (24, 6, 0.9), (34, 15, 0.8), (38, 5, 0.7), (10, 29, 0.7), (59, 27, 0.8))
"""Column, row and size."""


def _hang_lights(heavens: Floats, rows: Floats, columns: Floats, sky: str) -> None:
    """Put sun and cloud, low sun, or moon and stars into the sky, in place."""

    def glow(x: float, y: float, reach: float, strength: float, rgb: tuple[int, int, int]) -> None:
        veil = strength * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * reach**2))
        heavens[:] += veil[..., None] * (colour(rgb) - heavens)

    def disc(x: float, y: float, radius: float, rgb: tuple[int, int, int]) -> None:
        cover = np.clip(radius + 0.5 - np.hypot(columns - x, rows - y), 0, 1)
        heavens[:] += cover[..., None] * (colour(rgb) - heavens)

    if sky == "day":
        glow(51, 11, 8, 0.6, (255, 252, 236))
        disc(51, 11, 5, (255, 250, 226))
        for x, y, radius in ((11, 13, 3.2), (15, 11, 4.2), (20, 13, 3.4)):
            lobe = np.clip(radius + 0.8 - np.hypot((columns - x) * 0.8, rows - y), 0, 1) * (rows < 15)
            heavens[:] += 0.85 * lobe[..., None] * (colour((250, 252, 255)) - heavens)
    elif sky == "sunset":
        glow(47, HORIZON - 1, 13, 0.75, (255, 226, 160))
        disc(47, HORIZON - 2, 7.5, (255, 244, 206))
    else:
        glow(51, 12, 7, 0.3, (170, 180, 230))
        moon = np.clip(5.5 - np.hypot(columns - 51, rows - 12), 0, 1)
        bite = np.clip(5.0 - np.hypot(columns - 48.6, rows - 10.6), 0, 1)
        heavens[:] += (moon * (1 - bite))[..., None] * (colour((244, 242, 220)) - heavens)
        for x, y, size in _STARS:
            glow(x, y, size, 0.95, (236, 238, 255))


def _skyline(ground: str, columns: Floats) -> Floats:
    """How far the land reaches above the horizon, in pixels, (1, W)."""
    if ground == "grass":
        return np.asarray(2.6 + 1.8 * np.sin(columns / 9.0 + 0.6) + 0.9 * np.sin(columns / 4.6), dtype=np.float32)
    if ground == "sand":
        return np.asarray(1.4 + 1.6 * np.abs(np.sin(columns / 20.0 + 0.5)) ** 1.5, dtype=np.float32)
    if ground == "snow":
        peaks = [6.5 - 0.62 * np.abs(columns - 14), 4.5 - 0.5 * np.abs(columns - 33), 6.0 - 0.55 * np.abs(columns - 56)]
        return np.asarray(np.maximum(np.max(peaks, axis=0), 0.6), dtype=np.float32)
    return np.zeros_like(columns)


def _relief(ground: str, sky: str, frame: int, rows: Floats, columns: Floats) -> Floats:
    """The gentle light and shade on the ground, a factor around 1, (H, W)."""
    depth = np.clip((rows - HORIZON) / (SIZE - HORIZON), 0, 1)
    distant = np.clip(HORIZON + 1.5 - rows, 0, 1)
    if ground == "grass":
        mown = np.sin((columns - 32) / (2.6 + 6.5 * depth) + 0.4)
        return np.asarray(1 - 0.14 * distant + 0.07 * np.tanh(2 * mown) * np.clip(3 * depth, 0, 1), dtype=np.float32)
    if ground == "sand":
        ripple = np.sin(rows * 1.05 + 1.6 * np.sin(columns / 10.5) - 0.5)
        return np.asarray(1 - 0.08 * distant + 0.045 * ripple * np.clip(3 * depth, 0, 1), dtype=np.float32)
    if ground == "sea":
        swell = np.sin(rows * 1.25 - 2 * np.pi * frame / 16 + 0.8 * np.sin(columns / 8.0))
        return np.asarray(1 + 0.1 * swell * np.clip(2 * depth + 0.15, 0, 1), dtype=np.float32)
    drift = np.sin(columns / 11.0 + rows / 6.0) + np.sin(columns / 17.0 - rows / 4.0)
    return np.asarray(1 - 0.17 * distant + 0.022 * drift * np.clip(2 * depth, 0, 1), dtype=np.float32)


def _glitter(frame: int, rows: Floats, columns: Floats) -> Floats:
    """The path of light that sun or moon lays on the sea, (H, W) in 0..1."""
    broken = 0.5 + 0.5 * np.sin(rows * 1.25 - 2 * np.pi * frame / 16 + columns / 5.0)
    return np.asarray(0.5 * np.exp(-((columns - 49) ** 2) / (2 * (3 + (rows - HORIZON) * 0.16) ** 2)) * broken)


_DROPS = ((3, 2), (11, 19), (18, 6), (26, 24), (30, 12))
"""Column and row within the tile."""

_FLAKES = ((4, 3, 1.6), (13, 13, 1.2), (22, 6, 1.5), (28, 20, 1.3), (9, 25, 1.5), (19, 27, 1.1))
"""Column, row and radius within the tile."""


@cache
def _falling(weather: str, phase: int) -> Floats:
    """How much of each pixel rain or snow covers, (T, H, W) in 0..1: a tile that falls in a loop of 16 frames."""
    rows, columns = np.mgrid[:_TILE, :_TILE].astype(np.float32)

    def wrapped(distance: Floats) -> Floats:
        return np.asarray((distance + _TILE / 2) % _TILE - _TILE / 2, dtype=np.float32)

    loop = np.zeros((NUM_FRAMES, _TILE, _TILE), dtype=np.float32)
    for frame in range(NUM_FRAMES):
        turn = 2 * np.pi * frame / NUM_FRAMES
        if weather == "rain":
            for x, y in _DROPS:
                dx, dy = wrapped(columns - x + 2 * frame), wrapped(rows - y - 8 * frame)
                along = np.clip(dy, -3.5, 3.5)
                streak = np.clip(1.35 - np.hypot(dx + along * 0.25, dy - along), 0, 1)
                loop[frame] = np.maximum(loop[frame], 0.5 * streak)
        else:
            for number, (x, y, radius) in enumerate(_FLAKES):
                dx = wrapped(columns - x - 1.6 * np.sin(turn + 2.1 * number))
                dy = wrapped(rows - y - 2 * frame)
                loop[frame] = np.maximum(loop[frame], 0.75 * np.clip(radius + 0.6 - np.hypot(dx, dy), 0, 1))
    loop = np.roll(loop, -phase * NUM_FRAMES // _NUM_PHASES, axis=0)
    tiled = np.tile(loop, (1, SIZE // _TILE, SIZE // _TILE))
    tiled.setflags(write=False)
    return tiled


def _fall_colour(weather: str, sky: str) -> Floats:
    """The colour of drops or flakes in the light of a sky."""
    rgb = colour((214, 230, 250) if weather == "rain" else (252, 253, 255))
    return np.asarray(rgb * (np.float32(0.9) if sky == "night" else np.float32(1)), dtype=np.float32)


@cache
def _weathered(sky: str, ground: str, weather: str, phase: int) -> Video:
    """The clip without an object, quantised, (T, H, W, 3)."""
    picture = _backdrop(sky, ground, weather)
    if weather != "clear":
        picture = picture + _falling(weather, phase)[..., None] * (_fall_colour(weather, sky) - picture)
    video = _quantised(picture)
    video.setflags(write=False)
    return video


def _quantised(image: Floats) -> Video:
    video: Video = np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)
    return video
