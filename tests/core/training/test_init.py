"""What `--init` takes: published image weights, runs of Open-Sora 1.0's own trainer, models of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_core import components
from opensora_core.config import Config, with_settings
from opensora_core.errors import CheckpointError
from opensora_core.models import LatentTransformer
from tests.core.exported import SETTINGS, randomised


def config(**changes: Any) -> Config:
    """A tiny STDiT in Open-Sora's own layout of captions."""
    small = {**SETTINGS, "model.patch_size": (1, 2, 2), "model.weights": ""}
    return with_settings(Config(), {**small, **{name.replace("__", "."): value for name, value in changes.items()}})


def weights(settings: Config) -> dict[str, Tensor]:
    """Random weights, none of them zero."""
    return randomised(components.empty_model(settings)).state_dict()


def started(path: Path, **changes: Any) -> LatentTransformer:
    return components.build_initial_model(config(train__init=str(path), **changes))


def test_images_start_videos(tmp_path: Path) -> None:
    pixart = weights(config(model__family="pixart", video__num_frames=1))
    published = {**pixart, "pos_embed": torch.zeros(1, 16, 64)}
    published["x_embedder.proj.weight"] = pixart["x_embedder.proj.weight"].squeeze(2)
    torch.save({"state_dict": published}, tmp_path / "PixArt.pth")
    model = started(tmp_path / "PixArt.pth")
    state = model.state_dict()
    assert all(torch.equal(state[name], pixart[name]) for name in pixart)
    assert all(not state[name].any() for name in state if "attn_temp.proj" in name)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    with pytest.raises(CheckpointError, match=r"PixArt\.pth"):
        started(tmp_path / "PixArt.pth", model__depth=3)


def test_classes_start_captions(tmp_path: Path) -> None:
    dit = {"model__family": "dit", "model__learn_sigma": True}
    classes = weights(config(**dit, model__condition="class", model__num_classes=10, text__kind="class"))
    torch.save(classes, tmp_path / "DiT.pt")
    state = started(tmp_path / "DiT.pt", **dit, model__condition="pooled", model__caption_length=1).state_dict()
    assert torch.equal(state["blocks.1.attn.qkv.weight"], classes["blocks.1.attn.qkv.weight"])
    assert "y_embedder.y_proj.fc1.weight" in state


def published_run(folder: Path, state: dict[str, Tensor], average: dict[str, Tensor] | None) -> Path:
    """The folder of a checkpoint as Open-Sora 1.0's trainer writes it (FACTS 9.2): shards in bf16, ema.pt in fp32."""
    tables = {"pos_embed": torch.zeros(1, 99, 64), "pos_embed_temporal": torch.zeros(1, 7, 64)}
    shards = folder / "model"
    shards.mkdir(parents=True)
    names = sorted({**state, **tables})
    places = {name: f"pytorch_model-{1 + number % 2:05}.bin" for number, name in enumerate(names)}
    for shard in set(places.values()):
        held = {name: {**state, **tables}[name].to(torch.bfloat16) for name in names if places[name] == shard}
        torch.save(held, shards / shard)
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "running_states.json").write_text(json.dumps({"epoch": 0, "step": 10, "global_step": 10}))
    (folder / "optimizer").mkdir()
    if average is not None:
        torch.save({**average, **tables}, folder / "ema.pt")
    return folder


def test_a_run_of_the_published_trainer_starts_one(tmp_path: Path) -> None:
    settings = config()
    state = weights(settings)
    average = {name: tensor + 1 for name, tensor in state.items()}
    whole = published_run(tmp_path / "epoch0-global_step10", state, average)
    shards = published_run(tmp_path / "epoch1-global_step20", state, None)
    name = "blocks.1.attn_temp.qkv.weight"
    for path, expected in (
        (whole, average[name]),
        (whole / "ema.pt", average[name]),
        (whole / "model", state[name].to(torch.bfloat16).float()),
        (shards, state[name].to(torch.bfloat16).float()),
    ):
        assert torch.equal(started(path).state_dict()[name], expected), path


def test_nothing_is_a_start_as_well_and_always_the_same() -> None:
    a, b = (components.build_initial_model(config()).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = components.build_initial_model(config(train__seed=1)).state_dict()
    assert not torch.equal(a["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
