"""How processes tell each other things: what one finds out is known to all, and an error of one is an error of all.

shared      the first -> all
collected   all -> the first
gathered    all -> all

What is told are Python objects; an axis of one keeps what it has.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_core.errors import OsoraError, TrainingError
from opensora_core.parallel.mesh import Axis, Mesh

E = TypeVar("E")
T = TypeVar("T")

_LONG = timedelta(days=30)


def shared(axis: Axis, item: T) -> T:
    """What the first process of the axis holds, for all of it; what the others bring is left aside."""
    if axis.group is None:
        return item
    box: list[Any] = [item]
    dist.broadcast_object_list(box, group=axis.group, group_src=0)
    result: T = box[0]
    return result


def collected(axis: Axis, item: T) -> list[T]:
    """What all processes of the axis hold, in the order of their ranks, for the first; an empty list for the others."""
    if axis.group is None:
        return [item]
    boxes: list[Any] | None = [None] * axis.size if axis.rank == 0 else None
    dist.gather_object(item, boxes, group=axis.group, group_dst=0)
    return boxes or []


def gathered(axis: Axis, value: T) -> list[T]:
    """What everybody on an axis says, in the order of their ranks."""
    if axis.group is None:
        return [value]
    found: list[Any] = [None] * axis.size
    dist.all_gather_object(found, value, group=axis.group)
    return found


def mean(axis: Axis, values: Tensor) -> Tensor:
    """The mean over an axis, in place; one that is not a number makes it none for everybody."""
    if axis.group is not None:
        dist.all_reduce(values, group=axis.group)
        values /= axis.size
    return values


def largest(axis: Axis, values: Tensor) -> Tensor:
    """The largest of each value over an axis, in place."""
    if axis.group is not None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=axis.group)
    return values


@contextmanager
def agreed(axis: Axis) -> Iterator[None]:
    """End a block together: where it fails on one process, all raise what the first that failed has raised.

    Only for blocks without collectives of their own, of whose failure the others would not know.
    """
    if axis.size == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    errors = gathered(axis, _portable(own))
    for rank, told in enumerate(errors):
        if told is not None:
            raise own if rank == axis.rank and own is not None else told


@contextmanager
def patient(mesh: Mesh) -> Iterator[Axis]:
    """Everybody, as an axis whose members wait for each other however long it takes.

    One of them may draw or download for hours while the others have nothing to do. A process that goes away is noticed
    at once all the same.
    """
    if mesh.size == 1:
        yield mesh.whole
        return
    group = dist.new_group(backend="gloo", timeout=_LONG)
    yield replace(mesh.whole, group=group)
    dist.destroy_process_group(group)  # after an error it goes with all the others


def first(mesh: Mesh, function: Callable[[], T]) -> T:
    """What a function returns on the first process, known to all; what it raises there, all raise."""
    return _run(by_first(mesh, _once(function)))


def by_first(mesh: Mesh, work: Generator[E, None, T]) -> Generator[E, None, T]:
    """Let the first process do something for all, however long it takes, while the others wait.

    Returns:
        What the first one's work returned; it goes through pickle. Its events are the first one's only.
    """
    if mesh.size == 1:
        return (yield from work)
    with patient(mesh) as everybody:
        told: tuple[T | None, Exception | None] = (None, None)
        if not mesh.is_first:
            work.close()
            value, failure = shared(everybody, told)
            if failure is not None:
                raise failure
            return value  # type: ignore[return-value]
        try:
            result = yield from work
        except Exception as error:
            shared(everybody, (None, _portable(error)))
            raise
        shared(everybody, (result, None))
        return result


def spread(axis: Axis, items: list[T], function: Callable[[T], E]) -> list[E]:
    """Apply a function to items that the processes of an axis share; all get all results, in the items' order.

    Everybody calls it equally often, as models whose weights are shared want: who has nothing left does one again.
    """
    if not items:
        return []
    rounds = -(-len(items) // axis.size)
    own = [function(items[min(number * axis.size + axis.rank, len(items) - 1)]) for number in range(rounds)]
    found = gathered(axis, own)
    return [found[place % axis.size][place // axis.size] for place in range(len(items))]


def _once(function: Callable[[], T]) -> Generator[Any, None, T]:
    yield from ()
    return function()


def _run(work: Generator[Any, None, T]) -> T:
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def _portable(error: Exception | None) -> Exception | None:
    """An error that survives the way to another process."""
    if error is None or isinstance(error, OsoraError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return MemoryError(str(error) or "out of memory")
    return TrainingError(f"another process failed: {type(error).__name__}: {error}")
