"""The order of samples: a pure function, so that a resumed run goes on where it stopped without any saved state."""

from __future__ import annotations

import torch


def epoch_order(
    num_samples: int,
    *,
    epoch: int,
    seed: int = 0,
    shuffle: bool = True,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
) -> list[int]:
    """The samples that one rank sees in one epoch, in order.

    Every rank gets equally many: the first samples of the epoch are dealt again where `num_samples` does not divide.
    The order is that of PyTorch's DistributedSampler, hence of the published training; it shuffles by seed + epoch.

    Args:
        num_samples: size of the data set, at least 1.
        epoch: from 0; every epoch is shuffled anew.
        seed: of the run; all ranks must agree on it.
        shuffle: False deals the samples in their own order.
        rank: of 0 .. world_size - 1.
        world_size: number of ranks that share the epoch.
        start: how many samples of this rank to skip, those it saw before it was stopped.
    """
    assert num_samples > 0 and 0 <= rank < world_size and start >= 0
    if shuffle:
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(num_samples, generator=generator)
    else:
        order = torch.arange(num_samples)
    each = -(-num_samples // world_size)
    dealt = torch.arange(rank, each * world_size, world_size) % num_samples
    return [int(index) for index in order[dealt[start:]]]
