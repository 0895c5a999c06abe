"""Latents leave scaled as each family's own pipeline scales them."""

from __future__ import annotations

import pytest
import torch

from opensora_core.errors import ConfigError
from opensora_core.vae import VAES, load_vae
from opensora_core.vae.autoencoder import DiffusersVAE, LatentScale
from tests.core.vae.conftest import tiny
from tests.core.vae.test_contract import Folder, clip

DIFFUSERS_KINDS = [kind for kind in VAES if kind != "patch"]


def raw_latents(vae: DiffusersVAE, video: torch.Tensor) -> torch.Tensor:
    """The posterior's mean as diffusers gives it."""
    if vae.stride[0] > 1:
        return vae.model.encode(video).latent_dist.mean
    frames = video.transpose(1, 2).flatten(0, 1)
    return vae.model.encode(frames).latent_dist.mean.unflatten(0, (len(video), -1)).transpose(1, 2)


def load(kind: str, vae_folder: Folder, **options: object) -> DiffusersVAE:
    vae = load_vae(kind, vae_folder(kind), **options)  # type: ignore[arg-type]
    assert isinstance(vae, DiffusersVAE)
    return vae


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("kl", 0.18215), ("temporal-decoder", 0.18215), ("cogvideox", 1.15258426), ("hunyuan", 0.476986)],
)
def test_one_published_factor(kind: str, factor: float, vae_folder: Folder) -> None:
    vae = load(kind, vae_folder)
    video = clip(vae)
    torch.testing.assert_close(vae.encode(video), raw_latents(vae, video) * factor, atol=1e-4, rtol=1e-4)


def test_wan_is_normalised_by_the_statistics_of_its_config(vae_folder: Folder) -> None:
    vae = load("wan", vae_folder)
    video = clip(vae)
    mean, std = (torch.tensor(vae.model.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(vae.encode(video), (raw_latents(vae, video) - mean) / std, atol=1e-4, rtol=1e-4)


def test_ltx_is_normalised_by_the_statistics_among_its_weights(vae_folder: Folder) -> None:
    vae = load("ltx", vae_folder)
    assert vae.model.latents_std.std() > 0, "the statistics were not loaded"
    video = clip(vae)
    mean, std = (getattr(vae.model, name).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(vae.encode(video), (raw_latents(vae, video) - mean) / std, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", DIFFUSERS_KINDS)
def test_decoding_undoes_the_scaling(kind: str, vae_folder: Folder) -> None:
    vae = load(kind, vae_folder)
    latents = torch.randn(1, *vae.latent_shape(*clip(vae).shape[2:]))
    torch.testing.assert_close(vae.scale.apply(vae.scale.undo(latents)), latents, atol=1e-5, rtol=1e-5)
    other = load(kind, vae_folder, scaling_factor=0.5)
    same = other.scale.apply(vae.scale.undo(latents))
    torch.testing.assert_close(other.decode(same), vae.decode(latents), atol=1e-4, rtol=1e-4)


def test_another_factor_replaces_the_published_one(vae_folder: Folder) -> None:
    video = clip(vae := load("kl", vae_folder))
    halved = load("kl", vae_folder, scaling_factor=0.18215 / 2)
    torch.testing.assert_close(halved.encode(video), vae.encode(video) / 2)


def test_a_shift_is_subtracted_before_scaling() -> None:
    model = tiny("kl")
    model.register_to_config(shift_factor=0.25, scaling_factor=2.0)
    raw = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(LatentScale.of(model, 0.0).apply(raw), (raw - 0.25) * 2)


def test_ltx_with_a_decoder_that_is_told_the_noise_level() -> None:
    from diffusers import AutoencoderKLLTXVideo

    from opensora_core.vae.causal import LTXVAE

    widths = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    layers = {"layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1)}
    torch.manual_seed(0)
    model = AutoencoderKLLTXVideo(latent_channels=6, **widths, **layers, timestep_conditioning=True).eval()
    latents = torch.randn(2, 6, 1, 1, 1)
    whole, sliced = LTXVAE(model).decode(latents), LTXVAE(model, slicing=True).decode(latents)
    assert whole.shape == (2, 3, 1, 32, 32)
    torch.testing.assert_close(sliced, whole, atol=1e-4, rtol=1e-4)


def test_tiling_cuts_large_frames_only(vae_folder: Folder) -> None:
    vae, tiled = load("kl", vae_folder), load("kl", vae_folder, tiling=True)
    small, large = torch.rand(1, 3, 1, 32, 32), torch.rand(1, 3, 1, 32, 64)
    torch.testing.assert_close(tiled.encode(small), vae.encode(small))
    latents = vae.encode(large)
    assert tiled.encode(large).shape == latents.shape
    assert not torch.allclose(tiled.encode(large), latents), "the tiles are seen at their seams"
    assert tiled.decode(latents).shape == large.shape


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("temporal-decoder", {"tiling": True}, "cannot be tiled"),
        ("patch", {"tiling": True}, "cannot be tiled"),
        ("patch", {"scaling_factor": 0.5}, "0.5"),
        ("kl", {"micro_batch": 0}, "micro_batch = 0"),
        ("kl", {"scaling_factor": -1.0}, "-1.0"),
    ],
)
def test_options_that_a_kind_does_not_have(
    kind: str, options: dict[str, object], words: str, vae_folder: Folder
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_vae(kind, vae_folder(kind), **options)  # type: ignore[arg-type]
    assert caught.value.hint
