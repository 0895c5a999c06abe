from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_core.errors import CheckpointError
from opensora_core.text import load_text_encoder
from opensora_core.text.t5 import T5Encoder


def load(folder: Path, **options: object) -> T5Encoder:
    encoder = load_text_encoder("t5", folder, **options)  # type: ignore[arg-type]
    assert isinstance(encoder, T5Encoder)
    return encoder


def test_the_published_length_is_120(t5_folder: Path) -> None:
    assert load(t5_folder).max_length == 120
    assert load(t5_folder).encode(["a"]).tokens.shape[1] == 120


def test_the_mask_covers_the_caption_and_its_end(t5_folder: Path) -> None:
    encoder = load(t5_folder, max_length=20)
    mask = encoder.encode(["a red ball", "", "a red ball " * 20]).mask
    assert mask is not None
    assert mask.sum(1).tolist() == [encoder.count_tokens("a red ball"), 1, 20]
    assert mask[0, : int(mask[0].sum())].all(), "padding is on the right"


def test_the_pooled_caption_is_the_mean_of_its_tokens(t5_folder: Path) -> None:
    whole = load(t5_folder, max_length=20).encode(["a red ball", "the sea"])
    vectors = load_text_encoder("t5-pooled", t5_folder, max_length=20).encode(["a red ball", "the sea"]).tokens
    assert whole.mask is not None
    for tokens, mask, vector in zip(whole.tokens, whole.mask, vectors, strict=True):
        torch.testing.assert_close(vector[0], tokens[mask].mean(0))


def test_padding_does_not_reach_the_caption(t5_folder: Path) -> None:
    count = load(t5_folder).count_tokens("a red ball")
    short, long = (load(t5_folder, max_length=length).encode(["a red ball"]) for length in (count, 60))
    torch.testing.assert_close(short.tokens, long.tokens[:, :count], atol=1e-5, rtol=1e-5)


def test_a_cut_caption_keeps_its_end_mark(t5_folder: Path) -> None:
    encoder = load(t5_folder, max_length=5)
    ids = encoder.tokenizer(["a red ball " * 9], max_length=5, truncation=True).input_ids[0]
    assert len(ids) == 5 and ids[-1] == encoder.tokenizer("").input_ids[0]
    assert encoder.encode(["a red ball " * 9]).mask.all()  # type: ignore[union-attr]


def test_a_tokenizer_json_is_taken_as_it_is(t5_folder: Path) -> None:
    from tokenizers import Tokenizer

    exact, encoder = Tokenizer.from_file(str(t5_folder / "tokenizer.json")), load(t5_folder)
    for caption in ("A Red BALL", "猫 at night", "①²"):
        assert encoder.tokenizer(caption).input_ids == exact.encode(caption).ids


def test_the_layout_of_deepfloyd(deepfloyd_folder: Path) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(deepfloyd_folder / "spiece.model"))
    encoder = load(deepfloyd_folder, max_length=20)
    for caption in ("a red ball", "a blue cube on the sand", ""):
        assert encoder.tokenizer(caption).input_ids == [*pieces.encode(caption), 1]
    condition = encoder.encode(["a red ball"])
    assert condition.tokens.shape == (1, 20, 16) and condition.tokens.isfinite().all()


def test_the_encoder_of_a_whole_t5_is_the_encoder_alone(t5_folder: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = Path(shutil.copytree(t5_folder, tmp_path / "whole"))
    (folder / "model.safetensors").unlink()
    whole = T5ForConditionalGeneration(T5Config.from_pretrained(t5_folder, is_encoder_decoder=True))
    whole.save_pretrained(folder)
    encoder = load(folder, max_length=10)
    torch.testing.assert_close(encoder.model.shared.weight, whole.shared.weight)
    assert encoder.encode(["a red ball"]).tokens.isfinite().all()


def test_half_precision_keeps_the_layer_that_overflows_in_full(t5_folder: Path) -> None:
    dtypes = {
        name.rpartition(".")[0].rpartition(".")[2]: p.dtype
        for name, p in load(t5_folder, dtype=torch.float16).model.named_parameters()
    }
    assert dtypes.pop("wo") == torch.float32
    assert set(dtypes.values()) == {torch.float16}


def test_the_text_encoder_of_a_pipeline_is_found(t5_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(t5_folder, tmp_path / "text_encoder", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(t5_folder / "tokenizer.json", tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text("{}")
    torch.testing.assert_close(load(tmp_path).encode(["a"]).tokens, load(t5_folder).encode(["a"]).tokens)


def test_cleaning_comes_before_the_tokens(t5_folder: Path) -> None:
    published, plain = load(t5_folder, cleaning="published"), load(t5_folder, cleaning="plain")
    assert published.count_tokens("一只猫") == 1, "the published rules delete Chinese"
    assert plain.count_tokens("一只猫") > 1
    assert not torch.equal(plain.encode(["一只猫"]).tokens, plain.encode([""]).tokens)
    assert torch.equal(published.encode(["一只猫"]).tokens, published.encode([""]).tokens)
    torch.testing.assert_close(published.encode(["A (red) ball"]).tokens, plain.encode(["a red ball"]).tokens)


@pytest.fixture
def copy(t5_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(t5_folder, tmp_path / "copy"))


def test_weights_that_lack_a_tensor_are_refused_by_name(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("wi_0.weight"))
    weights.pop(name)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 missing: {name}"):
        load(copy)


def test_a_missing_tokenizer_says_what_to_put_where(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer") as caught:
        load(copy)
    assert "tokenizer.json" in caught.value.hint


def test_a_tokenizer_without_an_end_mark_is_refused(copy: Path) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    with pytest.raises(CheckpointError, match="end of a text"):
        load(copy)


def test_a_config_that_names_no_type_is_refused(copy: Path) -> None:
    for text in ("{}", "[]", "not json"):
        (copy / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="names no model_type"):
            load(copy)
