"""PixArt: text to image by full attention, here over any number of frames (arXiv 2310.00426; FACTS 4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from opensora_core.errors import ConfigError, InputError
from opensora_core.models.captioned import CaptionedBlock, CaptionedTransformer
from opensora_core.models.layers import ScalarEmbedder, small, zero
from opensora_core.models.positions import spatial_table, temporal_table
from opensora_core.tensors import Condition


class PixArt(CaptionedTransformer):
    """Captioned blocks with attention over all T * S tokens; 610,856,096 parameters at its defaults.

    Args:
        in_channels: latent channels C.
        patch_size: frames, rows and columns of a patch.
        hidden_size: width D, divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: heads A.
        mlp_ratio: width of the MLP over D.
        learn_sigma: also predict C channels of variance.
        caption_channels: caption width E.
        caption_length: length of the null caption; captions may be shorter.
        caption_dropout: see `LatentTransformer`.
        space_scale: spatial positions are divided by it.
        time_scale: frame positions are divided by it.
        temporal_positions: tell frames apart; off for a model of images.
        base_size: side of the square grid of patches that both axes are stretched to; 0 takes int(sqrt(S)), which
            leaves square grids alone.
        qk_norm: normalise queries and keys.
        attention: a backend of `attend`.
        recompute: see `LatentTransformer`.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        caption_channels: int = 4096,
        caption_length: int = 120,
        caption_dropout: float = 0.1,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
        temporal_positions: bool = True,
        base_size: int = 0,
        qk_norm: bool = False,
        attention: str = "auto",
        recompute: float = 0.0,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            learn_sigma=learn_sigma,
            caption_channels=caption_channels,
            caption_length=caption_length,
            caption_dropout=caption_dropout,
            space_scale=space_scale,
            time_scale=time_scale,
            attention=attention,
            recompute=recompute,
        )
        self.temporal_positions = temporal_positions
        self.base_size = base_size
        self.blocks.extend(
            CaptionedBlock(hidden_size, num_heads, mlp_ratio, over="all", qk_norm=qk_norm, attention=attention)
            for _ in range(depth)
        )
        self.initialise()

    def positions(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, None]:
        """Places and frames both go into the stream."""
        frames, rows, columns = grid
        base = self.base_size or int(math.sqrt(rows * columns))  # a compiler follows sqrt, not isqrt
        table = spatial_table(self.hidden_size, rows, columns, scale=self.space_scale, base=base, device=device)
        if self.temporal_positions:
            table = table + temporal_table(self.hidden_size, frames, scale=self.time_scale, device=device)[:, None]
        return table, None


class PixArtMS(PixArt):
    """PixArt that is told height, width and aspect ratio of the picture; 611,349,152 parameters at its defaults.

    Args:
        hidden_size: width D, divisible by 3 as well: each of the three numbers has a third of the channels.
        settings: as for `PixArt`.
    """

    def __init__(self, *, hidden_size: int = 1152, **settings: Any) -> None:
        if hidden_size % 3:
            raise ConfigError(
                f"model.hidden_size={hidden_size} must be divisible by 3 for pixart-ms",
                f"`--set model.hidden_size={3 * hidden_size}`",
            )
        super().__init__(hidden_size=hidden_size, **settings)
        self.csize_embedder = ScalarEmbedder(hidden_size // 3)
        self.ar_embedder = ScalarEmbedder(hidden_size // 3)
        for embedder in (self.csize_embedder, self.ar_embedder):
            zero(embedder.mlp[0], embedder.mlp[2])
            small(embedder.mlp[0], embedder.mlp[2])

    def time_vector(self, timestep: Tensor, condition: Condition) -> Tensor:
        """Add what `condition.size` (b, 2) tells to the time vector (B, D); b divides B.

        Raises:
            InputError: a condition without a size.
        """
        if condition.size is None:
            raise InputError("pixart-ms must be told the size of the picture", "`--size HxW`")
        t = super().time_vector(timestep, condition)
        height_width = embed_scalars(self.csize_embedder, condition.size)
        ratio = embed_scalars(self.ar_embedder, condition.size[:, :1] / condition.size[:, 1:])
        told = torch.cat([height_width, ratio], dim=1)
        return t + told.repeat(len(t) // len(told), 1)


def embed_scalars(embedder: ScalarEmbedder, scalars: Tensor) -> Tensor:
    """Embed each of n scalars of (B, n) and join them: (B, n * D)."""
    result: Tensor = embedder(scalars.flatten()).view(len(scalars), -1)
    return result
