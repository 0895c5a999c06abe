"""A small video autoencoder that convolves at latent resolution: the one the bundled model was trained with.

Each frame is cut into 8x8 patches by a pixel-unshuffle and every convolution then runs on the 8x smaller grid, where it
costs a 64th. The encoder is kept lighter than the decoder because training encodes each clip and never decodes it; at
depth 0 it is one linear map of each patch, as good here, next to free, and blind to what happens in other patches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from opensora_core.errors import CheckpointError
from opensora_core.vae.autoencoder import sampled
from opensora_core.vae.shapes import latent_grid

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class _Conv(nn.Module):
    """A convolution whose kernel is kept as the matrix (out, in * size * size) that it is.

    As a matrix it can be trained by Muon, which needs far fewer steps here than AdamW.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__()
        self.shape = (out_channels, in_channels, size, size)
        fan_in = in_channels * size * size
        self.weight = nn.Parameter(torch.randn(out_channels, fan_in) / fan_in**0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.view(self.shape), self.bias, padding=self.shape[-1] // 2)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = _Conv(width, width, 3)
        self.conv2 = _Conv(width, width, 3)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))
        return result


def _tower(in_channels: int, width: int, depth: int, out_channels: int) -> nn.Sequential:
    blocks = [_ResidualBlock(width) for _ in range(depth)]
    return nn.Sequential(
        _Conv(in_channels, width, 3), *blocks, nn.GroupNorm(8, width), nn.SiLU(), _Conv(width, out_channels, 1)
    )


class _LinearEncoder(nn.Module):
    """Patches (N, P, h, w) -> mean and log-variance (N, 2C, h, w): each patch for itself, the variance a constant."""

    def __init__(self, pixels: int, latent_channels: int) -> None:
        super().__init__()
        self.mean = _Conv(pixels, latent_channels, 1)
        self.log_variance = nn.Parameter(torch.zeros(latent_channels))

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.mean(x)
        return torch.cat([mean, self.log_variance[:, None, None].expand_as(mean)], dim=1)


class PatchVAE(nn.Module):
    """Per-frame KL autoencoder over patches, with the interface of `VideoVAE`.

    Args:
        latent_channels: C of the latents.
        patch: pixels of a patch's side, which is the spatial stride.
        encoder_width, encoder_depth, decoder_width, decoder_depth: channels and residual blocks of the two towers; an
            encoder of depth 0 is linear.
        latents_mean, latents_std: of the raw posterior mean per channel, taken after training; what leaves `encode` is
            normalised by them, so a denoiser sees zero mean and unit variance.
        micro_batch: frames per pass.
        sample_posterior: draw from the posterior instead of taking its mean.
    """

    frames_apart = True

    def __init__(
        self,
        *,
        latent_channels: int = 8,
        patch: int = 8,
        encoder_width: int = 96,
        encoder_depth: int = 0,
        decoder_width: int = 128,
        decoder_depth: int = 4,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        micro_batch: int = 256,
        sample_posterior: bool = True,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "latent_channels": latent_channels,
            "patch": patch,
            "encoder_width": encoder_width,
            "encoder_depth": encoder_depth,
            "decoder_width": decoder_width,
            "decoder_depth": decoder_depth,
        }
        self.latent_channels = latent_channels
        self.stride = (1, patch, patch)
        self.micro_batch = micro_batch
        self.sample_posterior = sample_posterior
        pixels = 3 * patch * patch
        if encoder_depth:
            self.encoder_blocks: nn.Module = _tower(pixels, encoder_width, encoder_depth, 2 * latent_channels)
        else:
            self.encoder_blocks = _LinearEncoder(pixels, latent_channels)
        self.decoder_blocks = _tower(latent_channels, decoder_width, decoder_depth, pixels)
        self.latents_mean = latents_mean or [0.0] * latent_channels
        self.latents_std = latents_std or [1.0] * latent_channels

    # ------------------------------------------------------------------ one batch of frames, used in training it

    def posterior(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (N, 3, H, W) in [-1, 1] -> mean and log-variance (N, C, h, w) of the raw posterior."""
        mean, log_variance = self.encoder_blocks(F.pixel_unshuffle(frames, self.stride[1])).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Raw latents (N, C, h, w) -> frames (N, 3, H, W)."""
        return F.pixel_shuffle(self.decoder_blocks(latents), self.stride[1])

    # ------------------------------------------------------------------ whole videos: the VideoVAE interface

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (C, T, h, w) of a video's latents.

        Raises:
            InputError: a side that the patch does not divide.
        """
        return self.latent_channels, *latent_grid(num_frames, height, width, self.stride)

    def num_frames(self, latent_frames: int) -> int:
        """Frames that decode from so many latent frames."""
        return latent_frames

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video (B, 3, T, H, W) in [-1, 1] -> mean and deviation of its normalised latents, each (B, C, T, h, w) fp32.

        Raises:
            InputError: a side that the patch does not divide.
        """
        batch, _, num_frames, height, width = video.shape
        self.latent_shape(num_frames, height, width)
        frames = video.transpose(1, 2).flatten(0, 1).to(self.dtype)
        means, log_variances = zip(*map(self.posterior, torch.split(frames, self.micro_batch)), strict=True)
        raw, deviation = torch.cat(means).float(), (0.5 * torch.cat(log_variances).float()).exp()
        if not self.sample_posterior:
            deviation = torch.zeros_like(deviation)
        shift, scale = self._statistics(raw)
        mean, std = (
            part.view(batch, num_frames, *part.shape[1:]).transpose(1, 2)
            for part in ((raw - shift) / scale, deviation / scale)
        )
        return mean, std

    def encode(self, video: Tensor, noise: Tensor | None = None) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> normalised latents (B, C, T, h, w) fp32.

        Args:
            video: the pixels.
            noise: standard normal (B, C, T, h, w) for a draw from the posterior; None takes its mean.

        Raises:
            InputError: a side that the patch does not divide.
        """
        return sampled(*self.moments(video), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, T, h, w) -> video (B, 3, T, H, W) fp32, about [-1, 1], not clamped."""
        batch, _, num_frames = latents.shape[:3]
        frames = latents.float().transpose(1, 2).flatten(0, 1)
        shift, scale = self._statistics(frames)
        raw = (frames * scale + shift).to(self.dtype)
        pixels = torch.cat([self.reconstruct(chunk) for chunk in torch.split(raw, self.micro_batch)]).float()
        return pixels.view(batch, num_frames, *pixels.shape[1:]).transpose(1, 2)

    @property
    def dtype(self) -> torch.dtype:
        """What the convolutions compute in."""
        return next(self.parameters()).dtype

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (like.new_tensor(values).view(1, -1, 1, 1) for values in (self.latents_mean, self.latents_std))
        return mean, std

    # ------------------------------------------------------------------ files

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and the weights into a folder, in diffusers' layout, the weights cast to `dtype`."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"_class_name": type(self).__name__, **self.settings}
        settings |= {"latents_mean": self.latents_mean, "latents_std": self.latents_std}
        state = {name: tensor.to(dtype).contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path, **options: Any) -> PatchVAE:
        """Read a folder that `save_pretrained` wrote.

        Args:
            folder: holds `config.json` and the weights.
            options: `micro_batch`, `sample_posterior`.

        Raises:
            CheckpointError: not such a folder, or weights that do not fit their settings.
        """
        try:
            settings = json.loads((folder / CONFIG_FILE).read_text())
            class_name = settings.pop("_class_name")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"no PatchVAE in {folder}: {error}", "give a folder with --set vae.weights=DIR"
            ) from None
        if class_name != cls.__name__:
            raise CheckpointError(f"{folder} holds a {class_name}, not a PatchVAE", "see --set vae.kind")
        try:
            vae = cls(**settings, **options)
            vae.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except Exception as error:
            raise CheckpointError(f"the PatchVAE in {folder} cannot be read: {error}") from error
        return vae.eval().requires_grad_(False)
