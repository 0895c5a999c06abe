from __future__ import annotations

from dataclasses import replace
from itertools import product
from time import process_time

import numpy as np
import pytest

from opensora_core.world import ATTRIBUTES, NUM_FRAMES, SIZE, Scene, draw_scene, render, render_batch
from opensora_core.world.palette import HALF_EXTENT, OBJECT, RADIUS
from opensora_core.world.renderer import _path

PLAIN = Scene("red", "ball", "small", "still", "day", "grass", "clear")


def test_clips_are_frames_of_bytes() -> None:
    video = render(PLAIN, np.random.default_rng(0))
    assert video.shape == (NUM_FRAMES, SIZE, SIZE, 3)
    assert video.dtype == np.uint8


def test_the_same_seed_paints_the_same_clip_and_another_seed_another_one() -> None:
    scene = replace(PLAIN, motion="bouncing", weather="rain", ground="sea")
    first, again, other = (render(scene, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_a_batch_is_its_clips() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(5)]
    batch = render_batch(scenes, [3, 4, 5, 6, np.random.default_rng(7)])
    for seed, scene, video in zip(range(3, 8), scenes, batch, strict=True):
        assert (video == render(scene, np.random.default_rng(seed))).all()


def test_a_painted_clip_does_not_share_memory_with_the_pictures_it_was_made_from() -> None:
    video = render(PLAIN, np.random.default_rng(0))
    video[:] = 0
    assert render(PLAIN, np.random.default_rng(0)).any()


@pytest.mark.parametrize(
    ("motion", "shape", "size"), list(product(ATTRIBUTES["motion"], ATTRIBUTES["shape"], ATTRIBUTES["size"]))
)
def test_the_object_stays_inside_and_moves_as_it_should(motion: str, shape: str, size: str) -> None:
    scene = replace(PLAIN, motion=motion, shape=shape, size=size)  # type: ignore[arg-type]
    half_width, half_height = (RADIUS[size] * extent for extent in HALF_EXTENT[shape])
    for seed in range(30):
        x, y = _path(scene, half_width, half_height, np.random.default_rng(seed))
        assert x.min() - half_width >= 0 and x.max() + half_width <= SIZE - 1
        assert y.min() - half_height >= 0 and y.max() + half_height <= SIZE - 1
        dx, dy = np.diff(x), np.diff(y)
        travel = {"left": x[0] - x[-1], "right": x[-1] - x[0], "up": y[0] - y[-1], "down": y[-1] - y[0]}
        if motion in travel:
            assert travel[motion] >= 18
            assert np.ptp(dx) < 0.01 and np.ptp(dy) < 0.01, "constant speed"
        elif motion == "still":
            assert not dx.any() and not dy.any()
        else:
            assert not dx.any()
            assert np.ptp(y) >= 10
            tops = (dy[:-1] < 0) & (dy[1:] >= 0)
            assert tops.sum() >= 2


def test_what_is_random_is_little() -> None:
    # Away from the object there are as many pictures as phases of the weather, and one when nothing falls.
    for weather, most in (("clear", 1), ("rain", 2), ("snow", 2)):
        scene = replace(PLAIN, weather=weather)  # type: ignore[arg-type]
        corners = {render(scene, np.random.default_rng(seed))[:, :30].tobytes() for seed in range(24)}
        assert len(corners) == most


@pytest.mark.parametrize("sky", ATTRIBUTES["sky"])
def test_object_colours_keep_apart_under_every_sky(sky: str) -> None:
    means = []
    for color in OBJECT:
        scene = replace(PLAIN, color=color, sky=sky, size="large")  # type: ignore[arg-type]
        video = render(scene, np.random.default_rng(1)).astype(float)
        x = int(_path(scene, 11.0, 11.0, np.random.default_rng(1))[0][0])
        means.append(video[:, 42:52, x - 4 : x + 5].mean(axis=(0, 1, 2)))
    for index, mean in enumerate(means):
        assert min(np.linalg.norm(mean - other) for other in means[:index] + means[index + 1 :]) > 60


def test_painting_is_fast() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(60)]
    render_batch(scenes, range(60))  # makes the pictures that later clips share
    start = process_time()
    render_batch(scenes, range(60))
    assert (process_time() - start) / 60 < 0.02, "a clip takes 2 ms; twenty mean that something went wrong"
