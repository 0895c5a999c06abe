"""The denoiser at work: from noise to the latents of a batch."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from opensora_core import components, diffusion, parallel
from opensora_core.config import Config
from opensora_core.errors import OsoraError
from opensora_core.models import LatentTransformer
from opensora_core.parallel import Mesh
from opensora_core.sampling.captions import Captions
from opensora_core.sampling.events import Event, Loading, Notice, Progress
from opensora_core.sampling.loading import PARTS
from opensora_core.sampling.planning import Request
from opensora_core.sampling.steady import NoiseSource, SteadyDenoiser, steady_layers
from opensora_core.tensors import Condition

T = TypeVar("T")


def load_drawer(
    config: Config, captions: Captions, shape: tuple[int, int, int, int], mesh: Mesh
) -> Generator[Event, None, Drawer]:
    """Load the denoiser for latents of a shape (C, T, h, w); who shares a sample's frames or halves computes his part.

    Raises:
        WeightsError, CheckpointError: weights that are missing, torn or of another model.
        InputError: a size that the model cannot make.
    """
    yield Loading(PARTS["model"])
    notes: list[str] = []
    model = components.build_model(config, captions.empty, notes.append)
    for note in notes:
        yield Notice(note)
    frames, _, _ = model.x_embedder.grid(torch.empty(1, *shape, device="meta"))  # raises where it does not divide
    if mesh.sequence.size > frames:
        yield Notice(
            f"{mesh.sequence.size} processes share {frames} frame{'' if frames == 1 else 's'} of the model, so that "
            f"{mesh.sequence.size - frames} have little to do; --parallel data={mesh.size} lets each draw samples alone"
        )
    if config.sampling.batch_invariant:
        steady_layers(model)
    parallel.sequence_parallel(model, mesh.sequence)
    if config.runtime.compile:
        model.compile()
    return Drawer(config, model, captions, shape, mesh)


class Drawer:
    """Draws latents, batch by batch."""

    def __init__(
        self,
        config: Config,
        model: LatentTransformer,
        captions: Captions,
        shape: tuple[int, int, int, int],
        mesh: Mesh,
    ) -> None:
        self.config, self.model, self.captions, self.shape, self.mesh = config, model, captions, shape, mesh
        self.steady = SteadyDenoiser(model) if config.sampling.batch_invariant else None
        self.objective = components.build_objective(config)

    def draw(self, batches: Sequence[Sequence[Request]]) -> Generator[Event, None, Tensor]:
        """Draw the latents (B, C, T, h, w) of this group's batch, while the others draw theirs.

        Raises:
            OsoraError: numbers beyond what the dtype holds.
        """
        settings = self.config.sampling
        batch = batches[self.mesh.data.rank]
        if not batch:
            return torch.empty(0, *self.shape)
        condition = self.condition(batch)
        draw_noise = NoiseSource([(request.prompt, request.seed) for request in batch], self.shape, self.mesh.device)
        steps = diffusion.sample(
            parallel.in_halves(self.model if self.steady is None else self.steady.of(len(batch)), self.mesh.cfg),
            draw_noise(),
            condition,
            self.model.null_condition(condition) if settings.guidance != 1 else None,
            objective=self.objective,
            sampler=settings.sampler,
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_channels=settings.guidance_channels,
            draw_noise=draw_noise,
        )
        together = sum(map(len, batches))
        title = batch[0].prompt if together == 1 else f"{batch[0].prompt} (and {together - 1} more)"
        begin = time.monotonic()
        yield Progress(title, 0, settings.steps, None)
        latents = torch.empty(0)
        for step in _without_gradients(steps):
            latents, done = step.latents, step.index + 1
            yield Progress(title, done, step.total, (time.monotonic() - begin) / done * (step.total - done))
        if not latents.isfinite().all():
            raise OsoraError(
                "the model's numbers grew beyond what the dtype holds, so there is nothing to show",
                "--dtype fp32, or bf16; or a lower --guidance",
            )
        return latents

    def condition(self, batch: Sequence[Request]) -> Condition:
        """The captions of a batch, on the device."""
        condition = Condition.cat([self.captions.of[request.prompt] for request in batch])
        if self.config.model.family == "pixart-ms":  # it is told the size in pixels
            size = torch.tensor([[self.config.video.height, self.config.video.width]], dtype=torch.float32)
            condition = replace(condition, size=size.repeat(len(batch), 1))
        return condition.to(self.mesh.device, components.resolve_dtype(self.config.runtime.dtype, self.mesh.device))


def _without_gradients(steps: Iterator[T]) -> Iterator[T]:
    """Compute each step without gradients, and leave the mode as it was while the caller has the word."""
    while True:
        with torch.no_grad():
            step = next(steps, None)
        if step is None:
            return
        yield step
