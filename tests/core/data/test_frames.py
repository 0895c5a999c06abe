"""Frame choice; what the published release chose is pinned by the golden cases."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora_core.data import at_rate, evenly_spaced, published_indices
from opensora_core.data.frames import span_at_rate
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


@given(st.integers(1, 2000), st.integers(1, 64), st.integers(1, 12), st.integers(0, 2**32))
def test_evenly_spaced_frames_are_in_the_video_or_there_are_none(
    total: int, num_frames: int, frame_interval: int, seed: int
) -> None:
    span = (num_frames - 1) * frame_interval + 1
    if total < span:
        with pytest.raises(InputError, match=f"span {span} frames, the video has {total}"):
            evenly_spaced(total, num_frames, frame_interval, random.Random(seed))
    else:
        begin, *rest = evenly_spaced(total, num_frames, frame_interval, random.Random(seed))
        assert 0 <= begin <= total - span
        assert rest == [begin + number * frame_interval for number in range(1, num_frames)]


RATES = [12, 15, 23.976, 24000 / 1001, 24, 25, 29.97, 30, 47.95, 50, 59.94, 60]


@pytest.mark.parametrize("clip_fps", RATES)
@pytest.mark.parametrize("fps", [4, 8, 25 / 3, 10, 24])
def test_clips_of_all_rates_move_at_the_same_speed(clip_fps: float, fps: float) -> None:
    for seed in range(10):
        chosen = at_rate(400, 16, clip_fps, fps, random.Random(seed))
        times = [(index - chosen[0]) / clip_fps for index in chosen]
        # to half a frame of the clip, also after many frames: nothing adds up
        assert all(abs(time - number / fps) <= 0.5 / clip_fps + 1e-9 for number, time in enumerate(times))


@given(st.floats(12, 60), st.floats(1, 30), st.integers(1, 40), st.integers(0, 400), st.integers(0, 2**32))
def test_frames_at_a_rate_are_in_the_video_or_there_are_none(
    clip_fps: float, fps: float, num_frames: int, spare: int, seed: int
) -> None:
    span = span_at_rate(num_frames, clip_fps, fps)
    chosen = at_rate(span + spare, num_frames, clip_fps, fps, random.Random(seed))
    assert chosen == sorted(chosen) and chosen[-1] - chosen[0] == span - 1
    assert chosen[0] >= 0 and chosen[-1] < span + spare
    with pytest.raises(InputError, match=f"span {span} of a video"):
        at_rate(span - 1, num_frames, clip_fps, fps, random.Random(seed))


def test_rates_give_the_frames_that_one_would_count_out() -> None:
    def choose(total: int, clip_fps: float) -> list[int]:
        return at_rate(total, 5, clip_fps, 10, random.Random(0))

    assert choose(9, 20) == [0, 2, 4, 6, 8]
    assert choose(7, 15) == [0, 2, 3, 5, 6]  # a half goes up, whether the number before it is even or odd
    assert choose(5, 10) == [0, 1, 2, 3, 4]
    assert choose(3, 5) == [0, 1, 1, 2, 2]  # too slow a clip repeats frames rather than run too fast
    assert at_rate(9, 1, 30, 8, random.Random(0)) == [random.Random(0).randint(0, 8)]


@pytest.mark.parametrize("measured", [24 - 1e-7, 24, 24 + 1e-7])
def test_a_rate_that_was_measured_needs_no_frame_more_than_the_one_it_stands_for(measured: float) -> None:
    assert at_rate(46, 16, measured, 8, random.Random(0)) == list(range(0, 46, 3))
    assert span_at_rate(16, measured, 8) == 46


def test_every_begin_is_drawn_at_a_rate_too() -> None:
    assert {at_rate(12, 3, 20, 5, random.Random(seed))[0] for seed in range(60)} == {0, 1, 2, 3}
