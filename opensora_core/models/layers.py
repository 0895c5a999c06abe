"""The layers that the families share. Attribute names give the published state-dict keys (FACTS 5)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora_core.errors import ConfigError, InputError
from opensora_core.models.attention import Ragged, attend, check_backend
from opensora_core.tensors import Condition


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale tokens (B, T, S, D) by vectors (B, D) or (B, 1, 1, D)."""
    if shift.dim() == 2:
        shift, scale = shift[:, None, None], scale[:, None, None]
    return x * (1 + scale) + shift


def layer_norm(dim: int) -> nn.LayerNorm:
    """The norm of every block: eps 1e-6, nothing learned."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


class Mlp(nn.Module):
    """Two linear layers around a tanh-GELU."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., out)."""
        result: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return result


class PatchEmbed(nn.Module):
    """Latents to tokens and back."""

    def __init__(self, in_channels: int, patch_size: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Patches along T, h and w of latents (B, C, T, h, w).

        Raises:
            InputError: a number of channels, or a size, that this model cannot take.
        """
        channels, *size = latents.shape[1:]
        if channels != self.proj.in_channels:
            raise InputError(
                f"latents of {channels} channels, but the model takes {self.proj.in_channels}",
                "the VAE and the model must belong together: `--set vae.weights` and `--model`",
            )
        if any(side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            shown, patch = "x".join(map(str, size)), "x".join(map(str, self.patch_size))
            raise InputError(
                f"a latent of {shown} (frames x height x width) does not divide into patches of {patch}",
                "change `--frames` or `--size` so that each side of the latent is a multiple of the patch",
            )
        frames, rows, columns = (side // patch for side, patch in zip(size, self.patch_size, strict=True))
        return frames, rows, columns

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, T, h, w) -> (B, T, S, D) in the dtype of the weights."""
        pt, ph, pw = self.patch_size
        self.grid(latents)
        patches = rearrange(
            latents.to(self.proj.weight.dtype),
            "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)",
            pt=pt, ph=ph, pw=pw,
        )  # fmt: skip
        # the convolution's stride is its kernel, so it is this product, for which every device has a fast kernel
        tokens = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        return tokens.to(self.proj.weight.dtype)  # also under autocast, so that the residual stream stays in fp32

    def fold(self, tokens: Tensor, rows: int) -> Tensor:
        """(B, T, S, pt * ph * pw * C) -> (B, C, T, h, w) fp32, for a grid of that many rows; C varies fastest."""
        pt, ph, pw = self.patch_size
        return rearrange(
            tokens.float(),
            "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
            h=rows, pt=pt, ph=ph, pw=pw,
        )  # fmt: skip


class ScalarEmbedder(nn.Module):
    """A scalar (a timestep, a height) as a sinusoid through two linear layers."""

    SINUSOID = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.SINUSOID, dim), nn.SiLU(), nn.Linear(dim, dim))

    @staticmethod
    def sinusoid(scalars: Tensor, dim: int) -> Tensor:
        """(N,) of any dtype -> (N, dim) fp32: cosines, then sines, then a zero where dim is odd."""
        half = dim // 2
        index = torch.arange(half, dtype=torch.float32, device=scalars.device)
        angles = scalars.float()[:, None] * torch.exp(-math.log(10000.0) * index / half)
        return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))

    def forward(self, scalars: Tensor) -> Tensor:
        """(N,) -> (N, D) in the dtype of the weights; the scalars themselves are never rounded to it."""
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        result: Tensor = self.mlp(self.sinusoid(scalars, self.SINUSOID).to(first.weight.dtype))
        return result


class CaptionEmbedder(nn.Module):
    """Projects caption embeddings, and owns the null caption in their un-projected space."""

    y_embedding: Tensor

    def __init__(self, caption_channels: int, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(length, caption_channels) / caption_channels**0.5)
        self.y_proj = Mlp(caption_channels, dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, E) -> (B, L, D).

        Raises:
            InputError: labels, or captions of another width.
        """
        if tokens.dim() != 3 or tokens.shape[2] != self.y_proj.fc1.in_features:
            raise InputError(
                f"a condition of shape {tuple(tokens.shape)}, but the model takes captions of width "
                f"{self.y_proj.fc1.in_features}",
                "the text encoder and the model must belong together: `--set text.weights` and `--model`",
            )
        result: Tensor = self.y_proj(tokens.to(self.y_proj.fc1.weight.dtype))
        return result

    def replace(self, condition: Condition, dropped: Tensor) -> Condition:
        """Put the null caption in place of the dropped ones; the mask stays, as published.

        Raises:
            InputError: captions longer than the null caption.
        """
        length, longest = condition.tokens.shape[1], len(self.y_embedding)
        if length > longest:
            raise InputError(
                f"captions of {length} tokens, but the model's null caption has {longest}",
                f"`--set model.caption_length={longest}`",
            )
        null = self.y_embedding[:length].to(condition.tokens)
        return replace(condition, tokens=torch.where(dropped[:, None, None], null, condition.tokens))

    def set_null(self, tokens: Tensor) -> None:
        """Make embeddings (L, E) the null caption, for weights that were published without one."""
        self.y_embedding = tokens.detach().to(self.y_proj.fc1.weight).clone()


class LabelEmbedder(nn.Module):
    """A table of classes; with `null_class`, one more row stands for "no class"."""

    def __init__(self, num_classes: int, null_class: bool, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + null_class, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) int -> (B, D).

        Raises:
            InputError: captions instead of labels.
        """
        if labels.dim() != 1:
            raise InputError(
                f"a condition of shape {tuple(labels.shape)}, but the model takes one class number per sample",
                "`--set text.kind=class`",
            )
        result: Tensor = self.embedding_table(labels)
        return result

    def replace(self, condition: Condition, dropped: Tensor) -> Condition:
        """Put the null class in place of the dropped labels.

        Raises:
            ConfigError: a model that was trained without one.
        """
        if self.embedding_table.num_embeddings == self.num_classes:
            raise ConfigError(
                "this model was built without a null class (model.caption_dropout is 0), so nothing can guide it",
                "`--guidance 1`",
            )
        return replace(condition, tokens=condition.tokens.masked_fill(dropped, self.num_classes))


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other.

    Args:
        dim: width D.
        num_heads: heads A.
        over: `space` attends within each frame, `time` along the frames at each place, `all` over both.
        bias: whether queries, keys and values have one.
        qk_norm: normalise queries and keys per head.
        backend: a backend of `attend`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        over: Literal["space", "time", "all"],
        bias: bool = True,
        qk_norm: bool = False,
        backend: str = "sdpa",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.over = over
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, S, D) -> (B, T, S, D)."""
        if self.over == "time":
            return self.along(x.transpose(1, 2)).transpose(1, 2)
        if self.over == "all":
            return self.along(x.flatten(1, 2)[:, None]).view(x.shape)
        return self.along(x)

    def along(self, x: Tensor) -> Tensor:
        """Attend along the third dim of (B, X, N, D), each of the B * X sequences for itself."""
        qkv = self.qkv(x).flatten(0, 1).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(dim=2)
        heads = self.attend(self.q_norm(q), self.k_norm(k), v)
        result: Tensor = self.proj(heads.flatten(2)).view(x.shape)
        return result

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B * X, N, A, K) each -> (B * X, N, A, K): where tokens meet, which `parallel/` replaces for shared ones."""
        return attend(q, k, v, backend=self.backend)


class CrossAttention(nn.Module):
    """Multi-head attention of a sample's tokens to its own caption."""

    def __init__(self, dim: int, num_heads: int, *, backend: str = "sdpa") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, captions: Tensor, ragged: Ragged | None) -> Tensor:
        """(B, T, S, D) attends to captions (B, L, D), to those that `ragged` keeps."""
        q = self.q_linear(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv_linear(captions).unflatten(-1, (2, self.num_heads, -1)).unbind(dim=2)
        heads = attend(q, k, v, mask=ragged, backend=self.backend)
        result: Tensor = self.proj(heads.flatten(2)).view(x.shape)
        return result


class TableFinalLayer(nn.Module):
    """Last layer of STDiT and PixArt: modulated by a learned table plus the time vector itself."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = layer_norm(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, T, S, D), (B, D) -> (B, T, S, out)."""
        shift, scale = (self.scale_shift_table + t[:, None]).unbind(dim=1)
        result: Tensor = self.linear(modulate(self.norm(x), shift, scale).to(x.dtype))
        return result


class LinearFinalLayer(nn.Module):
    """Last layer of DiT and Latte: modulated by a linear function of the condition vector."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = layer_norm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, T, S, D), (B, D) -> (B, T, S, out)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        result: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return result


class LatentTransformer(nn.Module):
    """What the families have in common: patches, the time embedding, the null caption, the walk over the blocks.

    Attributes:
        caption_dropout: how often a trainer is to call `replace_captions` on a sample; nothing is drawn in here.
        recompute: share of the blocks, in [0, 1], that recompute their activations in the backward pass instead of
            keeping them; they are spread evenly over the depth.
    """

    y_embedder: CaptionEmbedder | LabelEmbedder

    def __init__(
        self,
        *,
        in_channels: int,
        patch_size: tuple[int, int, int],
        hidden_size: int,
        num_heads: int,
        learn_sigma: bool,
        caption_dropout: float,
        attention: str,
        recompute: float,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or hidden_size % 4:
            raise ConfigError(
                f"model.hidden_size={hidden_size} must be divisible by 4 and by model.num_heads={num_heads}",
                f"`--set model.hidden_size={-(-hidden_size // (4 * num_heads)) * 4 * num_heads}`",
            )
        if not 0 <= recompute <= 1:
            raise ConfigError(
                f"recompute={recompute} is not a share of the blocks, from 0 to 1", "`--set train.recompute=0.5`"
            )
        check_backend(attention)
        self.hidden_size = hidden_size
        self.attention = "sdpa" if attention == "auto" else attention
        self.caption_dropout = caption_dropout
        self.recompute = recompute
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.blocks = nn.ModuleList()

    @property
    def out_features(self) -> int:
        """Numbers that the last layer gives per token."""
        return self.out_channels * math.prod(self.x_embedder.patch_size)

    def replace_captions(self, condition: Condition, dropped: Tensor) -> Condition:
        """Put the null caption, or null class, where `dropped` (B,) bool is True; a mask stays as it is."""
        return self.y_embedder.replace(condition, dropped)

    def null_condition(self, condition: Condition) -> Condition:
        """The condition that guidance steers away from: null captions under the captions' own mask."""
        return self.replace_captions(
            condition, torch.ones(len(condition), dtype=torch.bool, device=condition.tokens.device)
        )

    def set_null_caption(self, tokens: Tensor) -> None:
        """Make (L, E) embeddings, such as those of the empty caption, the null caption.

        Raises:
            ConfigError: a model of classes.
        """
        if not isinstance(self.y_embedder, CaptionEmbedder):
            raise ConfigError("a model of classes has no null caption", "`--set model.condition=pooled`")
        self.y_embedder.set_null(tokens)

    def ragged(self, condition: Condition, batch: int) -> Ragged | None:
        """Prepare the caption mask; one of b samples is tiled over a batch of a multiple of b, as published."""
        if condition.mask is None:
            return None
        mask = condition.mask
        return Ragged.build(mask.repeat(batch // len(mask), 1), self.attention)

    def own_frames(self, x: Tensor) -> Tensor:
        """The frames of tokens (B, T, S, D), or of a table (T, 1, D), that this process walks through the blocks.

        All of them; `parallel/` replaces it where processes share the frames.
        """
        return x

    def recomputes(self, number: int) -> bool:
        """Whether block `number` recomputes its activations in the backward pass."""
        return math.floor((number + 1) * self.recompute) > math.floor(number * self.recompute)

    def walk(self, number: int, x: Tensor, *arguments: Any) -> Tensor:
        """Run block `number` on tokens x (B, T, S, D), keeping or recomputing its activations."""
        block = self.blocks[number]
        if self.recomputes(number) and torch.is_grad_enabled():
            # nothing in a block is random, so there is no state of a generator to bring back
            result: Tensor = checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            result = block(x, *arguments)
        return result

    def linears(self) -> Iterator[nn.Linear]:
        """Every linear layer of the model."""
        return (module for module in self.modules() if isinstance(module, nn.Linear))

    def initialise(self) -> None:
        """Start weights common to all families: Xavier-uniform matrices without bias, small time embedding."""
        for linear in self.linears():
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.view(self.hidden_size, -1))
        small(self.t_embedder.mlp[0], self.t_embedder.mlp[2])
        if isinstance(self.y_embedder, CaptionEmbedder):
            small(self.y_embedder.y_proj.fc1, self.y_embedder.y_proj.fc2)


def small(*linears: nn.Module) -> None:
    """Draw weights from N(0, 0.02)."""
    for linear in linears:
        assert isinstance(linear, nn.Linear)
        nn.init.normal_(linear.weight, std=0.02)


def zero(*linears: nn.Module) -> None:
    """Let layers start as nothing."""
    for linear in linears:
        assert isinstance(linear, nn.Linear)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
