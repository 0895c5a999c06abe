"""Samplers: from noise to latents by repeated predictions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opensora_core.diffusion.guidance import Predict
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
        ancestral: draws fresh noise in every step.
    """

    about: str
    fits: tuple[type, ...]
    run: Callable[[Predict, Tensor, Any, int, DrawNoise | None], Trajectory]
    ancestral: bool = False


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
