"""Single-device denoisers: (latents, timestep, condition) -> prediction, at any size that the patch divides."""

from __future__ import annotations

import inspect
from typing import Any

from opensora_core.errors import ConfigError, nearest
from opensora_core.models.attention import attend
from opensora_core.models.layers import LatentTransformer
from opensora_core.models.stdit import STDiT, STDiTParallel, freeze

__all__ = ["MODELS", "LatentTransformer", "attend", "build", "freeze"]

MODELS: dict[str, type[LatentTransformer]] = {
    "stdit": STDiT,
    "stdit-parallel": STDiTParallel,
}


def build(family: str, **settings: Any) -> LatentTransformer:
    """Build a model from settings of which it takes those that mean something to it.

    Args:
        family: a name of `MODELS`.
        settings: names of `ModelConfig`, and `gradient_checkpointing`.

    Raises:
        ConfigError: an unknown family, or settings that contradict each other.
    """
    if family not in MODELS:
        raise ConfigError(f"unknown model family '{family}'", nearest(family, MODELS))
    accepted = inspect.signature(MODELS[family]).parameters
    return MODELS[family](**{name: value for name, value in settings.items() if name in accepted})
