"""Causal 3-D autoencoders of diffusers: CogVideoX, LTX, Wan, Hunyuan.

They compress time as well: the first frame becomes a latent frame by itself, every further `stride[0]` frames one more,
so they take 1 + k * stride[0] frames (CogVideoX every second of those).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_core.vae.autoencoder import DiffusersVAE, halvings
from opensora_core.vae.loading import load_autoencoder


class CausalVAE(DiffusersVAE):
    """A causal 3-D autoencoder. Videos are never split along time by the micro-batch."""

    class_name: str

    @classmethod
    def from_pretrained(
        cls, path: Path, *, dtype: torch.dtype, device: torch.device | str, **options: Any
    ) -> CausalVAE:
        """Read a folder; `options` are those of `DiffusersVAE`.

        Raises:
            WeightsError: there is no such folder.
            CheckpointError: it holds another class, or weights that are torn or do not fit.
        """
        return cls(load_autoencoder(path, cls.class_name, dtype=dtype, device=device), **options)

    def __init__(self, model: Any, **options: Any) -> None:
        time, space = self._strides(model)
        super().__init__(
            model,
            stride=(time, space, space),
            latent_channels=self._latent_channels(model),
            causal_step=self._causal_step(time),
            **options,
        )

    @torch.no_grad()
    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video (B, 3, T, H, W) in [-1, 1] -> mean and deviation of its latents, each (B, C, T', h, w).

        Raises:
            InputError: the size or the number of frames does not divide.
        """
        self.latent_shape(*video.shape[2:])
        return self._moments(video, max(1, self.micro_batch // video.shape[2]))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, T', h, w) -> video (B, 3, T, H, W), about [-1, 1]."""
        chunk = max(1, self.micro_batch // self.num_frames(latents.shape[2]))
        return self._decode(latents, chunk, self._decode_videos)

    def _decode_videos(self, latents: Tensor) -> Tensor:
        video: Tensor = self.model.decode(latents).sample
        return video

    def _strides(self, model: Any) -> tuple[int, int]:
        return int(model.temporal_compression_ratio), int(model.spatial_compression_ratio)

    def _latent_channels(self, model: Any) -> int:
        return int(model.config.latent_channels)

    def _causal_step(self, time_stride: int) -> int:
        return time_stride


class HunyuanVAE(CausalVAE):
    """AutoencoderKLHunyuanVideo."""

    class_name = "AutoencoderKLHunyuanVideo"


class CogVideoXVAE(CausalVAE):
    """AutoencoderKLCogVideoX. It takes 1 + 8k frames: its decoder tells a first frame by an odd number of latents."""

    class_name = "AutoencoderKLCogVideoX"

    def _strides(self, model: Any) -> tuple[int, int]:
        return int(model.config.temporal_compression_ratio), halvings(model.config.block_out_channels)

    def _causal_step(self, time_stride: int) -> int:
        return 2 * time_stride


class LTXVAE(CausalVAE):
    """AutoencoderKLLTXVideo. A decoder that is told a noise level is told zero: the latents are taken as they are."""

    class_name = "AutoencoderKLLTXVideo"

    def _decode_videos(self, latents: Tensor) -> Tensor:
        noise_level = latents.new_zeros(len(latents)) if self.model.config.timestep_conditioning else None
        video: Tensor = self.model.decode(latents, noise_level).sample
        return video


class WanVAE(CausalVAE):
    """AutoencoderKLWan. It clamps what it decodes to [-1, 1] by itself."""

    class_name = "AutoencoderKLWan"

    def _strides(self, model: Any) -> tuple[int, int]:
        return int(model.config.scale_factor_temporal), int(model.config.scale_factor_spatial)

    def _latent_channels(self, model: Any) -> int:
        return int(model.config.z_dim)
