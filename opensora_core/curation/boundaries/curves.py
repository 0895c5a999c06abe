"""Per-frame curves of a video, computed as its small pictures stream by; of the pictures only the last few are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opensora_core.media.glance import Chunk
from opensora_core.media.sketch import COLUMNS, ROWS

Curve = NDArray[np.float32]
Small = NDArray[np.uint8]
Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]

REACHES = (2, 4, 6, 8, 10, 12, 16, 20, 24)
"""Half lengths of the windows, in frames, that are searched for gradual transitions."""
RETURNS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)
"""After how many frames a picture may be back, for what was between to be a flash."""
LAGS = tuple(sorted({*RETURNS, *(reach * part // 2 for reach in REACHES for part in (1, 2, 3, 4))}))

_KEPT = 2 * max(LAGS) + 2
_WIPE_REACHES = (6, 8, 12, 16, 24)
_LEAST_DISTANCE, _MOST_MOTION, _LEAST_RESIDUAL = 12.0, 0.6, 0.2  # of windows that may hold a wipe
_BLOCK = 32  # pictures, which the cache of a processor holds
_MOST_UNEVEN, _MOST_NEITHER = 0.3, 0.3
_CHANGED = 16  # levels that tell the old picture from the new one at a place
_LEAST_CHANGED = 0.3  # share of the places that must differ


@dataclass(frozen=True, slots=True)
class Wipe:
    """A window in which every place shows either the old picture or the new one.

    Attributes:
        frame: the middle.
        reach: the window is [frame - reach, frame + reach].
        cost: 0 for a perfect wipe; motion has 0.35 and more.
        shares: how much of the picture is new at a quarter, the half and three quarters of the window.
    """

    frame: int
    reach: int
    cost: float
    shares: tuple[float, float, float]


@dataclass(frozen=True)
class Curves:
    """What was measured of N frames.

    Attributes:
        change: (N,) mean difference in levels to the frame before, beyond what motion of a 64th of it explains.
        level: (N,) mean luma of the middle of the picture.
        contrast: (N,) its standard deviation.
        tint: (N,) distance of the mean chroma from grey, in levels.
        distances: lag -> (N,) mean squared difference of frame n to frame n + lag in levels, of 16 x 9 pictures; 0
            beyond the end.
        wipes: windows that look like one.
    """

    change: Curve
    level: Curve
    contrast: Curve
    tint: Curve
    distances: dict[int, Curve]
    wipes: list[Wipe]


@dataclass
class Meter:
    """Takes chunks, and keeps no more pictures than the longest window needs."""

    num_frames: int = 0
    _luma: Small = field(default_factory=lambda: np.empty((0, ROWS, COLUMNS), np.uint8))
    _chroma: Small = field(default_factory=lambda: np.empty((0, 2, ROWS // 2, COLUMNS // 2), np.uint8))
    _coarse: Curve = field(default_factory=lambda: np.empty((0, 432), np.float32))
    _change: list[Curve] = field(default_factory=list)
    _level: list[Curve] = field(default_factory=list)
    _contrast: list[Curve] = field(default_factory=list)
    _tint: list[Curve] = field(default_factory=list)
    _distances: dict[int, list[Curve]] = field(default_factory=lambda: {lag: [] for lag in LAGS})
    _wipes: list[Wipe] = field(default_factory=list)
    _searched: int = 0

    def add(self, chunk: Chunk) -> None:
        """Measure the frames of a chunk that follows the last one."""
        new = len(chunk.luma)
        coarse = _coarse(chunk.luma, chunk.chroma)
        luma = np.concatenate([self._luma, chunk.luma])
        last = max(len(self._luma) - 1, 0)
        chroma = np.concatenate([self._chroma, chunk.chroma])
        change = changes_of(luma[last:], chroma)
        self._change.append(change if len(change) == new else np.concatenate([np.zeros(1, np.float32), change]))
        middle = chunk.luma[:, 8:28, 12:52].reshape(new, -1)
        self._level.append(middle.mean(axis=1, dtype=np.float32))
        self._contrast.append(middle.std(axis=1, dtype=np.float32))
        tints = chunk.chroma[:, :, 4:14, 6:26].mean(axis=(2, 3), dtype=np.float32) - np.float32(128)
        self._tint.append(np.abs(tints).max(axis=1))
        vectors = np.concatenate([self._coarse, coarse])
        for lag, parts in self._distances.items():
            begin = max(len(self._coarse), lag)
            if begin < len(vectors):
                gap = vectors[begin:] - vectors[begin - lag : len(vectors) - lag]
                parts.append(np.einsum("ij,ij->i", gap, gap) / np.float32(gap.shape[1]))
        self.num_frames += new
        self._search(luma, vectors, self.num_frames - max(LAGS))
        self._luma, self._coarse, self._chroma = luma[-_KEPT:].copy(), vectors[-_KEPT:].copy(), chroma[-1:].copy()

    def finish(self) -> Curves:
        """What was measured of all chunks."""
        self._search(self._luma, self._coarse, self.num_frames)
        total = self.num_frames
        distances = {}
        for lag, parts in self._distances.items():
            distances[lag] = np.zeros(total, np.float32)
            if parts:
                distances[lag][: total - lag] = np.concatenate(parts)
        change, level, contrast, tint = (
            np.concatenate(parts) for parts in (self._change, self._level, self._contrast, self._tint)
        )
        return Curves(change, level, contrast, tint, distances, self._wipes)

    def _search(self, luma: Small, vectors: Curve, end: int) -> None:
        """Look for wipes whose middle lies before `end`; `luma` and `vectors` are those of the last frames."""
        begin = self.num_frames - len(luma)
        for reach in _WIPE_REACHES:
            first = max(self._searched, begin + reach)
            # every other frame will do: no wipe is that short
            middles = np.arange(first + first % 2, min(end, self.num_frames - reach), 2) - begin
            for narrow in (_unlike, _steady, _uneven, _in_parts):
                middles = middles[narrow(vectors, middles, reach)]
            for middle in middles.tolist():
                wipe = _wipe(luma, middle, reach)
                if wipe is not None:
                    self._wipes.append(Wipe(begin + middle, reach, *wipe))
        self._searched = max(self._searched, end)


def changes_of(luma: Small, chroma: Small) -> Curve:
    """(K - 1,) the change from each of K pictures to the next, as `Curves.change` has it."""
    return _beyond_motion(luma) + _beyond_motion(chroma[:, 0]) + _beyond_motion(chroma[:, 1])


def _coarse(luma: Small, chroma: Small) -> Curve:
    """(N, 432): 16 x 9 means of luma and of both chroma, in levels from the middle."""
    rows = luma[:, 0::4].astype(np.uint16) + luma[:, 1::4] + luma[:, 2::4] + luma[:, 3::4]
    light = rows[:, :, 0::4] + rows[:, :, 1::4] + rows[:, :, 2::4] + rows[:, :, 3::4]
    lines = chroma[:, :, 0::2].astype(np.uint16) + chroma[:, :, 1::2]
    colour = lines[..., 0::2] + lines[..., 1::2]
    count = len(luma)
    parts = [light.reshape(count, -1) / np.float32(16), colour.reshape(count, -1) / np.float32(4)]
    return np.concatenate(parts, axis=1, dtype=np.float32) - np.float32(128)


def _squared(vectors: Curve, one: Numbers, other: Numbers) -> Curve:
    gap = vectors[one] - vectors[other]
    squared: Curve = np.einsum("ij,ij->i", gap, gap) / np.float32(gap.shape[1])
    return squared


def _unlike(vectors: Curve, middles: Numbers, reach: int) -> Mask:
    """Whether the two ends of windows differ."""
    return _squared(vectors, middles - reach, middles + reach) > _LEAST_DISTANCE**2


def _steady(vectors: Curve, middles: Numbers, reach: int) -> Mask:
    """Whether little moves before and after."""
    old, new = middles - reach, middles + reach
    most = _MOST_MOTION**2 * _squared(vectors, old, new)
    before = _squared(vectors, (old - reach).clip(0), old)
    after = _squared(vectors, new, (new + reach).clip(max=len(vectors) - 1))
    steady: Mask = (before < most) & (after < most)
    return steady


def _uneven(vectors: Curve, middles: Numbers, reach: int) -> Mask:
    """Whether the middle is about half way between the ends, and no mixture of them."""
    old, new = middles - reach, middles + reach
    apart, to_old = _squared(vectors, old, new), _squared(vectors, old, middles)
    share = (to_old + apart - _squared(vectors, middles, new)) / (2 * apart)
    uneven: Mask = (to_old - share**2 * apart > _LEAST_RESIDUAL**2 * apart) & (np.abs(share - 0.5) < _MOST_UNEVEN)
    return uneven


def _in_parts(vectors: Curve, middles: Numbers, reach: int) -> Mask:
    """Whether the places of the middle show one of the ends each, as far as 16 x 9 means can tell."""
    old, new, now = (vectors[middles + offset, :144] for offset in (-reach, reach, 0))
    neither = np.minimum(np.abs(now - old), np.abs(now - new)).mean(axis=1)
    in_parts: Mask = neither < _MOST_NEITHER * np.abs(new - old).mean(axis=1)
    return in_parts


def _spread(pictures: Small) -> tuple[Small, Small]:
    """The darkest and the brightest of each place and its eight neighbours, (..., H, W)."""
    found = []
    for extreme in (np.minimum, np.maximum):
        rows = pictures.copy()
        extreme(rows[..., 1:, :], pictures[..., :-1, :], out=rows[..., 1:, :])
        extreme(rows[..., :-1, :], pictures[..., 1:, :], out=rows[..., :-1, :])
        both = rows.copy()
        extreme(both[..., 1:], rows[..., :-1], out=both[..., 1:])
        extreme(both[..., :-1], rows[..., 1:], out=both[..., :-1])
        found.append(both)
    return found[0], found[1]


def _outside(pictures: Small, low: Small, high: Small) -> Small:
    """How far each place is outside a range."""
    over: Small = np.maximum(pictures, high) - high
    over += low - np.minimum(pictures, low)
    return over


def _beyond_motion(pictures: Small) -> Curve:
    """(N, H, W) -> (N - 1,): mean difference to the picture before, beyond the range of each place's neighbours."""
    changes = np.empty(len(pictures) - 1, np.float32)
    for first in range(0, len(changes), _BLOCK):
        part = pictures[first : first + _BLOCK + 1]
        low, high = _spread(part)
        over = _outside(part[1:], low[:-1], high[:-1]).reshape(len(part) - 1, part[0].size).sum(axis=1, dtype=np.int32)
        over += _outside(part[:-1], low[1:], high[1:]).reshape(len(part) - 1, part[0].size).sum(axis=1, dtype=np.int32)
        changes[first : first + _BLOCK] = over / np.float32(2 * part[0].size)
    return changes


def _wipe(luma: Small, middle: int, reach: int) -> tuple[float, tuple[float, float, float]] | None:
    """Cost of taking a window for a wipe, and how much of the picture is new; None where the ends are too alike.

    Each place of a picture inside has to be the old picture or the new one, in few large regions, and once new stay so.
    """
    old, new = luma[middle - reach], luma[middle + reach]
    apart = np.maximum(old, new) - np.minimum(old, new)
    changed = apart > _CHANGED
    count = np.count_nonzero(changed)
    if count < _LEAST_CHANGED * changed.size:
        return None
    inside = luma[[middle - reach // 2, middle, middle + reach // 2]]
    lows, highs = _spread(np.stack([old, new]))
    to_old, to_new = (_outside(inside, lows[side], highs[side]) for side in (0, 1))
    nearer_old = np.abs(inside.astype(np.int16) - old) < np.abs(inside.astype(np.int16) - new)
    is_new = np.where(to_old == to_new, ~nearer_old, to_old > to_new)
    neither = np.minimum(to_old, to_new)[:, changed].mean(axis=1).max() / apart[changed].mean()
    sides = (is_new[:, :, 1:] != is_new[:, :, :-1]) & (changed[:, 1:] & changed[:, :-1])
    stacked = (is_new[:, 1:] != is_new[:, :-1]) & (changed[1:] & changed[:-1])
    ragged = (sides.sum(axis=(1, 2)) + stacked.sum(axis=(1, 2))).max() / count
    back = (is_new[:-1] & ~is_new[1:] & changed).sum() / (2 * count)
    first, half, last = (float(share) for share in is_new[:, changed].mean(axis=1))
    return float(neither + ragged + back + abs(half - 0.5)), (first, half, last)
