"""Tiny models of every family, with weights that matter and conditions that fit."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_core.models import LatentTransformer, build
from opensora_core.tensors import Condition

WIDTH, HEADS, CAPTION, LENGTH, CLASSES, CHANNELS = 48, 4, 12, 6, 5, 4

VARIANTS: dict[str, dict[str, object]] = {
    "stdit": {},
    "stdit-parallel": {},
    "dit": {"condition": "pooled"},
    "dit, classes": {"condition": "class"},
    "latte": {"condition": "pooled"},
    "latte, classes": {"condition": "class"},
    "latte-1": {},
    "pixart": {},
    "pixart-ms": {},
}


def tiny(variant: str, **changes: object) -> LatentTransformer:
    """A fresh model of two blocks, in evaluation mode."""
    settings: dict[str, object] = {
        "in_channels": CHANNELS,
        "hidden_size": WIDTH,
        "depth": 2,
        "num_heads": HEADS,
        "mlp_ratio": 2.0,
        "caption_channels": CAPTION,
        "caption_length": LENGTH,
        "num_classes": CLASSES,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(variant.partition(",")[0], **{**settings, **VARIANTS[variant], **changes}).eval()


def stir(model: LatentTransformer) -> LatentTransformer:
    """Move every weight off its start value, so that nothing is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def condition(variant: str, batch: int = 2) -> Condition:
    """What the variant takes; captions are ragged."""
    generator = torch.Generator().manual_seed(2)
    if "classes" in variant:
        return Condition(torch.arange(batch) % CLASSES)
    if variant in ("dit", "latte"):
        return Condition(torch.randn(batch, 1, CAPTION, generator=generator))
    lengths = torch.arange(batch) % LENGTH + 1
    tokens = torch.randn(batch, LENGTH, CAPTION, generator=generator)
    size = torch.tensor([[64.0, 96.0]]).repeat(batch, 1) if variant == "pixart-ms" else None
    return Condition(tokens, torch.arange(LENGTH) < lengths[:, None], size)


def latents(*size: int, batch: int = 2) -> Tensor:
    """Noise (B, C, *size)."""
    return torch.randn(batch, CHANNELS, *size, generator=torch.Generator().manual_seed(3))
