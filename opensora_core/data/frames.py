"""Which frames of a video become a sample."""

from __future__ import annotations

import random

import numpy as np

from opensora_core.errors import InputError


def evenly_spaced(total: int, num_frames: int, frame_interval: int, rng: random.Random) -> list[int]:
    """Choose frames begin, begin + interval, begin + 2 interval, ... with every possible begin equally likely.

    Args:
        total: number of frames of the video.
        num_frames: how many to choose.
        frame_interval: distance between two of them, in frames.
        rng: draws the begin; one number is taken.

    Raises:
        InputError: the video is shorter than the span of the sample.
    """
    span = (num_frames - 1) * frame_interval + 1
    if total < span:
        raise InputError(
            f"{num_frames} frames at an interval of {frame_interval} span {span} frames, the video has {total}",
            "lower video.num_frames or video.frame_interval, or leave the video out",
        )
    begin = rng.randint(0, total - span)
    return list(range(begin, begin + span, frame_interval))


def published_crop(total: int, num_frames: int, frame_interval: int, rng: random.Random) -> range:
    """The frames that Open-Sora 1.0 chose from: a window of num_frames * frame_interval, or all of a shorter video.

    The last possible begin is never drawn, as published. Arguments as of `evenly_spaced`.

    Raises:
        InputError: the video has fewer than `num_frames` frames.
    """
    window = num_frames * frame_interval
    begin = rng.randint(0, max(0, total - window - 1))
    crop = range(begin, min(begin + window, total))
    if len(crop) < num_frames:
        raise InputError(
            f"a sample takes {num_frames} frames, the video has {total}",
            "lower video.num_frames, or leave the video out",
        )
    return crop


def published_indices(total: int, num_frames: int, frame_interval: int, rng: random.Random) -> list[int]:
    """Choose frames as Open-Sora 1.0 did: spread over the whole of `published_crop`, rounded down.

    Most are `frame_interval` apart and some one more, and a short video is squeezed into the sample at a smaller
    interval. Kept to reproduce published training; `evenly_spaced` keeps the speed of motion. Arguments and errors as
    of `published_crop`.
    """
    crop = published_crop(total, num_frames, frame_interval, rng)
    return [int(index) for index in np.floor(np.linspace(crop.start, crop.stop - 1, num_frames))]


def at_rate(total: int, num_frames: int, clip_fps: float, fps: float, rng: random.Random) -> list[int]:
    """Choose the frames nearest to begin, begin + 1 / fps, ... so that clips of all rates move at the same speed.

    Args:
        total: number of frames of the video.
        num_frames: how many to choose.
        clip_fps: rate of the video; where it is lower than `fps`, frames repeat.
        fps: rate of the sample.
        rng: draws the begin; one number is taken.

    Raises:
        InputError: the video is shorter than the span of the sample.
    """
    span = span_at_rate(num_frames, clip_fps, fps)
    if total < span:
        raise InputError(
            f"{num_frames} frames at {fps:g} per second span {span} of a video at {clip_fps:g}, which has {total}",
            "lower video.num_frames or raise the rate, or leave the video out",
        )
    begin = rng.randint(0, total - span)
    return [begin + _nearest(index, clip_fps, fps) for index in range(num_frames)]


def span_at_rate(num_frames: int, clip_fps: float, fps: float) -> int:
    """Frames of a video that a sample of `at_rate` reaches over, its first and last included."""
    return _nearest(num_frames - 1, clip_fps, fps) + 1


def _nearest(index: int, clip_fps: float, fps: float) -> int:
    """The frame of a video nearest to frame `index` of a sample; of two, the later."""
    return int(index * clip_fps / fps + 0.5)
