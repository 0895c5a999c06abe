"""Objectives and samplers: maths over a `Denoiser` callable. This room knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from opensora_core.diffusion.dpm_solver import dpm_solver
from opensora_core.diffusion.guidance import GuidanceChannels, guide
from opensora_core.diffusion.iddpm import IDDPM
from opensora_core.diffusion.library import multistep
from opensora_core.diffusion.objective import Objective
from opensora_core.diffusion.rectified_flow import RectifiedFlow
from opensora_core.diffusion.samplers import Sampler, Step, ancestral, ddim, euler, heun
from opensora_core.errors import ConfigError, nearest
from opensora_core.tensors import Condition, Denoiser

__all__ = ["IDDPM", "OBJECTIVES", "SAMPLERS", "Objective", "RectifiedFlow", "Sampler", "Step", "sample"]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "iddpm": IDDPM,
    "rectified-flow": RectifiedFlow,
}

SAMPLERS: dict[str, Sampler] = {
    "iddpm": Sampler("ancestral, as the published videos were made", (IDDPM,), ancestral, draws_noise=True),
    "ddim": Sampler("the ancestral sampler without its noise", (IDDPM,), ddim),
    "dpm-solver": Sampler("DPM-Solver++ 2M, as the published class and image samples were made", (IDDPM,), dpm_solver),
    "dpm-solver++": Sampler(
        "DPM-Solver++ 2M of diffusers, down to no noise",
        (IDDPM, RectifiedFlow),
        multistep("DPMSolverMultistepScheduler"),
    ),
    "unipc": Sampler("UniPC of order 2, of diffusers", (IDDPM, RectifiedFlow), multistep("UniPCMultistepScheduler")),
    "euler": Sampler("straight steps along the flow", (RectifiedFlow,), euler),
    "heun": Sampler("second-order steps along the flow, two predictions each", (RectifiedFlow,), heun),
}


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Condition,
    null_condition: Condition | None = None,
    *,
    objective: Objective,
    sampler: str,
    steps: int,
    guidance: float = 1.0,
    guidance_channels: GuidanceChannels = "all",
    draw_noise: Callable[[], Tensor] | None = None,
) -> Iterator[Step]:
    """Draw samples, one `Step` per step; the latents of the last step are the sample.

    A sample depends on its own noise and condition alone, not on the batch that it is drawn in.

    Args:
        denoiser: predicts what `objective` asks for.
        noise: standard normal (B, C, T, h, w), the start of the run.
        condition: of B samples.
        null_condition: of B samples; needed unless `guidance` is 1.
        objective: the one that the denoiser was trained with.
        sampler: a name of `SAMPLERS`.
        steps: at least 1.
        guidance: strength of classifier-free guidance; 1 runs the condition alone.
        guidance_channels: `all`, or `first-three` as in the published IDDPM runs.
        draw_noise: fresh noise (B, C, T, h, w) for each step of an ancestral sampler; seed it per sample.

    Raises:
        ConfigError: an unknown sampler, one that does not fit the objective, or a number of steps it cannot take.
            Raised at the call, not at the first step.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"unknown sampler '{sampler}'", nearest(sampler, SAMPLERS))
    chosen = SAMPLERS[sampler]
    if not isinstance(objective, chosen.fits):
        kind = next((name for name, known in OBJECTIVES.items() if known is type(objective)), type(objective).__name__)
        fitting = [name for name, entry in SAMPLERS.items() if isinstance(objective, entry.fits)]
        raise ConfigError(
            f"the sampler '{sampler}' does not fit a model trained with {kind}",
            f"set --sampler to one that does: {', '.join(fitting)}",
        )
    if not 1 <= steps <= objective.num_timesteps:
        raise ConfigError(
            f"{steps} sampling steps are not between 1 and {objective.num_timesteps}", "set --steps, for example to 20"
        )
    assert draw_noise is not None or not chosen.draws_noise, f"the sampler '{sampler}' draws noise in every step"
    predict = guide(denoiser, condition, null_condition, guidance, guidance_channels)
    run = chosen.run(predict, noise.float(), objective, steps, draw_noise)
    return (Step(index, steps, timestep, latents) for index, (timestep, latents) in enumerate(run))
