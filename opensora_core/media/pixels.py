"""From what a VAE decodes to what a screen shows, and frames side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # a tensor that comes in brings torch with it; writing files needs none
    from torch import Tensor

Frames = NDArray[np.uint8]
"""(T, H, W, 3), RGB."""


def to_uint8(video: Tensor) -> Frames:
    """Round a decoded video to bytes, half up, as the published release does.

    Args:
        video: (3, T, H, W); values outside [-1, 1] are clamped.

    Returns:
        (T, H, W, 3) uint8.
    """
    unit = (video.detach().float().clamp(-1, 1) + 1) / 2
    frames: Frames = (255 * unit + 0.5).floor().byte().permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return frames


def tile(frames: Frames, columns: int) -> NDArray[np.uint8]:
    """Lay frames out row by row, (rows * H, columns * W, 3); cells without a frame are black."""
    num_frames, height, width, channels = frames.shape
    rows = math.ceil(num_frames / columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:num_frames] = frames
    grid = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, columns * width, channels)
