"""STDiT: spatial and temporal attention in one block (Open-Sora 1.0; FACTS 2).

    sequential    x += g1 * attn(m);  x += g1 * attn_temp(x [+ p]);  x += cross_attn(x);  x += g2 * mlp(m')
    parallel      x += g1 * (attn(m) + attn_temp(m [+ p]));          x += cross_attn(x);  x += g2 * mlp(m')

with m = LN(x) * (1 + c1) + s1, m' = LN(x) * (1 + c2) + s2, and p the table of frame positions in the first block only.
The sequential one is what was released: its temporal attention reads the stream itself, neither normalised nor
modulated. The parallel one is only named in the report of Open-Sora 1.0; this is our definition of it. Both have the
same weights, but a model trained as one is not the other.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from opensora_core.models.captioned import CaptionedBlock, CaptionedTransformer
from opensora_core.models.layers import SelfAttention, zero
from opensora_core.models.positions import spatial_table, temporal_table


class STDiTBlock(CaptionedBlock):
    """Spatial attention within each frame, then temporal attention at each place."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qk_norm: bool = False,
        attention: str = "sdpa",
    ) -> None:
        super().__init__(hidden_size, num_heads, mlp_ratio, over="space", qk_norm=qk_norm, attention=attention)
        self.attn_temp = SelfAttention(hidden_size, num_heads, over="time", qk_norm=qk_norm, backend=attention)

    def attend(self, x: Tensor, modulated: Tensor, gate: Tensor, frames: Tensor | None) -> Tensor:
        """Add spatial, then temporal attention to x (B, T, S, D), under the same gate."""
        x = x + gate * self.attn(modulated)
        return x + gate * self.over_time(x, frames)

    def over_time(self, x: Tensor, frames: Tensor | None) -> Tensor:
        """Temporal attention of x (B, T, S, D); positions are added to what it reads, never to the stream."""
        if frames is not None:
            x = (x + frames).to(x.dtype)
        result: Tensor = self.attn_temp(x)
        return result


class STDiTParallelBlock(STDiTBlock):
    """Spatial and temporal attention read the same modulated tokens; their sum is gated once."""

    def attend(self, x: Tensor, modulated: Tensor, gate: Tensor, frames: Tensor | None) -> Tensor:
        """Add the gated sum of both attentions to x (B, T, S, D)."""
        result: Tensor = x + gate * (self.attn(modulated) + self.over_time(modulated, frames))
        return result


class STDiT(CaptionedTransformer):
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
        frame_positions: `published` adds them to what the first temporal attention reads, and nowhere else; that
            suffices for a model that starts from image weights. `stream` adds them to the embedded patches, as DiT and
            PixArt do, for one that starts from nothing: it has to tell one end of a movement from the other.
        qk_norm: normalise queries and keys.
        attention: a backend of `attend`.
        recompute: see `LatentTransformer`.
    """

    block: type[STDiTBlock] = STDiTBlock

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
        frame_positions: Literal["published", "stream"] = "published",
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
        self.frame_positions = frame_positions
        self.blocks.extend(
            self.block(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, attention=attention) for _ in range(depth)
        )
        self.initialise()

    def positions(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Places go into the stream, frames there too or into what the first temporal attention reads."""
        frames, rows, columns = grid
        space = spatial_table(self.hidden_size, rows, columns, scale=self.space_scale, device=device)
        time = temporal_table(self.hidden_size, frames, scale=self.time_scale, device=device)
        if self.frame_positions == "stream":
            return space + time[:, None], None
        return space, time[:, None]

    def initialise(self) -> None:
        """Draw start weights; temporal attention adds nothing at first, so an image model's weights carry over."""
        super().initialise()
        for block in self.blocks:
            assert isinstance(block, STDiTBlock)
            zero(block.attn_temp.proj)


class STDiTParallel(STDiT):
    """STDiT with both attentions of a block side by side: fewer sequential steps, the same weights."""

    block = STDiTParallelBlock


def freeze(model: nn.Module, which: Literal["not_temporal", "text"]) -> None:
    """Exclude weights from training: all but the temporal attention, or the cross attention to captions."""
    for name, parameter in model.named_parameters():
        if which == "not_temporal":
            parameter.requires_grad_(".attn_temp." in name)
        elif ".cross_attn." in name:
            parameter.requires_grad_(False)
