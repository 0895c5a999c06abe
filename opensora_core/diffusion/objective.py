"""What every objective of the table offers to a trainer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from opensora_core.tensors import Condition, Denoiser


class Objective(Protocol):
    """A way to make noisy latents out of clean ones, and a regression target out of both.

    Attributes:
        num_timesteps: the length of the noise axis. A timestep lies in [0, num_timesteps), 0 being clean; whether
            timesteps are integers is the objective's own affair.
    """

    @property
    def num_timesteps(self) -> int:
        """See above."""
        ...

    def draw_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw timesteps (B,), on the generator's device, from the distribution that training uses."""
        ...

    def losses(
        self, denoiser: Denoiser, x0: Tensor, timestep: Tensor, noise: Tensor, condition: Condition
    ) -> dict[str, Tensor]:
        """Compute the loss of every sample.

        Args:
            denoiser: the model in training; called once.
            x0: clean latents (B, C, T, h, w).
            timestep: (B,) as `draw_timesteps` draws them.
            noise: standard normal, shaped like `x0`.
            condition: of B samples.

        Returns:
            "loss" (B,) fp32, which is what to minimise the mean of, and the terms it is made of.
        """
        ...
