"""From the pixels of a file to the pixels of a sample: cover the wanted size, cut out the middle, map to [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def normalise(pixels: Tensor) -> Tensor:
    """Map uint8 values 0 .. 255, or float values in [0, 1], of any shape to fp32 in [-1, 1]."""
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    return (values - 0.5) / 0.5


def fit_video(frames: Tensor, height: int, width: int, flip: bool = False) -> Tensor:
    """Resize a video (T, C, H, W) uint8 to cover height x width and cut out the middle.

    Bilinear without antialiasing, as published.

    Args:
        frames: the chosen frames.
        height: of the result, in pixels.
        width: of the result, in pixels.
        flip: mirror all frames left to right first. Captions that name a side are wrong then.

    Returns:
        (T, C, height, width) fp32 in [-1, 1].
    """
    values = frames.float() / 255
    if flip:
        values = values.flip(-1)
    rows, columns = frames.shape[-2:]
    scale = max(height / rows, width / columns)
    covered = int(rows * scale), int(columns * scale)
    if covered[0] >= height and covered[1] >= width:
        # the published grid: the scale itself, not the ratio of the rounded sizes, places the sampling points
        values = F.interpolate(values, scale_factor=scale, mode="bilinear")
    else:
        # rows * (height / rows) can fall short of height by a rounding error; such videos were dropped once
        size = max(covered[0], height), max(covered[1], width)
        values = F.interpolate(values, size=size, mode="bilinear")
    top, left = (round((have - want) / 2) for have, want in zip(values.shape[-2:], (height, width), strict=True))
    return normalise(values[..., top : top + height, left : left + width])


def fit_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an image to cover height x width and cut out the middle, as ADM did (Dhariwal & Nichol 2021).

    Large images are halved by averaging first, so that the bicubic resize that follows does not alias.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covered = max(round(image.width * scale), width), max(round(image.height * scale), height)
    image = image.resize(covered, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def image_pixels(image: Image.Image) -> Tensor:
    """An image as (3, H, W) uint8; grey, palette and transparent ones become RGB."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
