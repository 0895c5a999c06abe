"""What CLIP says, by a tiny one of the real class with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from opensora_core.config import FilterConfig
from opensora_core.curation.filters import Place, apply, score
from opensora_core.curation.filters.clip import embedding
from opensora_core.curation.filters.look import look_at
from opensora_core.errors import CheckpointError, DeviceError, WeightsError

from .drawn import moving, write

WIDTH = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefgh"), *"abcdefgh"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(words), "max_position_embeddings": 12},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=WIDTH,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAION's layout: linear layers with dropout between them, which keeps its numbers in the names."""
    path = tmp_path_factory.mktemp("laion") / "linear.pth"
    layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("clip") / "a.mp4", moving())


def test_scores_are_those_of_transformers(model: Path, predictor: Path, clip: Path) -> None:
    settings = FilterConfig(clip_model=str(model), aesthetic_weights=str(predictor), device="cpu")
    found = score(Place(clip, 16, caption="a bad cab"), settings)
    look = look_at(Place(clip, 16), settings)
    plain = transformers.CLIPModel.from_pretrained(model).eval()
    images = transformers.CLIPImageProcessorPil.from_pretrained(model)(
        images=[look.pictures[place] for place in look.firsts], return_tensors="pt"
    )
    words = transformers.CLIPTokenizer.from_pretrained(model)(["a bad cab"], return_tensors="pt")
    with torch.no_grad():
        out = plain(input_ids=words.input_ids, attention_mask=words.attention_mask, **images)
        state = torch.load(predictor, weights_only=True)
        hidden = out.image_embeds @ state["layers.0.weight"].T + state["layers.0.bias"]
        rating = hidden @ state["layers.2.weight"].T + state["layers.2.bias"]
    assert found["similarity"] == pytest.approx(float((out.image_embeds @ out.text_embeds[0]).mean()), abs=1e-5)
    assert found["aesthetic"] == pytest.approx(float(rating.mean()), abs=1e-5)
    mean = out.image_embeds.mean(0)
    assert np.allclose(embedding(look, settings), (mean / mean.norm()).numpy(), atol=1e-5)


def test_a_clip_without_words_has_no_similarity(model: Path, clip: Path) -> None:
    found = score(clip, FilterConfig(clip_model=str(model), device="cpu"))
    assert "similarity" not in found and "aesthetic" not in found and "motion" in found


def test_long_captions_are_cut(model: Path, clip: Path) -> None:
    assert "similarity" in score(
        Place(clip, 16, caption="a b c " * 50), FilterConfig(clip_model=str(model), device="cpu")
    )


def test_what_does_not_fit_is_told(model: Path, predictor: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="aesthetic_weights"):
        score(clip, FilterConfig(clip_model=str(model), aesthetic_weights="none.pth", device="cpu"))
    torch.save({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, tmp_path / "small.pth")
    with pytest.raises(CheckpointError, match="takes embeddings of 5 numbers"):
        score(clip, FilterConfig(clip_model=str(model), aesthetic_weights=str(tmp_path / "small.pth"), device="cpu"))
    torch.save({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match="end in one number"):
        score(clip, FilterConfig(clip_model=str(model), aesthetic_weights=str(tmp_path / "wide.pth"), device="cpu"))
    with pytest.raises(DeviceError):
        score(clip, FilterConfig(clip_model=str(model), device="cuda:77"))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="no CLIP"):
        score(clip, FilterConfig(clip_model=str(tmp_path), device="cpu"))


@pytest.mark.slow
def test_copies_are_found_by_their_embeddings(model: Path, clip: Path, tmp_path: Path) -> None:
    write(tmp_path / "copy.mp4", moving(), crf=30)
    text = "".join(
        json.dumps({"path": str(path), "caption": "a bad cab"}) + "\n" for path in (clip, tmp_path / "copy.mp4")
    )
    (tmp_path / "manifest.jsonl").write_text(text)
    settings = FilterConfig(clip_model=str(model), max_copy_similarity=0.999, device="cpu", workers=1)
    done = list(apply(tmp_path, settings))[-1]
    assert (done.num_kept, done.refused["max_copy_similarity"][0]) == (1, 1)
    (row,) = [json.loads(text) for text in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert row["scores"]["copy_similarity"] > 0.999 and f"a copy of {clip}" in row["reason"]
    (kept,) = [json.loads(text) for text in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert "similarity" in kept["scores"]
