from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora_core.errors import ConfigError
from opensora_core.text import load_text_encoder
from opensora_core.text.clip import ClipEncoder


def load(folder: Path, **options: object) -> ClipEncoder:
    encoder = load_text_encoder("clip", folder, cleaning="plain", **options)  # type: ignore[arg-type]
    assert isinstance(encoder, ClipEncoder)
    return encoder


def test_the_vector_is_the_state_at_the_end_of_the_text(clip_folder: Path) -> None:
    encoder = load(clip_folder)
    ids = torch.tensor([encoder.tokenizer("a red ball").input_ids])
    last = encoder.model(ids).last_hidden_state[:, -1]  # unpadded: the end of the text is last
    torch.testing.assert_close(encoder.encode(["a red ball"]).tokens[:, 0], last, atol=1e-5, rtol=1e-5)


def test_the_length_does_not_change_what_fits(clip_folder: Path) -> None:
    assert load(clip_folder).max_length == 24
    short, long = load(clip_folder, max_length=12).encode(["a ball"]), load(clip_folder).encode(["a ball"])
    torch.testing.assert_close(short.tokens, long.tokens, atol=1e-5, rtol=1e-5)


def test_a_cut_caption_keeps_its_end_mark(clip_folder: Path) -> None:
    encoder = load(clip_folder, max_length=6)
    ids = encoder.tokenizer("a red ball rolls over the sand", max_length=6, truncation=True).input_ids
    assert len(ids) == 6 and ids[-1] == encoder.model.config.eos_token_id


def test_more_than_its_positions_is_refused(clip_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"77 tokens .* 24 positions"):
        load(clip_folder, max_length=77)
