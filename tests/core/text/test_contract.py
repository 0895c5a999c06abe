"""What every text encoder of the table does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora_core.errors import CheckpointError, ConfigError, WeightsError
from opensora_core.text import TEXT_ENCODERS, TextEncoder, load_text_encoder

every_kind = pytest.mark.parametrize("kind", TEXT_ENCODERS)
every_text_kind = pytest.mark.parametrize("kind", ["t5", "t5-pooled", "clip"])


@pytest.fixture
def encoder(kind: str, t5_folder: Path, clip_folder: Path) -> TextEncoder:
    if kind == "class":
        return load_text_encoder(kind, None, num_classes=101)
    folder, length = (clip_folder, 0) if kind == "clip" else (t5_folder, 20)
    return load_text_encoder(kind, folder, max_length=length, cleaning="plain")


def prompts_for(kind: str) -> list[str]:
    return ["yo yo", "Archery", "7"] if kind == "class" else ["a red ball", "the sea at night, it snows", ""]


@every_kind
def test_a_prompt_does_not_depend_on_its_batch(kind: str, encoder: TextEncoder) -> None:
    prompts = prompts_for(kind)
    together = encoder.encode(prompts)
    assert len(together) == len(prompts)
    for index, prompt in enumerate(prompts):
        alone = encoder.encode([prompt])
        torch.testing.assert_close(alone.tokens, together.tokens[index : index + 1], atol=1e-5, rtol=1e-5)
        if together.mask is not None:
            assert alone.mask is not None and torch.equal(alone.mask, together.mask[index : index + 1])


@every_kind
def test_different_prompts_differ(kind: str, encoder: TextEncoder) -> None:
    first, second, third = encoder.encode(prompts_for(kind)).tokens.float()
    assert not torch.equal(first, second) and not torch.equal(second, third)


@every_kind
def test_the_shapes_are_those_of_condition(kind: str, encoder: TextEncoder) -> None:
    condition = encoder.encode(prompts_for(kind))
    assert condition.size is None and not condition.tokens.requires_grad
    if kind == "class":
        assert condition.tokens.shape == (3,) and condition.tokens.dtype == torch.int64 and condition.mask is None
    elif kind in ("clip", "t5-pooled"):
        assert condition.tokens.shape == (3, 1, 16) and condition.mask is None
    else:
        assert condition.tokens.shape == (3, 20, 16)
        assert condition.mask is not None and condition.mask.shape == (3, 20) and condition.mask.dtype == torch.bool


@every_text_kind
def test_tokens_are_counted_before_cutting(kind: str, encoder: TextEncoder) -> None:
    long = "a red ball " * 50
    assert encoder.count_tokens(long) > 50 > encoder.max_length
    assert encoder.encode([long]).tokens.isfinite().all()
    assert encoder.count_tokens("a") < encoder.count_tokens("a red ball") < encoder.max_length


@every_text_kind
def test_an_empty_prompt_has_special_tokens_only(kind: str, encoder: TextEncoder) -> None:
    assert encoder.count_tokens("") == (2 if kind == "clip" else 1) == encoder.count_tokens("  \n ")
    assert encoder.encode([""]).tokens.isfinite().all()


@every_text_kind
def test_dtype_is_that_of_the_embeddings(kind: str, t5_folder: Path, clip_folder: Path) -> None:
    folder = clip_folder if kind == "clip" else t5_folder
    full = load_text_encoder(kind, folder, dtype=torch.float32).encode(["a red ball"]).tokens
    half = load_text_encoder(kind, folder, dtype=torch.bfloat16).encode(["a red ball"]).tokens
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.1)


@every_text_kind
def test_another_folder_is_refused_with_what_it_holds(
    kind: str, t5_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    other, held = (t5_folder, "t5") if kind == "clip" else (clip_folder, "clip")
    with pytest.raises(CheckpointError, match=f"of type {held}"):
        load_text_encoder(kind, other)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_text_encoder(kind, tmp_path)
    with pytest.raises(WeightsError, match="missing"):
        load_text_encoder(kind, tmp_path / "missing")
    with pytest.raises(ConfigError):
        load_text_encoder(kind, None)


@every_text_kind
def test_torn_weights_are_refused(kind: str, t5_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    for file in (clip_folder if kind == "clip" else t5_folder).iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_text_encoder(kind, tmp_path)


def test_unknown_words_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="klip") as caught:
        load_text_encoder("klip", tmp_path)
    assert "clip" in caught.value.hint
    with pytest.raises(ConfigError, match="plane") as caught:
        load_text_encoder("t5", tmp_path, cleaning="plane")
    assert "plain" in caught.value.hint
    with pytest.raises(ConfigError, match="-3 tokens"):
        load_text_encoder("t5", tmp_path, max_length=-3)
