"""What every video autoencoder offers, whatever it is made of."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class VideoVAE(Protocol):
    """Video <-> latents. Latents are scaled for the denoiser: about zero mean and unit variance."""

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        ...

    @property
    def stride(self) -> tuple[int, int, int]:
        """How many frames, rows and columns of pixels one latent position stands for."""
        ...

    @property
    def frames_apart(self) -> bool:
        """Whether each frame is decoded from a latent frame of its own, so that others may decode its neighbours."""
        ...

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The latents (C, T', h, w) of a video of this size in pixels.

        Raises:
            InputError: the size does not divide; the nearest sizes that do are named.
        """
        ...

    def num_frames(self, latent_frames: int) -> int:
        """How many frames of video this many frames of latents decode to."""
        ...

    def encode(self, video: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode a video (B, 3, T, H, W) in [-1, 1] to latents (B, C, T', h, w).

        Args:
            video: floating point.
            noise: standard normal (B, C, T', h, w) that the posterior is sampled with, mean + std * noise. The caller
                draws it for the whole batch, so the result does not depend on the micro-batch. None gives the mean, and
                so does a VAE that was built with `sample_posterior` off.

        Raises:
            InputError: the size of the video does not divide.
        """
        ...

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents that `encode` draws for a video (B, 3, T, H, W) in [-1, 1].

        Returns:
            mean and std, both (B, C, T', h, w) fp32, in the scale of the latents: `encode(video, noise)` is
            `mean + std * noise`, to the bit. A VAE that was built with `sample_posterior` off has a std of zero.

        Raises:
            InputError: the size of the video does not divide.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, T', h, w) to a video (B, 3, T, H, W), about [-1, 1], not clamped by us."""
        ...
