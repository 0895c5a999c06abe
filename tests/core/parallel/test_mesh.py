"""The grid of processes."""

import pytest
import torch

from opensora_core.errors import ConfigError
from opensora_core.parallel import joined
from opensora_core.parallel.local import on_ranks

CPU = torch.device("cpu")


def test_one_process_is_a_grid_of_one() -> None:
    with joined(CPU) as mesh:
        assert (mesh.size, mesh.rank, mesh.is_first, mesh.whole.group) == (1, 0, True, None)
        assert {axis.size for axis in (mesh.replicate, mesh.shard, mesh.data, mesh.cfg, mesh.sequence)} == {1}


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 processes do not divide into sequence=2"), joined(CPU, sequence=2):
        pass


def _places() -> tuple[int, ...]:
    with joined(CPU, sequence=2, shard=0) as mesh:
        return mesh.data.size, mesh.shard.rank, mesh.sequence.rank, mesh.replicate.size


def test_neighbours_in_rank_share_frames() -> None:
    assert on_ranks(4, _places) == [(2, 0, 0, 1), (2, 0, 1, 1), (2, 1, 0, 1), (2, 1, 1, 1)]
