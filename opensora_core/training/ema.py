"""Exponential moving average of the trained parameters, kept in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opensora_core.parallel.shards import Stored, like, local
from opensora_core.training.checkpoint import AVERAGE


class EMA:
    """A shadow of every parameter that is trained. Buffers and frozen parameters are never averaged.

    Where the parameters are shards of themselves, the shadow is, too.

    Args:
        module: the module to follow; the shadow starts at its values.
        decay: weight of the old average, in [0, 1].
        warmup: start with a short memory, min(decay, (1 + n) / (10 + n)) at the n-th update, so that the random start
            is forgotten at once instead of after 1 / (1 - decay) steps.
        settle: called before and after the module's values are replaced, so that nobody goes on with copies of them.
    """

    def __init__(
        self, module: nn.Module, decay: float, warmup: bool = False, settle: Callable[[], None] = lambda: None
    ) -> None:
        self.module = module
        self.decay = decay
        self.warmup = warmup
        self.settle = settle
        self.updates = 0
        self.shadow: dict[str, Tensor] = {
            name: like(parameter.detach(), local(parameter.detach()).float().clone())
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def _parameters(self) -> dict[str, Tensor]:
        """What this process holds of the parameters."""
        return {name: local(parameter.detach()) for name, parameter in self.module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's values; call it after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        parameters = self._parameters()
        shadows = [local(shadow) for shadow in self.shadow.values()]
        torch._foreach_lerp_(shadows, [parameters[name].float() for name in self.shadow], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the averaged values into the module, in place of its own."""
        self.settle()
        parameters = self._parameters()
        for name, value in self.shadow.items():
            parameters[name].copy_(local(value))
        self.settle()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged values into the module for a while; its own come back bit for bit."""
        self.settle()
        parameters = self._parameters()
        own = {name: parameters[name].clone() for name in self.shadow}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    parameters[name].copy_(value)
            self.settle()

    def load(self, stored: Stored, updates: int) -> None:
        """Continue from a saved average.

        Raises:
            CheckpointError: it is of another set of parameters.
        """
        stored.fill(AVERAGE, self.shadow)
        self.updates = updates
