"""The arithmetic of strides: which videos have latents, and how large those are."""

from __future__ import annotations

from collections.abc import Iterable

from opensora_core.errors import InputError


def latent_grid(
    num_frames: int, height: int, width: int, stride: tuple[int, int, int], *, causal_step: int = 0
) -> tuple[int, int, int]:
    """The latent grid (T', h, w) of a video.

    Args:
        num_frames, height, width: of the video, in frames and pixels.
        stride: frames, rows and columns of pixels per latent position.
        causal_step: of a VAE whose first frame has a latent frame of its own: it takes 1 + k * `causal_step` frames.
            0 for a VAE that takes a multiple of its stride.

    Raises:
        InputError: a side or the number of frames does not divide; the nearest that do are named.
    """
    time_stride, row_stride, column_stride = stride
    if height < row_stride or width < column_stride or height % row_stride or width % column_stride:
        rows, columns = _multiples(height, row_stride, row_stride), _multiples(width, column_stride, column_stride)
        raise InputError(
            f"a video of {height}x{width} pixels does not divide into latents of {row_stride}x{column_stride} pixels",
            f"try --size {_either(f'{side[0]}x{side[1]}' for side in zip(rows, columns, strict=True))}",
        )
    first, step = (1, causal_step) if causal_step else (0, time_stride)
    if num_frames < 1 or (num_frames - first) % step:
        near = _multiples(num_frames - first, step, step - first * step)
        raise InputError(
            f"{num_frames} frames do not divide into latents: this VAE takes {'1 + ' * first}a multiple of {step}",
            f"try --frames {_either(str(first + frames) for frames in near)}",
        )
    return first + (num_frames - first) // time_stride, height // row_stride, width // column_stride


def _multiples(value: int, step: int, least: int) -> tuple[int, int]:
    """The multiples of `step` on both sides of a value, both the value itself where it is one, none below `least`."""
    return max(least, value // step * step), max(least, -(-value // step) * step)


def _either(choices: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(choices))
