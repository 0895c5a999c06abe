"""The order of samples: a pure function, so that a resumed run goes on where it stopped without any saved state."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


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


@dataclass(frozen=True)
class Share:
    """Whose part of every batch is meant: `rank` of `size` equal ones, next to each other."""

    rank: int = 0
    size: int = 1

    def places(self, total: int) -> range:
        """The places of a batch of `total`, which `size` divides, that are in this part."""
        each, left = divmod(total, self.size)
        assert not left, f"{total} do not go into {self.size} equal parts"
        return range(self.rank * each, (self.rank + 1) * each)


WHOLE = Share()


@dataclass(frozen=True)
class Slot:
    """A place in the order: `position` of its bucket's endless walk, which is clip `index` in walk number `epoch`."""

    bucket: int
    position: int
    epoch: int
    index: int


class BatchOrder:
    """Which clips make the batch of a step: a pure function of (seed, step), whoever asks.

    Each bucket is walked through again and again, in another order each time, and nothing is dropped or padded: a batch
    may end one walk and begin the next. Epoch e has the batches that the buckets fill in it, in a drawn order.

    Args:
        members: the clips of each bucket; at least one bucket has one.
        batch_sizes: clips of a batch, per bucket.
        seed: of the run.
    """

    def __init__(self, members: Sequence[Sequence[int]], batch_sizes: Sequence[int], seed: int) -> None:
        assert any(len(clips) for clips in members) and all(size > 0 for size in batch_sizes)
        self.members = [np.asarray(clips, dtype=np.int64) for clips in members]
        self.batch_sizes = tuple(batch_sizes)
        self.seed = seed
        # neighbouring walks of each bucket and the last epoch's shuffle: a batch may lie in two walks
        self._walks: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._shuffle: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def batch(self, step: int, share: Share = WHOLE) -> list[Slot]:
        """The slots of a step's batch, or of a part of it, all of one bucket."""
        bucket, number = self._batch_of(step)
        size = self.batch_sizes[bucket]
        return [self.slot(bucket, number * size + place) for place in share.places(size)]

    def slot(self, bucket: int, position: int) -> Slot:
        """The clip at a position of a bucket's endless walk."""
        epoch, place = divmod(position, len(self.members[bucket]))
        return Slot(bucket, position, epoch, int(self._walk(bucket, epoch)[place]))

    def next_in_order(self, slot: Slot) -> Slot:
        """The slot after this one, which stands in where this one's clip is broken."""
        return self.slot(slot.bucket, slot.position + 1)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step lies in."""
        high = 1
        while self._before(high) <= step:
            high *= 2
        return bisect_right(range(high + 1), step, key=self._before) - 1

    def _before(self, epoch: int) -> int:
        """Batches of all epochs before one."""
        return sum(self._firsts(epoch))

    def _firsts(self, epoch: int) -> list[int]:
        """Per bucket, the number of the first batch that ends in an epoch."""
        return [epoch * len(clips) // size for clips, size in zip(self.members, self.batch_sizes, strict=True)]

    def _batch_of(self, step: int) -> tuple[int, int]:
        """The batch of a step as (bucket, number in that bucket)."""
        epoch = self.epoch_of(step)
        firsts, ends = self._firsts(epoch), self._firsts(epoch + 1)
        place = step - sum(firsts)
        if len(self.members) > 1:
            if self._shuffle[0] != epoch:
                drawn = np.random.default_rng([self.seed, 1, epoch]).permutation(sum(ends) - sum(firsts))
                self._shuffle = (epoch, drawn)
            place = int(self._shuffle[1][place])
        bucket = 0
        while place >= ends[bucket] - firsts[bucket]:
            place -= ends[bucket] - firsts[bucket]
            bucket += 1
        return bucket, firsts[bucket] + place

    def _walk(self, bucket: int, epoch: int) -> NDArray[np.int64]:
        if (bucket, epoch) not in self._walks:
            clips = self.members[bucket]
            drawn = np.random.default_rng([self.seed, 0, bucket, epoch]).permutation(len(clips))
            self._walks = {
                key: walk for key, walk in self._walks.items() if key[0] != bucket or abs(key[1] - epoch) <= 1
            }
            self._walks[bucket, epoch] = clips[drawn]
        return self._walks[bucket, epoch]
