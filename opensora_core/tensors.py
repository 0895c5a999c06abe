"""The dimension key and the types by which sibling rooms speak to each other.

    B batch        C latent or pixel channels    T frames           H W pixels      h w latent grid
    S patches of one frame    D width            L caption tokens   E caption width
    A heads        K width of a head

Tokens stay four-dimensional, (B, T, S, D), from the patch embedding to the last layer: a block reads T and S off
the tensor, so nobody stores them, and "shard the frames" is "split dim 1".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What a sample is conditioned on; the only thing that passes from the text room to a model.

    Attributes:
        tokens: caption embeddings (B, L, E) for text; (B, 1, E) for one pooled vector; (B,) int64 for class labels.
        mask: (B, L) bool, True where a caption token counts; None when all do, and always None for labels.
        size: (B, 2) float, height and width in pixels, for models that are told the size (PixArt-MS).
    """

    tokens: Tensor
    mask: Tensor | None = None
    size: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move to a device, and cast the floating-point embeddings (never labels, masks or sizes)."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device=device)

        tokens = self.tokens.to(device=device, dtype=dtype if self.tokens.is_floating_point() else None)
        return replace(self, tokens=tokens, mask=move(self.mask), size=move(self.size))

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """Select samples; a slice or an index tensor keeps the batch dim."""
        return Condition(
            self.tokens[index],
            None if self.mask is None else self.mask[index],
            None if self.size is None else self.size[index],
        )

    @staticmethod
    def cat(parts: list[Condition]) -> Condition:
        """Join along the batch dim. Optional fields must be present in all parts or in none."""

        def join(tensors: list[Tensor | None]) -> Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            assert len(present) in (0, len(tensors)), "optional fields must be present in all parts or in none"
            return torch.cat(present) if present else None

        tokens = torch.cat([part.tokens for part in parts])
        return Condition(tokens, join([part.mask for part in parts]), join([part.size for part in parts]))


Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]
"""(latents (B, C, T, h, w), timestep (B,) float or int in [0, 1000], condition) -> prediction (B, C or 2C, T, h, w)."""
