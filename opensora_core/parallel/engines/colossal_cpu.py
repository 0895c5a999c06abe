"""What ColossalAI 0.5 lacks on a CPU, put beside it and not into it; imported on CPUs only.

Its accelerator for CPUs refuses whatever a CPU has only one of: the current device, the stream that work is queued
on, the wait for that stream. Its ZeRO optimizer asks for a GPU, and would do without. Nothing here changes what is
computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import Tensor


class _Cpu(CpuAccelerator):  # type: ignore[misc] # the library has no types
    """A CPU: one device, whose work is done when a call returns."""

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def Stream(self, device: Any = None, priority: int = 0, **options: Any) -> None:  # noqa: N802 - the library's name
        return None

    def current_stream(self, device: Any = None) -> None:
        return None

    def stream(self, stream_: Any) -> AbstractContextManager[None]:
        return nullcontext()


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let plugins be set up on a CPU; what they were set up with stays theirs."""
    set_accelerator(_Cpu())
    checks = LowLevelZeroOptimizer._sanity_checks
    LowLevelZeroOptimizer._sanity_checks = lambda self: None
    try:
        yield
    finally:
        LowLevelZeroOptimizer._sanity_checks = checks
