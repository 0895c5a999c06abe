"""Ranges of frames: lengths, shares, transitions, and that no frame is lost."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_core.curation.boundaries import Boundary
from opensora_core.curation.scenes import TOO_SHORT, TRANSITION, TRIMMED, Gap, Range, choose_ranges, last_end


def cut(frame: int, score: float = 2.0) -> Boundary:
    return Boundary(frame, frame / 25, "cut", frame, frame, score)


def dissolve(start: int, end: int) -> Boundary:
    return Boundary((start + end) // 2, start / 25, "dissolve", start, end, 1.5)


def choose(boundaries: list[Boundary], num_frames: int, **options: object) -> tuple[list[Range], list[Gap]]:
    given = {"min_seconds": 1.0, "max_seconds": 5.0, **options}
    return choose_ranges(boundaries, np.arange(num_frames) / 25, num_frames / 25, **given)  # type: ignore[arg-type]


def test_scenes_lie_between_cuts_and_keep_the_scores_of_both() -> None:
    ranges, gaps = choose([cut(50, 3), cut(100, 4)], 150)
    assert ranges == [Range(0, 50, 0, 3), Range(50, 100, 3, 4), Range(100, 150, 4, 0)]
    assert gaps == []


def test_the_span_of_a_transition_is_dropped() -> None:
    ranges, gaps = choose([dissolve(50, 62)], 150)
    assert [(item.start, item.end) for item in ranges] == [(0, 50), (62, 150)]
    assert gaps == [Gap(50, 62, TRANSITION)]


def test_a_short_scene_is_told() -> None:
    assert choose([cut(24)], 100)[1] == [Gap(0, 24, TOO_SHORT)]
    assert choose([cut(25)], 100)[1] == []


def test_trim_drops_frames_at_transitions_and_not_at_the_ends_of_the_file() -> None:
    ranges, gaps = choose([cut(50)], 100, trim=3)
    assert [(item.start, item.end) for item in ranges] == [(0, 47), (53, 100)]
    assert gaps == [Gap(47, 50, TRIMMED), Gap(50, 53, TRIMMED)]


def test_a_long_scene_becomes_even_shares_without_a_short_rest() -> None:
    ranges, gaps = choose([], 130)  # 5.2 s
    assert [(item.start, item.end) for item in ranges] == [(0, 65), (65, 130)]
    assert gaps == []


def test_where_even_shares_would_all_be_too_short_only_the_rest_is() -> None:
    ranges, gaps = choose([], 130, min_seconds=4.0)
    assert [(item.start, item.end) for item in ranges] == [(0, 125)]
    assert gaps == [Gap(125, 130, TOO_SHORT)]


def test_no_limit_leaves_scenes_whole() -> None:
    assert len(choose([], 10_000, max_seconds=math.inf)[0]) == 1


def test_shares_go_by_time_where_the_rate_varies() -> None:
    seconds = np.concatenate([np.arange(100) / 25, 4 + np.arange(30) / 5])  # 4 s at 25, then 6 s at 5 frames a second
    ranges, _ = choose_ranges([], seconds, 10.0, min_seconds=1, max_seconds=5)
    assert [(item.start, item.end) for item in ranges] == [(0, 105), (105, 130)]


def test_a_frame_that_is_shown_for_longer_than_a_clip_may_be_is_a_clip() -> None:
    ranges, gaps = choose_ranges([], np.array([0.0, 10.0, 20.0]), 30.0, min_seconds=1, max_seconds=5)
    assert [(item.start, item.end) for item in ranges] == [(0, 1), (1, 2), (2, 3)]
    assert gaps == []


def at(num_frames: int, *places: int) -> np.ndarray:
    keyframes = np.zeros(num_frames, np.bool_)
    keyframes[list(places)] = True
    return keyframes


@pytest.mark.parametrize(
    ("places", "longest", "starts"),
    [
        ((0, 90, 160), 6.0, [0, 90]),
        ((0, 90, 160), 5.0, [0, 90, 160]),  # a share more, and no frame before its keyframe
        ((0, 30, 60, 90, 120, 150, 180, 210), 5.0, [0, 120]),  # as even and as few as with none
        ((0,), 5.0, [0, 125]),  # a group that is too long: what begins without a keyframe is short
        ((0, 190), 4.0, [0, 100, 170]),  # as many before a keyframe as if it began at 190, and more even
        ((), 5.0, [0, 120]),
        ((20, 236), 5.0, [0, 120]),  # neither a clip below the least length, nor one above the longest
    ],
)
def test_long_scenes_of_copies_are_parted_at_keyframes_where_lengths_allow(
    places: tuple[int, ...], longest: float, starts: list[int]
) -> None:
    ranges, gaps = choose([], 240, max_seconds=longest, keyframes=at(240, *places))
    assert [item.start for item in ranges] == starts
    assert [item.end for item in ranges] == [*starts[1:], 240] and gaps == []


def test_very_many_keyframes_cost_little() -> None:
    ranges, gaps = choose([], 20_000, keyframes=np.arange(20_000) % 3 == 0)
    assert max(item.end - item.start for item in ranges) <= 125 and len(ranges) <= 175 and gaps == []
    assert all(item.start % 3 == 0 for item in ranges)


def test_spans_from_elsewhere_may_overlap_or_leave_the_file() -> None:
    ranges, gaps = choose([dissolve(40, 60), dissolve(50, 55), dissolve(90, 120)], 100)
    assert [(item.start, item.end) for item in ranges] == [(0, 40), (60, 90)]
    assert gaps == [Gap(40, 60, TRANSITION), Gap(90, 100, TRANSITION)]


@pytest.mark.parametrize(
    ("seconds", "fps", "end"), [([0.0, 0.04, 0.08], 25, 0.12), ([3.0], 25, 3.04), ([3.0], 0, 3.04)]
)
def test_the_last_frame_lasts_as_long_as_the_others(seconds: list[float], fps: float, end: float) -> None:
    assert last_end(np.array(seconds), fps) == pytest.approx(end)


def late(ranges: list[Range], keyframes: np.ndarray) -> int:
    """Frames that come before the first keyframe of their range."""
    return sum(int((~np.logical_or.accumulate(keyframes[item.start : item.end])).sum()) for item in ranges)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_frame_is_in_one_range_or_one_gap(data: st.DataObject) -> None:
    steps = data.draw(st.lists(st.floats(0.001, 3), min_size=1, max_size=120))
    seconds = np.cumsum([0.0, *steps])[:-1] + data.draw(st.floats(-5, 5))
    end = last_end(seconds, 25)
    places = st.integers(0, len(seconds) + 5)
    boundaries = [dissolve(*sorted(data.draw(st.tuples(places, places)))) for _ in range(data.draw(st.integers(0, 8)))]
    shortest = data.draw(st.floats(0, 4))
    longest = data.draw(st.floats(max(shortest, 0.01), 8))
    trim = data.draw(st.integers(0, 4))
    keys = np.array(data.draw(st.lists(st.booleans(), min_size=len(seconds), max_size=len(seconds))))
    ranges, gaps = choose_ranges(
        boundaries,
        seconds,
        end,
        min_seconds=shortest,
        max_seconds=longest,
        trim=trim,
        keyframes=data.draw(st.sampled_from([None, keys])),
    )
    parts = sorted([*((item.start, item.end) for item in ranges), *((gap.start, gap.end) for gap in gaps)])
    assert [part for first, last in parts for part in range(first, last)] == list(range(len(seconds)))
    assert all(first < last for first, last in parts)
    times = np.append(seconds, end)
    plain, same = (
        choose_ranges(boundaries, seconds, end, min_seconds=shortest, max_seconds=longest, trim=trim, keyframes=given)[
            0
        ]
        for given in (None, keys)
    )
    assert late(same, keys) <= late(plain, keys)
    for item in ranges:
        length = times[item.end] - times[item.start]
        assert length >= shortest - 1e-5
        assert item.end - item.start == 1 or length <= longest + 1e-5 or max(np.diff(times)) > longest / 4
