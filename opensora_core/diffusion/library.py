"""Samplers whose arithmetic is that of diffusers' schedulers, on our grids of timesteps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opensora_core.diffusion.dpm_solver import ContinuousTime
from opensora_core.diffusion.guidance import Predict
from opensora_core.diffusion.iddpm import IDDPM
from opensora_core.diffusion.rectified_flow import RectifiedFlow
from opensora_core.diffusion.samplers import DrawNoise, Trajectory


def multistep(scheduler: str) -> Callable[[Predict, Tensor, IDDPM | RectifiedFlow, int, DrawNoise | None], Trajectory]:
    """Make a sampler of a diffusers scheduler class that takes flow sigmas, such as `UniPCMultistepScheduler`."""

    def run(
        predict: Predict,
        noise: Tensor,
        objective: IDDPM | RectifiedFlow,
        steps: int,
        draw_noise: DrawNoise | None,
    ) -> Trajectory:
        import diffusers  # takes seconds, so only those who ask for it wait

        flow = isinstance(objective, RectifiedFlow)
        if isinstance(objective, RectifiedFlow):
            prediction = "flow_prediction"
            timesteps, sigmas = _flow_grid(objective, steps)
        else:
            prediction = "sample" if objective.predict_xstart else "epsilon"
            timesteps, sigmas = _discrete_grid(objective, steps)
        solver = getattr(diffusers, scheduler)(prediction_type=prediction, use_flow_sigmas=flow, solver_order=2)
        solver.set_timesteps(steps)
        solver.set_begin_index(0)
        # its own grid rounds timesteps to integers, and for flows begins short of pure noise
        solver.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32)
        latents = noise
        for number, timestep in enumerate(timesteps):
            velocity_or_noise = predict(latents, timestep)[:, : noise.shape[1]]
            latents = solver.step(velocity_or_noise, solver.timesteps[number], latents).prev_sample
            yield timestep, latents

    return run


def _flow_grid(objective: RectifiedFlow, steps: int) -> tuple[list[float], list[float]]:
    positions = objective.grid(steps)[:-1]
    # at exactly 1 nothing is left of the data and the solvers' log(1 - s) is infinite
    return [s * objective.num_timesteps for s in positions], [min(s, 1 - 1e-6) for s in positions]


def _discrete_grid(objective: IDDPM, steps: int) -> tuple[list[float], list[float]]:
    time = ContinuousTime(objective)
    indices = time.grid(steps)[:-1]
    return [time.seen(index) for index in indices], [time.sigma(index) / time.alpha(index) for index in indices]
