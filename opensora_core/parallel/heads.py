"""Full attention over tokens that processes share: each attends with some of the heads (DeepSpeed-Ulysses, 2309.14509).

Before it, tokens are exchanged for heads, and after it back: four exchanges of width D in all, of which three are one
all-to-all. Heads that do not divide are shared unevenly; where there are fewer heads than processes, `ring.py` attends.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from opensora_core.parallel.collectives import Cut, exchange
from opensora_core.parallel.mesh import Axis


def attend_by_heads(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, *, tokens: Cut, axis: Axis
) -> Tensor:
    """Attend to the tokens of all processes.

    Args:
        attend: queries, keys and values (B, N, A', K) of whole sequences -> (B, N, A', K).
        q: queries of this process' tokens (B, n, A, K), with as many heads A as the axis has members, or more.
        k: their keys (B, n, A, K).
        v: their values (B, n, A, K).
        tokens: how the N tokens of a sample are shared; its dim is 1.
        axis: who shares them.

    Returns:
        (B, n, A, K) in the dtype of `v`.
    """
    heads = Cut.even(2, v.shape[2], axis)
    whole = exchange([q.to(v.dtype), k.to(v.dtype), v], tokens, heads, axis)
    return exchange([attend(*whole)], heads, tokens, axis)[0]
