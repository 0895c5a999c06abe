"""From the boundaries of a source to the ranges of frames that become clips, with every other frame accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from opensora_core.curation.boundaries import Boundary

TOO_SHORT = "too short"
TRANSITION = "in a transition"
TRIMMED = "trimmed"

_SLACK = 1e-6  # seconds; times of frames are sums of fractions
_ANCHORS = 16  # keyframes in the longest share that are thought of, where every frame is one
_BEYOND = 3  # keyframes that are thought of beyond the longest share, with other beginnings between


@dataclass(frozen=True, slots=True)
class Range:
    """Frames [start, end) of a source that become a clip, and the scores of what bounds them: 0 where nothing does."""

    start: int
    end: int
    start_score: float = 0.0
    end_score: float = 0.0


@dataclass(frozen=True, slots=True)
class Gap:
    """Frames [start, end) of a source that become no clip, and why."""

    start: int
    end: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Scene:
    start: int
    end: int
    start_score: float
    end_score: float


def last_end(seconds: NDArray[np.float64], fps: float) -> float:
    """When the last frame is shown no more: it is taken to last as long as the median one.

    Args:
        seconds: (N,) times of the frames, ascending; at least one.
        fps: of the source, for a single frame.
    """
    lasts = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0
    return float(seconds[-1]) + (lasts if lasts > 0 else 1 / fps if fps > 0 else 0.04)


def choose_ranges(
    boundaries: Sequence[Boundary],
    seconds: NDArray[np.float64],
    end_seconds: float,
    *,
    min_seconds: float,
    max_seconds: float,
    trim: int = 0,
    keyframes: NDArray[np.bool_] | None = None,
) -> tuple[list[Range], list[Gap]]:
    """Choose the ranges that become clips.

    A scene lies between two transitions, whose own frames are dropped. One that is longer than `max_seconds` becomes
    consecutive clips of even length, so that none of it is lost. Every frame is in one range or one gap.

    Args:
        boundaries: in order.
        seconds: (N,) times of the frames, ascending.
        end_seconds: when the last frame ends.
        min_seconds: of a clip.
        max_seconds: of a clip; `math.inf` leaves scenes whole. A single frame may be shown for longer.
        trim: frames that are dropped on both sides of a boundary.
        keyframes: (N,); where given, long scenes are parted so that few frames of a clip come before its first
            keyframe, as far as the two lengths allow, and not evenly.

    Returns:
        Ranges and gaps, each in order.
    """
    times = np.append(seconds, end_seconds)
    ranges: list[Range] = []
    gaps: list[Gap] = []
    for scene in _scenes(boundaries, len(seconds), gaps):
        start = min(scene.start + trim, scene.end) if scene.start else 0
        end = max(scene.end - trim, start) if scene.end < len(seconds) else scene.end
        gaps += [Gap(*part, TRIMMED) for part in ((scene.start, start), (end, scene.end)) if part[0] < part[1]]
        if start == end:
            continue
        if times[end] - times[start] < min_seconds - _SLACK:
            gaps.append(Gap(start, end, TOO_SHORT))
            continue
        shares = _shares(times, (start, end), (min_seconds, max_seconds), keyframes)
        for first, last in pairwise(shares):
            if times[last] - times[first] < min_seconds - _SLACK:
                gaps.append(Gap(first, last, TOO_SHORT))
                continue
            start_score = scene.start_score if first == start else 0.0
            ranges.append(Range(first, last, start_score, scene.end_score if last == end else 0.0))
    return ranges, sorted(gaps, key=lambda gap: gap.start)


def _scenes(boundaries: Sequence[Boundary], num_frames: int, gaps: list[Gap]) -> Iterator[_Scene]:
    """What lies between transitions; their own spans become gaps. Spans that overlap are one."""
    start, score = 0, 0.0
    for boundary in sorted(boundaries, key=lambda item: (item.start_frame, item.end_frame)):
        first = min(max(boundary.start_frame, start), num_frames)
        last = min(max(boundary.end_frame, first), num_frames)
        if first > start:
            yield _Scene(start, first, score, float(boundary.score))
        if last > first:
            gaps.append(Gap(first, last, TRANSITION))
        start, score = last, float(boundary.score)
    if start < num_frames:
        yield _Scene(start, num_frames, score, 0.0)


def _shares(
    times: NDArray[np.float64],
    span: tuple[int, int],
    lengths: tuple[float, float],
    keyframes: NDArray[np.bool_] | None,
) -> list[int]:
    """Where the shares of a scene begin, and its end."""
    (start, end), (min_seconds, max_seconds) = span, lengths
    length = float(times[end] - times[start])
    if length <= max_seconds + _SLACK:
        return [start, end]
    fewest = math.ceil((length - _SLACK) / max_seconds)
    if length / fewest < min_seconds - _SLACK:
        # even shares would all be too short, so all but the rest are as long as they may be
        return _longest(times, start, end, max_seconds)
    most = min(end - start, 2 * fewest)
    shares = [start, end]
    for count in range(min(fewest, most), most + 1):  # frames do not divide evenly, so one share more may be needed
        shares = _even(times, start, end, count)
        longest = max(times[last] - times[first] for first, last in pairwise(shares))
        if longest <= max_seconds + _SLACK:
            break
    if keyframes is not None:
        return _at_keyframes(times, shares, lengths, keyframes)
    return shares


def _even(times: NDArray[np.float64], start: int, end: int, count: int) -> list[int]:
    """Parts as equal as frames allow, each of one frame or more."""
    marks = np.linspace(times[start], times[end], count + 1)[1:-1]
    cuts = [start]
    for number, mark in enumerate(marks, 1):
        after = int(np.searchsorted(times, mark))
        nearest = after if times[after] - mark <= mark - times[after - 1] else after - 1
        cuts.append(min(max(nearest, cuts[-1] + 1), end - (count - number)))
    return [*cuts, end]


def _longest(times: NDArray[np.float64], start: int, end: int, max_seconds: float) -> list[int]:
    cuts = [start]
    while times[end] - times[cuts[-1]] > max_seconds + _SLACK:
        after = int(np.searchsorted(times, times[cuts[-1]] + max_seconds + _SLACK, "right")) - 1
        cuts.append(min(max(after, cuts[-1] + 1), end))
    return [*cuts, end] if cuts[-1] < end else cuts


def _at_keyframes(
    times: NDArray[np.float64],
    shares: list[int],
    lengths: tuple[float, float],
    keyframes: NDArray[np.bool_],
) -> list[int]:
    """Other shares of a scene, of which as many frames as possible lie behind a keyframe of their own share.

    Of several such ways, the one with the fewest shares, and the most even of these. The given ones, if none is better.
    """
    max_seconds = lengths[1]
    start, end = shares[0], shares[-1]
    found = np.flatnonzero(keyframes[start + 1 : end]) + start + 1
    # the first keyframe at or after each frame
    following = [*np.minimum.accumulate(np.where(keyframes[start:end], np.arange(start, end), end)[::-1])[::-1], end]
    anchors = [start]
    for place in found.tolist():
        if times[place] - times[anchors[-1]] >= max_seconds / _ANCHORS:
            anchors.append(place)
    anchors.append(end)

    def cost(cuts: list[int]) -> tuple[int, int, float]:
        late = sum(min(int(following[first - start]), last) - first for first, last in pairwise(cuts))
        return late, len(cuts) - 1, sum(float(times[last] - times[first]) ** 2 for first, last in pairwise(cuts))

    at_most = cost(shares)[0]
    if at_most == 0:
        return shares
    best: list[tuple[tuple[int, int, float], int, list[int]] | None] = [((0, 0, 0.0), 0, [])]
    best += [None] * (len(anchors) - 1)
    for number, first in enumerate(anchors[:-1]):
        reached = best[number]
        if reached is None:
            continue
        so_far, num_beyond = reached[0], 0
        for other in range(number + 1, len(anchors)):
            leg = _leg(times, (first, anchors[other]), lengths, is_keyframe=bool(keyframes[first]))
            if leg is not None:
                late, count, square = cost(leg)
                total = so_far[0] + late, so_far[1] + count, so_far[2] + square
                known = best[other]
                if known is None or total < known[0]:
                    best[other] = total, number, leg
            num_beyond += times[anchors[other]] - times[first] > max_seconds
            if num_beyond == _BEYOND:
                break
    return _retraced(best, shares) if (last := best[-1]) and last[0][0] < at_most else shares


def _retraced(best: list[tuple[tuple[int, int, float], int, list[int]] | None], shares: list[int]) -> list[int]:
    """Where the shares begin that lead to the last anchor, and its end."""
    cuts, number = [shares[-1]], len(best) - 1
    while number > 0 and (step := best[number]) is not None:
        _, number, leg = step
        cuts += reversed(leg[:-1])
    return cuts[::-1]


def _leg(
    times: NDArray[np.float64], span: tuple[int, int], lengths: tuple[float, float], *, is_keyframe: bool
) -> list[int] | None:
    """The fewest shares between two keyframes, the first of them as long as may be if it is the one that has one."""
    (start, end), (min_seconds, max_seconds) = span, lengths
    length = float(times[end] - times[start])
    if length <= max_seconds + _SLACK:
        return [start, end] if length >= min_seconds - _SLACK else None
    count = math.ceil((length - _SLACK) / max_seconds)
    if count > end - start:
        return None
    cuts = _even(times, start, end, count)
    if is_keyframe:
        most = times[start] + min(max_seconds, length - (count - 1) * min_seconds) + _SLACK
        lead = int(np.searchsorted(times, most, "right")) - 1
        if start < lead <= end - (count - 1):
            cuts = [start, *_even(times, lead, end, count - 1)]
    steps = [float(times[last] - times[first]) for first, last in pairwise(cuts)]
    return cuts if min(steps) >= min_seconds - _SLACK and max(steps) <= max_seconds + _SLACK else None
