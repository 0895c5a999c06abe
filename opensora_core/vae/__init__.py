"""Video <-> latents: autoencoders behind one protocol.

`VAES` is the table of kinds; a new one is a file and a line here. Nothing of diffusers is imported until one is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opensora_core.errors import ConfigError, nearest
from opensora_core.vae.causal import LTXVAE, CogVideoXVAE, HunyuanVAE, WanVAE
from opensora_core.vae.kl import FrameVAE
from opensora_core.vae.protocol import VideoVAE
from opensora_core.vae.temporal import TemporalDecoderVAE

__all__ = ["VAES", "VideoVAE", "load_vae"]


def _patch(
    path: Path, *, dtype: torch.dtype, device: torch.device | str, scaling_factor: float, tiling: bool, **options: Any
) -> VideoVAE:
    from opensora_core.vae.patch import PatchVAE

    if scaling_factor:
        raise ConfigError(
            f"vae.scaling_factor = {scaling_factor} does not fit a patch VAE: its weights carry their own statistics",
            "leave it at 0",
        )
    if tiling:
        raise ConfigError("a patch VAE cannot be tiled", "use --set vae.slicing=true to save memory")
    if options.pop("slicing"):
        options["micro_batch"] = 1
    return PatchVAE.from_pretrained(path, **options).to(device=device, dtype=dtype)


VAES: dict[str, Callable[..., VideoVAE]] = {
    "kl": FrameVAE.from_pretrained,
    "temporal-decoder": TemporalDecoderVAE.from_pretrained,
    "cogvideox": CogVideoXVAE.from_pretrained,
    "ltx": LTXVAE.from_pretrained,
    "wan": WanVAE.from_pretrained,
    "hunyuan": HunyuanVAE.from_pretrained,
    "patch": _patch,
}


def load_vae(
    kind: str,
    path: Path,
    *,
    scaling_factor: float = 0.0,
    micro_batch: int = 16,
    sample_posterior: bool = True,
    slicing: bool = False,
    tiling: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VideoVAE:
    """Load a VAE from a local folder.

    Args:
        kind: a name of `VAES`.
        path: a folder with `config.json` and weights in diffusers' layout, or a diffusers pipeline with a `vae` folder.
        scaling_factor: of the latents; 0 is the one that the weights were published with.
        micro_batch: frames that run through the model at a time; changes memory and speed, never the result.
        sample_posterior: whether `encode` uses the noise it is given.
        slicing: the smallest micro-batch there is: one frame, or one video where frames depend on each other.
        tiling: cut large frames into tiles; saves memory, changes the result slightly.
        dtype: of the weights.
        device: where they are put.

    Raises:
        ConfigError: an unknown kind, or an option that this kind does not have.
        WeightsError: there is no such folder.
        CheckpointError: the folder holds something else, or weights that are torn or do not fit.
    """
    if kind not in VAES:
        raise ConfigError(f"unknown kind of VAE '{kind}'", nearest(kind, VAES))
    return VAES[kind](
        Path(path),
        scaling_factor=scaling_factor,
        micro_batch=micro_batch,
        sample_posterior=sample_posterior,
        slicing=slicing,
        tiling=tiling,
        dtype=dtype,
        device=device,
    )
