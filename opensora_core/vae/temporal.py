"""Stable Video Diffusion's autoencoder: frames are encoded one by one, and decoded with an eye on their neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from opensora_core.vae.kl import FrameVAE
from opensora_core.vae.loading import load_autoencoder


class TemporalDecoderVAE(FrameVAE):
    """AutoencoderKLTemporalDecoder. A video is decoded in one piece, so that no seam depends on the micro-batch."""

    frames_apart = False

    @classmethod
    def from_pretrained(
        cls, path: Path, *, dtype: torch.dtype, device: torch.device | str, **options: Any
    ) -> TemporalDecoderVAE:
        """Read a folder; `options` are those of `DiffusersVAE`.

        Raises:
            WeightsError: there is no such folder.
            CheckpointError: it holds no AutoencoderKLTemporalDecoder, or one whose weights are torn or do not fit.
        """
        return cls(load_autoencoder(path, "AutoencoderKLTemporalDecoder", dtype=dtype, device=device), **options)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) -> video (B, 3, T, H, W), about [-1, 1], not clamped."""
        num_frames = latents.shape[2]

        def run(videos: Tensor) -> Tensor:
            frames = rearrange(videos, "b c t h w -> (b t) c h w")
            decoded: Tensor = self.model.decode(frames, num_frames=num_frames).sample
            return rearrange(decoded, "(b t) c h w -> b c t h w", t=num_frames)

        return self._decode(latents, max(1, self.micro_batch // num_frames), run)
