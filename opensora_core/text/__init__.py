"""Prompts -> `Condition`: text encoders behind one protocol.

`TEXT_ENCODERS` is the table of kinds; a new one is a file and a line here. transformers is not imported until one is
loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opensora_core.errors import ConfigError, nearest
from opensora_core.text.cleaning import CLEANINGS
from opensora_core.text.clip import ClipEncoder
from opensora_core.text.labels import LabelEncoder
from opensora_core.text.protocol import TextEncoder
from opensora_core.text.t5 import PooledT5Encoder, T5Encoder

__all__ = ["TEXT_ENCODERS", "TextEncoder", "load_text_encoder"]


def _classes(path: Path | None, *, num_classes: int, device: torch.device | str, **_: Any) -> TextEncoder:
    return LabelEncoder.from_pretrained(path, num_classes=num_classes, device=device)


def _captions(encoder: type[T5Encoder] | type[ClipEncoder]) -> Callable[..., TextEncoder]:
    def load(path: Path | None, *, num_classes: int, **options: Any) -> TextEncoder:
        if path is None:
            raise ConfigError("a text encoder needs weights", "name a folder with --set text.weights=DIR")
        return encoder.from_pretrained(path, **options)

    return load


TEXT_ENCODERS: dict[str, Callable[..., TextEncoder]] = {
    "t5": _captions(T5Encoder),
    "t5-pooled": _captions(PooledT5Encoder),
    "clip": _captions(ClipEncoder),
    "class": _classes,
}


def load_text_encoder(
    kind: str,
    path: Path | None,
    *,
    max_length: int = 0,
    cleaning: str = "published",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    num_classes: int = 0,
) -> TextEncoder:
    """Load a text encoder from a local path.

    Args:
        kind: a name of `TEXT_ENCODERS`.
        path: a folder in transformers' layout, or a diffusers pipeline with `text_encoder` and `tokenizer` folders. For
            classes a list of their names, or None.
        max_length: tokens that a prompt is cut at; 0 is what the published models use, 120 for T5 and 77 for CLIP.
        cleaning: `published` or `plain`, see `cleaning.py`; class names are not cleaned.
        dtype: of the weights, and so of the embeddings.
        device: where they are put.
        num_classes: of the model, for classes.

    Raises:
        ConfigError: an unknown kind or cleaning, or an impossible length.
        WeightsError: there is no such path.
        CheckpointError: it holds something else, or files that are torn or do not fit.
    """
    if kind not in TEXT_ENCODERS:
        raise ConfigError(f"unknown kind of text encoder '{kind}'", nearest(kind, TEXT_ENCODERS))
    if cleaning not in CLEANINGS:
        raise ConfigError(f"unknown cleaning '{cleaning}'", nearest(cleaning, CLEANINGS))
    if max_length < 0:
        raise ConfigError(f"a caption cannot be cut at {max_length} tokens", "set model.caption_length to 1 or more")
    return TEXT_ENCODERS[kind](
        path if path is None else Path(path),
        max_length=max_length,
        cleaning=cleaning,
        dtype=dtype,
        device=device,
        num_classes=num_classes,
    )
