"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) as a wrapper around a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from opensora_core.tensors import Condition, Denoiser

GuidanceChannels = Literal["all", "first-three"]

Predict = Callable[[Tensor, float], Tensor]
"""(latents (B, C, T, h, w), timestep) -> prediction (B, C or 2C, T, h, w) fp32: a denoiser with its condition bound."""


def guide(
    denoiser: Denoiser,
    condition: Condition,
    null_condition: Condition | None = None,
    scale: float = 1.0,
    channels: GuidanceChannels = "all",
) -> Predict:
    """Bind a denoiser to its condition, and pull its prediction away from the unconditional one.

    Both predictions come from one call on the doubled batch [condition; null]. Variance channels, and with
    `first-three` also every channel from the fourth on, are those of the conditional half, unguided.

    Args:
        denoiser: predicts C channels, or 2C of which the latter half are variance values.
        condition: of B samples.
        null_condition: of B samples; needed unless `scale` is 1.
        scale: 1 runs the condition alone, in a batch of B.
        channels: `first-three` is what the published IDDPM did (it was written for RGB, run on four latent channels).

    Returns:
        A function of latents and one timestep for all of them. It tracks no gradient.
    """
    if scale == 1.0:
        both = condition
    else:
        assert null_condition is not None, "guidance needs a null condition"
        both = Condition.cat([condition, null_condition])

    @torch.no_grad()
    def predict(latents: Tensor, timestep: float) -> Tensor:
        copies = len(both) // len(latents)
        # torch.full gives int64 for an int and fp32 for a float: published models saw whole timesteps as integers
        timesteps = torch.full((len(both),), timestep, device=latents.device)
        prediction = denoiser(torch.cat([latents] * copies), timesteps, both).float()
        if copies == 1:
            return prediction
        conditional, unconditional = prediction.chunk(2)
        guided = slice(0, 3 if channels == "first-three" else latents.shape[1])
        result = conditional.clone()
        result[:, guided] = unconditional[:, guided] + scale * (conditional[:, guided] - unconditional[:, guided])
        return result

    return predict
