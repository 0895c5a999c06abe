"""The objective: its path, its target, its timesteps."""

from __future__ import annotations

import pytest
import torch

from opensora_core.diffusion import RectifiedFlow
from opensora_core.errors import ConfigError
from opensora_core.tensors import Condition

SHAPE = (3, 4, 2, 4, 4)
CONDITION = Condition(torch.zeros(3, 1, 2))


def latents(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variance_channels", [0, 4])
def test_the_true_velocity_has_no_loss(variance_channels: int) -> None:
    x0, noise, timestep = latents(0), latents(1), torch.tensor([10.0, 500.5, 990.0])
    seen = {}

    def denoiser(noisy: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        seen.update(noisy=noisy, time=time, condition=condition)
        return torch.cat([noise - x0, torch.full_like(x0, 9.0)[:, :variance_channels]], dim=1)

    losses = RectifiedFlow().losses(denoiser, x0, timestep, noise, CONDITION)
    torch.testing.assert_close(losses["loss"], torch.zeros(3))
    s = timestep.view(3, 1, 1, 1, 1) / 1000
    torch.testing.assert_close(seen["noisy"], (1 - s) * x0 + s * noise)
    assert torch.equal(seen["time"], timestep)
    assert seen["condition"] is CONDITION


def test_the_loss_is_the_mean_square_per_sample() -> None:
    x0, noise = latents(0), latents(1)
    offset = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1, 1)
    losses = RectifiedFlow().losses(lambda *_: noise - x0 + offset, x0, torch.full((3,), 5.0), noise, CONDITION)
    torch.testing.assert_close(losses["loss"], torch.tensor([0.0, 1.0, 4.0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_timesteps_follow_the_shifted_distribution(sampling: str, shift: float) -> None:
    flow = RectifiedFlow(timestep_sampling=sampling, timestep_shift=shift)  # type: ignore[arg-type]
    drawn = flow.draw_timesteps(20000, torch.Generator().manual_seed(0)) / 1000
    again = flow.draw_timesteps(20000, torch.Generator().manual_seed(0)) / 1000
    assert torch.equal(drawn, again)
    assert drawn.min() >= 0 and drawn.max() < 1
    # undoing the shift gives back the plain distribution, whose quartiles are known
    plain = drawn / (shift - (shift - 1) * drawn)
    quartile = 0.25 if sampling == "uniform" else torch.sigmoid(torch.tensor(-0.67449)).item()
    expected = torch.tensor([quartile, 0.5, 1 - quartile])
    torch.testing.assert_close(plain.quantile(torch.tensor([0.25, 0.5, 0.75])), expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_a_batch_has_a_timestep_from_every_part_of_the_path(sampling: str) -> None:
    flow = RectifiedFlow(timestep_sampling=sampling)  # type: ignore[arg-type]
    everything = flow.draw_timesteps(4000, torch.Generator().manual_seed(1))
    limits = everything.quantile(torch.linspace(0, 1, 9))[1:-1]
    batches = [flow.draw_timesteps(8, torch.Generator().manual_seed(seed)) for seed in range(20)]
    for drawn in batches:
        assert sorted(torch.bucketize(drawn + 0.5, limits).tolist()) == pytest.approx(list(range(8)), abs=1)
    firsts = torch.stack(batches)[:, 0]  # the first sample of a batch may get any part
    assert firsts.min() < 250 and firsts.max() > 750


def test_the_sampling_grid_is_shifted_like_training() -> None:
    assert RectifiedFlow().grid(4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert RectifiedFlow(timestep_shift=3.0).grid(2) == pytest.approx([1, 0.75, 0])


@pytest.mark.parametrize("settings", [{"timestep_sampling": "cosine"}, {"timestep_shift": 0.0}])
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RectifiedFlow(**settings)  # type: ignore[arg-type]
