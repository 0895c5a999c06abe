"""T5 as a text encoder: one embedding per token, with a mask of those that count, or their mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_core.tensors import Condition
from opensora_core.text.cleaning import CLEANINGS, Step
from opensora_core.text.loading import load_text_model, load_tokenizer

PUBLISHED_LENGTH = 120
"""Tokens of a caption in PixArt-alpha and Open-Sora 1.0."""


class T5Encoder:
    """The encoder half of a T5, such as DeepFloyd's t5-v1_1-xxl.

    Captions are padded to `max_length`, never to the longest of a batch, and attention is masked, so a caption's
    embeddings depend on nothing but the caption. An empty one still has a token, the end of the text.

    Args:
        model: transformers' T5EncoderModel.
        tokenizer: its tokenizer.
        max_length: tokens that a caption is cut at and padded to, the end of the text included; 0 is 120.
        clean: what a caption goes through first.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, clean: Step) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length or PUBLISHED_LENGTH
        self.clean = clean

    @classmethod
    def from_pretrained(
        cls, path: Path, *, max_length: int, cleaning: str, dtype: torch.dtype, device: torch.device | str
    ) -> T5Encoder:
        """Read a local folder in transformers' layout, with `spiece.model` or `tokenizer.json`.

        In float16 the large T5s overflow; transformers keeps the one layer where they do (`wo`) in float32.

        Raises:
            WeightsError: there is no such folder.
            CheckpointError: it holds no T5, or weights or a tokenizer that are torn or do not fit.
        """
        model = load_text_model(path, "T5EncoderModel", model_types=("t5",), dtype=dtype, device=device)
        return cls(model, load_tokenizer(path), max_length=max_length, clean=CLEANINGS[cleaning])

    def encode(self, prompts: list[str]) -> Condition:
        """Prompts -> tokens (B, L, E) and mask (B, L), L = `max_length`; padding has embeddings that the mask hides."""
        batch = self.tokenizer(
            [self.clean(prompt) for prompt in prompts],
            max_length=self.max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return self.encode_ids(batch.input_ids, batch.attention_mask)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Condition:
        """Token ids and mask, both (B, L) int64 -> tokens (B, L, E) and mask (B, L)."""
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return Condition(hidden, mask.bool())

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt after cleaning and before cutting, the end of the text included."""
        return len(self.tokenizer(self.clean(prompt), truncation=False, verbose=False).input_ids)


class PooledT5Encoder(T5Encoder):
    """A T5 whose caption is one vector: the mean over its tokens, for models that take no more."""

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Condition:
        """Token ids and mask, both (B, L) int64 -> tokens (B, 1, E), no mask."""
        whole = super().encode_ids(ids, mask)
        assert whole.mask is not None
        return Condition(pooled(whole.tokens, whole.mask)[:, None])


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean (B, E) of embeddings (B, L, E) over the tokens that a mask (B, L) keeps."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
