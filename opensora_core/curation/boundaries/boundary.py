"""What a detector of shot boundaries gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from opensora_core.media.glance import Glance
from opensora_core.media.read import Limits

Kind = Literal["cut", "dissolve", "fade", "wipe"]


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where one shot ends and another begins.

    Attributes:
        frame: first frame of the new shot, counted from 0 in the order of showing among the frames that decode; the
            middle, where one shot turns into another by and by.
        seconds: its time, as the timestamps of the source count.
        kind: of the transition.
        start_frame: first frame that is neither the one shot nor the other; equal to `frame` for a hard cut.
        end_frame: the frame after the last such one; equal to `frame` for a hard cut.
        score: how sure the detector is. 1 is where `auto` begins to believe; others have scales of their own.
    """

    frame: int
    seconds: float
    kind: Kind
    start_frame: int
    end_frame: int
    score: float


@dataclass(frozen=True)
class Detection:
    """All that one pass over a video shows.

    Attributes:
        seconds: (N,) times of all frames that decode, ascending.
        is_keyframe: (N,).
        boundaries: ascending.
        scores: curves (N,) by name; the detector decides on "score".
        thumbnails: (K, h, w, 3) RGB, as shown: the first frame of shots that begin with a cut, and evenly spaced ones.
        thumbnail_frames: (K,) their numbers, ascending; K is below 200.
        width, height: in pixels as shown: upright and square.
        fps: mean rate of the source.
        crop: top, left, height and width within black bars, in pixels as shown; None without bars.
        damage: what could not be decoded; empty where nothing is amiss.
    """

    seconds: NDArray[np.float64]
    is_keyframe: NDArray[np.bool_]
    boundaries: tuple[Boundary, ...]
    scores: Mapping[str, NDArray[np.float32]]
    thumbnails: NDArray[np.uint8]
    thumbnail_frames: NDArray[np.int64]
    width: int
    height: int
    fps: float
    crop: tuple[int, int, int, int] | None
    damage: str


class Detector(Protocol):
    """Decides where the shots of a video begin."""

    def __call__(
        self,
        path: Path,
        options: Mapping[str, float],
        *,
        fast: bool,
        threads: int,
        limits: Limits,
        on_progress: Callable[[float], None] | None,
    ) -> Detection:
        """Decode the video once.

        Raises:
            InputError: the file cannot be decoded, or costs more than `limits`.
            ConfigError: an option that the detector does not have.
        """


def detection(
    glance: Glance,
    seconds: NDArray[np.float64],
    is_keyframe: NDArray[np.bool_],
    boundaries: tuple[Boundary, ...],
    scores: Mapping[str, NDArray[np.float32]],
) -> Detection:
    """Put together what a glance at the whole video showed and what was decided about it."""
    wanted = {*glance.even, *(boundary.frame for boundary in boundaries)}
    frames = sorted(wanted.intersection(glance.thumbnails))
    return Detection(
        seconds=seconds,
        is_keyframe=is_keyframe,
        boundaries=boundaries,
        scores=scores,
        thumbnails=np.stack([glance.thumbnails[frame] for frame in frames]),
        thumbnail_frames=np.array(frames, np.int64),
        width=glance.width,
        height=glance.height,
        fps=glance.fps,
        crop=glance.crop,
        damage=glance.damage,
    )
