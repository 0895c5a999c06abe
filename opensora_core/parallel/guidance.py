"""The two halves of classifier-free guidance on different processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_core.parallel.mesh import Axis
from opensora_core.tensors import Condition, Denoiser


def in_halves(denoiser: Denoiser, axis: Axis) -> Denoiser:
    """Let the processes of the axis compute one half each of a doubled batch, and exchange what they predict.

    Args:
        denoiser: predicts any number of samples; both halves of a batch of guidance, [condition; null], go through it.
        axis: of one process, which computes both, or of two.

    Returns:
        A denoiser whose whole answer every process has. It tracks no gradient.
    """
    if axis.size == 1:
        return denoiser
    assert axis.size == 2, f"guidance has two halves, not {axis.size}"

    def predict(latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        half = len(latents) // 2
        own = slice(axis.rank * half, (axis.rank + 1) * half)
        mine = denoiser(latents[own], timestep[own], condition[own]).contiguous()
        halves = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(halves, mine, group=axis.group)
        return torch.cat(halves)

    return predict
