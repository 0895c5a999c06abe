"""Where and with what a measurement was made, and what memory there is."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora_core import __version__, components
from opensora_core.config import Config, iterate

_SHAPE = ("video.num_frames", "video.height", "video.width")
SETTINGS: dict[str, dict[str, str]] = {
    "world": {
        "model": "model.weights",
        "sampler": "sampling.sampler",
        "steps": "sampling.steps",
        "guidance": "sampling.guidance",
        "seed": "sampling.seed",
    },
    "train": {
        path: path
        for path in (
            *_SHAPE,
            *("model.family", "model.hidden_size", "model.depth", "model.patch_size", "model.attention"),
            *(
                "train.batch_size",
                "train.draws",
                "train.accumulate",
                "train.optimizer",
                "train.recompute",
                "train.trainable",
            ),
            *("train.lora_rank", "train.num_workers", "runtime.dtype", "runtime.compile"),
        )
    },
    "data": {
        path: path
        for path in (
            *_SHAPE,
            *("video.frame_interval", "video.source_fps", "data.frame_choice", "data.resize", "data.flip"),
            *("data.decode_threads", "train.seed"),
        )
    },
    "split": {},
    "scaling": {
        path: path
        for path in (
            *_SHAPE,
            *("model.family", "model.hidden_size", "model.depth", "train.batch_size", "train.recompute"),
            *("parallel.sequence", "parallel.sharding"),
        )
    },
}
"""Per suite, the settings that its numbers depend on: what a report calls each, and its path."""


def describe(config: Config, suite: str) -> dict[str, Any]:
    """The machine, the versions and the settings that the numbers of a suite stand on."""
    device = components.resolve_device(config.runtime.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    settings = dict(iterate(config))
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{device}: {name}",
        "cores": os.cpu_count(),
        "versions": {"osora": __version__, "torch": torch.__version__, "python": platform.python_version()},
        **{name: settings[path] for name, path in SETTINGS[suite].items()},
    }


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return None


def reset_peak() -> None:
    """Count peaks of memory from now on: of all GPUs, and of this process where the system can (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what lies free counts as taken until it is given back
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the peak back to what is there


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is entered, until each is freed.

    Attributes:
        now: bytes that are there.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the operation, and count what it made."""
        result = func(*args, **(kwargs or {}))
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:  # else a view, or changed in place
                given.add(_storage(tensor))
                storage = tensor.untyped_storage()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
