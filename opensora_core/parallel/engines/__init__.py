"""Who trains: one protocol, one file each."""

from __future__ import annotations

import importlib

import torch

from opensora_core.config import ParallelConfig, TrainConfig
from opensora_core.errors import ConfigError
from opensora_core.parallel.engines.colossal_library import require_installed
from opensora_core.parallel.engines.protocol import Engine
from opensora_core.parallel.mesh import Mesh

__all__ = ["ENGINES", "Engine", "build_engine", "check_engine"]

ENGINES = {
    "torch": "TorchEngine",
    "colossalai": "ColossalEngine",
}
"""Module of this room -> the class in it; imported when it is asked for, as some need what few have installed."""


def check_engine(parallel: ParallelConfig) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        ConfigError: an engine that is not installed, or settings of another one.
    """
    if parallel.engine == "colossalai":
        require_installed()
    elif parallel.plugin:
        raise ConfigError(
            f"parallel.plugin={parallel.plugin} is for --engine colossalai", "--set parallel.sharding=..."
        )


def build_engine(
    mesh: Mesh, parallel: ParallelConfig, train: TrainConfig, *, dtype: torch.dtype, scale_loss: bool = False
) -> Engine:
    """The engine that the settings name.

    Args:
        mesh: of the run.
        parallel: the settings; `engine` names it.
        train: the kind of optimizer, and what an engine builds of its own.
        dtype: of the arithmetic.
        scale_loss: keep gradients within what fp16 holds.

    Raises:
        ConfigError: what the engine cannot do, or that it is not installed.
    """
    check_engine(parallel)
    module = importlib.import_module(f"{__name__}.{parallel.engine}")
    engine: Engine = getattr(module, ENGINES[parallel.engine])(
        mesh, parallel, train, dtype=dtype, scale_loss=scale_loss
    )
    return engine
