"""STDiT: spatial and temporal attention in turn, captions by cross attention (Open-Sora 1.0; FACTS 2).

    sequential    x += g1 * attn(m);  x += g1 * attn_temp(x [+ p]);  x += cross_attn(x);  x += g2 * mlp(m')
    parallel      x += g1 * (attn(m) + attn_temp(m [+ p]));          x += cross_attn(x);  x += g2 * mlp(m')

with m = LN(x) * (1 + c1) + s1, m' = LN(x) * (1 + c2) + s2, and p the table of frame positions in the first block only.
Both have the same weights; a model trained as one is not the other.
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
from opensora_core.models.positions import spatial_table, temporal_table
from opensora_core.tensors import Condition


class STDiTBlock(nn.Module):
    """Spatial attention within each frame, then temporal attention at each place, then captions, then the MLP."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool = False, attention: str = "sdpa"
    ) -> None:
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.norm2 = layer_norm(hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm=qk_norm, backend=attention)
        self.attn_temp = SelfAttention(hidden_size, num_heads, qk_norm=qk_norm, backend=attention)
        self.cross_attn = CrossAttention(hidden_size, num_heads, backend=attention)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)

    def forward(
        self, x: Tensor, t6: Tensor, captions: Tensor, ragged: Ragged | None, frames: Tensor | None = None
    ) -> Tensor:
        """Refine the tokens.

        Args:
            x: tokens (B, T, S, D).
            t6: the projected time vector (B, 6, D).
            captions: projected captions (B, L, D).
            ragged: which caption tokens count.
            frames: frame positions (T, D), for the first block.
        """
        table = (self.scale_shift_table + t6)[:, None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = table.to(x.dtype).unbind(dim=3)
        x = self.attend(x, modulate(self.norm1(x), shift1, scale1), gate1, frames)
        x = x + self.cross_attn(x, captions, ragged)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def attend(self, x: Tensor, modulated: Tensor, gate: Tensor, frames: Tensor | None) -> Tensor:
        """Add spatial and temporal attention to x (B, T, S, D); the temporal one reads x itself, un-normalised."""
        x = x + gate * self.attn(modulated)
        return x + gate * self.over_time(x, frames)

    def over_time(self, x: Tensor, frames: Tensor | None) -> Tensor:
        """Attention along T of (B, T, S, D); positions are added to what it reads, never to the stream."""
        if frames is not None:
            x = (x + frames[:, None]).to(x.dtype)
        result: Tensor = self.attn_temp(x.transpose(1, 2)).transpose(1, 2)
        return result


class STDiTParallelBlock(STDiTBlock):
    """Spatial and temporal attention read the same modulated tokens, and their sum is gated once."""

    def attend(self, x: Tensor, modulated: Tensor, gate: Tensor, frames: Tensor | None) -> Tensor:
        """Add the gated sum of both attentions to x (B, T, S, D)."""
        return x + gate * (self.attn(modulated) + self.over_time(modulated, frames))


class STDiT(LatentTransformer):
    """The denoiser that Open-Sora 1.0 released; 759,620,768 parameters at its defaults.

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
        qk_norm: normalise queries and keys.
        attention: a backend of `attend`.
        gradient_checkpointing: see `LatentTransformer`.
    """

    block: type[STDiTBlock] = STDiTBlock
    y_embedder: CaptionEmbedder

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
        qk_norm: bool = False,
        attention: str = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            learn_sigma=learn_sigma,
            caption_dropout=caption_dropout,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.space_scale = space_scale
        self.time_scale = time_scale
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, caption_length, hidden_size)
        self.blocks.extend(
            self.block(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, attention=self.attention)
            for _ in range(depth)
        )
        self.final_layer = TableFinalLayer(hidden_size, self.out_features)
        self.initialise()

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Predict noise (or velocity) and variance.

        Args:
            x: latents (B, C, T, h, w), each side divisible by the patch.
            timestep: (B,) int or float in [0, 1000).
            condition: captions (B, L, E), with a mask of B or of a divisor of B samples.

        Returns:
            (B, C or 2C, T, h, w) fp32.

        Raises:
            InputError: a latent that does not fit the patches.
        """
        frames, rows, columns = self.x_embedder.grid(x)
        space = spatial_table(self.hidden_size, rows, columns, self.space_scale, None, x.device)
        time = temporal_table(self.hidden_size, frames, self.time_scale, x.device)
        ragged = self.ragged(condition, len(x))

        tokens = self.x_embedder(x)
        tokens = (tokens + space).to(tokens.dtype)
        t = self.t_embedder(timestep)
        t6 = self.t_block(t).unflatten(1, (6, -1))
        captions = self.y_embedder(condition.tokens)
        for number, block in enumerate(self.blocks):
            tokens = self.walk(block, tokens, t6, captions, ragged, time if number == 0 else None)
        return self.x_embedder.fold(self.final_layer(tokens, t), rows)

    def initialise(self) -> None:
        """Draw start weights; a fresh model outputs exactly zero, and its temporal attention adds nothing."""
        super().initialise()
        small(self.t_block[1])
        for block in self.blocks:
            assert isinstance(block, STDiTBlock)
            zero(block.cross_attn.proj, block.attn_temp.proj)
        zero(self.final_layer.linear)


class STDiTParallel(STDiT):
    """STDiT with both attentions of a block side by side: half the sequential steps, the same weights."""

    block = STDiTParallelBlock


def freeze(model: nn.Module, which: Literal["not_temporal", "text"]) -> None:
    """Exclude weights from training: all but the temporal attention, or the cross attention to captions."""
    for name, parameter in model.named_parameters():
        if which == "not_temporal":
            parameter.requires_grad_(".attn_temp." in name)
        elif ".cross_attn." in name:
            parameter.requires_grad_(False)
