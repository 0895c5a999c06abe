"""Muon in the precision that the device is fast at.

torch's own orthogonalises in bf16, which a CPU without instructions for it emulates: of a step of the tiny model that
was 6.2 seconds, and is 0.13 in fp32. Everything else is torch's: groups, state, rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Spread = Callable[[Iterable[tuple[Tensor, Tensor]], Callable[[Tensor], Tensor]], Iterator[Tensor]]
"""Applies a function of whole matrices to (parameter, what this process holds of its update), one after the other."""


def one_by_one(updates: Iterable[tuple[Tensor, Tensor]], function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """What a process does that holds all of every matrix."""
    for _, update in updates:
        yield function(update)


class Muon(torch.optim.Muon):
    """Momentum of matrices, orthogonalised (https://kellerjordan.github.io/posts/muon/).

    A parameter may be a shard of itself (`DTensor`): all but the orthogonalisation works on what this process holds.

    Attributes:
        spread: how that is done for all matrices; processes that share them put something in its place.
    """

    spread: Spread = staticmethod(one_by_one)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        assert closure is None, "the loop computes the loss itself"
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]

            def function(matrix: Tensor, group: dict[str, Any] = group) -> Tensor:
                return orthogonal(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])

            updates = ((parameter, self._momentum(parameter, group)) for parameter in moved)
            for parameter, update in zip(moved, self.spread(updates, function), strict=True):
                ratio = math.sqrt(max(1, parameter.shape[0] / parameter.shape[1]))
                held = _held(parameter)
                held.mul_(1 - group["lr"] * group["weight_decay"])
                held.add_(update, alpha=-group["lr"] * ratio)

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Take a gradient into the momentum; returns what is to be orthogonalised."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradient = _held(parameter.grad)
        buffer = _held(state["momentum_buffer"]).lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def _held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, not a copy."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest matrix with singular values of about one, by the quintic Newton-Schulz iteration of Muon."""
    precise = matrix.device.type == "cpu"
    result = matrix.float() if precise else matrix.bfloat16()
    is_tall = matrix.shape[0] > matrix.shape[1]
    result = result.T if is_tall else result
    result = result / result.norm().clamp(min=eps)
    if precise and 2 * result.shape[1] >= 3 * result.shape[0]:
        result = _by_gram(result, coefficients, steps)
    else:
        a, b, c = coefficients
        for _ in range(steps):
            gram = result @ result.T
            result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.T if is_tall else result


def _by_gram(wide: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The same iteration on the small square X X', and one product with X at the end: half the work where X is long.

    Every factor P = a + b X X' + c (X X')^2 commutes with X X', so what they come to can be gathered before it meets X.
    It squares the range of the singular values, for which fp32 has digits enough and bf16 does not.
    """
    a, b, c = coefficients
    gram = wide @ wide.T
    gathered = torch.eye(len(gram), dtype=gram.dtype)
    for step in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        gathered = factor @ gathered if step else factor
        if step < steps - 1:
            gram = factor @ gram @ factor
    return gathered @ wide
