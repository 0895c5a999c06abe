"""What STDiT, PixArt and Latte-1 share: captions by cross attention, and one time projection for all blocks.

The modulation is PixArt-alpha's adaLN-single (arXiv 2310.00426, section 2.3): six vectors per sample from the timestep,
computed once, plus a learned table of six vectors per block.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from opensora_core.models.attention import Ragged
from opensora_core.models.layers import (
    CaptionEmbedder,
    CrossAttention,
    LatentTransformer,
    Mlp,
    SelfAttention,
    TableFinalLayer,
    layer_norm,
    modulate,
    small,
    zero,
)
from opensora_core.tensors import Condition


class CaptionedBlock(nn.Module):
    """Modulated attention, then captions, then a modulated MLP.

        x += g1 * attn(m);  x += cross_attn(x);  x += g2 * mlp(m')

    with m = LN(x) * (1 + c1) + s1 and m' = LN(x) * (1 + c2) + s2. What reads the captions is not normalised.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        over: Literal["space", "time", "all"],
        captions: bool = True,
        qk_norm: bool = False,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.norm2 = layer_norm(hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.attn = SelfAttention(hidden_size, num_heads, over=over, qk_norm=qk_norm, backend=attention)
        self.cross_attn = CrossAttention(hidden_size, num_heads, backend=attention) if captions else None
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)

    def forward(
        self, x: Tensor, t6: Tensor, captions: Tensor, ragged: Ragged | None, frames: Tensor | None = None
    ) -> Tensor:
        """Refine tokens.

        Args:
            x: tokens (B, T, S, D).
            t6: the projected time vector (B, 6, D).
            captions: projected captions (B, L, D).
            ragged: which caption tokens count.
            frames: frame positions (T, 1, D), given to one block of the families that place frames inside a block.
        """
        table = (self.scale_shift_table + t6)[:, None, None].to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(dim=3)
        x = self.attend(x, modulate(self.norm1(x), shift1, scale1), gate1, frames)
        if self.cross_attn is not None:
            x = x + self.cross_attn(x, captions, ragged)
        result: Tensor = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return result

    def attend(self, x: Tensor, modulated: Tensor, gate: Tensor, frames: Tensor | None) -> Tensor:
        """Add gated self attention to x (B, T, S, D)."""
        assert frames is None, "this block has no use for frame positions"
        result: Tensor = x + gate * self.attn(modulated)
        return result


class CaptionedTransformer(LatentTransformer):
    """The walk from latents to prediction. A family fills `blocks` and says where it puts its positions.

    Attributes:
        block_of_frames: the block that is handed the frame positions, where the family has such a one.
    """

    y_embedder: CaptionEmbedder
    block_of_frames = 0

    def __init__(
        self,
        *,
        in_channels: int,
        patch_size: tuple[int, int, int],
        hidden_size: int,
        num_heads: int,
        learn_sigma: bool,
        caption_channels: int,
        caption_length: int,
        caption_dropout: float,
        space_scale: float,
        time_scale: float,
        attention: str,
        recompute: float,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            learn_sigma=learn_sigma,
            caption_dropout=caption_dropout,
            attention=attention,
            recompute=recompute,
        )
        self.space_scale = space_scale
        self.time_scale = time_scale
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, caption_length, hidden_size)
        self.final_layer = TableFinalLayer(hidden_size, self.out_features)

    def positions(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Tables for a grid of T frames, rows and columns.

        Returns:
            What is added to the embedded patches, broadcastable to (T, S, D), and frame positions (T, 1, D) for the
            block that `block_of_frames` names, or None.
        """
        raise NotImplementedError

    def time_vector(self, timestep: Tensor, condition: Condition) -> Tensor:
        """What modulates every block, (B, D)."""
        result: Tensor = self.t_embedder(timestep)
        return result

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Predict noise (or velocity), and variance with `learn_sigma`.

        Args:
            x: latents (B, C, T, h, w), each side divisible by the patch.
            timestep: (B,) int or float in [0, 1000); never rounded to the dtype of the weights.
            condition: captions (B, L, E), with a mask of B samples or of a divisor of B.

        Returns:
            (B, C or 2C, T, h, w) fp32.

        Raises:
            InputError: a latent that does not fit the patches, or a condition that does not fit the model.
        """
        grid = self.x_embedder.grid(x)
        added, frames = self.positions(grid, x.device)
        ragged = self.ragged(condition, len(x))

        tokens = self.x_embedder(x)
        tokens = self.own_frames((tokens + added).to(tokens.dtype))
        frames = None if frames is None else self.own_frames(frames)
        t = self.time_vector(timestep, condition)
        t6 = self.t_block(t).unflatten(1, (6, -1))
        captions = self.y_embedder(condition.tokens)
        for number in range(len(self.blocks)):
            placed = frames if number == self.block_of_frames else None
            tokens = self.walk(number, tokens, t6, captions, ragged, placed)
        return self.x_embedder.fold(self.final_layer(tokens, t), grid[1])

    def initialise(self) -> None:
        """Draw start weights; a fresh model outputs exactly zero."""
        super().initialise()
        small(self.t_block[1])
        for block in self.blocks:
            assert isinstance(block, CaptionedBlock)
            if block.cross_attn is not None:
                zero(block.cross_attn.proj)
        zero(self.final_layer.linear)
