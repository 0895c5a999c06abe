"""Schedules and their subsets; the tables themselves are pinned by the golden cases."""

from __future__ import annotations

import pytest
import torch

from opensora_core.diffusion import IDDPM
from opensora_core.diffusion.schedule import NOISE_SCHEDULES, NoiseTables, named_betas, spaced_timesteps
from opensora_core.errors import ConfigError


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("steps", [50, 1000])
def test_a_schedule_destroys_the_signal_step_by_step(name: str, steps: int) -> None:
    tables = NoiseTables(named_betas(name, steps))
    assert len(tables) == steps
    assert bool((tables.betas > 0).all() and (tables.betas < 1).all())
    assert tables.alphas_cumprod[0] > 0.98 and tables.alphas_cumprod[-1] < 1e-4


@pytest.mark.parametrize("spacing", ["1", "7", "100", "ddim50", "10,20,30", [5, 5]])
def test_kept_timesteps_have_the_noise_they_had(spacing: str) -> None:
    full, kept = IDDPM(), IDDPM(spacing=spacing)
    torch.testing.assert_close(kept.tables.alphas_cumprod, full.tables.alphas_cumprod[kept.original_timesteps])
    assert bool(kept.tables.posterior_log_variance_clipped.isfinite().all())


def test_subsets_of_subsets_keep_original_numbers() -> None:
    assert IDDPM(spacing="ddim100").respaced("ddim10").original_timesteps.tolist() == list(range(0, 1000, 100))


def test_respacing_leaves_the_objective_as_it_was() -> None:
    objective = IDDPM()
    assert objective.respaced("10").num_timesteps == 10
    assert objective.num_timesteps == 1000 and len(objective.original_timesteps) == 1000


@pytest.mark.parametrize(
    ("spacing", "kept"),
    [("6", [0, 1, 2, 3, 4, 5]), ("2", [0, 5]), ("1", [0]), ("1,1", [0, 3]), ("2,1", [0, 2, 3]), ("ddim3", [0, 2, 4])],
)
def test_spacing_by_hand(spacing: str, kept: list[int]) -> None:
    assert spaced_timesteps(6, spacing) == kept


@pytest.mark.parametrize("spacing", ["7", "0", "-1", "4,1", "ddim4", "ddim0", "ddimx", "many", "1,,1", ""])
def test_spacings_that_do_not_fit_are_refused(spacing: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spaced_timesteps(6, spacing)
    assert caught.value.hint


def test_unknown_and_impossible_schedules_are_refused() -> None:
    with pytest.raises(ConfigError, match="linaer") as caught:
        named_betas("linaer", 1000)
    assert "linear" in caught.value.hint
    with pytest.raises(ConfigError, match="10 diffusion steps"):
        named_betas("linear", 10)


def test_the_fixed_large_variance_is_beta_but_for_the_last_step_back() -> None:
    """At timestep 0 the posterior has no variance and beta would blur, so its neighbour's stands in (as in DDPM)."""
    tables = IDDPM().tables
    assert torch.equal(tables.large_variance[1:], tables.betas[1:])
    assert tables.large_variance[0] == tables.posterior_variance[1]
