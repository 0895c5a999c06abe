from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_core.errors import ConfigError, DeviceError
from opensora_core.models import attention
from opensora_core.models.attention import BACKENDS, Ragged, attend, check_backend

CPU_BACKENDS = ["auto", "sdpa", "math", "flex"]
PACKED = ["flash", "flash3", "varlen", "xformers"]
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()  # ragged, with a hole


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one sample in fp64, head by head: (N, A, K), (L, A, K) twice -> (N, A, K)."""
    q, k, v = q.double(), k.double(), v.double()
    heads = [(q[:, a] @ k[:, a].T / q.shape[-1] ** 0.5).softmax(-1) @ v[:, a] for a in range(q.shape[1])]
    return torch.stack(heads, dim=1)


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    kept = torch.ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
    return torch.stack([plain(q[b], k[b][kept[b]], v[b][kept[b]]) for b in range(len(q))])


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(3, length, 2, 16, generator=generator).to(dtype) for length in (7, 5, 5)
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", [None, MASK], ids=["all keys", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_backends_agree_with_the_plain_formula(backend: str, dtype: torch.dtype, mask: Tensor | None) -> None:
    q, k, v = qkv(dtype)
    with torch.no_grad():
        out = attend(q, k, v, mask=mask, backend=backend)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(out.double(), expected(q, k, v, mask), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_sample_without_any_key_gets_zeros(backend: str) -> None:
    with torch.no_grad():
        out = attend(*qkv(), mask=torch.zeros(3, 5), backend=backend)
    assert not out.any()


def packed_package() -> Any:
    """Stand-ins for the packages that need a GPU: the plain formula over the samples that the offsets tell apart."""

    def apart(q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor) -> Tensor:
        assert of_q.dtype == of_k.dtype == torch.int32
        assert (of_q[-1], of_k[-1]) == (len(q), len(k))
        starts = zip(of_q[:-1], of_q[1:], of_k[:-1], of_k[1:], strict=True)
        return torch.cat([plain(q[a:b], k[c:d], v[c:d]) for a, b, c, d in starts]).to(v.dtype)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k == cu_seqlens_k.diff().max()
        return apart(q, k, v, cu_seqlens_q, cu_seqlens_k), None

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *offsets: Any) -> Tensor:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return flash_attn_varlen_func(q, k, v, **dict(zip(names, offsets, strict=True)))[0]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return expected(q, k, v, None).to(v.dtype)

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
        if attn_bias is None:
            return dense(q, k, v)
        of_q, of_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in attn_bias)
        return apart(q[0], k[0], v[0], of_q, of_k)[None]

    diagonal = SimpleNamespace(from_seqlens=lambda of_q, of_k: (of_q, of_k))
    return SimpleNamespace(
        flash_attn_func=dense,
        flash_attn_varlen_func=flash_attn_varlen_func,
        varlen_attn=varlen_attn,
        memory_efficient_attention=memory_efficient_attention,
        fmha=SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=diagonal)),
    )


@pytest.mark.parametrize("mask", [None, MASK], ids=["all keys", "ragged"])
@pytest.mark.parametrize("backend", PACKED)
def test_kept_keys_are_packed_for_the_kernels_that_want_them(
    backend: str, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_package", lambda name: packed_package())
    monkeypatch.setattr(attention, "_require_cuda", lambda *arguments, **options: None)
    q, k, v = qkv()
    out = attend(q, k, v, mask=mask, backend=backend)
    torch.testing.assert_close(out.double(), expected(q, k, v, mask), atol=1e-5, rtol=1e-5)


def test_every_backend_is_tried() -> None:
    assert set(BACKENDS) == {*CPU_BACKENDS, *PACKED} - {"auto"}


def test_a_mask_is_packed_only_for_who_needs_it() -> None:
    assert Ragged.build(MASK, "sdpa").index is None
    packed = Ragged.build(MASK, "flash")
    assert packed.index is not None
    assert packed.index.tolist() == [0, 1, 2, 3, 4, 5, 7, 14]
    assert packed.lengths == (5, 2, 1)


def test_an_unknown_backend_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown attention backend 'flsh'") as caught:
        check_backend("flsh")
    assert "'flash'" in caught.value.hint


@pytest.mark.parametrize(("backend", "module"), [("flash", "flash_attn"), ("xformers", "xformers")])
def test_a_package_that_is_not_installed(backend: str, module: str) -> None:
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed here")
    with pytest.raises(ConfigError, match=f"attention backend '{backend}' cannot be used") as caught:
        check_backend(backend)
    assert "pip install" in caught.value.hint


def test_a_backend_for_another_device() -> None:
    with pytest.raises(DeviceError, match="'varlen' needs a CUDA device, not 'cpu'") as caught:
        attend(*qkv(torch.bfloat16), backend="varlen")
    assert "model.attention=auto" in caught.value.hint


def test_flex_says_that_it_cannot_train_on_a_cpu() -> None:
    q, k, v = qkv()
    with pytest.raises(DeviceError, match="no gradients on a CPU"):
        attend(q.requires_grad_(), k, v, backend="flex")


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_gradients_agree(backend: str) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    attend(q, k, v, mask=MASK, backend=backend).sin().sum().backward()
    own = [tensor.grad for tensor in (q, k, v)]
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    expected(q, k, v, MASK).sin().sum().backward()
    torch.testing.assert_close(own, [tensor.grad for tensor in (q, k, v)], atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [None, MASK], ids=["all keys", "ragged"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_on_a_gpu(backend: str, mask: Tensor | None) -> None:
    try:
        check_backend(backend)
    except ConfigError as error:
        pytest.skip(error.message)
    if backend == "flash3" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("flash-attn 3 is for Hopper")
    q, k, v = qkv(torch.bfloat16)
    out = attend(q.cuda(), k.cuda(), v.cuda(), mask=None if mask is None else mask.cuda(), backend=backend)
    torch.testing.assert_close(out.cpu().double(), expected(q, k, v, mask), atol=0.02, rtol=0.02)
