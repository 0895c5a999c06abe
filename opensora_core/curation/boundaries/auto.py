"""Our own detector, over all frames in one pass, or by what keyframes and the sizes of packets give away.

How it decides is in `shots`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opensora_core.curation.boundaries.boundary import Boundary, Detection, detection
from opensora_core.curation.boundaries.curves import Curve, Meter, changes_of
from opensora_core.curation.boundaries.shots import AROUND, RETURNED, AutoOptions, Found, Mask, decide
from opensora_core.media.glance import Glance
from opensora_core.media.packets import UnreliableTimesError
from opensora_core.media.read import Limits
from opensora_core.media.skim import Skim, skimmed

# levels by which keyframes differ that are not of one shot; and that surely are not, whatever the packets say
_UNLIKE_EARLY, _UNLIKE, _FAR_UNLIKE = 3.5, 6.0, 25.0
_USUAL_GROUPS = (250, 240, 300, 120, 128)  # frames between keyframes, by default of common encoders
_LARGE, _LARGE_KEY = 4.0, 0.4  # times the usual packet, and of the keyframe, is a packet that may hold a cut
_MOST_LARGE = 3  # such packets in a group
_SHARE = 0.22  # of the frames that may be decoded beside keyframes


def detect_auto(
    path: Path,
    options: Mapping[str, float],
    *,
    fast: bool = False,
    threads: int = 1,
    limits: Limits,
    on_progress: Callable[[float], None] | None = None,
) -> Detection:
    """Find cuts, fades, dissolves and wipes in one pass; see `Detector`."""
    settings = AutoOptions.of(options)
    if fast:
        skimming = Glance(path, limits, threads, on_progress=on_progress)
        try:
            return _skim(skimming, settings)
        except UnreliableTimesError:
            pass  # frames that only decoding tells apart
    glance = Glance(path, limits, threads, on_progress=on_progress)
    meter = Meter()
    seconds, keys = [], []
    for chunk in glance:
        meter.add(chunk)
        seconds.append(chunk.seconds)
        keys.append(chunk.is_keyframe)
    curves, times = meter.finish(), np.concatenate(seconds)
    found, score = decide(curves, glance.fps, settings)
    boundaries = tuple(
        Boundary(item.frame, float(times[item.frame]), item.kind, item.start, item.end, item.score) for item in found
    )
    scores = {"score": score, "change": curves.change, "luma": curves.level, "contrast": curves.contrast}
    return detection(glance, times, np.concatenate(keys), boundaries, scores)


def _skim(glance: Glance, options: AutoOptions) -> Detection:
    """Compare keyframes, and decode a little of what lies between unlike ones.

    Encoders begin a new group of pictures at a cut they notice: a keyframe that comes early and is unlike the one
    before is a cut. A cut elsewhere costs bytes: a packet nearly as large as a keyframe's among small ones. Stretches
    that may hold one are decoded while they are few, the shortest first; in the rest the large packets are the cuts.
    """
    with skimmed(glance) as skim:
        total = len(skim.seconds)
        change, lengths = changes_of(skim.luma, skim.chroma), np.diff(skim.keys)
        found: dict[int, Found] = {}
        left = _SHARE * total
        usual = _usual_group(lengths)
        unlike = np.flatnonzero((change >= np.where(lengths < usual, _UNLIKE_EARLY, _UNLIKE)) & ~_returns(skim, change))
        for key in unlike[np.argsort(lengths[unlike], kind="stable")].tolist():
            begin, end = int(skim.keys[key]), int(skim.keys[key + 1])
            if lengths[key] < usual:
                found[end] = Found(end, "cut", end, end, float(change[key] / _UNLIKE))
                continue
            sizes = skim.sizes[begin + 1 : end]
            least = max(_LARGE * np.median(sizes), _LARGE_KEY * skim.sizes[begin]) if len(sizes) else np.inf
            large = (np.flatnonzero(sizes > least) + begin + 1).tolist()
            if lengths[key] <= left and (large or change[key] >= _FAR_UNLIKE):
                left -= lengths[key]
                chunk = skim.stretch(key)
                if chunk is None:
                    raise UnreliableTimesError
                meter = Meter()
                meter.add(chunk)
                for item in decide(meter.finish(), glance.fps, options)[0]:
                    place = item.frame + begin
                    found[place] = Found(place, item.kind, item.start + begin, item.end + begin, item.score)
            else:
                if len(large) > _MOST_LARGE:
                    continue  # an encoder that spends bytes in spurts says nothing
                for number, place in enumerate(large):
                    if not number or place - large[number - 1] > AROUND:
                        # the cut may be at any of the frames that this one overtook
                        cut = place - int(skim.leaps[place]) // 2
                        found[cut] = Found(cut, "cut", cut, cut, float(change[key] / _UNLIKE))
        score = np.zeros(total, np.float32)
        for place, item in found.items():
            score[place] = item.score
        is_keyframe = np.zeros(total, np.bool_)
        is_keyframe[skim.keys] = True
        boundaries = tuple(
            Boundary(place, float(skim.seconds[place]), item.kind, item.start, item.end, item.score)
            for place, item in sorted(found.items())
        )
        return detection(glance, skim.seconds, is_keyframe, boundaries, {"score": score})


def _usual_group(lengths: NDArray[np.int64]) -> float:
    """The number of frames after which the encoder begins a new group anyway; infinity where it never had to."""
    most = int(lengths.max())
    return most if most in _USUAL_GROUPS or np.count_nonzero(lengths == most) > 1 else np.inf


def _returns(skim: Skim, change: Curve) -> Mask:
    """(K - 1,) whether a keyframe's change is that of a flash, which keyframes next to each other show."""
    returns = np.zeros(len(change), np.bool_)
    for first in (0, 1):
        across = changes_of(skim.luma[first::2], skim.chroma[first::2])
        for number, value in enumerate(across.tolist()):
            key = first + 2 * number
            if value < RETURNED * min(change[key], change[key + 1]):
                returns[key : key + 2] = True
    return returns
