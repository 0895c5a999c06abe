"""Noise schedules of discrete diffusion: named betas, the tables that follow from them, and their subsets of timesteps.

Ho et al. 2020 (arXiv 2006.11239) for the linear schedule and the posterior; Nichol & Dhariwal 2021 (arXiv 2102.09672)
for the squared cosine (equation 17) and for sampling with a subset of the timesteps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opensora_core.errors import ConfigError, nearest


def _linear(steps: int) -> Tensor:
    # both ends were tuned for 1000 steps; fewer steps must destroy as much signal each in proportion
    scale = 1000 / steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)


def _squared_cosine(steps: int) -> Tensor:
    angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
    remaining = angle.cos() ** 2
    return (1 - remaining[1:] / remaining[:-1]).clamp(max=0.999)


NOISE_SCHEDULES = {"linear": _linear, "squaredcos_cap_v2": _squared_cosine}


def named_betas(name: str, steps: int) -> Tensor:
    """The variances (steps,) float64 that a named schedule adds step by step.

    Raises:
        ConfigError: an unknown name, or so few steps that a variance would reach 1.
    """
    if name not in NOISE_SCHEDULES:
        raise ConfigError(f"unknown noise schedule '{name}'", nearest(name, NOISE_SCHEDULES))
    betas = NOISE_SCHEDULES[name](steps)
    if betas.max() >= 1:
        raise ConfigError(
            f"{steps} diffusion steps are too few for the schedule '{name}': the last would have a beta of "
            f"{betas.max():.2f}, which leaves no signal",
            "set diffusion.diffusion_steps to 1000, as published models have it; --steps is for sampling with fewer",
        )
    return betas


def spaced_timesteps(total: int, spacing: str | Sequence[int]) -> list[int]:
    """Choose which of `total` timesteps to keep, in rising order.

    Args:
        total: number of timesteps of the full schedule.
        spacing: counts per section, as numbers or words ("10,15,20"): `total` is cut into sections of equal length
            (the first ones longer by one where it does not divide), and each keeps its count, spread evenly from its
            first timestep to its last. Or "ddimN": N timesteps at the smallest integer stride that gives exactly N.

    Raises:
        ConfigError: a count that does not fit.
    """
    if isinstance(spacing, str):
        try:
            if spacing.startswith("ddim"):
                return _strided(total, int(spacing.removeprefix("ddim")))
            spacing = [int(word) for word in spacing.split(",")]
        except ValueError:
            raise ConfigError(f"spacing '{spacing}' is neither counts nor ddimN", "for example 100 or ddim50") from None
    shortest, longer = divmod(total, len(spacing))
    kept, begin = [], 0
    for number, count in enumerate(spacing):
        length = shortest + (number < longer)
        if not 1 <= count <= length:
            raise ConfigError(f"cannot keep {count} of the {length} timesteps from {begin} on", f"1 to {length} fit")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # added up rather than multiplied: published samples depend on how the halves round
        positions = itertools.accumulate(itertools.repeat(stride, count - 1), initial=0.0)
        kept += [begin + round(position) for position in positions]
        begin += length
    return kept


def _strided(total: int, count: int) -> list[int]:
    for stride in range(1, total + 1):
        kept = range(0, total, stride)
        if len(kept) == count:
            return list(kept)
    raise ConfigError(f"no integer stride keeps {count} of {total} timesteps", f"use the spacing '{count}' instead")


class NoiseTables:
    """What follows from betas (N,), each table (N,) float64; index 0 is the least noisy timestep.

    x_t = sqrt_alphas_cumprod x0 + sqrt_one_minus_alphas_cumprod noise, and the posterior of x_{t-1} given x_t and x0
    is normal with mean posterior_mean_coef1 x0 + posterior_mean_coef2 x_t.
    """

    def __init__(self, betas: Tensor) -> None:
        alphas = 1 - betas
        remaining = alphas.cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), remaining[:-1]])
        self.betas = betas
        self.alphas_cumprod = remaining
        self.alphas_cumprod_prev = before
        self.sqrt_alphas_cumprod = remaining.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - remaining).sqrt()
        self.log_one_minus_alphas_cumprod = (1 - remaining).log()
        self.sqrt_recip_alphas_cumprod = (1 / remaining).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / remaining - 1).sqrt()
        self.posterior_mean_coef1 = betas * before.sqrt() / (1 - remaining)
        self.posterior_mean_coef2 = (1 - before) * alphas.sqrt() / (1 - remaining)
        self.posterior_variance = betas * (1 - before) / (1 - remaining)
        # the posterior at 0 is exact, its log variance -inf; its neighbour's stands in
        neighbour = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = torch.cat([neighbour, self.posterior_variance[1:]]).log()
        self.large_variance = torch.cat([neighbour, betas[1:]])

    def __len__(self) -> int:
        return len(self.betas)

    def keep(self, timesteps: Sequence[int]) -> NoiseTables:
        """The tables of the process that visits only these timesteps, with the same noise at each."""
        remaining = self.alphas_cumprod[list(timesteps)]
        before = torch.cat([torch.ones(1, dtype=torch.float64), remaining[:-1]])
        return NoiseTables(1 - remaining / before)
