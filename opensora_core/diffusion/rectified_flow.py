"""Rectified flow: a straight path from data to noise, and the velocity along it.

Liu et al. 2022 (arXiv 2209.03003) for the objective; Esser et al. 2024 (arXiv 2403.03206) for logit-normal timesteps
(section 3.1) and the shift for larger latents (equation 23).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from opensora_core.errors import ConfigError
from opensora_core.tensors import Condition, Denoiser


class RectifiedFlow:
    """x_s = (1 - s) x0 + s noise for s in [0, 1]; the denoiser predicts dx_s / ds = noise - x0.

    The timestep is 1000 s, a float, so that one timestep embedding serves both objectives.

    Args:
        timestep_sampling: how s is drawn in training: uniform, or logit-normal (sigmoid of a standard normal), which
            dwells on the middle of the path where the velocity is hardest to tell.
        timestep_shift: a > 0 maps s to a s / (1 + (a - 1) s). Above 1 it moves s to noise, as larger latents need
            because neighbouring values average the noise away; 1 changes nothing. Sampling uses the same shift.
    """

    num_timesteps = 1000

    def __init__(
        self,
        timestep_sampling: Literal["uniform", "logit-normal"] = "uniform",
        timestep_shift: float = 1.0,
    ) -> None:
        if timestep_sampling not in ("uniform", "logit-normal"):
            raise ConfigError(
                f"timestep sampling '{timestep_sampling}' is unknown",
                "set diffusion.timestep_sampling to uniform or logit-normal",
            )
        if timestep_shift <= 0:
            raise ConfigError(
                f"timestep shift {timestep_shift} is not positive",
                "set diffusion.timestep_shift to 1 for no shift, above 1 to dwell on noise",
            )
        self.timestep_sampling = timestep_sampling
        self.timestep_shift = timestep_shift

    def shift(self, s: Tensor) -> Tensor:
        """Move positions in [0, 1] towards noise; 0 and 1 stay."""
        return self.timestep_shift * s / (1 + (self.timestep_shift - 1) * s)

    def draw_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw 1000 s (B,) fp32, on the generator's device: one from each B-th of the distribution, in random order.

        So each sample has the distribution for itself, but a small batch never leaves a part of the path out, and its
        gradient varies less.
        """
        device = generator.device
        parts = torch.randperm(batch_size, generator=generator, device=device)
        s = (parts + torch.rand(batch_size, generator=generator, device=device)) / batch_size
        if self.timestep_sampling == "logit-normal":
            s = torch.sigmoid(torch.special.ndtri(s.clamp(1e-6, 1 - 1e-6)))
        return self.shift(s) * self.num_timesteps

    def grid(self, steps: int) -> list[float]:
        """The positions s of a sampling run, steps + 1 of them from 1 (noise) to 0 (data)."""
        return self.shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()

    def noisy(self, x0: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) fp32 on the path between `x0` and `noise` at `timestep` (B,)."""
        s = (timestep / self.num_timesteps).view(-1, *[1] * (x0.ndim - 1))
        return x0.float().lerp(noise.float(), s)

    def losses(
        self, denoiser: Denoiser, x0: Tensor, timestep: Tensor, noise: Tensor, condition: Condition
    ) -> dict[str, Tensor]:
        """Mean squared error of the velocity, per sample; see `Objective.losses`."""
        velocity = denoiser(self.noisy(x0, timestep, noise), timestep, condition)[:, : x0.shape[1]]
        error = F.mse_loss(velocity.float(), (noise - x0).float(), reduction="none")
        return {"loss": error.flatten(1).mean(1)}
