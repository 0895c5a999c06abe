"""Frames decoded by all processes that drew a sample together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opensora_core.parallel.agreement import collected
from opensora_core.parallel.collectives import Cut
from opensora_core.parallel.mesh import Axis, Mesh

Frames = NDArray[np.uint8]
"""(T, H, W, 3), as in `media`."""


def place_in_group(mesh: Mesh) -> Axis:
    """The processes that draw a sample together, as one axis without a group of its own."""
    cfg, sequence = mesh.cfg, mesh.sequence
    return Axis("group", cfg.size * sequence.size, cfg.rank * sequence.size + sequence.rank)


def decode_by_frames(decode: Callable[[Tensor], Frames], latents: Tensor, mesh: Mesh) -> Frames | None:
    """Decode a sample's frames, each by one of the processes that hold its latents.

    Args:
        decode: latents (C, T', h, w) -> frames; each frame must follow from its own latent frame alone.
        latents: (C, T, h, w) of the whole sample, the same on every process of the group.
        mesh: whose cfg and sequence axes share the work.

    Returns:
        All frames on the first process of the group, None on the others.
    """
    place = place_in_group(mesh)
    cut = Cut.even(1, latents.shape[1], place)
    start, length = cut.start(place.rank), cut.sizes[place.rank]
    own = decode(latents[:, start : start + length]) if length else None
    rows = [part for part in collected(mesh.sequence, own) if part is not None]
    if mesh.sequence.rank != 0:
        return None
    row = np.concatenate(rows) if rows else None  # fewer frames than processes
    parts = [part for part in collected(mesh.cfg, row) if part is not None]
    return np.concatenate(parts) if mesh.cfg.rank == 0 else None
