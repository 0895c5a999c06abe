"""Image autoencoders, frame by frame: diffusers' AutoencoderKL, of which sd-vae-ft-ema and -mse are two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from opensora_core.vae.autoencoder import DiffusersVAE, halvings
from opensora_core.vae.loading import load_autoencoder


class FrameVAE(DiffusersVAE):
    """AutoencoderKL on every frame by itself: stride (1, s, s)."""

    frames_apart = True

    @classmethod
    def from_pretrained(cls, path: Path, *, dtype: torch.dtype, device: torch.device | str, **options: Any) -> FrameVAE:
        """Read a folder; `options` are those of `DiffusersVAE`.

        Raises:
            WeightsError: there is no such folder.
            CheckpointError: it holds no AutoencoderKL, or one whose weights are torn or do not fit.
        """
        return cls(load_autoencoder(path, "AutoencoderKL", dtype=dtype, device=device), **options)

    def __init__(self, model: Any, **options: Any) -> None:
        side = halvings(model.config.block_out_channels)
        super().__init__(model, stride=(1, side, side), latent_channels=model.config.latent_channels, **options)

    @torch.no_grad()
    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video (B, 3, T, H, W) in [-1, 1] -> mean and deviation of its latents, each (B, C, T, h, w).

        Raises:
            InputError: the size of the video does not divide.
        """
        self.latent_shape(*video.shape[2:])
        mean, std = self._moments(_to_frames(video), self.micro_batch)
        return _to_video(mean, len(video)), _to_video(std, len(video))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) -> video (B, 3, T, H, W), about [-1, 1], not clamped."""
        frames = self._decode(_to_frames(latents), self.micro_batch, lambda part: self.model.decode(part).sample)
        return _to_video(frames, len(latents))


def _to_frames(video: Tensor) -> Tensor:
    return rearrange(video, "b c t h w -> (b t) c h w")


def _to_video(frames: Tensor, batch: int) -> Tensor:
    return rearrange(frames, "(b t) c h w -> b c t h w", b=batch)
