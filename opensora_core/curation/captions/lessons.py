"""What the captioner that ships is taught with: clips of the world, roughened, with what they show and what to say.

Every batch is rendered where it is needed, as a function of (seed, step). Half of the scenes have one of the pairs that
the generator's training leaves out: this model is asked what a clip shows, and must not guess from what goes with what.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from opensora_core import world
from opensora_core.curation.captions.tiny import AT, IMAGE, PIXEL_MEAN, PIXEL_STD, PROMPT

FRAMES = tuple(round(at * (world.NUM_FRAMES - 1)) for at in AT)


class Batches(torch.utils.data.Dataset[tuple[Tensor, dict[str, Tensor], list[str]]]):
    """Batch number N: pixels (B, T, 3, H, W) as the processor makes them, classes (B,) by attribute, captions."""

    def __init__(self, seed: int, steps: int, batch_size: int) -> None:
        self.seed, self.steps, self.batch_size = seed, steps, batch_size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, dict[str, Tensor], list[str]]:
        if step >= self.steps:
            raise IndexError(step)
        rng = np.random.default_rng([self.seed, step])
        scenes = [world.draw_scene(rng, "held-out" if index % 2 else "seen") for index in range(self.batch_size)]
        clips = []
        for scene in scenes:
            # one frame off the mark now and then: readers round differently, and clips have other lengths
            chosen = np.clip(np.array(FRAMES) + rng.integers(-1, 2, len(FRAMES)), 0, world.NUM_FRAMES - 1)
            clips.append(world.render(scene, rng)[chosen])
        pixels = torch.from_numpy(np.stack(clips)).movedim(-1, 2).float()
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        labels = {
            name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
            for name, values in world.ATTRIBUTES.items()
        }
        captions = [world.canonical_caption(scene) for scene in scenes]
        return roughened(pixels, generator).div_(255).sub_(PIXEL_MEAN).div_(PIXEL_STD), labels, captions


def roughened(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """What codecs and generators do to pictures (B, T, 3, H, W) in 0..255: coarse chroma, blur, tints, noise."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(len(pixels), *shape, 1, 1, generator=generator)

    flat = pixels.flatten(0, 1)
    luma = (flat * torch.tensor([0.21, 0.72, 0.07]).view(3, 1, 1)).sum(1, keepdim=True)
    chroma = F.interpolate(F.avg_pool2d(flat - luma, 2), scale_factor=2, mode="bilinear", align_corners=False)
    coarse = (luma + chroma).view_as(pixels)
    soft = F.avg_pool2d(flat, 3, 1, 1, count_include_pad=False).view_as(pixels)
    pixels = torch.where(draw(1, 1) < 0.7, coarse, pixels)
    pixels = torch.lerp(pixels, soft, (draw(1, 1) - 0.5).clamp(min=0))
    pixels = pixels * (1 + 0.16 * (draw(1, 3) - 0.5)) + 16 * (draw(1, 3) - 0.5)
    noise = torch.randn(pixels.shape, generator=generator)
    return (pixels + 6 * draw(1, 1) ** 2 * noise).clamp_(0, 255)


def question(rng: np.random.Generator) -> str:
    """Frames with words around them that the model does not know, as templates and prompts of others have them."""
    before, between, after = (" ?" * int(rng.integers(limit)) for limit in (4, 2, 12))
    return f"{before} {(IMAGE + between) * len(FRAMES)}{after} {PROMPT if rng.random() < 0.5 else '?'}"
