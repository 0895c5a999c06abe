"""Tiny random VAEs of every kind, saved as their publishers save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn


def tiny(kind: str) -> nn.Module:
    """A random model of a kind of `VAES` with the published strides, as narrow as its class allows."""
    import diffusers

    torch.manual_seed(0)
    image = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "latent_channels": 4}
    if kind == "kl":
        model = diffusers.AutoencoderKL(
            **image,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            sample_size=32,
        )
    elif kind == "temporal-decoder":
        model = diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
        )
    elif kind == "cogvideox":
        model = diffusers.AutoencoderKLCogVideoX(**image | {"latent_channels": 6}, norm_num_groups=4)
    elif kind == "ltx":
        model = diffusers.AutoencoderKLLTXVideo(
            latent_channels=6,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        )
        model.latents_mean.normal_()
        model.latents_std.uniform_(0.5, 2)
    elif kind == "wan":
        model = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    elif kind == "hunyuan":
        model = diffusers.AutoencoderKLHunyuanVideo(
            block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=6, norm_num_groups=4
        )
    elif kind == "patch":
        from opensora_core.vae.patch import PatchVAE

        model = PatchVAE(encoder_width=8, encoder_depth=1, decoder_width=8, decoder_depth=1)
    else:
        raise KeyError(f"a new kind of VAE, {kind}, needs a tiny model here")
    return model


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("vaes")

    def folder(kind: str) -> Path:
        path = root / kind
        if not path.exists():
            tiny(kind).save_pretrained(path)
        return path

    return folder
