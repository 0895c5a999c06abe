"""DPM-Solver++ 2M as Open-Sora 1.0 ran it (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

Differs from diffusers' scheduler in its timesteps, which are fractional and uniform from the last to 0, and in that
it ends at timestep 0, with the little noise that is left there.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from opensora_core.diffusion.guidance import Predict
from opensora_core.diffusion.iddpm import IDDPM
from opensora_core.diffusion.samplers import DrawNoise, Trajectory


class ContinuousTime:
    """A discrete schedule between its timesteps: log alpha is piecewise linear in the index, here a float.

    x_t = alpha x0 + sigma noise; the solver's own time runs along log(alpha / sigma).
    """

    def __init__(self, objective: IDDPM) -> None:
        self.log_alphas = objective.tables.alphas_cumprod.log() / 2
        self.original_timesteps = objective.original_timesteps.double()

    def log_alpha(self, index: float) -> float:
        """The logarithm of the signal's share at an index in [0, num_timesteps - 1]."""
        return _interpolate(self.log_alphas, index)

    def alpha(self, index: float) -> float:
        """The signal's share."""
        return math.exp(self.log_alpha(index))

    def sigma(self, index: float) -> float:
        """The noise's share."""
        return math.sqrt(-math.expm1(2 * self.log_alpha(index)))

    def log_ratio(self, index: float) -> float:
        """log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
        return self.log_alpha(index) - math.log(self.sigma(index))

    def seen(self, index: float) -> float:
        """What the denoiser is told."""
        return _interpolate(self.original_timesteps, index)

    def grid(self, steps: int) -> list[float]:
        """Indices from the last to 0, steps + 1 of them, evenly spaced."""
        return torch.linspace(len(self.log_alphas) - 1, 0, steps + 1, dtype=torch.float64).tolist()


def _interpolate(table: Tensor, index: float) -> float:
    below = min(int(index), len(table) - 2) if len(table) > 1 else 0
    above = min(below + 1, len(table) - 1)
    return float(table[below].lerp(table[above], index - below))


def dpm_solver(
    predict: Predict, noise: Tensor, objective: IDDPM, steps: int, draw_noise: DrawNoise | None
) -> Trajectory:
    """Second-order multistep in the predicted x0; one prediction per step."""
    time = ContinuousTime(objective)
    grid, latents, channels = time.grid(steps), noise, noise.shape[1]
    earlier = earlier_x0 = None
    for number, (here, there) in enumerate(itertools.pairwise(grid)):
        x0 = predict(latents, time.seen(here))[:, :channels]
        if not objective.predict_xstart:
            x0 = (latents - time.sigma(here) * x0) / time.alpha(here)
        stride = time.log_ratio(there) - time.log_ratio(here)
        gain = -time.alpha(there) * math.expm1(-stride)
        latents = time.sigma(there) / time.sigma(here) * latents + gain * x0
        # with few steps the last one is too long for a second order to help
        if earlier is not None and earlier_x0 is not None and (number < steps - 1 or steps >= 10):
            ratio = (time.log_ratio(here) - time.log_ratio(earlier)) / stride
            latents = latents + gain / (2 * ratio) * (x0 - earlier_x0)
        earlier, earlier_x0 = here, x0
        yield time.seen(here), latents
