"""Properties of the hybrid loss that the golden cases do not show."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_core.diffusion import IDDPM
from opensora_core.tensors import Condition

SHAPE = (5, 4, 2, 4, 4)
CONDITION = Condition(torch.zeros(5, 1, 1))
TIMESTEPS = torch.tensor([0, 1, 40, 500, 999])


def latents(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_the_denoiser_sees_original_timesteps_as_integers() -> None:
    seen: list[Tensor] = []

    def denoiser(noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        seen.append(timestep)
        return torch.cat([noisy, noisy], dim=1)

    IDDPM(spacing="ddim10").losses(denoiser, latents(0), torch.tensor([0, 1, 2, 8, 9]), latents(1), CONDITION)
    assert seen[0].dtype == torch.int64
    assert seen[0].tolist() == [0, 100, 200, 800, 900]


def test_the_bound_prefers_the_posterior_when_the_noise_is_known() -> None:
    """A perfect prediction leaves only the variance to learn, and x0 known, the best is the posterior's (-1)."""
    noise = latents(1)

    def bound(value: float) -> Tensor:
        output = torch.cat([noise, torch.full_like(noise, value)], dim=1)
        return IDDPM().losses(lambda *_: output, latents(0), TIMESTEPS, noise, CONDITION)["vb"]

    # the more noisy a timestep, the less the two variances differ
    assert bool((bound(-1.0)[1:3] < bound(1.0)[1:3] - 1e-4).all())
    torch.testing.assert_close(bound(-1.0)[1:], torch.zeros(4), atol=1e-5, rtol=0)


def test_the_bound_teaches_the_variance_only() -> None:
    output = torch.cat([latents(2), latents(3)], dim=1).requires_grad_()
    losses = IDDPM().losses(lambda *_: output, latents(0), TIMESTEPS, latents(1), CONDITION)
    losses["vb"].sum().backward()
    assert output.grad is not None
    assert not output.grad[:, :4].any()
    assert output.grad[:, 4:].any()


def test_half_precision_predictions_are_compared_in_full() -> None:
    noise = latents(1)
    output = torch.cat([latents(2), latents(3)], dim=1).bfloat16()
    half = IDDPM().losses(lambda *_: output, latents(0), TIMESTEPS, noise, CONDITION)
    full = IDDPM().losses(lambda *_: output.float(), latents(0), TIMESTEPS, noise, CONDITION)
    assert half["loss"].dtype == torch.float32
    assert torch.equal(half["loss"], full["loss"])
