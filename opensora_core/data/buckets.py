"""The sizes that clips are brought to, and which clip goes to which."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from opensora_core.data.frames import span_at_rate
from opensora_core.errors import ConfigError

_WORD = re.compile(r"(\d+)x(\d+)x(\d+)(?::(\d+))?")
_RATIOS = ((9, 16), (3, 4), (1, 1), (4, 3), (16, 9))


@dataclass(frozen=True)
class Bucket:
    """A size that batches have: frames, height and width in pixels, and how many clips make a batch."""

    num_frames: int
    height: int
    width: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Pace:
    """How the frames of a sample lie in a clip.

    Attributes:
        frame_interval: distance between two, in frames of the clip.
        fps: frames per second of a sample, where clips of different rates are to move at the same speed (one of an
            unknown rate is taken to have this one); 0 keeps to the interval.
        squeeze: a clip shorter than the span is sampled more densely, as published, down to every frame.
    """

    frame_interval: int
    fps: float = 0.0
    squeeze: bool = False

    def span(self, num_frames: int, clip_fps: float | None) -> int:
        """Frames that a clip must have for a sample of so many."""
        if self.squeeze:
            return num_frames
        if self.fps:
            return span_at_rate(num_frames, clip_fps or self.fps, self.fps)
        return (num_frames - 1) * self.frame_interval + 1


def parse_buckets(
    text: str, *, main: tuple[int, int, int], batch_size: int, tokens_per_batch: int, patch: tuple[int, int, int]
) -> list[Bucket]:
    """Read the setting `data.buckets`.

    Args:
        text: words such as `16x256x256` or `1x512x512:32`, `auto`, or nothing.
        main: frames, height and width of `video`.
        batch_size: of the main size.
        tokens_per_batch: what other sizes take their batch size from; 0 is what a batch of the main size has.
        patch: frames, rows and columns of pixels of one token.

    Raises:
        ConfigError: a word that is no size, a size that the patches do not divide, or one that is named twice.
    """

    def tokens(size: Sequence[int]) -> int:
        return math.prod(-(-side // step) for side, step in zip(size, patch, strict=True))

    setting = "data.buckets" if text.strip() else "video"
    budget = tokens_per_batch or batch_size * tokens(main)
    sizes: list[tuple[tuple[int, int, int], int | None]] = []
    if not text.strip():
        sizes.append((main, None if tokens_per_batch else batch_size))
    elif text.strip() == "auto":
        sizes += [(size, None) for size in dict.fromkeys(_of_ratio(main, ratio, patch) for ratio in _RATIOS)]
    else:
        for word in text.replace(",", " ").split():
            found = _WORD.fullmatch(word)
            if found is None:
                raise ConfigError(f"data.buckets: '{word}' is no size", "write 16x256x256, or 16x256x256:8 for 8 clips")
            frames, height, width = (int(number) for number in found.groups()[:3])
            sizes.append(((frames, height, width), int(found[4]) if found[4] else None))
    for number, (size, count) in enumerate(sizes):
        name = "x".join(map(str, size))
        if not all(size) or count == 0:
            raise ConfigError(f"{setting}: {name if count is None else f'{name}:{count}'} is empty", "1 or more each")
        if any(side % step for side, step in zip(size[1:], patch[1:], strict=True)):
            raise ConfigError(
                f"{setting}: {name} is no multiple of patches of {patch[1]}x{patch[2]} pixels",
                "choose multiples of them",
            )
        if size in [other for other, _ in sizes[:number]]:
            raise ConfigError(f"data.buckets: {name} is named twice", "leave one of them out")
    return [Bucket(*size, count or max(1, budget // tokens(size))) for size, count in sizes]


def _of_ratio(main: tuple[int, int, int], ratio: tuple[int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """The size of about as many pixels and another aspect ratio, height to width."""
    height = math.sqrt(main[1] * main[2] * ratio[0] / ratio[1])
    width = main[1] * main[2] / height
    rounded = (max(round(side / step), 1) * step for side, step in zip((height, width), patch[1:], strict=True))
    return (main[0], *rounded)  # type: ignore[return-value]


def choose_bucket(
    buckets: Sequence[Bucket],
    pace: Pace,
    *,
    num_frames: int,
    fps: float | None,
    height: int,
    width: int,
    max_upscale: float,
) -> tuple[int, str]:
    """The best bucket for a clip, or -1 and why there is none.

    Of those that the clip is long and large enough for: the one with the most frames, of these the one that cuts least
    away, of these the one of the most pixels.

    Args:
        buckets: to choose from.
        pace: how frames are taken.
        num_frames: of the clip.
        fps: of the clip.
        height: of the clip, in pixels.
        width: of the clip, in pixels.
        max_upscale: how much smaller than its bucket a clip may be.
    """
    best: tuple[tuple[int, float, int], int] | None = None
    long_enough = False
    for index, bucket in enumerate(buckets):
        if num_frames < pace.span(bucket.num_frames, fps):
            continue
        long_enough = True
        scale = max(bucket.height / height, bucket.width / width)
        if scale > max_upscale:
            continue
        kept = bucket.height * bucket.width / (height * width * scale * scale)
        rank = (bucket.num_frames, round(kept, 6), bucket.height * bucket.width)
        if best is None or rank > best[0]:
            best = (rank, index)
    if best is not None:
        return best[1], ""
    if not long_enough:
        needed = min(pace.span(bucket.num_frames, fps) for bucket in buckets)
        return -1, f"too short: {num_frames} frames, {needed} are needed"
    return -1, f"too small: {height}x{width}"
