"""Latte: blocks of spatial and of temporal attention by turns (arXiv 2401.03048, variant 1; FACTS 3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from opensora_core.models.attention import Ragged
from opensora_core.models.captioned import CaptionedBlock, CaptionedTransformer
from opensora_core.models.dit import DiT
from opensora_core.models.positions import spatial_table, temporal_table


class Latte(DiT):
    """DiT whose even blocks attend within frames and whose odd blocks attend along time; the weights are DiT's."""

    def over(self, number: int) -> Literal["space", "time", "all"]:
        """Space, time, space, time."""
        return "time" if number % 2 else "space"

    def adds_frames(self, number: int) -> bool:
        """Frame positions enter the stream before the first temporal block, and stay."""
        return number == 1


class Latte1TemporalBlock(CaptionedBlock):
    """Attention along time; frame positions enter the stream in front of it, and stay."""

    def forward(
        self, x: Tensor, t6: Tensor, captions: Tensor, ragged: Ragged | None, frames: Tensor | None = None
    ) -> Tensor:
        """Refine tokens; see `CaptionedBlock`."""
        if frames is not None:
            x = (x + frames).to(x.dtype)
        return super().forward(x, t6, captions, ragged)


class Latte1(CaptionedTransformer):
    """Latte-1, the text-to-video successor: captions by cross attention, in the spatial blocks only.

    As published in diffusers' layout (maxin-cn/Latte-1), where one "layer" is a spatial and a temporal block; `depth`
    counts both, so the published model has 56.

    Args:
        in_channels: latent channels C.
        patch_size: frames, rows and columns of a patch.
        hidden_size: width D, divisible by 4 and by `num_heads`.
        depth: number of blocks, spatial and temporal by turns.
        num_heads: heads A.
        mlp_ratio: width of the MLP over D.
        learn_sigma: also predict C channels of variance.
        caption_channels: caption width E.
        caption_length: length of the null caption; captions may be shorter.
        caption_dropout: see `LatentTransformer`.
        space_scale: spatial positions are divided by it.
        time_scale: frame positions are divided by it.
        base_size: side of the square grid of patches that both axes are stretched to; 0 for no stretching.
        qk_norm: normalise queries and keys.
        attention: a backend of `attend`.
        recompute: see `LatentTransformer`.
    """

    block_of_frames = 1

    def __init__(
        self,
        *,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 56,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        caption_channels: int = 4096,
        caption_length: int = 120,
        caption_dropout: float = 0.1,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
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
        self.base_size = base_size
        self.blocks.extend(
            (Latte1TemporalBlock if number % 2 else CaptionedBlock)(
                hidden_size,
                num_heads,
                mlp_ratio,
                over="time" if number % 2 else "space",
                captions=number % 2 == 0,
                qk_norm=qk_norm,
                attention=attention,
            )
            for number in range(depth)
        )
        self.initialise()

    def positions(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Places go into the stream at once, frames before the first temporal block; a single image has no frames."""
        frames, rows, columns = grid
        base = self.base_size or None
        space = spatial_table(self.hidden_size, rows, columns, scale=self.space_scale, base=base, device=device)
        if frames == 1:
            return space, None
        return space, temporal_table(self.hidden_size, frames, scale=self.time_scale, device=device)[:, None]
