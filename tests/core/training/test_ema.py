"""The average of the weights; its numbers are pinned by the golden case `ema`."""

from __future__ import annotations

import torch
from torch import nn

from opensora_core.training.ema import EMA


def test_a_warm_average_forgets_its_start() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    warm, cold = EMA(module, 0.999, warmup=True), EMA(module, 0.999)
    nn.init.ones_(module.weight)
    for _ in range(50):
        warm.update()
        cold.update()
    assert warm.shadow["weight"].item() > 0.99
    assert cold.shadow["weight"].item() < 0.06
    cold.apply()
    assert module.weight.item() == cold.shadow["weight"].item()


def test_it_is_kept_in_fp32() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    average = EMA(module, 0.9999)
    nn.init.zeros_(module.weight)
    for _ in range(3):
        average.update()
    torch.testing.assert_close(average.shadow["weight"].item(), 0.9999**3)  # bf16 would still say 1
