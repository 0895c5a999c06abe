"""Collectives that gradients flow through, against the whole tensors that they share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora_core.parallel import Axis, Cut, counted, exchange, gather, joined, own
from opensora_core.parallel.local import on_ranks

CPU = torch.device("cpu")
ALONE = Axis("sequence")


def whole(*shape: int, number: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers on every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(dtype)


def share(x: Tensor, cut: Cut, axis: Axis) -> Tensor:
    return x.split(list(cut.sizes), dim=cut.dim)[axis.rank]


def exchanged(axis: Axis) -> None:
    """Every size, even or not, empty or not, contiguous or not; forward and backward."""
    for batch, frames, patches, count in ((1, 4, 6, 1), (2, 5, 3, 1), (1, 5, 3, 3), (2, 1, 1, 2), (3, 4, 1, 1)):
        by_frames, by_patches = Cut.even(1, frames, axis), Cut.even(2, patches, axis)
        for dtype in (torch.float64, torch.bfloat16):
            tensors = [whole(batch, frames, patches, 8, number=number, dtype=dtype) for number in range(count)]
            weights = [whole(batch, frames, patches, 8, number=9 + number, dtype=dtype) for number in range(count)]
            held = [share(x, by_frames, axis).clone().requires_grad_() for x in tensors]
            # a transposed input, as attention along another dim hands it over
            given = [x.transpose(-1, -2).contiguous().transpose(-1, -2) if batch > 1 else x for x in held]
            with counted() as traffic:
                found = exchange(given, by_frames, by_patches, axis)
                torch.autograd.backward(
                    [(x * share(w, by_patches, axis)).sum() for x, w in zip(found, weights, strict=True)]
                )
            for x, w, mine, expected in zip(found, weights, held, tensors, strict=True):
                assert torch.equal(x, share(expected, by_patches, axis))
                assert mine.grad is not None and torch.equal(mine.grad, share(w, by_frames, axis))
            t, s = by_frames.sizes[axis.rank], by_patches.sizes[axis.rank]
            tokens = t * (patches - s) + (frames - t) * s
            assert traffic.total == tokens * batch * 8 * count * dtype.itemsize
            back = exchange(found, by_patches, by_frames, axis)
            assert all(torch.equal(x, mine) for x, mine in zip(back, held, strict=True))


def gathered(axis: Axis) -> None:
    for dim, total in ((1, 4), (1, 5), (0, 1), (2, 3)):
        shape = [2, 3, 4]
        shape[dim] = total
        cut, x, weight = Cut.even(dim, total, axis), whole(*shape), whole(*shape, number=1)
        held = x.clone().requires_grad_()
        mine = own(held, cut, axis)
        assert torch.equal(mine, share(x, cut, axis))
        found = gather(mine, cut, axis)
        assert torch.equal(found, x)
        (found * weight).sum().backward()
        # of the whole that it came from: the gradient of the own share, times the size of the axis
        expected = torch.zeros_like(x)
        share(expected, cut, axis).copy_(share(weight, cut, axis) * axis.size)
        assert held.grad is not None and torch.equal(held.grad, expected)


def check(size: int) -> None:
    with joined(CPU, sequence=size) as mesh:
        exchanged(mesh.sequence)
        gathered(mesh.sequence)
        with torch.inference_mode():
            x = whole(2, 5, 3)
            cut = Cut.even(1, 5, mesh.sequence)
            assert torch.equal(gather(own(x, cut, mesh.sequence), cut, mesh.sequence), x)


def test_two_processes_hold_a_tensor_together() -> None:
    on_ranks(2, check, 2, seconds=300)


@pytest.mark.slow
def test_four_processes_hold_a_tensor_together() -> None:
    on_ranks(4, check, 4, seconds=300)


def test_shares_differ_by_one_at_most() -> None:
    axis = Axis("sequence", size=3)
    assert [Cut.even(1, total, axis).sizes for total in (0, 1, 3, 5)] == [(0, 0, 0), (1, 0, 0), (1, 1, 1), (2, 2, 1)]
    cut = Cut.even(1, 5, axis).scaled(4)
    assert (cut.sizes, [cut.start(rank) for rank in range(3)]) == ((8, 8, 4), [0, 8, 16])


def test_an_axis_of_one_leaves_things_as_they_are() -> None:
    x, cut = whole(2, 3), Cut.even(1, 3, ALONE)
    with counted() as traffic:
        assert own(x, cut, ALONE) is x
        assert gather(x, cut, ALONE) is x
        assert exchange([x], cut, Cut.even(0, 2, ALONE), ALONE)[0] is x
    assert traffic.total == 0
