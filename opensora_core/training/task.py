"""What the loop trains, and how a process draws what belongs to its own part of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensora_core.data.order import WHOLE
from opensora_core.parallel import Mesh
from opensora_core.parallel.watchdog import Watch
from opensora_core.training.checkpoint import Also
from opensora_core.training.ema import EMA
from opensora_core.training.events import Event, Facts


@dataclass(frozen=True)
class Crew:
    """Who trains together: the processes, and who watches over them."""

    mesh: Mesh
    watch: Watch | None = None


class Task:
    """What the loop needs to know of a part in training.

    Attributes:
        name: of the part.
        stays: attributes that `batch` does without and that workers do not get, as weights on a GPU or in parts.
        module: what is trained, averaged and saved.
        root: what the losses call: the module, or what holds it.
        called: the same, as the engine wants it to be called.
        share: which part of every batch is this process's.
        mesh: of the run.
    """

    name: str
    stays: tuple[str, ...] = ("module", "model", "called", "mesh")
    module: nn.Module
    called: Callable[..., Any]
    share = WHOLE
    mesh: Mesh

    @property
    def root(self) -> nn.Module:
        """See above."""
        return self.module

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.stays}

    def batch(self, step: int) -> Any:
        """Make this process's share of the batch of a step, a function of the step alone. Runs in a worker process."""
        raise NotImplementedError

    def losses(self, batch: Any, generator: torch.Generator, parts: int) -> Iterator[dict[str, Tensor]]:
        """Compute scalars in `parts` parts that add up to the share's; "loss" is minimised, the others are reported.

        The generator is the same for all shares of a batch, see `noise_at`.
        """
        raise NotImplementedError

    def received(self, batch: Any) -> Iterator[Event]:
        """Tell what happened while the batch was made; all processes do so at every step, and may ask each other."""
        return iter(())

    def facts(self, batch: Any) -> Facts:
        """Say what the report is to know of a share of a batch."""
        return Facts()

    def after(self, step: int, ema: EMA) -> Iterator[Event]:
        """Look at the weights after a step, on all processes together, and leave them as they are."""
        return iter(())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the module: its own tensors, not copies."""
        return self.module.state_dict()

    def also_save(self, ema: EMA) -> Also | None:
        """What writes more into a checkpoint, on the first process; all processes prepare it together."""
        return None


def step_seed(seed: int, step: int) -> int:
    """One seed per (seed, step), far apart for neighbours."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63


def noise_at(places: range, shape: tuple[int, ...], generator: torch.Generator, salt: int) -> Tensor:
    """Standard normal (len(places), *shape) of places in a batch, the same whoever draws it.

    Args:
        places: in the whole batch.
        shape: of one sample.
        generator: only its seed and device are used.
        salt: another one for each thing that is drawn at a place.
    """
    own, seed = torch.Generator(generator.device), generator.initial_seed()
    noise = torch.empty(len(places), *shape, device=generator.device)
    for row, place in zip(noise, places, strict=True):
        torch.randn(shape, generator=own.manual_seed(step_seed(seed + salt, place + 1)), out=row)
    return noise
