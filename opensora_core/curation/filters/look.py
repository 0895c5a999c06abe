"""What a filter is, and what it looks at: one clip, decoded once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from opensora_core.config import FilterConfig
from opensora_core.media import probe
from opensora_core.media.motion import Footage, watch
from opensora_core.media.pixels import Frames

SIDE = 448  # pixels of the longer side: what is left of a 16:9 frame for a CLIP of 224
Gray = NDArray[np.uint8]


@dataclass(frozen=True)
class Place:
    """Where a clip is, and its words.

    Attributes:
        path: absolute.
        num_frames: that it has; None has them counted first, which decodes it twice.
        start_seconds, end_seconds: of a range of a file.
        caption: its words, if it has some.
    """

    path: Path
    num_frames: int | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    caption: str | None = None


@dataclass
class Look:
    """A clip as filters see it. The bars around the picture belong to `bars` alone; the others see what is inside.

    Attributes:
        footage: see `media.motion`.
        caption: its words.
        kept: what filters that share a model keep between them.
    """

    footage: Footage
    caption: str | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def pictures(self) -> Frames:
        """(N, H, W, 3) the frames that are looked at closely, without bars."""
        crop, pictures = self.footage.crop, self.footage.pictures
        if crop is None:
            return pictures
        scale = pictures.shape[1] / self.footage.height, pictures.shape[2] / self.footage.width
        top, left = round(crop[0] * scale[0]), round(crop[1] * scale[1])
        bottom, right = round((crop[0] + crop[2]) * scale[0]), round((crop[1] + crop[3]) * scale[1])
        return np.ascontiguousarray(pictures[:, top : max(bottom, top + 1), left : max(right, left + 1)])

    @cached_property
    def grays(self) -> list[Gray]:
        """The same in gray, (H, W) each."""
        return [np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.uint8) for picture in self.pictures]

    @cached_property
    def firsts(self) -> list[int]:
        """Positions of the first picture of each place."""
        return [number for number, _ in self.pairs] or list(range(len(self.pictures)))

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Positions of pictures that follow each other, one pair for each place."""
        indices, found, last = self.footage.indices, list[tuple[int, int]](), -1
        for position in range(len(indices) - 1):
            if indices[position + 1] == indices[position] + 1 and position > last:
                found.append((position, position + 1))
                last = position + 1
        return found


@dataclass(frozen=True)
class Filter:
    """A score, and its limits.

    Attributes:
        about: what it measures.
        unit: in words that follow the number.
        measure: gives the score of a clip, or None where it has none; None is given by comparing clips, see `copies`.
        least: the setting that refuses a lower score, or "".
        most: the setting that refuses a higher one, or "".
        is_on: whether it is measured with these settings.
        made_by: what the score depends on besides the clip; another one has it measured anew.
        needs: what it takes besides OpenCV, and how to say where that is.
    """

    about: str
    unit: str
    measure: Callable[[Look, FilterConfig], float | None] | None
    least: str = ""
    most: str = ""
    is_on: Callable[[FilterConfig], bool] = lambda settings: True
    made_by: Callable[[FilterConfig], str] = lambda settings: "1"
    needs: str = ""

    @property
    def limits(self) -> tuple[str, ...]:
        """Settings that are limits of this score."""
        return tuple(filter(None, (self.least, self.most)))


def places(num_frames: int, count: int) -> list[int]:
    """Numbers of pairs of frames that follow each other, at `count` places spread evenly over a clip, or fewer."""
    if num_frames < 2:
        return [0]
    firsts = {min(int((number + 0.5) * num_frames / count), num_frames - 2) for number in range(count)}
    return sorted(firsts | {first + 1 for first in firsts})


def look_at(place: Place, settings: FilterConfig) -> Look:
    """Decode a clip.

    Raises:
        InputError: it cannot be decoded, or has fewer frames than are said of it.
    """
    num_frames = place.num_frames
    start, end = place.start_seconds, place.end_seconds
    if num_frames is None:
        num_frames = probe(place.path, start_seconds=start, end_seconds=end).num_frames
    footage = watch(
        place.path,
        places(num_frames, settings.frames),
        side=SIDE,
        start_seconds=start,
        end_seconds=end,
        vectors=settings.motion == "vectors",
    )
    return Look(footage, place.caption)


def median(values: Sequence[float]) -> float | None:
    """The middle of some numbers; None of none."""
    return float(np.median(values)) if len(values) else None
