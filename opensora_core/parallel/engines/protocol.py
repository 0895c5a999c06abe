"""What the training loop asks of an engine: how the state of a training is spread, and how a step is taken on it.

The loop owns what is the same for all: batches, draws, losses, the average of the weights, reports, when to save. An
engine owns the weights, gradients and optimizers, wherever they lie. In the order in which the loop calls:

    engine = build_engine(parallel, mesh, ...)              engines/__init__.py
    root = engine.prepare(module, root, build)              once; everything of the module is on its device
    engine.load(stored)                                     where there is a checkpoint
    every step:
        for part in task.losses(...):                       these call `root`
            engine.backward(part["loss"])
        norm = engine.clip(max_norm)
        (the loop compares losses and norm over all processes, and stops before the next line if one is not finite)
        engine.update()
        (the loop moves its average: `parameter.lerp` on whatever the module's parameters are now)
    now and then:
        engine.settle()                                     the loop has written into the parameters
        engine.tensors(), engine.numbers(), engine.save(folder)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opensora_core.parallel.shards import Stored

Optimizer = torch.optim.Optimizer


class Engine(Protocol):
    """One way to train on the processes of a mesh. One process is a mesh of one.

    An engine is made for a mesh and its settings, and refuses in its constructor, by a `ConfigError`, what it cannot
    do: a kind of optimizer, a sequence axis, a dtype, a device.

    Attributes:
        optimizers: what `prepare` had built (or put around it); their `param_groups[..]["lr"]` are set by the loop
            before each `update`.
        skips_overflows: whether `update` leaves a step out whose gradients are not finite, as a scaled fp16 loss does;
            False where such gradients are an error.
    """

    optimizers: list[Optimizer]

    @property
    def skips_overflows(self) -> bool:
        """See above."""
        ...

    def prepare(
        self, module: nn.Module, root: nn.Module, build: Callable[[nn.Module], list[Optimizer]]
    ) -> Callable[..., Any]:
        """Take a module over, once.

        Args:
            module: whose parameters are trained; those that do not require gradients stay as they are. Its parameters
                keep their names (`module.named_parameters()`), and may become shards of themselves (`DTensor`).
            root: what the losses call; the module itself, or what holds it.
            build: gives the optimizers of the module's parameters as they are when it is called.

        Returns:
            What is to be called in place of `root`.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of this process's batch. Parts add up to the mean over this process's samples."""
        ...

    def clip(self, max_norm: float) -> Tensor:
        """Make the gradients those of the mean over all processes, and their norm at most `max_norm`.

        Returns:
            The norm before, () fp32, the same on every process; of unscaled gradients. Not finite if they are not.
        """
        ...

    def update(self) -> None:
        """Take the step, and let go of the gradients."""
        ...

    def settle(self) -> None:
        """Notice that parameters were written to from outside: drop gathered copies of them, renew master weights."""
        ...

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What goes into the files of our own: `{"optimizer": {"<parameter>/<key>": tensor}}`, or less.

        Tensors are the engine's own, not copies; shards (`DTensor`) are written by whoever owns them. The weights and
        their average are saved by the loop. Empty where the engine writes everything itself.
        """
        ...

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as JSON knows it; the same on every process."""
        ...

    def save(self, folder: Path) -> None:
        """Write, on every process, what is in a format of the engine's own, below `folder/<engine's name>/`.

        The folder exists and is seen by all; the manifest of sums is written afterwards.
        """
        ...

    def load(self, stored: Stored, numbers: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; the loop has filled the weights already, and has not called `settle`.

        Args:
            stored: the checkpoint: `stored.folder` for what `save` wrote, `stored.fill("optimizer", own)` for what
                `tensors` gave.
            numbers: what `numbers` gave.

        Raises:
            CheckpointError: of another engine, or of other optimizers or parameters.
        """
        ...
