"""Read a scene back from the pixels of a clip.

The verifier is told nothing about the clip. It knows what the world's colours are (`palette`) and how things look and
move there, and measures: gradients for sky and ground, chromaticity for the object's colour, the outline's geometry
for shape and size, the path of its centre for motion, and what comes down how fast for the weather. It works on
sampled clips too, where colours are a little off and edges soft.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opensora_core.world.palette import (
    GREYING,
    GROUND,
    HALF_EXTENT,
    HORIZON,
    LIGHT_ON_OBJECT,
    OBJECT,
    RADIUS,
    SIZE,
    SKY,
    Floats,
    colour,
    greyed,
    ground_column,
    sky_column,
)

Mask = NDArray[np.bool_]

_MIN_DENSITY = 30
"""Fewer pixels of one colour than this in the best 9x9 of a frame are no object; noise does not get there."""


def verify(video: NDArray[np.uint8]) -> dict[str, str]:
    """Read the attributes of a clip.

    Args:
        video: (T, H, W, 3) uint8 with H = W = 64. One frame is enough for all but the motion and the weather, which
            then come out as still and clear.

    Returns:
        Attribute -> value. Color, shape, size and motion are absent when most frames show no object.
    """
    frames = _checked(video)
    sky, ground = _surroundings(frames)
    found = {"sky": sky, "ground": ground}
    sighting = _find_object(frames, sky)
    if sighting is not None:
        shape, size = _geometry(sighting.masks[sighting.seen])
        found |= {"color": sighting.color, "shape": shape, "size": size, "motion": _motion(_centres(sighting))}
    found["weather"] = _weather(frames, None if sighting is None else sighting.masks)
    return found


def track(video: NDArray[np.uint8]) -> Floats:
    """Follow the centre of the object.

    Args:
        video: (T, H, W, 3) uint8 with H = W = 64.

    Returns:
        (T, 2) float32, x and y in pixels; between sightings interpolated, and not-a-number where most frames show no
        object.
    """
    frames = _checked(video)
    sighting = _find_object(frames, _surroundings(frames)[0])
    if sighting is None:
        return np.full((len(frames), 2), np.nan, dtype=np.float32)
    return _centres(sighting)


def _checked(video: NDArray[np.uint8]) -> Floats:
    assert video.dtype == np.uint8 and video.ndim == 4, f"a clip is (T, H, W, 3) uint8, not {video.shape} {video.dtype}"
    assert video.shape[1:] == (SIZE, SIZE, 3), f"frames of this world are {SIZE}x{SIZE}, not {video.shape[1:]}"
    return video.astype(np.float32)


def _surroundings(frames: Floats) -> tuple[str, str]:
    """The sky and ground whose gradients are nearest to those of the clip, in whichever weather."""
    column = np.median(frames, axis=(0, 2))
    best, answer = np.inf, ("", "")
    for sky in SKY:
        for weather in GREYING:
            above = np.abs(column[4:30] - greyed(sky_column(sky), weather)[4:30]).mean()
            for ground in GROUND:
                expected = greyed(ground_column(ground, sky), weather)[6:]
                distance = float(above + np.abs(column[HORIZON + 6 :] - expected).mean())
                if distance < best:
                    best, answer = distance, (sky, ground)
    return answer


@dataclass(frozen=True)
class _Sighting:
    """The object in a clip: its colour, its filled masks (T, H, W), and the frames (T,) that show it."""

    color: str
    masks: Mask
    seen: Mask


def _find_object(frames: Floats, sky: str) -> _Sighting | None:
    """Find the largest thing that looks more like a shade of an object colour than like its row of the background."""
    row = np.median(frames, axis=2, keepdims=True)
    # in the shade, as it is, and behind a drop or flake or in the glare of the sun
    from_background = np.minimum(_distance(frames, _DEEPEST_SHADOW * row, row), _distance(frames, row, _WHITE))
    paints = [colour(rgb) * colour(LIGHT_ON_OBJECT[sky]) for rgb in OBJECT.values()]
    from_paints = np.stack([_distance(frames, _DARKEST * paint, _LIGHTEST * paint) for paint in paints])
    nearest = from_paints.argmin(axis=0)
    likely = (from_paints.min(axis=0) < np.minimum(from_background, _TOO_FAR)) & (from_background > _TOO_FAR / 3)
    # dense patches count, not scattered pixels: each colour is weighed by its best neighbourhood in each frame
    votes = [_box_sum(likely & (nearest == index)).max(axis=(1, 2)).sum() for index in range(len(OBJECT))]
    winner = int(np.argmax(votes))
    masks = from_paints[winner] < np.minimum(from_background, _TOO_FAR)
    density = _box_sum(likely & (nearest == winner))
    core = _largest(masks, density)
    # lossy codecs smear the colour over the edges, but keep the edges: the rim is where the background ends
    masks = _filled(_grown(_grown(core)) & (from_background > _STANDS_OUT))
    seen = (density.max(axis=(1, 2)) >= _MIN_DENSITY) & masks.any(axis=(1, 2))
    if seen.mean() <= 0.5:
        return None
    return _Sighting(list(OBJECT)[winner], masks, seen)


_STANDS_OUT = 36.0
"""A pixel closer to its background than this, in 0..255 RGB, is background."""

_DARKEST, _LIGHTEST = 0.5, 1.15
"""The range of shades on an object, rim included, in shares of its colour."""

_DEEPEST_SHADOW = 0.4
_WHITE = colour((240, 244, 252))

_TOO_FAR = 90.0
"""A pixel further than this from every shade of a colour, in 0..255 RGB, is something else."""


def _distance(image: Floats, start: Floats, end: Floats) -> Floats:
    """How far each colour of an image (..., 3) is from the straight line between two colours, (...)."""
    line = end - start
    length = np.maximum((line * line).sum(axis=-1), 1)
    offset = image - start
    along = np.einsum("...c,...c->...", offset, line)
    share = np.clip(along / length, 0, 1)
    squared = np.einsum("...c,...c->...", offset, offset) - share * (2 * along - share * length)
    return np.asarray(np.sqrt(np.maximum(squared, 0)), dtype=np.float32)


def _box_sum(masks: Mask, reach: int = 4) -> NDArray[np.int64]:
    """How many pixels are set within `reach` of each, (T, H, W)."""
    padded = np.pad(masks.astype(np.int64), ((0, 0), (reach + 1, reach), (reach + 1, reach))).cumsum(1).cumsum(2)
    width = 2 * reach + 1
    return np.asarray(
        padded[:, width:, width:]
        - padded[:, :-width, width:]
        - padded[:, width:, :-width]
        + padded[:, :-width, :-width]
    )


def _grown(masks: Mask) -> Mask:
    """Each mask with its eight-neighbours."""
    padded = np.pad(masks, ((0, 0), (1, 1), (0, 0)))
    tall = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
    padded = np.pad(tall, ((0, 0), (0, 0), (1, 1)))
    return np.asarray(padded[:, :, :-2] | padded[:, :, 1:-1] | padded[:, :, 2:])


def _largest(masks: Mask, density: NDArray[np.int64]) -> Mask:
    """The connected part of each frame's mask around the densest spot; a streak of rain does not cut it in two."""
    density = np.where(masks, density, -1).reshape(len(masks), -1)  # the middle of a ring is dense, but not of it
    part = np.zeros_like(masks)
    part.reshape(len(masks), -1)[np.arange(len(masks)), density.argmax(axis=1)] = True
    passable = _grown(masks)
    for _ in range(SIZE // 2):
        larger = _grown(part) & passable
        if (larger == part).all():
            break
        part = larger
    return part & masks


def _filled(masks: Mask) -> Mask:
    """Close the gaps that gloss, drops and flakes leave: all shapes here are convex, so rows and columns are spans."""

    def spans(axis: int) -> Mask:
        before = np.logical_or.accumulate(masks, axis=axis)
        after = np.flip(np.logical_or.accumulate(np.flip(masks, axis), axis=axis), axis)
        return np.asarray(before & after)

    return spans(1) | spans(2)


def _geometry(masks: Mask) -> tuple[str, str]:
    """Shape and size from the outline that most frames agree on.

    The masks are laid over each other by their centres of mass, and what half of them cover is compared with a ball, a
    cube and a pyramid of the same area and centre: the one with the largest overlap wins.
    """
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    pile = np.zeros((SIZE, SIZE), dtype=np.float32)
    for mask in masks:
        middle = [round(float(line[mask].mean())) for line in (rows, columns)]
        pile += np.roll(mask, [SIZE // 2 - at for at in middle], axis=(0, 1))
    outline = pile * 2 >= len(masks)
    area = float(outline.sum())
    if not area:
        return "ball", "small"
    down, across = rows - rows[outline].mean(), columns - columns[outline].mean()
    overlaps = {}
    for shape, unit_area in _UNIT_AREA.items():
        radius = float(np.sqrt(area / unit_area))
        ideal = _inside(shape, across / radius, down / radius)
        overlaps[shape] = float((ideal & outline).sum() / (ideal | outline).sum())
    shape = max(overlaps, key=lambda name: overlaps[name])
    between = (RADIUS["small"] + RADIUS["large"]) / 2 - _RIM
    return shape, "large" if area > _UNIT_AREA[shape] * between**2 else "small"


_UNIT_AREA: dict[str, float] = {
    "ball": float(np.pi),
    "cube": 4 * HALF_EXTENT["cube"][0] * HALF_EXTENT["cube"][1],
    "pyramid": 2 * HALF_EXTENT["pyramid"][0] * HALF_EXTENT["pyramid"][1],
}
"""Area of a shape of radius one."""

_RIM = 0.5
"""Pixels of its radius that an object loses because its dark rim is not counted."""


def _inside(shape: str, across: Floats, down: Floats) -> Mask:
    """Where a shape of radius one is, given offsets from its centre of mass."""
    half_width, half_height = HALF_EXTENT[shape]
    if shape == "ball":
        return np.asarray(across**2 + down**2 <= 1)
    if shape == "cube":
        return np.asarray((np.abs(across) <= half_width) & (np.abs(down) <= half_height))
    from_tip = down + half_height * 4 / 3  # the centre of mass is two thirds of the way down
    return np.asarray((from_tip <= 2 * half_height) & (np.abs(across) <= from_tip * half_width / (2 * half_height)))


def _centres(sighting: _Sighting) -> Floats:
    """Centres of mass (T, 2), x and y, interpolated over the frames that do not show the object."""
    area = np.maximum(sighting.masks.sum(axis=(1, 2)), 1)
    along = np.arange(SIZE)
    centres = np.stack(
        [
            (sighting.masks.sum(axis=1) * along).sum(axis=1) / area,
            (sighting.masks.sum(axis=2) * along).sum(axis=1) / area,
        ]
    )
    time, seen = np.arange(len(area)), sighting.seen
    return np.stack([np.interp(time, time[seen], line[seen]) for line in centres], axis=-1).astype(np.float32)


def _motion(centres: Floats) -> str:
    """What a path (T, 2) is: hops, a straight way in one direction, or staying where it is."""
    time = np.linspace(-0.5, 0.5, len(centres)) if len(centres) > 1 else np.zeros(1)
    spread = float((time**2).sum())
    travel = (time[:, None] * centres).sum(axis=0) / spread if spread else np.zeros(2)
    straight = centres.mean(axis=0) + time[:, None] * travel
    wobble = np.sqrt(((centres - straight) ** 2).mean(axis=0))
    if wobble[1] > 2.5 and wobble[1] > wobble[0]:
        return "bouncing"
    if np.abs(travel).max() < 7:
        return "still"
    if abs(travel[0]) > abs(travel[1]):
        return "right" if travel[0] > 0 else "left"
    return "down" if travel[1] > 0 else "up"


def _weather(frames: Floats, masks: Mask | None) -> str:
    """Whether bright things pass through the sky, and whether they fall like drops or like flakes."""
    if len(frames) < 3:
        return "clear"
    sky = frames[:, : HORIZON - 6].mean(axis=-1)
    passing = sky - np.median(sky, axis=0)
    if masks is not None:
        near = masks
        for _ in range(3):
            near = _grown(near)
        # where the object was in any frame the median is not the sky
        passing[:, near[:, : HORIZON - 6].any(axis=0)] = 0
    # averaging over 3x3 pixels leaves a streak or flake and takes away most of a codec's noise
    padded = np.pad(passing, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    bright = np.maximum((rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9 - 7, 0)
    if float((bright > 0).mean()) < 0.03:
        return "clear"
    speed = _fall(bright)
    return "clear" if speed == 0 else "rain" if speed >= 5 else "snow"


def _fall(bright: Floats) -> int:
    """By how many rows per frame the bright things come down: the shift at which a frame matches the next best.

    Zero when nothing matches: what flickers without falling is no weather.
    """
    height, width = bright.shape[1:]
    matches = []
    for down in range(12):
        for aside in range(-3, 4):
            now = bright[:-1, : height - down, max(0, -aside) : width - max(0, aside)]
            then = bright[1:, down:, max(0, aside) : width + min(0, aside)]
            now, then = now - now.mean(), then - then.mean()
            norm = float(np.linalg.norm(now) * np.linalg.norm(then))
            matches.append((float(np.vdot(now, then)) / norm if norm else 0.0, down))
    match, speed = max(matches)
    return speed if match > 0.25 else 0
