"""Resizing and cropping at any size; the published square ones are pinned by the golden cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opensora_core.data import fit_image, fit_video, normalise
from opensora_core.data.transforms import image_pixels

SIZES = [(16, 16), (16, 28), (24, 8), (1, 1)]


def ramp(rows: int, columns: int) -> Tensor:
    """A video whose channels rise along the rows, along the columns, and along time."""
    down = torch.linspace(0, 255, rows).view(1, rows, 1).expand(2, rows, columns)
    across = torch.linspace(0, 255, columns).view(1, 1, columns).expand(2, rows, columns)
    time = torch.tensor([0.0, 255.0]).view(2, 1, 1).expand(2, rows, columns)
    return torch.stack([down, across, time], dim=1).round().to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("rows", "columns"), [(36, 64), (64, 36), (17, 17), (5, 7), (200, 9)])
def test_a_video_covers_the_size_and_keeps_its_middle(rows: int, columns: int, height: int, width: int) -> None:
    fitted = fit_video(ramp(rows, columns), height, width)
    assert fitted.shape == (2, 3, height, width)
    assert fitted.dtype == torch.float32 and fitted.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(fitted[:, 2].flatten(1).mean(1), torch.tensor([-1.0, 1.0]))
    # what is cut off is cut off on both sides alike, so the ramps stay centred, to a pixel of either grid
    steepest = 2 * max(1 / (rows - 1), 1 / (columns - 1)) + 2 / min(height, width)
    for channel in (0, 1):
        assert abs(float(fitted[:, channel].mean())) <= steepest


@pytest.mark.parametrize("short", [392, 478, 479, 644])
def test_sides_that_a_rounding_error_once_dropped_are_kept(short: int) -> None:
    """506 of the 4,320 possible short sides came out a pixel short in the published code; the samples were lost."""
    size = next(size for size in (256, 512, 1024) if int(short * (size / short)) < size)
    frames = torch.full((1, 3, short, short + 2), 128, dtype=torch.uint8)
    fitted = fit_video(frames, size, size)
    assert fitted.shape == (1, 3, size, size)
    torch.testing.assert_close(fitted, torch.full_like(fitted, 128 / 255 * 2 - 1))


def test_a_flip_mirrors_left_and_right_of_the_whole_clip() -> None:
    frames = ramp(20, 20)
    torch.testing.assert_close(fit_video(frames, 10, 10, flip=True), fit_video(frames, 10, 10).flip(-1))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (130, 96), (16, 19), (7, 5), (300, 20)])
def test_an_image_covers_the_size_and_keeps_its_middle(rows: int, columns: int, height: int, width: int) -> None:
    image = Image.fromarray(ramp(rows, columns)[0].permute(1, 2, 0).numpy())
    fitted = fit_image(image, height, width)
    assert (fitted.width, fitted.height) == (width, height)
    values = normalise(image_pixels(fitted))
    steepest = 2 * max(1 / (rows - 1), 1 / (columns - 1)) + 4 / min(height, width)
    for channel in (0, 1):
        assert abs(float(values[channel].mean())) <= steepest


def test_a_large_image_is_averaged_rather_than_sampled() -> None:
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    fitted = np.array(fit_image(Image.fromarray(checks), 16, 16))
    assert fitted.min() >= 126 and fitted.max() <= 129


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_images_of_other_modes_become_rgb(mode: str) -> None:
    pixels = image_pixels(Image.new("L", (4, 6), 200).convert(mode))
    assert pixels.shape == (3, 6, 4) and pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.full_like(pixels, 200))
