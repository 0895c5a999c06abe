"""Full attention over tokens that processes share: keys and values travel round (Ring Attention, arXiv 2310.01889).

Each process keeps its queries and adds up what they find in the keys that pass by, with an online softmax: of the part
before and the new part, each weighed by its share of exp(scores), which the log-sum-exp of both tells. The backward
pass recomputes the weights from the final log-sum-exp (FlashAttention, arXiv 2205.14135, section 3.1 and appendix B.2);
the gradients of keys and values travel along with these, and arrive at home.

All is computed in fp32, by the plain formula, some queries at a time. torch's own context parallelism has no gradients
on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_core.parallel.collectives import Cut, note
from opensora_core.parallel.mesh import Axis

MAX_SCORES = 2**25
"""Scores that are in memory at once, of one process: 128 MiB in fp32."""


def attend_by_ring(q: Tensor, k: Tensor, v: Tensor, tokens: Cut, axis: Axis) -> Tensor:
    """Attend to the tokens of all processes.

    Args:
        q: queries of this process' tokens (B, n, A, K); n may be 0.
        k: their keys (B, n, A, K).
        v: their values (B, n, A, K).
        tokens: how the N tokens of a sample are shared; its dim is 1.
        axis: who shares them.

    Returns:
        (B, n, A, K) in the dtype of `v`.
    """
    return _Ring.apply(tokens.sizes, axis, q, k, v)  # type: ignore[no-untyped-call,no-any-return]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, ...], axis: Axis, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        with torch.autocast(q.device.type, enabled=False):
            queries = _scaled(q)
            out = torch.zeros_like(queries)
            lse = torch.full_like(queries[..., :1], -torch.inf)
            for size, keys, values in _passing(k, v, sizes, axis):
                for rows in _few(queries, size):
                    scores = queries[:, :, rows] @ keys.transpose(2, 3)
                    part = scores.logsumexp(dim=-1, keepdim=True)
                    found = scores.sub_(part).exp_() @ values
                    both = torch.logaddexp(lse[:, :, rows], part)
                    out[:, :, rows] = out[:, :, rows] * (lse[:, :, rows] - both).exp() + found * (part - both).exp()
                    lse[:, :, rows] = both
        ctx.sizes, ctx.axis = sizes, axis
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            queries, to_out = _scaled(q), gradient.transpose(1, 2).float()
            inner = (to_out * out).sum(dim=-1, keepdim=True)
            to_queries = torch.zeros_like(queries)
            batch, _, heads, width = q.shape
            # what was found of the gradients of the keys (0) and values (1) that are here
            carried = queries.new_zeros(2, batch, heads, max(ctx.sizes), width)
            spare, travelling = torch.empty_like(carried), None
            for size, keys, values in _passing(k, v, ctx.sizes, ctx.axis):
                here = queries.new_zeros(2, batch, heads, size, width)
                for rows in _few(queries, size):
                    weights = (queries[:, :, rows] @ keys.transpose(2, 3)).sub_(lse[:, :, rows]).exp_()
                    to_rows = to_out[:, :, rows]
                    here[1] += weights.transpose(2, 3) @ to_rows
                    to_scores = (to_rows @ values.transpose(2, 3)).sub_(inner[:, :, rows]).mul_(weights)
                    to_queries[:, :, rows] += to_scores @ keys
                    here[0] += to_scores.transpose(2, 3) @ queries[:, :, rows]
                if travelling is not None:
                    _arrived(travelling)
                    carried, spare = spare, carried
                carried[:, :, :, :size] += here
                travelling = _pass_on(carried, spare, ctx.axis, tag=1)
            assert travelling is not None
            _arrived(travelling)
            to_keys, to_values = spare[:, :, :, : k.shape[1]].transpose(2, 3).unbind()
            to_queries *= q.shape[-1] ** -0.5
        return None, None, to_queries.transpose(1, 2).to(q.dtype), to_keys.to(k.dtype), to_values.to(v.dtype)


def _scaled(q: Tensor) -> Tensor:
    """(B, n, A, K) -> (B, A, n, K) fp32, times K ** -0.5."""
    scaled: Tensor = q.transpose(1, 2).float() * q.shape[-1] ** -0.5
    return scaled


def _few(queries: Tensor, num_keys: int) -> Iterator[slice]:
    """Cut the n of (B, A, n, K) queries so that the scores with so many keys fit; nothing where either has none."""
    batch, heads, length, _ = queries.shape
    if num_keys:
        step = max(MAX_SCORES // (batch * heads * num_keys), 1)
        yield from (slice(start, min(start + step, length)) for start in range(0, length, step))


def _passing(k: Tensor, v: Tensor, sizes: tuple[int, ...], axis: Axis) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield every rank's keys and values, this one's first, then its predecessor's: how many, and (B, A, n, K) fp32.

    What is passed on is of one size, as large as the largest share, since a message may not be empty.
    """
    batch, length, heads, width = k.shape
    held = v.new_zeros(2, batch, heads, max(sizes), width)
    held[0, :, :, :length] = k.transpose(1, 2)
    held[1, :, :, :length] = v.transpose(1, 2)
    spare = torch.empty_like(held)
    for step in range(axis.size):
        travelling = _pass_on(held, spare, axis, tag=0) if step + 1 < axis.size else []
        size = sizes[(axis.rank - step) % axis.size]
        keys, values = held[:, :, :, :size].float()
        yield size, keys, values
        _arrived(travelling)
        held, spare = spare, held


def _pass_on(sent: Tensor, received: Tensor, axis: Axis, *, tag: int) -> list[Any]:
    """Begin to send to the next process and to receive from the one before."""
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    note("ring", sent.nbytes)
    travelling: list[Any] = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=axis.group, tag=tag, group_peer=after),
            dist.P2POp(dist.irecv, received, group=axis.group, tag=tag, group_peer=before),
        ]
    )
    return travelling


def _arrived(travelling: list[Any]) -> None:
    for work in travelling:
        work.wait()
