"""Muon on many processes: each orthogonalises some of the matrices, and none does what another has done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from opensora_core.muon import Spread
from opensora_core.parallel.mesh import Axis

Update = tuple[Tensor, Tensor]
"""A parameter, and what this process holds of its update."""

_CHUNK_BYTES = 2**28
"""Of updates that are sent at a time: few messages, and no second copy of all matrices of a large model."""


def dealt(axis: Axis) -> Spread:
    """For matrices that everybody on an axis holds: each does its share, and sends what comes out to the others."""

    def spread(updates: Iterable[Update], function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        for chunk in _chunks(updates):
            owners = _owners(chunk, axis.size)
            results = [torch.empty(0)] * len(chunk)
            for owner in range(axis.size):
                places = [place for place, at in enumerate(owners) if at == owner]
                if not places:
                    continue
                if owner == axis.rank:
                    flat = torch.cat(
                        [function(chunk[place][1]).to(chunk[place][1].dtype).flatten() for place in places]
                    )
                else:
                    flat = chunk[0][1].new_empty(sum(chunk[place][1].numel() for place in places))
                dist.broadcast(flat, group=axis.group, group_src=owner)
                parts = _cut(flat, [chunk[place][1].numel() for place in places])
                for place, part in zip(places, parts, strict=True):
                    results[place] = part.view(chunk[place][1].shape)
            yield from results

    return spread


def exchanged() -> Spread:
    """For matrices whose rows are dealt out: each gets all rows of its share, and sends them back when it is done."""

    def spread(updates: Iterable[Update], function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        for chunk in _chunks(updates):
            parameter = chunk[0][0]
            assert isinstance(parameter, DTensor)
            dim = next(dim for dim, placement in enumerate(parameter.placements) if isinstance(placement, Shard))
            mesh = parameter.device_mesh
            axis = Axis("owners", mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim))
            yield from _exchange(chunk, function, axis)

    return spread


def _exchange(chunk: list[Update], function: Callable[[Tensor], Tensor], axis: Axis) -> Iterator[Tensor]:
    """Bring each matrix together on its owner, apply the function there, and part it again."""
    like, owners = chunk[0][1], _owners(chunk, axis.size)
    order = sorted(range(len(chunk)), key=lambda place: (owners[place], place))
    mine = [place for place in order if owners[place] == axis.rank]

    def numbers(place: int, rank: int) -> int:
        """How many numbers of a matrix a process holds."""
        parameter = chunk[place][0]
        return _rows(parameter, rank, axis.size) * parameter.shape[1]

    sent = [0] * axis.size
    for place in order:
        sent[owners[place]] += numbers(place, axis.rank)
    pieces = [[numbers(place, rank) for place in mine] for rank in range(axis.size)]
    came_from = [sum(sizes) for sizes in pieces]
    came = like.new_empty(sum(came_from))
    flat = torch.cat([chunk[place][1].flatten() for place in order])
    dist.all_to_all_single(came, flat, came_from, sent, group=axis.group)

    held = [_cut(part, sizes) for part, sizes in zip(_cut(came, came_from), pieces, strict=True)]
    for number, place in enumerate(mine):
        matrix = torch.cat([parts[number] for parts in held]).view(chunk[place][0].shape)
        done = _cut(function(matrix).to(like.dtype).flatten(), [sizes[number] for sizes in pieces])
        for parts, part in zip(held, done, strict=True):
            parts[number].copy_(part)

    dist.all_to_all_single(flat, came, sent, came_from, group=axis.group)
    back = dict(zip(order, _cut(flat, [chunk[place][1].numel() for place in order]), strict=True))
    for place, (_, update) in enumerate(chunk):
        yield back[place].view(update.shape)


def _chunks(updates: Iterable[Update]) -> Iterator[list[Update]]:
    chunk: list[Update] = []
    for update in updates:
        chunk.append(update)
        if sum(parameter.nbytes for parameter, _ in chunk) >= _CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _owners(chunk: list[Update], size: int) -> list[int]:
    """Who does which matrix: each gets about as much work, the largest first."""
    owners, burden = [0] * len(chunk), [0] * size
    for place in sorted(range(len(chunk)), key=lambda place: (-chunk[place][0].numel(), place)):
        owners[place] = burden.index(min(burden))
        burden[owners[place]] += chunk[place][0].numel() * min(chunk[place][0].shape)
    return owners


def _rows(parameter: Tensor, rank: int, size: int) -> int:
    """How many rows one of `size` processes holds."""
    each = -(-parameter.shape[0] // size)
    return max(min(each, parameter.shape[0] - each * rank), 0)


def _cut(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    """Neighbouring parts, not copies."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]
