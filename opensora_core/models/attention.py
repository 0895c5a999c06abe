"""The one seam through which every model attends, and the backends behind it.

    sdpa       torch's scaled_dot_product_attention; any device, any dtype; what `auto` means
    math       the plain formula, softmax in fp32; what the others are tested against
    flash      flash-attn 2   (CUDA, half precision)      flash3     flash-attn 3 (Hopper, half precision)
    varlen     torch.nn.attention.varlen (CUDA, half)     xformers   memory-efficient attention (CUDA)
    flex       torch's flex attention; compiled on CUDA, eager and without gradients on a CPU

Captions are ragged: each sample attends to its own tokens only. `flash`, `flash3`, `varlen` and `xformers` take the
kept keys packed one after the other; the rest take a (B, 1, 1, L) mask that broadcasts. Nobody builds B x N x L. A mask
that keeps everything is not special: a sample's result must not depend on the captions that share its batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_core.errors import ConfigError, DeviceError, nearest

_AUTO_HINT = "`--set model.attention=auto` runs everywhere"


@dataclass(frozen=True)
class Ragged:
    """Which of the L keys of each sample count, prepared once per forward and shared by all blocks.

    Attributes:
        mask: (B, L) bool, True where a key counts.
        index: (M,) int64, the kept keys as positions in the flattened B * L; None for backends that take the mask.
        offsets: (B + 1,) int32, where each sample begins among the M kept keys; None likewise.
        lengths: the number of kept keys of each sample; empty likewise.
    """

    mask: Tensor
    index: Tensor | None = None
    offsets: Tensor | None = None
    lengths: tuple[int, ...] = ()

    @staticmethod
    def build(mask: Tensor, backend: str) -> Ragged:
        """Prepare a (B, L) mask for a backend. Packing waits for the device once; the mask form never does."""
        mask = mask != 0
        if backend not in _PACKED:
            return Ragged(mask)
        counts = mask.sum(dim=1)
        return Ragged(mask, mask.flatten().nonzero().squeeze(1), _offsets(counts), tuple(counts.tolist()))

    def pack(self, keys: Tensor) -> Tensor:
        """(B, L, A, K) -> (M, A, K)."""
        assert self.index is not None, "built for a backend that takes the mask"
        return keys.flatten(0, 1)[self.index]


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Ragged | Tensor | None = None, backend: str = "auto") -> Tensor:
    """Softmax attention, scaled by K ** -0.5.

    Args:
        q: queries (B, N, A, K).
        k: keys (B, L, A, K).
        v: values (B, L, A, K).
        mask: which keys count, (B, L) or prepared; a sample without any gets zeros. None: all do.
        backend: a name of `BACKENDS`, or `auto`.

    Returns:
        (B, N, A, K) in the dtype of `v`.

    Raises:
        ConfigError: an unknown backend, or one that is not installed.
        DeviceError: a backend that cannot run on the device or in the dtype of the tensors.
    """
    backend = "sdpa" if backend == "auto" else backend
    if isinstance(mask, Tensor):
        mask = Ragged.build(mask, backend)
    if q.numel() == 0:  # of a process without frames; not all kernels take it, and its keys have gradients: zeros
        return (q + k[:, :0].sum() + v[:, :0].sum()).to(v.dtype)
    return BACKENDS[backend](q.to(v.dtype), k.to(v.dtype), v, mask)


def check_backend(name: str) -> None:
    """Raise ConfigError unless `name` is a backend and its package can be imported."""
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend '{name}'", nearest(name, ["auto", *BACKENDS]))
    if name in _PACKAGES:
        _package(name)


# Backends: (B, N, A, K), (B, L, A, K) twice, Ragged or None -> (B, N, A, K).


def _sdpa(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None) -> Tensor:
    mask = None if ragged is None else ragged.mask[:, None, None]
    heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return heads.transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None) -> Tensor:
    scores = torch.einsum("bnak,blak->banl", q * q.shape[-1] ** -0.5, k).float()
    if ragged is None:
        weights = scores.softmax(dim=-1)
    else:
        dropped = ~ragged.mask[:, None, None]
        # the second fill turns the NaN of a sample without any key into zeros
        weights = scores.masked_fill(dropped, -torch.inf).softmax(dim=-1).masked_fill(dropped, 0.0)
    return torch.einsum("banl,blak->bnak", weights.to(v.dtype), v)


def _flash(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None) -> Tensor:
    return _flash_of("flash", q, k, v, ragged)


def _flash3(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None) -> Tensor:
    return _flash_of("flash3", q, k, v, ragged)


def _flash_of(name: str, q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None) -> Tensor:
    package = _package(name)
    _require_cuda(name, q, half=True)
    if ragged is None:
        return _first(package.flash_attn_func(q, k, v))
    out = package.flash_attn_varlen_func(
        q.flatten(0, 1),
        ragged.pack(k),
        ragged.pack(v),
        cu_seqlens_q=_even_offsets(q),
        cu_seqlens_k=ragged.offsets,
        max_seqlen_q=q.shape[1],
        max_seqlen_k=max(ragged.lengths),
    )
    return _first(out).view(q.shape)


def _varlen(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None) -> Tensor:
    package = _package("varlen")
    _require_cuda("varlen", q, half=True)
    if ragged is None:
        keys, offsets, longest = (k.flatten(0, 1), v.flatten(0, 1)), _even_offsets(k), k.shape[1]
    else:
        assert ragged.offsets is not None
        keys, offsets, longest = (ragged.pack(k), ragged.pack(v)), ragged.offsets, max(ragged.lengths)
    out = package.varlen_attn(q.flatten(0, 1), *keys, _even_offsets(q), offsets, q.shape[1], longest)
    return _first(out).view(q.shape)


def _xformers(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None) -> Tensor:
    package = _package("xformers")
    _require_cuda("xformers", q, half=False)
    if ragged is None:
        return _first(package.memory_efficient_attention(q, k, v))
    diagonal = package.fmha.attn_bias.BlockDiagonalMask.from_seqlens([q.shape[1]] * len(q), list(ragged.lengths))
    packed = (q.flatten(0, 1)[None], ragged.pack(k)[None], ragged.pack(v)[None])
    return _first(package.memory_efficient_attention(*packed, attn_bias=diagonal)).view(q.shape)


def _flex(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None) -> Tensor:
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise DeviceError("attention backend 'flex' has no gradients on a CPU", _AUTO_HINT)

    def only_kept(score: Tensor, b: Tensor, a: Tensor, n: Tensor, key: Tensor) -> Tensor:
        assert ragged is not None
        return torch.where(ragged.mask[b, key], score, -torch.inf)

    heads = _flex_kernel(q.device.type)(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), score_mod=None if ragged is None else only_kept
    )
    return _first(heads).transpose(1, 2)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Ragged | None], Tensor]] = {
    "sdpa": _sdpa,
    "math": _math,
    "flash": _flash,
    "flash3": _flash3,
    "varlen": _varlen,
    "xformers": _xformers,
    "flex": _flex,
}

_PACKED = ("flash", "flash3", "varlen", "xformers")

# backend -> (module to import, what to do where it is missing)
_PACKAGES = {
    "flash": ("flash_attn", '`pip install "osora[flash]"` needs a CUDA toolkit; '),
    "flash3": ("flash_attn_interface", "build it from the `hopper` folder of flash-attention; "),
    "varlen": ("torch.nn.attention.varlen", "it comes with torch 2.10 and later; "),
    "xformers": ("xformers.ops", "`pip install xformers` in the release that fits this torch; "),
}


@cache
def _package(backend: str) -> Any:
    module, remedy = _PACKAGES[backend]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"attention backend '{backend}' cannot be used: {error}"
        raise ConfigError(message, remedy + _AUTO_HINT) from error


def _require_cuda(backend: str, q: Tensor, *, half: bool) -> None:
    if q.device.type != "cuda":
        raise DeviceError(f"attention backend '{backend}' needs a CUDA device, not '{q.device.type}'", _AUTO_HINT)
    if half and q.dtype not in (torch.float16, torch.bfloat16):
        raise DeviceError(f"attention backend '{backend}' computes in fp16 or bf16, not {q.dtype}", "`--dtype bf16`")


@cache
def _flex_kernel(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # eager flex attention materialises the scores, which only a GPU has a compiler for that is worth its start
    kernel: Any = torch.compile(flex_attention) if device == "cuda" else flex_attention
    return cast(Callable[..., Any], kernel)


def _offsets(counts: Tensor) -> Tensor:
    """Running sum with a leading zero: (B,) -> (B + 1,) int32."""
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _even_offsets(tokens: Tensor) -> Tensor:
    """Offsets of (B, N, A, K) tokens that are all kept."""
    batch, length = tokens.shape[:2]
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=tokens.device)


def _first(out: Any) -> Tensor:
    """Drop what some releases return beside the output (the log-sum-exp)."""
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result
