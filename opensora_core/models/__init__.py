"""Single-device denoisers: (latents, timestep, condition) -> prediction, at any size that the patch divides."""

from __future__ import annotations

import inspect
from typing import Any

from opensora_core.errors import ConfigError, nearest
from opensora_core.models.attention import attend
from opensora_core.models.convert import (
    Converted,
    convert,
    diffusers_settings,
    guess_family,
    infer_settings,
    init_from_image,
    load,
)
from opensora_core.models.dit import DiT
from opensora_core.models.latte import Latte, Latte1
from opensora_core.models.layers import LatentTransformer
from opensora_core.models.pixart import PixArt, PixArtMS
from opensora_core.models.stdit import STDiT, STDiTParallel, freeze

__all__ = [
    "MODELS",
    "Converted",
    "LatentTransformer",
    "attend",
    "build",
    "convert",
    "diffusers_settings",
    "freeze",
    "guess_family",
    "infer_settings",
    "init_from_image",
    "load",
    "settings_of",
]

MODELS: dict[str, type[LatentTransformer]] = {
    "stdit": STDiT,
    "stdit-parallel": STDiTParallel,
    "dit": DiT,
    "latte": Latte,
    "latte-1": Latte1,
    "pixart": PixArt,
    "pixart-ms": PixArtMS,
}


def settings_of(family: str) -> frozenset[str]:
    """The settings that mean something to a family.

    Raises:
        ConfigError: an unknown family; the nearest names are offered.
    """
    if family not in MODELS:
        raise ConfigError(f"unknown model family '{family}'", nearest(family, MODELS))
    constructors = [cls.__init__ for cls in MODELS[family].__mro__ if issubclass(cls, LatentTransformer)]
    parameters = [one for constructor in constructors for one in inspect.signature(constructor).parameters.values()]
    return frozenset(one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY)


def build(family: str, **settings: Any) -> LatentTransformer:
    """Build a model from settings, of which it takes those that mean something to it.

    Args:
        family: a name of `MODELS`.
        settings: names of `ModelConfig`, and `recompute`.

    Raises:
        ConfigError: an unknown family, or settings that contradict each other.
    """
    accepted = settings_of(family)
    return MODELS[family](**{name: value for name, value in settings.items() if name in accepted})
