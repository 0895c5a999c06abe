"""The order of samples across ranks, epochs and interruptions."""

from __future__ import annotations

import itertools
import pickle
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_core.data import BatchOrder, Slot, epoch_order


@pytest.mark.parametrize(("num_samples", "world_size"), [(12, 3), (13, 4), (2, 5), (1, 1), (100, 8)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_ranks_share_every_sample(num_samples: int, world_size: int, shuffle: bool) -> None:
    orders = [
        epoch_order(num_samples, epoch=3, seed=5, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(order) for order in orders}) == 1
    dealt = [index for order in orders for index in order]
    assert set(dealt) == set(range(num_samples))
    assert max(dealt.count(index) for index in range(num_samples)) - 1 <= -(-world_size // num_samples)


def test_a_run_resumed_anywhere_goes_on_across_the_next_epoch() -> None:
    def from_there(epoch: int, start: int) -> list[int]:
        return epoch_order(11, epoch=epoch, seed=9, rank=1, world_size=2, start=start) + epoch_order(
            11, epoch=epoch + 1, seed=9, rank=1, world_size=2
        )

    whole = from_there(4, 0)
    for start in range(7):
        assert from_there(4, start) == whole[start:]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = {tuple(epoch_order(50, epoch=epoch, seed=seed)) for epoch, seed in ((0, 0), (1, 0), (0, 10), (1, 10))}
    assert len(orders) == 4
    assert epoch_order(50, epoch=1, seed=10) == epoch_order(50, epoch=1, seed=10)


def test_matches_the_sampler_of_pytorch() -> None:
    from torch.utils.data import DistributedSampler

    for rank in range(3):
        theirs: DistributedSampler[int] = DistributedSampler(range(20), num_replicas=3, rank=rank, seed=7)  # type: ignore[arg-type]
        theirs.set_epoch(2)
        assert epoch_order(20, epoch=2, seed=7, rank=rank, world_size=3) == list(theirs)


# ---------------------------------------------------------------------- batches of a run

SHAPES = [([7], [2]), ([6], [3]), ([1], [1]), ([3], [8]), ([40, 9, 5], [4, 2, 7]), ([0, 10], [1, 3]), ([1, 1], [5, 9])]


def order_of(counts: list[int], sizes: list[int], seed: int = 0) -> BatchOrder:
    """An order of buckets with so many clips; those of bucket b are numbered from 1000 b."""
    members = [range(1000 * bucket, 1000 * bucket + count) for bucket, count in enumerate(counts)]
    return BatchOrder(members, sizes, seed)


def first_steps(order: BatchOrder, count: int) -> list[list[Slot]]:
    return [order.batch(step) for step in range(count)]


def shapes() -> st.SearchStrategy[tuple[list[int], list[int]]]:
    pairs = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=4)
    return pairs.filter(lambda found: any(count for count, _ in found)).map(
        lambda found: ([count for count, _ in found], [size for _, size in found])
    )


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 2**40), st.integers(1, 120))
def test_batches_walk_through_every_bucket_without_a_gap(
    shape: tuple[list[int], list[int]], seed: int, num_steps: int
) -> None:
    counts, sizes = shape
    order = order_of(counts, sizes, seed)
    positions: dict[int, list[int]] = {}
    walks: dict[tuple[int, int], list[int]] = {}
    for slots in first_steps(order, num_steps):
        assert len({slot.bucket for slot in slots}) == 1 and len(slots) == sizes[slots[0].bucket]
        for slot in slots:
            positions.setdefault(slot.bucket, []).append(slot.position)
            walks.setdefault((slot.bucket, slot.epoch), []).append(slot.index)
            assert slot.epoch == slot.position // counts[slot.bucket]
    # batches of the epoch that is not over are drawn from anywhere in it, those before are all there
    done = order.epoch_of(num_steps)
    for bucket, found in positions.items():
        whole = done * counts[bucket] // sizes[bucket] * sizes[bucket]
        assert sorted(found)[:whole] == list(range(whole)) and len(set(found)) == len(found)
    for (bucket, epoch), found in walks.items():
        clips = range(1000 * bucket, 1000 * bucket + counts[bucket])
        assert len(set(found)) == len(found) and set(found) <= set(clips)
        if (epoch + 1) * counts[bucket] <= done * counts[bucket] // sizes[bucket] * sizes[bucket]:
            assert sorted(found) == list(clips)


@pytest.mark.parametrize(("counts", "sizes"), SHAPES)
def test_a_batch_depends_on_seed_and_step_alone(counts: list[int], sizes: list[int]) -> None:
    expected = first_steps(order_of(counts, sizes), 60)
    asked = [random.Random(0).randrange(60) for _ in range(150)]
    wandering = order_of(counts, sizes)
    for step in asked:
        assert wandering.batch(step) == expected[step]
        if step % 7 == 0:
            assert order_of(counts, sizes).batch(step) == expected[step]
            wandering.next_in_order(expected[step][-1])


@pytest.mark.parametrize(("counts", "sizes"), SHAPES)
def test_epochs_follow_each_other_at_thousands_of_steps(counts: list[int], sizes: list[int]) -> None:
    order = order_of(counts, sizes)
    begun = {}
    epochs = [order.epoch_of(step) for step in range(4000)]
    assert epochs == sorted(epochs)
    for step, epoch in enumerate(epochs):
        begun.setdefault(epoch, step)
    # the batches that have ended when every bucket has been walked through e times
    for epoch, step in begun.items():
        assert step == sum(epoch * count // size for count, size in zip(counts, sizes, strict=True))
    skipped = set(range(epochs[-1])) - begun.keys()
    for epoch in skipped:
        assert all(epoch * n // size == (epoch + 1) * n // size for n, size in zip(counts, sizes, strict=True))


def test_buckets_get_batches_in_proportion_to_those_that_their_clips_fill() -> None:
    counts, sizes = [400, 90, 30], [4, 2, 6]
    order = order_of(counts, sizes)
    drawn = [slots[0].bucket for slots in first_steps(order, 10 * (100 + 45 + 5))]
    assert Counter(drawn) == {0: 1000, 1: 450, 2: 50}
    assert drawn[:150] != sorted(drawn[:150]) and drawn[:150] != drawn[150:300]
    # no bucket waits for the end of the epoch
    assert all(set(drawn[start : start + 150]) == {0, 1, 2} for start in range(0, 1500, 150))
    assert {0, 1} <= set(drawn[:20])


def test_every_seed_epoch_and_bucket_has_an_order_of_its_own() -> None:
    def walk(seed: int, bucket: int, epoch: int) -> tuple[int, ...]:
        order = BatchOrder([range(30), range(30)], [5, 5], seed)
        return tuple(order.slot(bucket, epoch * 30 + place).index for place in range(30))

    places = list(itertools.product((0, 1, 2**33), (0, 1), (0, 1, 2)))
    assert len({walk(*place) for place in places}) == len(places)
    mixes = [
        tuple(slots[0].bucket for slots in first_steps(BatchOrder([range(99), range(99)], [3, 3], seed), 66))
        for seed in (0, 1)
    ]
    assert mixes[0] != mixes[1]


def test_the_next_in_order_is_the_next_position_also_across_walks() -> None:
    order = order_of([5], [2])
    slot = order.slot(0, 0)
    seen = []
    for position in range(12):
        assert (slot.position, slot.epoch) == (position, position // 5)
        seen.append(slot.index)
        slot = order.next_in_order(slot)
    assert [sorted(seen[:5]), sorted(seen[5:10])] == [list(range(5))] * 2
    assert seen == [slot.index for slots in first_steps(order_of([5], [2]), 6) for slot in slots]


def test_an_order_is_the_same_in_another_process() -> None:
    order = order_of([40, 9], [4, 2])
    order.batch(17)
    copy = pickle.loads(pickle.dumps(order))
    assert first_steps(copy, 30) == first_steps(order, 30)


def test_the_order_is_pinned() -> None:
    """A run that was begun with an earlier release goes on with the same clips."""
    order = order_of([5, 3], [2, 1], seed=7)
    found = [tuple(slot.index for slot in slots) for slots in first_steps(order, 8)]
    assert found == [(1002,), (2, 0), (1000,), (4, 1), (1001,), (1002,), (3, 4), (3, 1)]


def test_a_million_clips_cost_megabytes_however_far_the_run_is() -> None:
    clips = np.arange(1_000_000)
    order = BatchOrder([clips[:900_000], clips[900_000:]], [1, 2], seed=1)
    tracemalloc.start()
    for step in (10**6, 3, 5 * 10**6, 10**9, 10**9 + 1):
        slots = order.batch(step)
        order.next_in_order(slots[-1])
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 60e6 and peak < 100e6
