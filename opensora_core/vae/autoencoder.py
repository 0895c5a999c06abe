"""What the diffusers autoencoders share: micro-batches, the draw from the posterior, the scaling of latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora_core.errors import ConfigError
from opensora_core.vae.shapes import latent_grid


@dataclass(frozen=True)
class LatentScale:
    """How raw latents are scaled for the denoiser: (raw - mean) * factor, per channel.

    Attributes:
        mean: (C,) or one number for all channels.
        factor: likewise.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, model: Any, scaling_factor: float) -> LatentScale:
        """The scaling that a diffusers autoencoder was published with; `scaling_factor` replaces its own unless 0.

        All of them are cases of (raw - mean) * scaling_factor / std: Wan and LTX have a mean and a std per channel (Wan
        in its config, LTX among its weights), Flux-like ones a `shift_factor`, the others a `scaling_factor` only.
        """

        def setting(*names: str, default: float) -> Tensor:
            for name in names:
                value = getattr(model, name, None) if name in dict(model.named_buffers()) else model.config.get(name)
                if value is not None:
                    return torch.as_tensor(value, dtype=torch.float32)
            return torch.tensor(default)

        factor = torch.tensor(scaling_factor) if scaling_factor else setting("scaling_factor", default=1.0)
        mean = setting("latents_mean", "shift_factor", default=0.0)
        return cls(mean.cpu(), (factor.cpu() / setting("latents_std", default=1.0).cpu()))

    def apply(self, raw: Tensor) -> Tensor:
        """Raw latents (N, C, ...) -> latents for the denoiser."""
        return (raw - _per_channel(self.mean, raw)) * _per_channel(self.factor, raw)

    def spread(self, deviation: Tensor) -> Tensor:
        """Deviation of raw latents (N, C, ...) -> that of latents for the denoiser, which no mean shifts."""
        return deviation * _per_channel(self.factor, deviation)

    def undo(self, latents: Tensor) -> Tensor:
        """Latents of the denoiser (N, C, ...) -> raw latents."""
        return latents / _per_channel(self.factor, latents) + _per_channel(self.mean, latents)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device).reshape(1, -1, *[1] * (like.ndim - 2))


class DiffusersVAE(ABC):
    """A diffusers autoencoder with its strides, scaling and micro-batch; the kinds differ in what an item is.

    Latents and videos leave in float32 on the model's device, whatever its dtype: the draw from the posterior and the
    scaling are done in float32.

    Args:
        model: the diffusers model.
        stride: frames, rows and columns of pixels per latent position.
        latent_channels: C of the latents.
        causal_step: of a VAE whose first frame has a latent frame of its own: it takes 1 + k * `causal_step` frames;
            0 for a VAE without a notion of a first frame.
        scaling_factor: replaces the one the model was published with; 0 keeps that.
        micro_batch: frames that run through the model at a time. A model that looks across frames never has a video
            split: then it is the whole videos that fit into so many frames, at least one.
        sample_posterior: whether `encode` uses the noise it is given.
        slicing: run one frame (or one video, where they must not be split) at a time: the least memory.
        tiling: cut large frames into overlapping tiles and blend the seams; the result differs slightly.
    """

    frames_apart = False

    def __init__(
        self,
        model: Any,
        *,
        stride: tuple[int, int, int],
        latent_channels: int,
        causal_step: int = 0,
        scaling_factor: float = 0.0,
        micro_batch: int = 16,
        sample_posterior: bool = True,
        slicing: bool = False,
        tiling: bool = False,
    ) -> None:
        if micro_batch < 1:
            raise ConfigError(f"vae.micro_batch = {micro_batch} is less than one frame", "try --set vae.micro_batch=1")
        if scaling_factor < 0:
            raise ConfigError(
                f"vae.scaling_factor = {scaling_factor} is negative",
                "0 is the one that the weights were published with",
            )
        if tiling:
            try:
                model.enable_tiling()
            except NotImplementedError:
                raise ConfigError(
                    f"{type(model).__name__} cannot be tiled", "use --set vae.slicing=true to save memory"
                ) from None
        self.model = model
        self.stride = stride
        self.latent_channels = latent_channels
        self.causal_step = causal_step
        self.scale = LatentScale.of(model, scaling_factor)
        self.micro_batch = 1 if slicing else micro_batch
        self.sample_posterior = sample_posterior

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The latents (C, T', h, w) of a video of this size in pixels.

        Raises:
            InputError: the size does not divide; the nearest sizes that do are named.
        """
        return self.latent_channels, *latent_grid(num_frames, height, width, self.stride, causal_step=self.causal_step)

    def num_frames(self, latent_frames: int) -> int:
        """How many frames of video this many frames of latents decode to."""
        first = 1 if self.causal_step else 0
        return first + (latent_frames - first) * self.stride[0]

    @abstractmethod
    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video (B, 3, T, H, W) in [-1, 1] -> mean and deviation of its latents, each (B, C, T', h, w).

        Raises:
            InputError: the size or the number of frames does not divide.
        """

    def encode(self, video: Tensor, noise: Tensor | None = None) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> latents (B, C, T', h, w), sampled with `noise` of that shape if given.

        Raises:
            InputError: the size or the number of frames does not divide.
        """
        return sampled(*self.moments(video), noise)

    def _moments(self, items: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Items (N, 3, ...) -> mean and deviation of scaled latents, each (N, C, ...), `chunk` items at a time."""
        means, deviations = [], []
        for part in torch.split(items, chunk):
            posterior = self.model.encode(self._to_model(part)).latent_dist
            means.append(self.scale.apply(posterior.mean.float()))
            deviations.append(self.scale.spread(posterior.std.float()))
        mean, std = torch.cat(means), torch.cat(deviations)
        return mean, std if self.sample_posterior else torch.zeros_like(std)

    def _decode(self, latents: Tensor, chunk: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Scaled latents (N, C, ...) -> items (N, 3, ...), `chunk` of them through `run` at a time."""
        assert latents.shape[1] == self.latent_channels, f"{latents.shape[1]} channels, not {self.latent_channels}"
        raw = self.scale.undo(latents.float())
        return torch.cat([run(self._to_model(part)).float() for part in torch.split(raw, chunk)])

    def _to_model(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.model.device, dtype=self.model.dtype)


def sampled(mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
    """A draw from a posterior of moments (B, C, T', h, w) by noise of that shape; its mean without one."""
    if noise is None:
        return mean
    assert noise.shape == mean.shape, f"noise {tuple(noise.shape)} for latents {tuple(mean.shape)}"
    return mean + std * noise.to(mean)


def halvings(block_out_channels: Sequence[int]) -> int:
    """The spatial stride of an encoder that halves the grid between its levels."""
    return int(2 ** (len(block_out_channels) - 1))
