"""DiT: full attention over space and time, one condition vector per sample (arXiv 2212.09748; FACTS 3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from opensora_core.errors import ConfigError, InputError
from opensora_core.models.layers import (
    CaptionEmbedder,
    LabelEmbedder,
    LatentTransformer,
    LinearFinalLayer,
    Mlp,
    SelfAttention,
    layer_norm,
    modulate,
    zero,
)
from opensora_core.models.positions import spatial_table, temporal_table
from opensora_core.tensors import Condition


class DiTBlock(nn.Module):
    """Modulated attention and a modulated MLP: adaLN-Zero, arXiv 2212.09748, section 3.2.

    x += g1 * attn(LN(x) * (1 + c1) + s1);  x += g2 * mlp(LN(x) * (1 + c2) + s2)
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        over: Literal["space", "time", "all"] = "all",
        qk_norm: bool = False,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.norm2 = layer_norm(hidden_size)
        self.attn = SelfAttention(hidden_size, num_heads, over=over, qk_norm=qk_norm, backend=attention)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Refine tokens (B, T, S, D) under the condition vector (B, D)."""
        table = self.adaLN_modulation(c)[:, None, None].to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        result: Tensor = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return result


class DiT(LatentTransformer):
    """Full space-time attention; 675,600,800 parameters with captions, at its defaults.

    Args:
        in_channels: latent channels C.
        patch_size: frames, rows and columns of a patch.
        hidden_size: width D, divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: heads A.
        mlp_ratio: width of the MLP over D.
        learn_sigma: also predict C channels of variance.
        condition: `pooled` takes one caption vector per sample, `class` a class number.
        caption_channels: width E of a pooled caption.
        num_classes: number of classes, without the null class.
        caption_dropout: see `LatentTransformer`; with classes, 0 leaves out the null class.
        temporal_positions: tell frames apart; off for a model of images.
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
        condition: str = "pooled",
        caption_channels: int = 512,
        num_classes: int = 0,
        caption_dropout: float = 0.1,
        temporal_positions: bool = True,
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
            caption_dropout=caption_dropout,
            attention=attention,
            recompute=recompute,
        )
        self.temporal_positions = temporal_positions
        if condition == "pooled":
            self.y_embedder = CaptionEmbedder(caption_channels, 1, hidden_size)
        elif condition == "class" and num_classes > 0:
            self.y_embedder = LabelEmbedder(num_classes, caption_dropout > 0, hidden_size)
        else:
            raise ConfigError(
                f"DiT and Latte take one vector per sample, not model.condition={condition!r} with "
                f"model.num_classes={num_classes}",
                "`--set model.condition=pooled`, or `--set model.condition=class --set model.num_classes=N`",
            )
        self.blocks.extend(
            DiTBlock(hidden_size, num_heads, mlp_ratio, over=self.over(number), qk_norm=qk_norm, attention=attention)
            for number in range(depth)
        )
        self.final_layer = LinearFinalLayer(hidden_size, self.out_features)
        self.initialise()

    def over(self, number: int) -> Literal["space", "time", "all"]:
        """What block `number` attends over."""
        return "all"

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Predict noise (or velocity), and variance with `learn_sigma`.

        Args:
            x: latents (B, C, T, h, w), each side divisible by the patch.
            timestep: (B,) int or float in [0, 1000); never rounded to the dtype of the weights.
            condition: pooled captions (B, 1, E), or class numbers (B,).

        Returns:
            (B, C or 2C, T, h, w) fp32.

        Raises:
            InputError: a latent that does not fit the patches, or a condition that does not fit the model.
        """
        frames, rows, columns = self.x_embedder.grid(x)
        space = spatial_table(self.hidden_size, rows, columns, scale=1.0, device=x.device)
        time = self.own_frames(temporal_table(self.hidden_size, frames, scale=1.0, device=x.device)[:, None])

        tokens = self.x_embedder(x)
        tokens = self.own_frames((tokens + space).to(tokens.dtype))
        c = self.t_embedder(timestep) + self.embed(condition)
        for number in range(len(self.blocks)):
            if self.adds_frames(number):
                tokens = (tokens + time).to(tokens.dtype)
            tokens = self.walk(number, tokens, c)
        return self.x_embedder.fold(self.final_layer(tokens, c), rows)

    def adds_frames(self, number: int) -> bool:
        """Whether frame positions enter the stream before block `number`."""
        return number == 0 and self.temporal_positions

    def embed(self, condition: Condition) -> Tensor:
        """The condition as vectors (B, D).

        Raises:
            InputError: a whole caption where one pooled vector is expected.
        """
        vectors: Tensor = self.y_embedder(condition.tokens)
        if vectors.dim() == 2:
            return vectors
        if vectors.shape[1] != 1:
            raise InputError(
                f"captions of {vectors.shape[1]} tokens, but the model takes one pooled vector per sample",
                "`--set text.kind=clip`",
            )
        return vectors[:, 0]

    def initialise(self) -> None:
        """Draw start weights; every block starts as the identity, and a fresh model outputs exactly zero."""
        super().initialise()
        assert self.x_embedder.proj.bias is not None
        nn.init.zeros_(self.x_embedder.proj.bias)
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            zero(block.adaLN_modulation[1])
        zero(self.final_layer.adaLN_modulation[1], self.final_layer.linear)
