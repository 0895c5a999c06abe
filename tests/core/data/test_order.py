"""The order of samples across ranks, epochs and interruptions."""

from __future__ import annotations

import pytest

from opensora_core.data import epoch_order


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
