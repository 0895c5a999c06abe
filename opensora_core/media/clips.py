"""Frames of clips for training: by number, exact to the frame, at the size that is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from opensora_core.errors import InputError
from opensora_core.files import readable
from opensora_core.media.decoding import frames_at, survey
from opensora_core.media.packets import Window
from opensora_core.media.pixels import Frames
from opensora_core.media.read import Budget, Limits
from opensora_core.media.shown import Screen, fit
from opensora_core.media.stills import SUFFIXES, animation, is_animation, opened_picture, read_picture, upright_size

_LIMITS = Limits()


@dataclass(frozen=True)
class Probe:
    """What a clip is once decoded. `num_frames / fps` is its duration; a picture lasts a second."""

    num_frames: int  # frames that were decoded, not what the container claims
    fps: float  # from the times of the first and the last frame; the container's average for one frame; 1 for pictures
    width: int  # as shown: upright, with square pixels
    height: int
    duration_seconds: float


def probe(
    path: Path, *, start_seconds: float | None = None, end_seconds: float | None = None, limits: Limits = _LIMITS
) -> Probe:
    """Decode a clip to learn what it is. A clip that breaks off ends with its last sound frame.

    Args:
        path: a video, a picture or an animation.
        start_seconds: time in the source, as its timestamps count it, from which on frames belong to the clip.
        end_seconds: time from which on they belong to it no more.
        limits: of what it may cost.

    Raises:
        InputError: no video or picture, no frame that can be decoded, sound frames behind damaged ones, or a limit.
    """
    window = _window(start_seconds, end_seconds)
    if path.suffix.lower() in SUFFIXES:
        with opened_picture(path, limits) as image:
            height, width = upright_size(path, image)
            if not is_animation(path, image):
                _require_first_second(path, window)
                read_picture(path, image, (1, 1), limits)  # a torn one says so only now
                return Probe(1, 1.0, width, height, 1.0)
            times = [time for time, _ in animation(image, Budget(path, limits)) if window.start <= time < window.end]
        average = 1.0
    else:
        try:
            found = survey(window, Budget(path, limits))
        except av.FFmpegError as error:
            raise InputError(f"cannot read {path} as a video: {error}") from error
        times, height, width, average = found.times, found.height, found.width, found.average_fps
    if not times:
        raise InputError(f"{path} has no frame in the seconds asked for")
    fps = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else average
    return Probe(len(times), fps, width, height, len(times) / fps)


def read_frames(
    path: Path,
    indices: Sequence[int],
    *,
    height: int | None = None,
    width: int | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    threads: int = 1,
    limits: Limits = _LIMITS,
) -> Frames:
    """Read frames of a clip by number. What cannot be verified to be the frame asked for is refused, never guessed.

    Frame i is the i-th in the order of showing whose time lies in [start_seconds, end_seconds), whatever the frame
    rate, the order of coding or the time that the source begins at.

    Args:
        path: a video, a picture (whose only frame is 0) or an animation.
        indices: numbers of frames, in any order, also repeatedly.
        height: of the result; frames are resized to cover height x width, and the middle is cut out.
        width: of the result. Without the two, frames come as shown: upright, with square pixels.
        start_seconds: time in the source, as its timestamps count it, that the clip begins at.
        end_seconds: time that it ends before.
        threads: of the decoder. The result does not depend on them.
        limits: of what it may cost.

    Returns:
        (T, H, W, 3) uint8, one frame for each of `indices`.

    Raises:
        InputError: no video or picture, no such frame, one that cannot be decoded, or a limit.
    """
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(int(index), []).append(place)
    wanted = _wanted_size(height, width)
    window = _window(start_seconds, end_seconds)
    if not places or min(places) < 0:
        raise InputError(f"frames {list(indices)} of {path} were asked for", "ask for frame 0 or later ones")
    collected = _Collected(path, places, len(indices), limits)
    if path.suffix.lower() in SUFFIXES:
        return _read_pictures(path, collected, wanted, window)
    if wanted is not None:
        collected.require_room(wanted)
    screen: Screen | None = None
    shown_by = None
    try:
        for index, frame, stream in frames_at(sorted(places), window, threads, Budget(path, limits)):
            if screen is None or shown_by is not stream:
                screen, shown_by = Screen(path, stream, wanted, limits.max_pixels), stream
            collected.add(index, screen.show(frame))
    except av.FFmpegError as error:
        raise InputError(f"cannot read {path} as a video: {error}") from error
    return collected.frames


class _Collected:
    """The result, which is made room for when the first frame comes."""

    def __init__(self, path: Path, places: dict[int, list[int]], num_frames: int, limits: Limits) -> None:
        self.frames: Frames = np.empty((0, 0, 0, 3), np.uint8)
        self._path = path
        self.places = places
        self._num_frames = num_frames
        self.limits = limits

    def require_room(self, size: tuple[int, int]) -> None:
        """Refuse frames of a height and width that are too large together."""
        num_bytes = self._num_frames * size[0] * size[1] * 3
        if num_bytes > self.limits.max_bytes:
            raise InputError(
                f"{self._num_frames} frames of {size[1]} x {size[0]} from {self._path} are {readable(num_bytes)}, "
                f"more than max_bytes={self.limits.max_bytes}",
                "read fewer or smaller frames, or raise the limit",
            )

    def add(self, index: int, picture: Frames) -> None:
        """Put a frame (H, W, 3) to wherever it was asked for."""
        if not len(self.frames):
            self.require_room((picture.shape[0], picture.shape[1]))
            self.frames = np.empty((self._num_frames, *picture.shape), np.uint8)
        if picture.shape != self.frames.shape[1:]:
            raise InputError(
                f"{self._path} has frames of {self.frames.shape[2]} x {self.frames.shape[1]} and, in frame {index}, "
                f"{picture.shape[1]} x {picture.shape[0]}",
                "ask for one height and width",
            )
        for place in self.places[index]:
            self.frames[place] = picture


def _read_pictures(path: Path, collected: _Collected, wanted: tuple[int, int] | None, window: Window) -> Frames:
    limits, last, index = collected.limits, max(collected.places), -1
    with opened_picture(path, limits) as image:
        collected.require_room(wanted or upright_size(path, image))
        if is_animation(path, image):
            for time, frame in animation(image, Budget(path, limits)):
                if not window.start <= time < window.end:
                    continue
                index += 1
                if index in collected.places:
                    collected.add(index, fit(frame, wanted, path, limits.max_pixels))
                if index == last:
                    return collected.frames
        else:
            _require_first_second(path, window)
            index = 0
            if last == 0:
                collected.add(0, read_picture(path, image, wanted, limits)[0])
                return collected.frames
    raise InputError(f"frame {last} of {path} was asked for, which has {index + 1} frames")


def _wanted_size(height: int | None, width: int | None) -> tuple[int, int] | None:
    if height is None and width is None:
        return None
    if height is None or width is None or height < 1 or width < 1:
        raise InputError(f"frames of height {height} and width {width} were asked for", "give both, of 1 or more")
    return height, width


def _window(start_seconds: float | None, end_seconds: float | None) -> Window:
    start = -math.inf if start_seconds is None else start_seconds
    end = math.inf if end_seconds is None else end_seconds
    if not start < end:  # also where one is not a number
        raise InputError(f"no clip lies between {start_seconds} and {end_seconds} seconds")
    return Window(start, end)


def _require_first_second(path: Path, window: Window) -> None:
    """A picture is shown at second 0."""
    if not window.start <= 0 < window.end:
        raise InputError(f"{path} is a picture and has no frame in the seconds asked for")
