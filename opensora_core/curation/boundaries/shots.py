"""How our own detector decides: cuts against their surroundings, flashes left alone, gradual transitions by windows.

A hard cut changes the picture far more than anything near it does, and the picture before does not come back. A
gradual transition shows between two unlike pictures, each of which stands fairly still, either a mixture of both
(dissolve), or in each place one of both (wipe), or a picture without contrast (fade). All distances are of the small
pictures of `curves`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from opensora_core.curation.boundaries.boundary import Kind
from opensora_core.curation.boundaries.curves import REACHES, RETURNS, Curve, Curves, Wipe
from opensora_core.errors import ConfigError, nearest

Mask = NDArray[np.bool_]

AROUND = 6  # frames on either side that a cut has to stand out from
# of the distance that a picture went, what it may still be away when it counts as back; and if what else moves near
# it explains that, beside a noise in levels
RETURNED, _MOVED, _NOISE = 0.12, 0.5, 4.0
_STARTLING = 2.0  # times the change around: a moving camera also comes near to where it was
# of the threshold, what happens on the quieter side of a cut and on the busier one, when one of them stands still
_STILL, _BUSY = 4.0, 0.4
_FLASHED = 0.25  # share of the change in a flash that counts as around a cut
_FLASHING = 3.0  # levels that a flash changes the picture at least
_SHORT_FADE = 3  # frames; what goes dark faster is a cut
_LONG_FADE = 75
_BLACK, _WHITE, _GREY = 30.0, 222.0, 10.0  # luma below or above, and chroma around grey, of blank pictures
_IMPURE = 0.35  # how far from a mixture a fading picture may be, of the distance it goes
_VISIBLE = 10.0  # contrast and luma in levels away from a blank picture, of what fades
_MOTION = 0.33  # what moves before and after a dissolve, against what is no mixture within
_DIPPED = 0.15  # of the distance to a blank picture, that two pictures may be apart which are of the same shot


@dataclass(frozen=True)
class AutoOptions:
    """What can be set.

    Attributes:
        threshold: how much more than its surroundings a cut has to change the picture.
        min_change: in levels, that a cut has to change the picture at least.
        flash_seconds: a picture that is back after so long was interrupted by a flash.
        gradual: how imperfect a dissolve may be, 0..1; 0 finds none.
        wipe: how imperfect a wipe may be, 0..1; 0 finds none.
        flat: contrast in levels, below which a picture is blank.
    """

    threshold: float = 3.5
    min_change: float = 2.2
    flash_seconds: float = 0.36
    gradual: float = 0.45
    wipe: float = 0.31
    flat: float = 3.5

    @classmethod
    def of(cls, options: Mapping[str, float]) -> AutoOptions:
        """From names and values.

        Raises:
            ConfigError: an option that there is not.
        """
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"the detector 'auto' has no option '{name}'", nearest(name, known))
        return cls(**options)


@dataclass(frozen=True, slots=True)
class Found:
    """A boundary before its times are known; `start` and `end` are those of the transition."""

    frame: int
    kind: Kind
    start: int
    end: int
    score: float

    def touches(self, others: Iterable[Found], margin: int = 1) -> bool:
        """Whether it overlaps any of others, or comes within the margin."""
        return any(self.start - margin <= other.end and other.start <= self.end + margin for other in others)


def decide(curves: Curves, fps: float, options: AutoOptions) -> tuple[list[Found], Curve]:
    """All boundaries in order, and the curve of scores; 1 and more is a cut where nothing speaks against it."""
    flash = _flashes(curves, fps, options)
    score = _stands_out(curves.change, flash, options)
    fades = _fades(curves, flash, options)
    cuts = [cut for cut in _cuts(curves, score, flash, options) if not cut.touches(fades)]
    wipes = _wipes(curves.wipes, len(curves.change), options)
    found = [*fades, *cuts]
    for gradual in sorted([*_dissolves(curves, flash, options), *wipes], key=lambda item: -item.score):
        if not gradual.touches(found):
            found.append(gradual)
    found.sort(key=lambda item: item.frame)
    for item in found:
        score[item.frame] = max(score[item.frame], item.score)
    return found, score


def _flashes(curves: Curves, fps: float, options: AutoOptions) -> Mask:
    """Frames between a picture and its return, and one more at either end unless more happens there."""
    total = len(curves.change)
    flash = np.zeros(total, np.bool_)
    longest = min(max(round(options.flash_seconds * fps), 2), max(RETURNS) - 1)  # frames
    step = np.sqrt(curves.distances[1])
    lags = [lag for lag in RETURNS if 2 <= lag <= longest + 1]
    for frame in np.flatnonzero(curves.change >= max(options.min_change, _FLASHING)).tolist():
        went = step[frame - 1]
        usual = float(np.median(step[max(frame - 1 - AROUND, 0) : frame + AROUND]))
        for first, last in [(frame - 1, frame - 1 + lag) for lag in lags] + [(frame - lag, frame) for lag in lags]:
            if first < 0 or last >= total:
                continue
            away = float(np.sqrt(curves.distances[last - first][first]))
            # what moved in the meantime may be away too, but not far; and only of a change that is no part of a motion
            if away >= RETURNED * went:
                if away >= min(_MOVED * went, _NOISE + 1.5 * (last - first) * usual):
                    continue
                if curves.change[first + 1 : last + 1].max() < _STARTLING * _usual(curves.change, first, last):
                    break
            flash[first + 1 : last + 1] = True
            most = curves.change[first + 1 : last + 1].max()
            for edge in (first, last + 1):
                if 0 < edge < total and curves.change[edge] <= most:
                    flash[edge] = True
            break
    return flash


def _usual(change: Curve, first: int, last: int) -> float:
    around = np.concatenate([change[max(first - AROUND, 1) : first + 1], change[last + 1 : last + 1 + AROUND]])
    return float(around.mean()) + 1.0 if len(around) else 1.0


def _stands_out(change: Curve, flash: Mask, options: AutoOptions) -> Curve:
    """(N,) change over that of the frames around, 1 at the threshold; 0 in flashes."""
    # a flash hides little of a cut beside it, but where one follows the other nothing stands out
    shown = np.where(flash, change * np.float32(_FLASHED), change)
    views = np.lib.stride_tricks.sliding_window_view(np.pad(shown, AROUND), 2 * AROUND + 1)
    whole = np.zeros(len(change), np.bool_)
    whole[AROUND:-AROUND] = True  # nothing is known of what is before the first frame or after the last
    least = np.empty(len(change), np.float32)
    for first in range(0, len(change), 4096):  # in pieces, as the windows take 13 times the room
        view = np.delete(views[first : first + 4096], AROUND, axis=1)
        around = options.threshold * (0.5 * view.max(axis=1) + 0.5 * view.mean(axis=1) + 1)
        # where one of the shots stands still, what moves in the other hides the cut less
        sides = view[:, :AROUND].max(axis=1), view[:, AROUND:].max(axis=1)
        one_sided = options.threshold * np.maximum(_STILL * (np.minimum(*sides) + 1), _BUSY * np.maximum(*sides))
        least[first : first + 4096] = np.where(whole[first : first + 4096], np.minimum(around, one_sided), around)
    return np.where(flash, 0, change / least).astype(np.float32)


def _cuts(curves: Curves, score: Curve, flash: Mask, options: AutoOptions) -> list[Found]:
    candidates = np.flatnonzero((score >= 1) & (curves.change >= options.min_change) & ~flash)
    return [Found(frame, "cut", frame, frame, float(score[frame])) for frame in candidates.tolist() if frame]


def _fades(curves: Curves, flash: Mask, options: AutoOptions) -> list[Found]:
    """Runs of blank pictures that contrast leaves or enters by and by."""
    contrast, total = curves.contrast, len(curves.contrast)
    edges = np.flatnonzero(np.diff(np.pad(_blanks(curves, options).astype(np.int8), 1)))
    runs: list[tuple[int, int]] = []
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if runs and first - runs[-1][1] <= 2:
            runs[-1] = runs[-1][0], last
        else:
            runs.append((first, last))
    found = []
    for first, last in runs:
        low = max(first - _LONG_FADE, 0)
        level = float(curves.level[first:last].mean())
        # how much of a picture there is, from _LONG_FADE frames before the run on
        there = np.hypot(contrast[low : last + _LONG_FADE], curves.level[low : last + _LONG_FADE] - level)
        start, end = first - low, last - low
        while start > 0 and there[start - 1] > there[start] * 1.01 + 0.05:
            start -= 1
        while end < len(there) and there[end] > there[end - 1] * 1.01 + 0.05:
            end += 1
        top_out, top_in = float(there[start]), float(there[end - 1])
        start, end = start + low, end + low
        is_out = first - start >= _SHORT_FADE and top_out > _VISIBLE and _is_mixed(curves, first, start - first)
        is_in = end - last >= _SHORT_FADE and top_in > _VISIBLE and _is_mixed(curves, last - 1, end - last)
        start, end = start if is_out else first, end if is_in else last
        if not (is_out or is_in) or start < 2 or end > total - 2 or flash[first:last].all():
            continue
        apart = _lag(curves, start - 1, end - start + 1)
        if apart is not None and apart < (_DIPPED * max(top_out * is_out, top_in * is_in)) ** 2 / 3:
            continue
        frame = (first + last) // 2 if is_out and is_in else last if is_out else first
        found.append(Found(frame, "fade", start, end, max(top_out * is_out, top_in * is_in) / _VISIBLE))
    return found


def _blanks(curves: Curves, options: AutoOptions) -> Mask:
    """Frames that are black or white all over."""
    extreme = (curves.level < _BLACK) | (curves.level > _WHITE)
    return (curves.contrast < options.flat) & extreme & (curves.tint < _GREY)


def _is_mixed(curves: Curves, blank: int, length: int) -> bool:
    """Whether a picture half way to a blank one is a mixture of it and the picture before; not where a camera moved."""
    reach = next((reach for reach in reversed(REACHES) if 2.5 * reach <= abs(length)), None)
    if reach is None:
        return True
    first = blank - 2 * reach if length < 0 else blank
    if first < 0 or first + 2 * reach >= len(curves.change):
        return True
    apart = float(curves.distances[2 * reach][first]) + 1e-3
    to_first = float(curves.distances[reach][first])
    share = (to_first + apart - float(curves.distances[reach][first + reach])) / (2 * apart)
    return to_first - share**2 * apart < _IMPURE**2 * apart


def _lag(curves: Curves, frame: int, lag: int) -> float | None:
    """Squared distance of a frame to one about `lag` later; None where none is known."""
    known = next((known for known in curves.distances if known >= lag and frame + known < len(curves.change)), None)
    return None if known is None else float(curves.distances[known][frame])


def _dissolves(curves: Curves, flash: Mask, options: AutoOptions) -> list[Found]:
    """Windows whose ends are unlike and fairly still, and whose inside is the one mixed with the other."""
    total = len(curves.change)
    best_cost, best_score = np.full(total, np.inf, np.float32), np.zeros(total, np.float32)
    best_span = np.zeros((total, 2), np.float32)
    for reach in REACHES:
        middle = np.arange(reach, total - reach)
        if len(middle) == 0:
            continue
        old, new, half = middle - reach, middle + reach, reach // 2
        apart = curves.distances[2 * reach][old] + 1e-3
        shares, worst = [], np.zeros(len(middle), np.float32)
        for offset in (half, reach, reach + half):
            to_old, to_new = curves.distances[offset][old], curves.distances[2 * reach - offset][old + offset]
            share = (to_old + apart - to_new) / (2 * apart)
            worst = np.maximum(worst, np.sqrt((to_old - share**2 * apart).clip(0) / apart))
            shares.append(share)
        moved = [
            np.sqrt(curves.distances[reach][(old - reach).clip(0)] / apart),
            np.sqrt(curves.distances[reach][new.clip(max=max(total - 1 - reach, 0))] / apart),
        ]
        first, share, last = shares
        cost = (
            worst + _MOTION * (moved[0] + moved[1]) + abs(share - 0.5) + (0.05 - first).clip(0) + (last - 0.95).clip(0)
        )
        allowed = (0.019 * (np.sqrt(apart) - 5)).clip(1e-3, options.gradual or 1e-3)
        fits = (first < share) & (share < last) & (share > 0.15) & (share < 0.85) & ~flash[old] & ~flash[new]
        score = np.where(fits, allowed / np.maximum(cost, 1e-3), 0)
        better = score > best_score[middle]
        length = reach / np.maximum(last - first, 0.25)
        centre = middle + (0.5 - share) * length
        best_score[middle[better]] = score[better]
        best_span[middle[better]] = np.stack([centre - length / 2, centre + length / 2], axis=1)[better]
        best_cost[middle[better]] = cost[better]
    found: list[Found] = []
    blank = _blanks(curves, options)
    order = np.flatnonzero(best_score >= 1)
    for frame in order[np.argsort(-best_score[order], kind="stable")].tolist():
        start, end = max(round(float(best_span[frame, 0])), 1), min(round(float(best_span[frame, 1])) + 1, total - 1)
        kind: Kind = "fade" if blank[[start - 1, end]].any() else "dissolve"
        item = Found(frame, kind, min(start, frame), max(end, frame + 1), float(best_score[frame]))
        if not item.touches(found, margin=2):
            found.append(item)
    return found


def _wipes(wipes: list[Wipe], total: int, options: AutoOptions) -> list[Found]:
    """The best windows that look like a wipe; all that overlap say how long it is."""
    spans = []
    for wipe in sorted(wipes, key=lambda wipe: wipe.cost):
        if wipe.cost >= options.wipe:
            break
        first, half, last = wipe.shares
        length = wipe.reach / max(last - first, 0.25)
        centre = wipe.frame + (0.5 - half) * length
        score = min(options.wipe / max(wipe.cost, 1e-3), 10.0)
        spans.append(Found(wipe.frame, "wipe", round(centre - length / 2), round(centre + length / 2) + 1, score))
    found: list[Found] = []
    for best in spans:
        if not best.touches(found, margin=2):
            same = [span for span in spans if best.start < span.frame < best.end]
            start, end = min(span.start for span in same), max(span.end for span in same)
            start, end = max(start - 1, 1), min(end + 1, total - 1)
            found.append(Found((start + end) // 2, "wipe", start, end, best.score))
    return found
