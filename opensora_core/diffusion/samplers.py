"""Samplers: from noise to latents by repeated predictions. The solvers of higher order have files of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora_core.diffusion.guidance import Predict
from opensora_core.diffusion.iddpm import IDDPM, lookup
from opensora_core.diffusion.rectified_flow import RectifiedFlow

DrawNoise = Callable[[], Tensor]
"""Returns fresh standard normal noise, shaped like the latents, at every call."""

Trajectory = Iterator[tuple[float, Tensor]]
"""Per step, the timestep that the step started from and the latents (B, C, T, h, w) that it arrived at."""


@dataclass(frozen=True)
class Step:
    """One step of a sampling run; the latents of the last one are the sample.

    Attributes:
        index: from 0.
        total: number of steps of the run.
        timestep: what the denoiser was told at the start of the step; falls from step to step.
        latents: (B, C, T, h, w) fp32, after the step.
    """

    index: int
    total: int
    timestep: float
    latents: Tensor


@dataclass(frozen=True)
class Sampler:
    """An entry of the table.

    Attributes:
        about: a line for the user.
        fits: the classes of objectives whose models it can sample from.
        run: (predict, noise (B, C, T, h, w), objective, steps, draw_noise) -> trajectory.
        draws_noise: needs `draw_noise`, which it calls once per step.
    """

    about: str
    fits: tuple[type, ...]
    run: Callable[[Predict, Tensor, Any, int, DrawNoise | None], Trajectory]
    draws_noise: bool = False


def euler(
    predict: Predict, noise: Tensor, objective: RectifiedFlow, steps: int, draw_noise: DrawNoise | None
) -> Trajectory:
    """Follow the velocity in straight pieces; one prediction per step."""
    grid, latents = objective.grid(steps), noise
    for here, there in itertools.pairwise(grid):
        timestep = here * objective.num_timesteps
        latents = latents + (there - here) * predict(latents, timestep)[:, : noise.shape[1]]
        yield timestep, latents


def heun(
    predict: Predict, noise: Tensor, objective: RectifiedFlow, steps: int, draw_noise: DrawNoise | None
) -> Trajectory:
    """Average the velocity of both ends of each piece; two predictions per step, second order."""
    grid, latents, channels = objective.grid(steps), noise, noise.shape[1]
    for here, there in itertools.pairwise(grid):
        timestep = here * objective.num_timesteps
        start = predict(latents, timestep)[:, :channels]
        end = predict(latents + (there - here) * start, there * objective.num_timesteps)[:, :channels]
        latents = latents + (there - here) * (start + end) / 2
        yield timestep, latents


def ancestral(
    predict: Predict, noise: Tensor, objective: IDDPM, steps: int, draw_noise: DrawNoise | None
) -> Trajectory:
    """Draw each step back from the distribution that the model predicts; fresh noise every step."""
    assert draw_noise is not None
    spaced, latents = objective.respaced(str(steps)), noise
    for index in reversed(range(steps)):
        seen = int(spaced.original_timesteps[index])
        latents = ancestral_step(spaced, predict(latents, seen), latents, _indices(index, noise), draw_noise())
        yield seen, latents


def ancestral_step(
    objective: IDDPM, prediction: Tensor, latents: Tensor, timestep: Tensor, noise: Tensor, *, clip: bool = False
) -> Tensor:
    """Latents x_{t-1} (B, C, T, h, w) for a prediction at indices `timestep` (B,); at 0 its mean, without noise."""
    back = objective.step_back(prediction, latents, timestep, clip)
    noisy = (timestep > 0).view(-1, *[1] * (latents.ndim - 1))
    return back.mean + noisy * (0.5 * back.log_variance).exp() * noise


def ddim(predict: Predict, noise: Tensor, objective: IDDPM, steps: int, draw_noise: DrawNoise | None) -> Trajectory:
    """The deterministic relative of the ancestral sampler (Song et al. 2021, arXiv 2010.02502)."""
    spaced, latents = objective.respaced(str(steps)), noise
    for index in reversed(range(steps)):
        seen = int(spaced.original_timesteps[index])
        latents = ddim_step(spaced, predict(latents, seen), latents, _indices(index, noise))
        yield seen, latents


def ddim_step(
    objective: IDDPM,
    prediction: Tensor,
    latents: Tensor,
    timestep: Tensor,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Latents x_{t-1} (B, C, T, h, w) by equation 12; `eta` > 0 replaces part of the predicted noise by `noise`."""
    tables = objective.tables
    x0 = objective.x0(prediction, latents, timestep)
    remaining = lookup(tables.alphas_cumprod, timestep, latents)
    before = lookup(tables.alphas_cumprod_prev, timestep, latents)
    predicted_noise = (latents - remaining.sqrt() * x0) / (1 - remaining).sqrt()
    fresh = eta * ((1 - before) / (1 - remaining) * (1 - remaining / before)).sqrt()
    mean = before.sqrt() * x0 + (1 - before - fresh**2).clamp(min=0).sqrt() * predicted_noise
    return mean if noise is None else mean + fresh * noise


def _indices(index: int, latents: Tensor) -> Tensor:
    return torch.full((len(latents),), index, device=latents.device)
