"""Ring attention against attention on one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora_core.models import attend
from opensora_core.parallel import Axis, Cut, attend_by_ring, joined, ring
from opensora_core.parallel.local import on_ranks

CPU = torch.device("cpu")


def heads(length: int, number: int, scale: float = 1.0) -> Tensor:
    """(2, N, 3, 8), the same on every process."""
    return torch.randn(2, length, 3, 8, generator=torch.Generator().manual_seed(number)) * scale


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def compare(axis: Axis, length: int, scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Errors of what is found and of the worst gradient, over all processes' shares."""
    tensors = [heads(length, number, scale if number < 2 else 1.0).to(dtype).requires_grad_() for number in range(3)]
    weight = heads(length, 3).to(dtype)
    expected = attend(*tensors, backend="math")
    expected.backward(weight)

    tokens = Cut.even(1, length, axis)

    def mine(x: Tensor) -> Tensor:
        return x.split(list(tokens.sizes), dim=1)[axis.rank].detach().clone()

    held = [mine(x).requires_grad_() for x in tensors]
    found = attend_by_ring(*held, tokens=tokens, axis=axis)
    assert found.dtype == dtype
    found.backward(mine(weight))
    worst = 0.0
    for one, x in zip(held, tensors, strict=True):
        assert one.grad is not None and x.grad is not None
        # of the whole gradient: where scores are sharp, that of a single token may be next to nothing
        worst = max(worst, float((one.grad - mine(x.grad)).float().norm() / x.grad.float().norm().clamp(min=1e-3)))
    return off(found.detach(), mine(expected)), worst


def check(size: int) -> list[tuple[float, float, float]]:
    """Errors, in units of what is allowed, of even, uneven and empty shares; of sharp scores; of queries by few."""
    result = []
    with joined(CPU, sequence=size) as mesh:
        for length in (8, 7, 1):
            # scores of hundreds: no float holds their exponentials, and gradients are differences of near equals
            for scale, forward, backward in ((1.0, 1e-6, 1e-5), (12.0, 1e-5, 1e-3)):
                for most in (2**25, 30):
                    ring.MAX_SCORES = most
                    result.append((forward, backward, *compare(mesh.sequence, length, scale, torch.float32)))
        result.append((1e-2, 2e-2, *compare(mesh.sequence, 7, 1.0, torch.bfloat16)))
        with torch.autocast("cpu", torch.bfloat16):  # changes nothing: the ring computes in fp32
            result.append((1e-6, 1e-5, *compare_under_autocast(mesh.sequence)))
    return [(a, b, c, d) for a, b, c, d in result if c > a or d > b]


def compare_under_autocast(axis: Axis) -> tuple[float, float]:
    tokens = Cut.even(1, 7, axis)
    q, k, v = (heads(7, number).split(list(tokens.sizes), dim=1)[axis.rank] for number in range(3))
    under = attend_by_ring(q, k, v, tokens, axis)
    with torch.autocast("cpu", enabled=False):
        plain = attend_by_ring(q, k, v, tokens, axis)
    return off(under, plain), 0.0


def test_two_processes_attend_as_one_does() -> None:
    assert on_ranks(2, check, 2, seconds=300) == [[]] * 2


@pytest.mark.slow
def test_four_processes_attend_as_one_does() -> None:
    assert on_ranks(4, check, 4, seconds=300) == [[]] * 4
