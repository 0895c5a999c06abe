from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from opensora_core.world import ATTRIBUTES, Scene, draw_scene, render, track, verify
from opensora_core.world.palette import HALF_EXTENT, OBJECT, RADIUS
from opensora_core.world.renderer import _path, _weathered

PLAIN = Scene("red", "ball", "small", "right", "day", "grass", "clear")


def degraded(video: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """What a small VAE does: blur (sigma 0.7), a colour cast, and noise of sigma 7."""
    taps = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 0.7**2))
    taps /= taps.sum()
    image = video.astype(np.float64)
    for axis in (1, 2):
        padded = np.pad(image, [(2, 2) if dim == axis else (0, 0) for dim in range(4)], mode="edge")
        image = sum(tap * np.take(padded, range(at, at + video.shape[axis]), axis=axis) for at, tap in enumerate(taps))
    image = image * rng.uniform(0.95, 1.05, 3) + rng.uniform(-6, 6, 3) + rng.normal(0, 7, image.shape)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def accuracy(n: int, *, damage: bool, seed: int) -> dict[str, float]:
    right: Counter[str] = Counter()
    for index in range(n):
        rng = np.random.default_rng((seed, index))
        scene = draw_scene(rng, "seen" if index % 2 else "held-out")
        video = render(scene, rng)
        found = verify(degraded(video, rng) if damage else video)
        right.update(name for name, value in asdict(scene).items() if found.get(name) == value)
    return {name: right[name] / n for name in ATTRIBUTES}


@pytest.mark.parametrize("damage", [False, True])
def test_attributes_are_read_back(damage: bool) -> None:
    assert min(accuracy(75, damage=damage, seed=1).values()) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "floor"), [(False, 0.97), (True, 0.95)])
def test_attributes_are_read_back_from_many_clips(damage: bool, floor: float) -> None:
    assert min(accuracy(1_000, damage=damage, seed=2).values()) >= floor


def test_without_an_object_nothing_is_said_about_one() -> None:
    for sky, ground, weather in product(ATTRIBUTES["sky"], ATTRIBUTES["ground"], ATTRIBUTES["weather"]):
        assert verify(_weathered(sky, ground, weather, 2)) == {"sky": sky, "ground": ground, "weather": weather}


def test_nothing_is_seen_in_grey_or_noise() -> None:
    grey = np.full((16, 64, 64, 3), 128, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, grey.shape, dtype=np.uint8)
    for video in (grey, noise):
        found = verify(video)
        assert not {"color", "shape", "size", "motion"} & found.keys()
        assert found["weather"] == "clear"
        assert np.isnan(track(video)).all()


def test_a_hollow_thing_is_followed_too() -> None:
    video = _weathered("day", "grass", "clear", 0).copy()
    for x in range(16):  # 32 red pixels in nine by nine, and none near their middle
        ring = video[x, 40:49, 10 + x : 19 + x]
        inner = ring[1:-1, 1:-1].copy()
        ring[:] = OBJECT["red"]
        ring[1:-1, 1:-1] = inner
    found = verify(video)
    assert (found["color"], found["sky"]) == ("red", "day")
    assert np.diff(track(video)[:, 0]) == pytest.approx(1, abs=0.2)


def test_a_lost_object_is_followed_across_the_gap() -> None:
    video = render(PLAIN, np.random.default_rng(0))
    whole = track(video)
    empty = _weathered("day", "grass", "clear", 0)
    video[6:8] = empty[6:8]
    assert track(video) == pytest.approx(whole, abs=1.0)
    assert verify(video)["motion"] == "right"


def test_reversed_clips_move_the_other_way() -> None:
    for motion, opposite in (("left", "right"), ("up", "down")):
        video = render(replace(PLAIN, motion=motion), np.random.default_rng(3))  # type: ignore[arg-type]
        assert verify(video)["motion"] == motion
        assert verify(video[::-1])["motion"] == opposite


def test_a_single_frame_has_no_motion() -> None:
    found = verify(render(PLAIN, np.random.default_rng(0))[:1])
    assert found == {**asdict(PLAIN), "motion": "still"}


@pytest.mark.parametrize("motion", ATTRIBUTES["motion"])
def test_the_track_follows_the_object(motion: str) -> None:
    scene = replace(PLAIN, motion=motion, shape="cube", weather="rain")  # type: ignore[arg-type]
    half_width, half_height = (RADIUS["small"] * extent for extent in HALF_EXTENT["cube"])
    path = np.stack(_path(scene, half_width, half_height, np.random.default_rng(4)), axis=-1)
    found = track(render(scene, np.random.default_rng(4)))
    assert found.shape == (16, 2)
    assert np.abs(found - path).max() < 1.5
