"""Sin-cos position tables, computed from the latent at hand and cached; they are no part of a state dict.

Frequencies as in "Attention Is All You Need", section 3.5; the scales are Open-Sora 1.0's (FACTS 1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def sincos(dim: int, positions: Tensor) -> Tensor:
    """Embed positions (N,) as (N, dim): all sines, then all cosines, in fp64."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim // 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def temporal_table(dim: int, length: int, *, scale: float, device: torch.device) -> Tensor:
    """Table (length, dim) fp32 of frame positions `index / scale`."""
    return _remembered(_temporal, dim, length, scale, device)


def spatial_table(
    dim: int, rows: int, columns: int, *, scale: float, base: int | None = None, device: torch.device
) -> Tensor:
    """Table (rows * columns, dim) fp32, row-major; the first half of the channels tells the COLUMN.

    Args:
        dim: width, divisible by 4.
        rows: patches along h.
        columns: patches along w.
        scale: positions are divided by it, so 0.5 stretches a small grid over one of twice its side.
        base: side of the square grid that both axes are stretched to; None for no stretching.
        device: where the table lives.
    """
    return _remembered(_spatial, dim, (rows, columns), scale, base, device)


def _remembered(table: Callable[..., Tensor], *arguments: Any) -> Tensor:
    # a compiler traces through the cache anyway, and warns about it
    return table(*arguments) if torch.compiler.is_compiling() else _cached(table, *arguments)


@lru_cache(maxsize=64)
def _cached(table: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return table(*arguments)


def _temporal(dim: int, length: int, scale: float, device: torch.device) -> Tensor:
    positions = torch.arange(length, dtype=torch.float64, device=_with_doubles(device))
    return sincos(dim, positions / scale).float().to(device)


def _spatial(dim: int, grid: tuple[int, int], scale: float, base: int | None, device: torch.device) -> Tensor:
    def axis(length: int) -> Tensor:
        # fp32, as the published tables were computed
        positions = torch.arange(length, dtype=torch.float32, device=_with_doubles(device))
        if base is not None:
            positions = positions / (length / base)
        return sincos(dim // 2, positions / scale)

    rows, columns = grid
    by_column = axis(columns)[None].expand(rows, -1, -1)
    by_row = axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1).float().to(device)


def _with_doubles(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one that has no fp64."""
    return torch.device("cpu") if device.type == "mps" else device
