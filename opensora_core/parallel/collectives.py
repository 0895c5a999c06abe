"""Collectives that gradients flow through, over shares that need not be even, and a count of the bytes they send.

Processes that hold a tensor together cut it along one dim, each holding its share. Here are the three ways to change
who holds what:

    own       everybody holds the whole    ->  each its share
    exchange  shares along one dim         ->  shares along another dim
    gather    shares                       ->  everybody holds the whole

All shapes follow from the whole, so nobody asks the others for a size. On an axis of one they leave things as they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_core.parallel.mesh import Axis


@dataclass(frozen=True)
class Cut:
    """How processes share a tensor.

    Attributes:
        dim: along which it is cut, from 0.
        sizes: of the shares, by rank; a share may be empty.
    """

    dim: int
    sizes: tuple[int, ...]

    @staticmethod
    def even(dim: int, total: int, axis: Axis) -> Cut:
        """Shares of `total` that differ by one at most; the larger ones come first."""
        least, more = divmod(total, axis.size)
        return Cut(dim, tuple(least + (rank < more) for rank in range(axis.size)))

    def scaled(self, factor: int) -> Cut:
        """The same cut where each place holds `factor` of what it held."""
        return Cut(self.dim, tuple(size * factor for size in self.sizes))

    def start(self, rank: int) -> int:
        """Where a rank's share begins."""
        return sum(self.sizes[:rank])


@dataclass
class Traffic:
    """What this process sent to others.

    Attributes:
        sent: bytes by collective: `exchange`, `gather`, `ring`.
        calls: how often each was called.
    """

    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Bytes of all collectives."""
        return self.sent.total()


# a plain list, as the backward pass of a GPU runs in a thread of its own, which sees no context variable of ours
_counting: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what this process sends to others, forward and backward, while the context lasts."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def note(collective: str, num_bytes: int) -> None:
    """Tell all who count that this process sends so many bytes to others."""
    for traffic in _counting:
        traffic.sent[collective] += num_bytes
        traffic.calls[collective] += 1


def own(x: Tensor, cut: Cut, axis: Axis) -> Tensor:
    """Keep this process' share of a whole; nothing is sent.

    The gradient of the whole is that of the share, and zeros: its sum over the axis is the whole gradient.
    """
    if axis.size == 1:
        return x
    # a copy, so that nothing keeps the whole alive
    return x.narrow(cut.dim, cut.start(axis.rank), cut.sizes[axis.rank]).clone(memory_format=torch.contiguous_format)


def gather(x: Tensor, cut: Cut, axis: Axis) -> Tensor:
    """Put the shares together, for everybody.

    The gradient of a share is its part of the whole's gradient times the size of the axis. That is the sum over the
    processes, which all compute the same with the whole, without sending it; a mean over processes undoes it.
    """
    if axis.size == 1:
        return x
    return _Gather.apply(x, cut, axis)  # type: ignore[no-untyped-call,no-any-return]


def exchange(tensors: Sequence[Tensor], held: Cut, wanted: Cut, axis: Axis) -> tuple[Tensor, ...]:
    """Turn shares along one dim into shares along another, by one all-to-all.

    Args:
        tensors: of one shape and dtype; each is a share along `held.dim`, and whole along `wanted.dim`.
        held: how they are cut.
        wanted: how they shall be cut.
        axis: the processes that hold them.

    Returns:
        The same tensors, whole along `held.dim`, and shares along `wanted.dim`.
    """
    if axis.size == 1:
        return tuple(tensors)
    return _Exchange.apply(held, wanted, axis, *tensors)  # type: ignore[no-untyped-call,no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: Cut, axis: Axis) -> Tensor:
        ctx.cut, ctx.axis = cut, axis
        # what is gathered must be of one size; T frames over p processes waste one frame each at most
        longest = max(cut.sizes)
        shape = [*x.shape]
        shape[cut.dim] = longest
        sent = x.contiguous()
        if x.shape[cut.dim] < longest:
            sent = x.new_zeros(shape)
            sent.narrow(cut.dim, 0, x.shape[cut.dim]).copy_(x)
        received = x.new_empty(axis.size, *shape)
        note("gather", sent.nbytes * (axis.size - 1))
        dist.all_gather(list(received), sent, group=axis.group)
        return torch.cat(
            [part.narrow(cut.dim, 0, size) for part, size in zip(received, cut.sizes, strict=True)], dim=cut.dim
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cut, axis = ctx.cut, ctx.axis
        return gradient.narrow(cut.dim, cut.start(axis.rank), cut.sizes[axis.rank]) * axis.size, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: Cut, wanted: Cut, axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.held, ctx.wanted, ctx.axis = held, wanted, axis
        return _exchanged(tensors, held, wanted, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_exchanged(gradients, ctx.wanted, ctx.held, ctx.axis)


def _exchanged(tensors: Sequence[Tensor], held: Cut, wanted: Cut, axis: Axis) -> tuple[Tensor, ...]:
    first, count = tensors[0], len(tensors)
    assert first.shape[held.dim] == held.sizes[axis.rank], (first.shape, held, axis.rank)
    assert first.shape[wanted.dim] == sum(wanted.sizes), (first.shape, wanted)

    # what goes to, or comes from, each rank: `count` blocks of that rank's size along one of the dims
    going = [_with(first.shape, wanted.dim, size) for size in wanted.sizes]
    result = _with(first.shape, wanted.dim, wanted.sizes[axis.rank])
    coming = [_with(result, held.dim, size) for size in held.sizes]
    goes = [count * math.prod(shape) for shape in going]
    comes = [count * math.prod(shape) for shape in coming]

    if count == 1 and _in_order(first.shape, wanted.dim):
        sent = first.contiguous().view(-1)
    else:
        sent = first.new_empty(sum(goes))
        for rank, (block, shape) in enumerate(zip(torch.split(sent, goes), going, strict=True)):
            places = block.view(count, *shape)
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor.narrow(wanted.dim, wanted.start(rank), wanted.sizes[rank]))
    received = first.new_empty(sum(comes))
    note("exchange", (sum(goes) - goes[axis.rank]) * first.element_size())
    dist.all_to_all_single(received, sent, comes, goes, group=axis.group)

    whole = _with(result, held.dim, sum(held.sizes))
    if count == 1 and _in_order(whole, held.dim):
        return (received.view(whole),)
    parts = [block.view(count, *shape) for block, shape in zip(torch.split(received, comes), coming, strict=True)]
    return tuple(torch.cat([part[number] for part in parts], dim=held.dim) for number in range(count))


def _with(shape: Sequence[int], dim: int, size: int) -> list[int]:
    return [*shape[:dim], size, *shape[dim + 1 :]]


def _in_order(shape: Sequence[int], dim: int) -> bool:
    """Whether shares along `dim` lie in memory one after the other."""
    return math.prod(shape[:dim]) == 1
