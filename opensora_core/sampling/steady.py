"""A sample does not depend on the batch that it is drawn in: not its noise, and not one bit of its arithmetic.

A matrix product of six rows need not give the rows that six products of one row give: libraries choose their kernels by
shape, and kernels differ in the order of their sums. Over a hundred steps the last bit grows into another picture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from opensora_core.models.layers import PatchEmbed
from opensora_core.sampling.planning import hash_of
from opensora_core.tensors import Condition, Denoiser

_FEW_ROWS = 128  # per sample, below which products of a whole batch were seen to differ


class NoiseSource:
    """Standard normal noise for each of several samples, from generators of their own.

    Args:
        samples: (prompt, seed) of each; nothing else has a say in its noise.
        shape: (C, T, h, w) of one sample's latents.
        device: where the noise is put. It is drawn on the CPU, so that every device gets the same.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generators = [
            torch.Generator().manual_seed(int(hash_of(f"{seed} {prompt}")[:15], 16)) for prompt, seed in samples
        ]

    def __call__(self) -> Tensor:
        """Draw (B, C, T, h, w) fp32."""
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
        return noise.to(self.device)


class SteadyDenoiser:
    """A denoiser whose answer for a sample has the same bits in every batch.

    The first call for each batch size computes the batch at once and also one sample at a time. If the bits agree, the
    kernels sum in the same order, and later calls compute the batch at once; if they do not, one sample at a time. The
    price is that one call per batch size, and on machines that fail the test what batching would have gained there.

    Args:
        model: predicts (B, C or 2C, T, h, w).
    """

    def __init__(self, model: Denoiser) -> None:
        self.model = model
        self.at_once: dict[int, bool] = {1: True}

    def of(self, num_samples: int) -> Denoiser:
        """The denoiser for a batch of so many samples; doubled, as guidance makes it, it has two rows for each."""
        return functools.partial(self._predict, num_samples)

    def _predict(self, num_samples: int, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        at_once = self.at_once.get(num_samples)
        if at_once:
            return self.model(latents, timestep, condition)
        rows = [slice(sample, None, num_samples) for sample in range(num_samples)]
        parts = [self.model(latents[own], timestep[own], condition[own]) for own in rows]
        prediction = parts[0].new_empty(len(latents), *parts[0].shape[1:])
        for own, part in zip(rows, parts, strict=True):
            prediction[own] = part
        if at_once is None:
            self.at_once[num_samples] = torch.equal(self.model(latents, timestep, condition), prediction)
        return prediction


def steady_layers(model: nn.Module) -> None:
    """Let the layers of a model that have few rows per sample, such as those of the timestep, do one sample at a time.

    These are the products whose kernels do depend on the batch, and next to nothing of the work; with them done, most
    models pass `SteadyDenoiser`'s test.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | PatchEmbed):
            few = _FEW_ROWS * module.in_features if isinstance(module, nn.Linear) else math.inf
            module.forward = functools.partial(_one_by_one, module.forward, few)  # type: ignore[method-assign]


def _one_by_one(forward: Callable[[Tensor], Tensor], few: float, x: Tensor) -> Tensor:
    if len(x) < 2 or x[0].numel() >= few:  # of shared frames a process may have none
        return forward(x)
    return torch.cat([forward(x[row : row + 1]) for row in range(len(x))])
