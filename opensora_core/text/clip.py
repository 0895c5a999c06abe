"""CLIP's text tower as a text encoder: one pooled vector for a caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_core.errors import ConfigError
from opensora_core.tensors import Condition
from opensora_core.text.cleaning import CLEANINGS, Step
from opensora_core.text.loading import load_text_model, load_tokenizer


class ClipEncoder:
    """The text tower of a CLIP, such as openai/clip-vit-base-patch32.

    The vector is the hidden state at the end of the text, after the last layer norm and before CLIP's projection. No
    mask is needed: attention is causal, so what follows the end of the text cannot reach it.

    Args:
        model: transformers' CLIPTextModel.
        tokenizer: its tokenizer.
        max_length: tokens that a caption is cut at, its start and end included; 0 is all that the tower was built for.
        clean: what a caption goes through first.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, clean: Step) -> None:
        self.model = model
        self.tokenizer = tokenizer
        positions = int(model.config.max_position_embeddings)
        if max_length > positions:
            raise ConfigError(
                f"a caption of {max_length} tokens is too long for a CLIP of {positions} positions",
                "leave the length at 0 to use them all",
            )
        self.max_length = max_length or positions
        self.clean = clean

    @classmethod
    def from_pretrained(
        cls, path: Path, *, max_length: int, cleaning: str, dtype: torch.dtype, device: torch.device | str
    ) -> ClipEncoder:
        """Read a local folder in transformers' layout; of a whole CLIP only the text tower is loaded.

        Raises:
            WeightsError: there is no such folder.
            CheckpointError: it holds no CLIP, or weights or a tokenizer that are torn or do not fit.
        """
        types = ("clip", "clip_text_model")
        model = load_text_model(path, "CLIPTextModel", model_types=types, dtype=dtype, device=device)
        return cls(model, load_tokenizer(path), max_length=max_length, clean=CLEANINGS[cleaning])

    def encode(self, prompts: list[str]) -> Condition:
        """Prompts -> tokens (B, 1, E), no mask."""
        batch = self.tokenizer(
            [self.clean(prompt) for prompt in prompts],
            max_length=self.max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return self.encode_ids(batch.input_ids)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Condition:
        """Token ids (B, L) int64 -> tokens (B, 1, E)."""
        pooled: Tensor = self.model(input_ids=ids.to(self.model.device)).pooler_output
        return Condition(pooled[:, None])

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt after cleaning and before cutting, its start and end included."""
        return len(self.tokenizer(self.clean(prompt), truncation=False, verbose=False).input_ids)
