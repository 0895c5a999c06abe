"""A model of ours, tiny and untrained, in the layout that a training run exports."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from opensora_core import components
from opensora_core.config import Config, to_dict, with_settings
from opensora_core.files import write_manifest
from opensora_core.presets import preset
from opensora_core.training.world import make_text_encoder
from opensora_core.vae.patch import PatchVAE

SETTINGS = {
    "video.num_frames": 4,
    "video.height": 32,
    "video.width": 48,
    "model.family": "stdit",  # the bundled model is a DiT; what most tests are about is this
    "model.condition": "text",
    "model.qk_norm": False,
    "text.kind": "t5",
    "model.in_channels": 4,
    "model.hidden_size": 64,  # a multiple of 32, as in every preset: activations come in vectors of that length
    "model.depth": 2,
    "model.num_heads": 4,
    "model.patch_size": (2, 2, 2),
    "model.caption_channels": 16,
    "model.caption_length": 12,
    "sampling.steps": 3,
    "runtime.device": "cpu",
}


def tiny_config(folder: Path) -> Config:
    """The settings as `osora sample --model FOLDER` resolves them."""
    return with_settings(preset("tiny"), {**SETTINGS, "model.weights": str(folder)})


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of which none is zero, so that every layer has a say."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def export_tiny(folder: Path) -> Path:
    """Write `config.json`, `model.safetensors`, `vae/`, `text/` and a manifest."""
    config = with_settings(preset("tiny"), SETTINGS)
    torch.manual_seed(0)
    PatchVAE(latent_channels=4, encoder_width=8, encoder_depth=1, decoder_width=8, decoder_depth=1).save_pretrained(
        folder / "vae", torch.float32
    )
    make_text_encoder(folder / "text", width=16, max_length=12, seed=0, num_captions=100)
    save_file(randomised(components.empty_model(config)).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    write_manifest(folder)
    return folder
