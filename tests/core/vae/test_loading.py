"""Folders that are not what they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_core.errors import CheckpointError
from opensora_core.vae import load_vae
from tests.core.vae.test_contract import Folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(vae_folder: Folder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vae_folder("kl"), tmp_path / "copy"))


def test_the_vae_of_a_pipeline_is_found(vae_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(vae_folder("kl"), tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert load_vae("kl", tmp_path).latent_channels == 4


def test_weights_that_lack_a_tensor_are_refused_by_name(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    weights.pop("decoder.conv_in.bias")
    save_file(weights, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.conv_in\.bias"):
        load_vae("kl", copy)


def test_weights_with_a_stranger_are_refused_by_name(copy: Path) -> None:
    save_file({**load_file(copy / WEIGHTS), "stranger": torch.zeros(1)}, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match="1 unexpected: stranger"):
        load_vae("kl", copy)


def test_weights_of_another_width_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"block_out_channels": [4, 4, 4, 4]}))
    with pytest.raises(CheckpointError, match="AutoencoderKL"):
        load_vae("kl", copy)


def test_a_config_that_names_no_class_is_refused(copy: Path) -> None:
    for text in ("{}", "[]", "not json"):
        (copy / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="names no class"):
            load_vae("kl", copy)


def test_a_pickle_of_tensors_is_read_and_any_other_is_not_run(copy: Path, tmp_path: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    torch.save(weights, copy / "diffusion_pytorch_model.bin")
    assert load_vae("kl", copy).latent_channels == 4

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "harmed",)  # type: ignore[return-value]

    torch.save(weights | {"stranger": Malicious()}, copy / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError):
        load_vae("kl", copy)
    assert not (tmp_path / "harmed").exists()
