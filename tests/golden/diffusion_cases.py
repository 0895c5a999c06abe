"""Golden cases of the diffusion room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from opensora_core.diffusion import IDDPM, sample
from opensora_core.diffusion.dpm_solver import ContinuousTime
from opensora_core.diffusion.guidance import guide
from opensora_core.diffusion.samplers import ancestral_step, ddim_step
from opensora_core.diffusion.schedule import NoiseTables, named_betas, spaced_timesteps
from opensora_core.tensors import Condition, Denoiser
from tests.golden.case import Case


def fake(latents: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
    """The analytic model that the cases describe in their `fake_model` field."""
    time = timestep.float().view(-1, 1, 1, 1, 1) / 1000
    noise = time * latents + (1 - time) * 0.9 * torch.tanh(0.8 * latents + 0.5 * time)
    if condition is not None:
        noise = noise + (1 - time) * 0.5 * condition.tokens.flatten(1).mean(1).view(-1, 1, 1, 1, 1)
    return torch.cat([noise, torch.sin(1.3 * latents - time)], dim=1)


def model_and_conditions(case: Case) -> tuple[Denoiser, Condition, Condition]:
    """The denoiser of a sampling case, fake or real, with the conditions of its two halves.

    The published runs reuse the prompt's mask for the null caption.
    """
    if "model" not in case.config:
        return fake, Condition(case.io["y"]), Condition(case.io["null"])
    from tests.golden.model_cases import build_upstream, condition

    model = build_upstream(case).eval()
    return model, condition(case), condition(case, "null")


class Recorder:
    """A denoiser that notes the timestep and the batch size of every call."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.timesteps: list[Tensor] = []
        self.batches: list[int] = []

    def __call__(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        self.timesteps.append(timestep)
        self.batches.append(len(latents))
        return self.denoiser(latents, timestep, condition)


def check_guidance(case: Case) -> None:
    io, half = case.io, len(case.io["x"]) // 2
    case.close(fake(torch.cat([io["x"][:half]] * 2), io["t"], Condition(io["y"])), "raw")
    # sample by sample, so that a case may give each its own timestep
    for index in range(half):
        one, other = slice(index, index + 1), slice(half + index, half + index + 1)
        conditions = Condition(io["y"][one]), Condition(io["y"][other])
        predict = guide(fake, *conditions, case.config["cfg_scale"], "first-three")
        case.close(predict(io["x"][one], int(io["t"][index])), io["out"][one], f"out[{index}]")


def check_tables(case: Case) -> None:
    config = case.config
    schedules: dict[str, NoiseTables] = {}
    for key in sorted({name.split(".")[0] for name in case.io}):
        if key == "base":
            schedules[key] = IDDPM().tables
        elif key == "cosine":
            schedules[key] = NoiseTables(named_betas("squaredcos_cap_v2", config["cosine_steps"]))
        elif key.startswith("linear"):
            schedules[key] = NoiseTables(named_betas("linear", int(key.removeprefix("linear"))))
        else:
            schedules[key] = IDDPM(spacing=key.removeprefix("steps")).tables
    for name in case.io:
        key, table = name.split(".")
        case.close(getattr(schedules[key], table), name)
    for steps, expected in config["respaced_timesteps"].items():
        assert IDDPM(spacing=steps).original_timesteps.tolist() == expected, steps
    for sections, expected in config["sections"].items():
        total = config["sections_num_timesteps"][sections]
        assert spaced_timesteps(total, sections.strip("[]").replace(" ", "")) == expected, sections


def check_step(case: Case) -> None:
    io, objective = case.io, IDDPM(spacing=str(case.config["num_sampling_steps"]))
    seen = objective.original_timesteps[io["t"]]
    assert torch.equal(seen, io["model_t"])
    prediction = fake(io["x"], seen)
    for name in io:
        kind, _, result = name.partition(".")
        if kind.startswith("p_sample"):
            option, _, result = result.partition(".")
            clip = option == "clip1"
            if result == "pred_xstart":
                case.close(objective.step_back(prediction, io["x"], io["t"], clip).x0, name)
            else:
                case.close(ancestral_step(objective, prediction, io["x"], io["t"], io["noise"], clip=clip), name)
        elif kind.startswith("ddim_eta"):
            eta = float(name.removeprefix("ddim_eta").removesuffix(".sample"))
            case.close(ddim_step(objective, prediction, io["x"], io["t"], eta=eta, noise=io["noise"]), name)


def check_losses(case: Case) -> None:
    io, objective = case.io, IDDPM()
    channels, condition = io["x0"].shape[1], Condition(torch.zeros(len(io["x0"]), 1, 1))
    latents = objective.noisy(io["x0"], io["t"], io["noise"])
    case.close(latents, "q_sample")
    mean, log_variance = objective.posterior(io["x0"], latents, io["t"])
    case.close(mean, "q_posterior.mean")
    case.close(log_variance.expand_as(mean), "q_posterior.log_variance")
    for option, clip in (("clip0", False), ("clip1", True)):
        back = objective.step_back(io["model_output"], latents, io["t"], clip)
        case.close(back.mean, f"p_mean_variance.{option}.mean")
        case.close(back.log_variance, f"p_mean_variance.{option}.log_variance")
        case.close(back.x0, f"p_mean_variance.{option}.pred_xstart")
    for variant, options in case.config["variants"].items():
        flags = {name: value for name, value in options.items() if name != "num_sampling_steps"}
        objective = IDDPM(spacing=str(options.get("num_sampling_steps", "")), **flags)
        key = f"loss.{variant}"
        output = io["model_output"][:, : channels * (2 if objective.learn_sigma else 1)].clone().requires_grad_()
        recorder = Recorder(lambda *_, output=output: output)
        losses = objective.losses(recorder, io["x0"], io[f"{key}.t"], io["noise"], condition)
        assert torch.equal(recorder.timesteps[0], io[f"{key}.model_t"])
        losses["loss"].mean().backward()
        for term in ("loss", "mse", "vb"):
            if f"{key}.{term}" in io:
                case.close(losses[term], f"{key}.{term}")
        assert output.grad is not None
        case.close(output.grad, f"{key}.grad_model_output")


def check_ancestral_run(case: Case) -> None:
    io, config = case.io, case.config
    denoiser, condition, null = model_and_conditions(case)
    recorder = Recorder(denoiser)
    # the published run draws noise for both halves of its doubled state; only the first half reaches the sample
    noise: Iterator[Tensor] = iter(io["noise"][:, : config["n"]])
    steps = sample(
        recorder,
        io["z"],
        condition,
        null,
        objective=IDDPM(),
        sampler="iddpm",
        steps=config["num_sampling_steps"],
        guidance=config["cfg_scale"],
        guidance_channels="first-three",
        draw_noise=lambda: next(noise),
    )
    for step in steps:
        case.close(step.latents, io["xs"][step.index, : config["n"]], f"xs[{step.index}]")
    case.close(step.latents, "out")
    for timesteps, expected in zip(recorder.timesteps, io["model_t"], strict=True):
        assert bool((timesteps == expected).all())


def check_solver_schedule_and_runs(case: Case) -> None:
    io, time = case.io, ContinuousTime(IDDPM())
    total = len(time.log_alphas)
    case.close(time.log_alphas, "ns.log_alpha_array")
    case.close(torch.arange(1, total + 1) / total, "ns.t_array")

    def at(function: Callable[[float], float], name: str = "ns.t") -> Tensor:
        return torch.tensor([function(t * total - 1) for t in io[name].double().tolist()])

    case.close(at(time.log_alpha), "ns.log_mean_coeff")
    case.close(at(time.alpha), "ns.alpha")
    case.close(at(time.sigma), "ns.std")
    case.close(at(time.log_ratio), "ns.lambda")
    case.close(at(time.log_ratio, "ns.inverse_lambda"), "ns.lambda")
    for name, run in case.config["runs"].items():
        trajectory = check_solver_run(case, run["steps"], run["cfg_scale"], io[f"{name}.model_t"], run)
        case.close(torch.stack([io["z"], *trajectory]), f"{name}.x")
        case.close(trajectory[-1], f"{name}.out")


def check_solver_run(
    case: Case, steps: int, scale: float, timesteps: Tensor | None = None, run: dict[str, Any] | None = None
) -> list[Tensor]:
    denoiser, condition, null = model_and_conditions(case)
    recorder = Recorder(denoiser)
    taken = sample(
        recorder, case.io["z"], condition, null, objective=IDDPM(), sampler="dpm-solver", steps=steps, guidance=scale
    )
    trajectory = [step.latents for step in taken]
    if timesteps is not None and run is not None:
        case.close(torch.stack(recorder.timesteps), timesteps.unsqueeze(1).expand(-1, recorder.batches[0]), "model_t")
        assert recorder.batches == [run["batch_per_call"]] * run["nfe"]
    return trajectory


def check_solver_sample(case: Case) -> None:
    config = case.config
    case.close(check_solver_run(case, config["num_sampling_steps"], config["cfg_scale"])[-1], "out")


HANDLERS: dict[str, Callable[[Case], None]] = {
    "forward_with_cfg": check_guidance,
    "schedulers.iddpm": check_tables,
    "IDDPM.p_sample": check_step,
    "IDDPM.training_losses": check_losses,
    "IDDPM.sample (p_sample_loop + forward_with_cfg)": check_ancestral_run,
    "schedulers.dpms": check_solver_schedule_and_runs,
    "schedulers.dpms.DMP_SOLVER.sample": check_solver_sample,
}
