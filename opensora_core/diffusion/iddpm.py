"""Improved DDPM: predict the noise, and optionally the variance of each step back.

Ho et al. 2020 (arXiv 2006.11239); Nichol & Dhariwal 2021 (arXiv 2102.09672) for the learned variance (equation 15) and
the hybrid loss (equation 16). Open-Sora 1.0, DiT, Latte and PixArt were all trained with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from opensora_core.diffusion.schedule import NoiseTables, named_betas, spaced_timesteps
from opensora_core.tensors import Condition, Denoiser


@dataclass(frozen=True)
class StepBack:
    """The model's normal distribution of x_{t-1} given x_t, and the x0 that it stands on; each (B, C, T, h, w)."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


class IDDPM:
    """The published objective. A timestep is an index 0 .. num_timesteps - 1; the denoiser sees its original number.

    Args:
        noise_schedule: a name of `NOISE_SCHEDULES`.
        diffusion_steps: length of the full schedule.
        spacing: which timesteps to keep, see `spaced_timesteps`; empty keeps all.
        learn_sigma: the denoiser predicts 2C channels, of which the last C place each log variance between the
            posterior's (-1) and log beta (+1); their loss is the variational bound.
        predict_xstart: the denoiser predicts x0 instead of the noise.
        sigma_small: without `learn_sigma`, the posterior's variance instead of beta.
        rescale_learned_sigmas: weigh the bound by num_timesteps / 1000.
        use_kl: minimise num_timesteps times the bound and nothing else.
    """

    def __init__(
        self,
        noise_schedule: str = "linear",
        diffusion_steps: int = 1000,
        spacing: str | Sequence[int] = "",
        *,
        learn_sigma: bool = True,
        predict_xstart: bool = False,
        sigma_small: bool = False,
        rescale_learned_sigmas: bool = False,
        use_kl: bool = False,
    ) -> None:
        self.tables = NoiseTables(named_betas(noise_schedule, diffusion_steps))
        self.original_timesteps = torch.arange(diffusion_steps)
        self.learn_sigma = learn_sigma
        self.predict_xstart = predict_xstart
        self.sigma_small = sigma_small
        self.rescale_learned_sigmas = rescale_learned_sigmas
        self.use_kl = use_kl
        if spacing:
            self._keep(spacing)

    def _keep(self, spacing: str | Sequence[int]) -> None:
        kept = spaced_timesteps(self.num_timesteps, spacing)
        self.tables = self.tables.keep(kept)
        self.original_timesteps = self.original_timesteps[kept]

    @property
    def num_timesteps(self) -> int:
        """How many timesteps are kept."""
        return len(self.tables)

    def respaced(self, spacing: str | Sequence[int]) -> Self:
        """The same objective over a subset of its timesteps, see `spaced_timesteps`."""
        subset = copy.copy(self)
        subset._keep(spacing)
        return subset

    def draw_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw uniform timesteps (B,) int64, on the generator's device."""
        return torch.randint(self.num_timesteps, (batch_size,), generator=generator, device=generator.device)

    def noisy(self, x0: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) fp32 that `timestep` (B,) leaves of `x0`."""
        signal = lookup(self.tables.sqrt_alphas_cumprod, timestep, x0)
        return signal * x0 + lookup(self.tables.sqrt_one_minus_alphas_cumprod, timestep, x0) * noise

    def posterior(self, x0: Tensor, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, both broadcastable to (B, C, T, h, w), of x_{t-1} given `latents` x_t and `x0`."""
        mean = (
            lookup(self.tables.posterior_mean_coef1, timestep, x0) * x0
            + lookup(self.tables.posterior_mean_coef2, timestep, x0) * latents
        )
        return mean, lookup(self.tables.posterior_log_variance_clipped, timestep, x0)

    def x0(self, prediction: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
        """The clean latents (B, C, T, h, w) that a prediction (B, C or 2C, T, h, w) for `latents` implies."""
        first = prediction[:, : latents.shape[1]]
        if self.predict_xstart:
            return first
        return (
            lookup(self.tables.sqrt_recip_alphas_cumprod, timestep, latents) * latents
            - lookup(self.tables.sqrt_recipm1_alphas_cumprod, timestep, latents) * first
        )

    def step_back(self, prediction: Tensor, latents: Tensor, timestep: Tensor, clip: bool = False) -> StepBack:
        """Read a prediction (B, C or 2C, T, h, w) for `latents` x_t as a distribution of x_{t-1}.

        `clip` bounds the implied x0 to [-1, 1], right for pixels; the published runs leave latents unbounded.
        """
        x0 = self.x0(prediction, latents, timestep)
        if clip:
            x0 = x0.clamp(-1, 1)
        mean, log_variance = self.posterior(x0, latents, timestep)
        if self.learn_sigma:
            channels = latents.shape[1]
            assert prediction.shape[1] == 2 * channels, "a learned variance needs 2C channels"
            towards_beta = (prediction[:, channels:] + 1) / 2
            log_beta = lookup(self.tables.betas.log(), timestep, latents)
            log_variance = towards_beta * log_beta + (1 - towards_beta) * log_variance
        elif not self.sigma_small:
            log_variance = lookup(self.tables.large_variance.log(), timestep, latents)
        return StepBack(mean, log_variance.expand_as(mean), x0)

    def losses(
        self, denoiser: Denoiser, x0: Tensor, timestep: Tensor, noise: Tensor, condition: Condition
    ) -> dict[str, Tensor]:
        """The hybrid loss per sample, see `Objective.losses`.

        Returns:
            "loss"; "mse", the squared error, unless `use_kl`; "vb", the bound in bits per latent value, where the
            variance is learned or `use_kl`.
        """
        x0, noise, channels = x0.float(), noise.float(), x0.shape[1]
        latents = self.noisy(x0, timestep, noise)
        seen = self.original_timesteps.to(timestep.device)[timestep]
        prediction = denoiser(latents, seen, condition).float()
        if self.use_kl:
            bound = self._bound(prediction, x0, latents, timestep)
            return {"loss": self.num_timesteps * bound, "vb": bound}
        target = x0 if self.predict_xstart else noise
        mse = (target - prediction[:, :channels]).square().flatten(1).mean(1)
        if not self.learn_sigma:
            return {"loss": mse, "mse": mse}
        # the bound teaches the variance only: its gradient on the mean is too noisy (section 3.1)
        frozen = torch.cat([prediction[:, :channels].detach(), prediction[:, channels:]], dim=1)
        bound = self._bound(frozen, x0, latents, timestep)
        if self.rescale_learned_sigmas:
            bound = bound * (self.num_timesteps / 1000)
        return {"loss": mse + bound, "mse": mse, "vb": bound}

    def _bound(self, prediction: Tensor, x0: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
        """The term of the variational bound that belongs to `timestep`, in bits per latent value (B,)."""
        model = self.step_back(prediction, latents, timestep)
        mean, log_variance = self.posterior(x0, latents, timestep)
        divergence = _normal_kl(mean, log_variance, model.mean, model.log_variance)
        surprise = -_discretised_log_likelihood(x0, model.mean, model.log_variance / 2)
        nats = torch.where((timestep == 0).view(-1, *[1] * (x0.ndim - 1)), surprise, divergence)
        return nats.flatten(1).mean(1) / math.log(2)


def lookup(table: Tensor, timestep: Tensor, like: Tensor) -> Tensor:
    """Entries of a table (N,) at timesteps (B,), fp32, shaped to broadcast over `like` (B, ...)."""
    return table.float().to(timestep.device)[timestep].view(-1, *[1] * (like.ndim - 1))


def _normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence in nats of normal 2 from normal 1, element by element."""
    spread = log_variance2 - log_variance1 + (log_variance1 - log_variance2).exp()
    return 0.5 * (spread - 1 + (mean1 - mean2).square() * (-log_variance2).exp())


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability in nats that a normal gives to the bin of x, 256 bins over [-1, 1], open at both ends."""

    def cumulative(value: Tensor) -> Tensor:
        # published weights were trained with this approximation of the normal's distribution function
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    scale = (-log_std).exp()
    below_upper = cumulative((x - mean + 1 / 255) * scale)
    below_lower = cumulative((x - mean - 1 / 255) * scale)
    probability = torch.where(
        x < -0.999, below_upper, torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower)
    )
    return probability.clamp(min=1e-12).log()
