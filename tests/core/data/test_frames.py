"""Frame choice; what the published release chose is pinned by the golden cases."""

from __future__ import annotations

import itertools
import random

import pytest

from opensora_core.data import evenly_spaced, published_indices
from opensora_core.errors import InputError

SHAPES = [(1, 1, 1), (16, 16, 1), (46, 16, 3), (48, 16, 3), (300, 16, 3), (10, 1, 5)]


@pytest.mark.parametrize(("total", "num_frames", "frame_interval"), SHAPES)
def test_evenly_spaced_frames_are_exactly_apart(total: int, num_frames: int, frame_interval: int) -> None:
    for seed in range(20):
        chosen = evenly_spaced(total, num_frames, frame_interval, random.Random(seed))
        assert len(chosen) == num_frames
        assert chosen[0] >= 0 and chosen[-1] < total
        assert {later - earlier for earlier, later in itertools.pairwise(chosen)} <= {frame_interval}


def test_every_begin_is_drawn_the_last_included() -> None:
    begins = {evenly_spaced(10, 3, 3, random.Random(seed))[0] for seed in range(50)}
    assert begins == {0, 1, 2, 3}


def test_a_choice_depends_on_its_generator_alone() -> None:
    random.seed(1)
    first = evenly_spaced(500, 16, 3, random.Random(7))
    random.seed(2)
    assert evenly_spaced(500, 16, 3, random.Random(7)) == first


@pytest.mark.parametrize("choose", [evenly_spaced, published_indices])
def test_a_video_that_is_too_short_is_refused_with_its_length(choose: object) -> None:
    with pytest.raises(InputError, match=r"16 frames.* 15"):
        choose(15, 16, 1, random.Random(0))  # type: ignore[operator]


def test_the_two_ways_differ_where_a_video_is_shorter_than_the_window() -> None:
    assert published_indices(46, 16, 3, random.Random(0)) == evenly_spaced(46, 16, 3, random.Random(0))
    assert published_indices(45, 16, 3, random.Random(0))[-1] == 44
    with pytest.raises(InputError, match="span 46 frames, the video has 45"):
        evenly_spaced(45, 16, 3, random.Random(0))
