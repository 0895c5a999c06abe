"""Training a denoiser on latents and captions, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_core import components
from opensora_core.config import Config, to_dict, with_settings
from opensora_core.diffusion.objective import Objective
from opensora_core.lora import add_lora
from opensora_core.models import LatentTransformer, freeze
from opensora_core.parallel.sequence import sequence_parallel
from opensora_core.tensors import Condition
from opensora_core.training.events import Event
from opensora_core.training.loop import fit
from opensora_core.training.memory import peak_flops, training_flops
from opensora_core.training.task import Crew, Task, noise_at

POSTERIOR, DIFFUSION = 1, 2
"""Salts of the noises that are drawn at a place of a batch."""


class DenoiserTask(Task):
    """The objective on whatever `encoded` makes of a batch.

    Args:
        model: the denoiser; its weights are fp32.
        objective: what it learns.
        dtype: of the arithmetic; weights, losses and gradients stay fp32.

    Attributes:
        draws: how many noises and timesteps each clip of a batch is seen with.
    """

    name = "model"
    draws = 1

    def __init__(self, model: LatentTransformer, objective: Objective, dtype: torch.dtype = torch.float32) -> None:
        self.module = self.model = self.called = model
        self.objective = objective
        self.dtype = dtype

    def encoded(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """Latents (B, C, T, h, w) and captions of this process's share, on the model's device."""
        raise NotImplementedError

    def losses(self, batch: Any, generator: torch.Generator, parts: int) -> Iterator[dict[str, Tensor]]:
        """The objective's loss with captions dropped at the model's own rate.

        Everything is drawn for the whole batch, so neither the number of parts nor of processes changes a number.
        """
        latents, condition = self.encoded(batch, generator)
        device, count = latents.device, len(latents) * self.draws
        if self.draws > 1:
            again = torch.arange(len(latents), device=device).repeat_interleave(self.draws)
            latents, condition = latents[again], condition[again]
        total = count * self.share.size
        places = self.share.places(total)
        own = slice(places.start, places.stop)
        dropped = torch.rand(total, generator=generator, device=device)[own] < self.model.caption_dropout
        condition = self.model.replace_captions(condition, dropped)
        timestep = self.objective.draw_timesteps(total, generator)[own]
        noise = noise_at(places, tuple(latents.shape[1:]), generator, DIFFUSION)
        for indices in torch.arange(count, device=device).chunk(parts):
            part = slice(int(indices[0]), int(indices[-1]) + 1)
            losses = self.objective.losses(self.denoise, latents[part], timestep[part], noise[part], condition[part])
            yield {name: values.mean() * (len(indices) / count) for name, values in losses.items()}

    def denoise(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The model in the dtype of the arithmetic."""
        with autocast(latents.device, self.dtype):
            result: Tensor = self.called(latents, timestep, condition)
        return result


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Products in `dtype`, sums and weights in fp32; nothing at all for fp32."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def prepare(model: LatentTransformer, config: Config) -> None:
    """Choose what of a model is trained, and how it runs."""
    train = config.train
    if train.trainable == "temporal-only":
        freeze(model, "not_temporal")
    elif train.trainable == "all-but-text":
        freeze(model, "text")
    if train.lora_rank:
        add_lora(model, train.lora_rank, train.lora_alpha, seed=train.seed)
    if config.runtime.compile:
        for block in model.blocks:  # one block at a time: the next ones reuse what the first one compiled
            block.compile()


def sketch(config: Config) -> LatentTransformer:
    """The model as it would be trained, without the memory for it: on the meta device, and not compiled."""
    with torch.device("meta"):
        model = components.empty_model(config)
    prepare(model, with_settings(config, {"runtime.compile": False}))
    return model


def fit_denoiser(task: DenoiserTask, config: Config, folder: Path, crew: Crew | None = None) -> Iterator[Event]:
    """Train a denoiser as the settings say; see `fit`.

    Args:
        task: on the device of the settings.
        config: of the run; kept with every checkpoint.
        folder: of the checkpoints.
        crew: who trains; None is this process alone.
    """
    task.draws = config.train.draws
    if crew is not None:
        sequence_parallel(task.model, crew.mesh.sequence)
    return fit(
        task,
        config.train,
        folder,
        crew=crew,
        parallel=config.parallel,
        dtype=task.dtype,
        num_workers=config.train.num_workers,
        settings=to_dict(config),
        scale_loss=task.dtype is torch.float16,
        peak_flops=peak_flops(components.resolve_device(config.runtime.device), task.dtype),
    )


def tokens_and_flops(model: LatentTransformer, latent: tuple[int, ...]) -> tuple[int, float]:
    """Tokens of a sample, and floating-point operations of training on it."""
    frames, rows, columns = model.x_embedder.grid(torch.empty(1, *latent, device="meta"))
    return frames * rows * columns, training_flops(model, latent)
