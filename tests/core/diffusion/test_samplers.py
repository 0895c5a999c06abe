"""The contract of every sampler, on data whose denoiser is known: independent normals with mean m and deviation 0.5."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opensora_core.diffusion import IDDPM, OBJECTIVES, SAMPLERS, Objective, RectifiedFlow, sample
from opensora_core.diffusion.guidance import guide
from opensora_core.errors import ConfigError
from opensora_core.tensors import Condition, Denoiser

DEVIATION = 0.5
SHAPE = (3, 4, 2, 24, 24)
MEANS = Condition(torch.tensor([-0.7, 0.2, 1.0]).view(3, 1, 1))
PAIRS = [
    (sampler, objective)
    for sampler, entry in SAMPLERS.items()
    for objective, kind in OBJECTIVES.items()
    if kind in entry.fits
]
OBJECTIVE_SETTINGS: dict[str, list[Objective]] = {
    "iddpm": [
        IDDPM(),
        IDDPM("squaredcos_cap_v2", learn_sigma=False, predict_xstart=True, sigma_small=True),
        IDDPM(spacing="250"),
    ],
    "rectified-flow": [RectifiedFlow(), RectifiedFlow(timestep_shift=2.0)],
}


def exact_denoiser(objective: Objective) -> Denoiser:
    """The best possible prediction for the data, at any timestep, fractional ones included."""

    def flow(latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        assert timestep.is_floating_point()
        s, mean = timestep.view(-1, 1, 1, 1, 1) / 1000, condition.tokens.view(-1, 1, 1, 1, 1)
        variance = (1 - s) ** 2 * DEVIATION**2 + s**2
        slope = (s - (1 - s) * DEVIATION**2) / variance
        return slope * (latents - (1 - s) * mean) - mean

    def discrete(latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        assert isinstance(objective, IDDPM)
        full = IDDPM("linear" if objective.tables.betas[0] > 5e-5 else "squaredcos_cap_v2").tables.alphas_cumprod.log()
        below = timestep.long().clamp(max=len(full) - 2)
        remaining = full[below].lerp(full[below + 1], (timestep - below).double()).exp().float().view(-1, 1, 1, 1, 1)
        mean = condition.tokens.view(-1, 1, 1, 1, 1)
        noise = (
            (1 - remaining).sqrt() * (latents - remaining.sqrt() * mean) / (remaining * DEVIATION**2 + 1 - remaining)
        )
        first = (latents - (1 - remaining).sqrt() * noise) / remaining.sqrt() if objective.predict_xstart else noise
        # the middle of the learned range is within a few percent of the best variance for this data
        return torch.cat([first, torch.zeros_like(first)], dim=1) if objective.learn_sigma else first

    return flow if isinstance(objective, RectifiedFlow) else discrete


def generators(samples: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + number) for number in samples]


def draw(sampler: str, objective: Objective, steps: int, samples: range = range(3)) -> tuple[Tensor, Tensor]:
    """The start noise and the samples; each sample has noise of its own, as `sampling.py` has it."""
    sources = generators(samples)

    def noise() -> Tensor:
        return torch.stack([torch.randn(SHAPE[1:], generator=source) for source in sources])

    start = noise()
    run = sample(
        exact_denoiser(objective),
        start,
        MEANS[samples.start : samples.stop],
        objective=objective,
        sampler=sampler,
        steps=steps,
        draw_noise=noise,
    )
    *_, last = run
    return start, last.latents


def everything_that_fits(*only: str) -> list[object]:
    return [
        pytest.param(sampler, objective, id=f"{sampler}-{name}-{number}")
        for sampler, name in PAIRS
        if not only or sampler in only
        for number, objective in enumerate(OBJECTIVE_SETTINGS[name])
    ]


@pytest.mark.parametrize(("sampler", "objective"), everything_that_fits())
def test_samples_follow_the_data(sampler: str, objective: Objective) -> None:
    _, latents = draw(sampler, objective, steps=100)
    expected = MEANS.tokens.flatten()
    torch.testing.assert_close(latents.flatten(1).mean(1), expected, atol=0.06, rtol=0)
    torch.testing.assert_close(latents.flatten(1).std(1), torch.full((3,), DEVIATION), atol=0.04, rtol=0)


@pytest.mark.parametrize(("sampler", "objective"), everything_that_fits())
def test_more_steps_come_closer(sampler: str, objective: Objective) -> None:
    """Noise-free samplers approach the exact map of noise to data; the others approach its moments."""

    def error(steps: int) -> float:
        start, latents = draw(sampler, objective, steps)
        if SAMPLERS[sampler].draws_noise:
            return float((latents.flatten(1).std(1) - DEVIATION).abs().mean())
        exact = MEANS.tokens.view(3, 1, 1, 1, 1) + DEVIATION * start
        return float((latents - exact).square().mean().sqrt())

    coarse, fine = error(4), error(64)
    assert fine < 0.5 * coarse
    assert fine < 0.04


@pytest.mark.parametrize(("sampler", "objective"), everything_that_fits("dpm-solver++", "unipc", "heun"))
def test_second_order_solvers_are_right_to_the_third_digit(sampler: str, objective: Objective) -> None:
    """Tight enough to notice a denoiser that is told timesteps a few percent off."""
    start, latents = draw(sampler, objective, steps=64)
    error = latents - MEANS.tokens.view(3, 1, 1, 1, 1) - DEVIATION * start
    assert error.square().mean().sqrt() < 0.004


@pytest.mark.parametrize(("sampler", "objective"), everything_that_fits())
def test_a_sample_does_not_depend_on_its_batch(sampler: str, objective: Objective) -> None:
    _, together = draw(sampler, objective, steps=7)
    for number in range(3):
        _, alone = draw(sampler, objective, 7, range(number, number + 1))
        torch.testing.assert_close(alone[0], together[number], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 13])
@pytest.mark.parametrize(("sampler", "objective"), everything_that_fits())
def test_every_number_of_steps_works(sampler: str, objective: Objective, steps: int) -> None:
    seen: list[float] = []
    exact = exact_denoiser(objective)

    def denoiser(latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        seen.append(float(timestep[0]))
        assert not torch.is_grad_enabled() and latents.dtype == torch.float32
        return exact(latents, timestep, condition).to(torch.float64)

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    run = list(
        sample(
            denoiser,
            noise.to(torch.float64),
            MEANS,
            objective=objective,
            sampler=sampler,
            steps=steps,
            draw_noise=lambda: noise,
        )
    )
    assert [(step.index, step.total) for step in run] == [(index, steps) for index in range(steps)]
    assert all(step.latents.shape == SHAPE and step.latents.dtype == torch.float32 for step in run)
    assert bool(run[-1].latents.isfinite().all())
    timesteps = [step.timestep for step in run]
    assert timesteps == sorted(timesteps, reverse=True) and set(map(int, timesteps)) <= set(map(int, seen))
    assert len(set(timesteps)) == steps


@pytest.mark.parametrize("sampler", [name for name, objective in PAIRS if objective == "iddpm"])
def test_as_many_steps_as_timesteps(sampler: str) -> None:
    objective = IDDPM(spacing="40")
    _, latents = draw(sampler, objective, 40)
    torch.testing.assert_close(latents.flatten(1).mean(1), MEANS.tokens.flatten(), atol=0.06, rtol=0)


@pytest.mark.parametrize("sampler", ["dpm-solver++", "unipc"])
def test_the_solvers_of_diffusers_agree_with_euler_on_a_curved_flow(sampler: str) -> None:
    """Verifies that diffusers reads velocities and sigmas as we mean them, on data that is not normal."""

    def two_peaks(latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        s = timestep.view(-1, 1, 1, 1, 1) / 1000
        variance = (1 - s) ** 2 * 0.2**2 + s**2
        peaks = [-(latents - (1 - s) * peak).square() / (2 * variance) for peak in (-1.0, 1.0)]
        weight = torch.softmax(torch.stack(peaks), dim=0)[1]
        mean = 2 * weight - 1
        slope = (s - (1 - s) * 0.2**2) / variance
        return slope * (latents - (1 - s) * mean) - mean

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    objective = RectifiedFlow(timestep_shift=1.5)

    def last(name: str, steps: int) -> Tensor:
        *_, end = sample(two_peaks, noise, MEANS, objective=objective, sampler=name, steps=steps)
        return end.latents

    reference = last("euler", 1000)
    errors = [float((last(sampler, steps) - reference).abs().mean()) for steps in (10, 40, 160)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.01
    assert errors[1] < float((last("euler", 40) - reference).abs().mean())


def test_heun_needs_fewer_steps_than_euler() -> None:
    objective = RectifiedFlow()
    errors = {}
    for sampler, steps in (("euler", 20), ("heun", 10)):
        start, latents = draw(sampler, objective, steps)
        errors[sampler] = (latents - MEANS.tokens.view(3, 1, 1, 1, 1) - DEVIATION * start).abs().mean()
    assert errors["heun"] < 0.3 * errors["euler"]


def constant(latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """Predicts, in every one of 2C channels, the number that it is conditioned on."""
    return condition.tokens.view(-1, 1, 1, 1, 1).expand(-1, 2 * latents.shape[1], *latents.shape[2:])


def test_guidance_extrapolates_from_the_null_condition() -> None:
    condition, null = Condition(torch.tensor([[1.0], [2.0]])), Condition(torch.tensor([[0.0], [1.0]]))
    latents = torch.zeros(2, 5, 1, 2, 2)
    for channels, guided in (("all", 5), ("first-three", 3)):
        result = guide(constant, condition, null, 4.0, channels)(latents, 10)  # type: ignore[arg-type]
        first = result[:, :, 0, 0, 0]
        torch.testing.assert_close(first[:, :guided], torch.tensor([[4.0], [5.0]]).expand(2, guided))
        torch.testing.assert_close(first[:, guided:], torch.tensor([[1.0], [2.0]]).expand(2, 10 - guided))


def test_guidance_makes_one_call_and_a_scale_of_one_needs_no_null() -> None:
    batches: list[tuple[int, int]] = []

    def denoiser(latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        batches.append((len(latents), len(condition)))
        return constant(latents, timestep, condition)

    latents = torch.zeros(3, 4, 1, 2, 2)
    guide(denoiser, MEANS, MEANS, 2.0)(latents, 10)
    guide(denoiser, MEANS)(latents, 10)
    assert batches == [(6, 6), (3, 3)]


@pytest.mark.parametrize(
    ("objective", "sampler", "steps", "words"),
    [
        (RectifiedFlow(), "eular", 10, ["eular", "euler"]),
        (RectifiedFlow(), "iddpm", 10, ["iddpm", "rectified-flow", "euler", "heun", "unipc"]),
        (IDDPM(), "heun", 10, ["heun", "iddpm", "ddim", "dpm-solver"]),
        (IDDPM(), "ddim", 0, ["0", "1000", "--steps"]),
        (IDDPM(), "ddim", 1001, ["1001", "1000"]),
        (IDDPM(spacing="20"), "ddim", 21, ["21", "20"]),
    ],
)
def test_requests_that_do_not_fit_are_refused_at_once(
    objective: Objective, sampler: str, steps: int, words: list[str]
) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("called")

    with pytest.raises(ConfigError) as caught:
        sample(never, torch.zeros(SHAPE), MEANS, objective=objective, sampler=sampler, steps=steps)
    for word in words:
        assert word in caught.value.message + caught.value.hint


def test_the_table_of_objectives_is_usable_by_name() -> None:
    builders: list[Callable[..., Objective]] = list(OBJECTIVES.values())
    for build in builders:
        objective = build()
        timestep = objective.draw_timesteps(64, torch.Generator().manual_seed(0))
        assert timestep.shape == (64,) and timestep.min() >= 0 and timestep.max() < objective.num_timesteps
        exact = exact_denoiser(objective)
        x0 = DEVIATION * torch.randn(64, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
        condition = Condition(torch.zeros(64, 1, 1))
        best = objective.losses(exact, x0, timestep, noise, condition)
        worse = objective.losses(lambda *inputs, exact=exact: exact(*inputs) + 0.5, x0, timestep, noise, condition)
        assert best["loss"].shape == (64,)
        assert worse["loss"].mean() > best["loss"].mean() + 0.1
