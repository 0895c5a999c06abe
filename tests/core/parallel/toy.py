"""A part small enough to train on several processes in a blink, with everything that can lie in shards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora_core.config import ParallelConfig, TrainConfig, with_settings
from opensora_core.parallel import Mesh, joined
from opensora_core.parallel.engines import build_engine
from opensora_core.parallel.engines.torch import TorchEngine
from opensora_core.parallel.shards import Stored
from opensora_core.training import checkpoint, loop
from opensora_core.training.ema import EMA
from opensora_core.training.events import Event, Facts
from opensora_core.training.optim import build_optimizers
from opensora_core.training.task import noise_at

CPU = torch.device("cpu")
SETTINGS = TrainConfig(
    max_steps=6, batch_size=4, optimizer="muon", lr=1e-2, warmup_steps=2, decay_fraction=0.5, ema_decay=0.9, log_every=1
)


class Model(nn.Module):
    """Matrices in blocks for Muon, of rows that no number of processes divides; a frozen part, a buffer, a table."""

    marks: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(1, 5))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5)) for _ in range(2))
        self.register_buffer("marks", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 5) -> (B, 5)."""
        x = self.frozen(x) + self.table
        for block in self.blocks:
            x = x + block(x)
        return x


class Task(loop.Task):
    """A regression whose batches are shared.

    Args:
        bad_step: at which the last process has a sample that is not a number.
        signal_at: the step at which the last process gets a signal.
        signal_number: which one.
    """

    name = "toy"

    def __init__(self, bad_step: int = -1, signal_at: int = -1, signal_number: int = signal.SIGTERM) -> None:
        self.module = self.called = Model()
        self.bad_step, self.signal_at, self.signal_number = bad_step, signal_at, signal_number

    def batch(self, step: int) -> tuple[int, Tensor]:
        whole = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        own = whole[list(self.share.places(4))]
        is_last = self.share.rank == self.share.size - 1
        return step, own * float("nan") if step == self.bad_step and is_last else own

    def losses(self, batch: Any, generator: torch.Generator, parts: int) -> Iterator[dict[str, Tensor]]:
        step, rows = batch
        if step == self.signal_at and self.share.rank == self.share.size - 1:
            os.kill(os.getpid(), self.signal_number)
        noise = noise_at(self.share.places(4), (5,), generator, 1)
        for part, noises in zip(rows.chunk(parts), noise.chunk(parts), strict=True):
            error = self.called(part + noises) - part
            yield {"loss": error.square().sum() / rows.numel()}

    def facts(self, batch: Any) -> Facts:
        return Facts(ids=tuple(f"row {place}" for place in self.share.places(4)), tokens=8, flops=100.0)


def fit(folder: Path, sharding: str, task: Task | None = None, scaled: bool = False, **changes: Any) -> list[Event]:
    """Train on the processes that call it; the axes are those of the sharding."""
    shard = {"replicate": 1, "hybrid": 2}.get(sharding, 0)
    with joined(CPU, shard=min(shard, int(os.environ.get("WORLD_SIZE", "1")))) as mesh:
        parallel = with_settings(ParallelConfig(), {"sharding": sharding})
        settings = with_settings(SETTINGS, changes)
        return list(
            loop.fit(
                task or Task(),
                settings,
                folder,
                crew=loop.Crew(mesh),
                parallel=parallel,
                num_workers=0,
                scale_loss=scaled,
            )
        )


def saved_again(source: Path, target: Path, sharding: str) -> None:
    """Load a checkpoint on the processes that call it, and save what came of it without a step."""
    shard = {"replicate": 1, "hybrid": 2}.get(sharding, 0)
    with joined(CPU, shard=min(shard, int(os.environ.get("WORLD_SIZE", "1")))) as mesh:
        task = Task()
        with torch.no_grad():
            for tensor in task.module.state_dict().values():
                tensor.zero_()
        engine = _engine(mesh, sharding)
        engine.prepare(task.module, task.root, lambda module: build_optimizers(module, SETTINGS))
        ema = EMA(task.module, 0.9)
        path, state, _ = checkpoint.newest(source, mesh)
        assert path is not None
        stored = Stored(path)
        stored.fill(checkpoint.WEIGHTS, task.state())
        ema.load(stored, state["updates"])
        engine.load(stored, state)
        groups = {checkpoint.WEIGHTS: task.state(), checkpoint.AVERAGE: ema.shadow, **engine.tensors()}
        rest = {"updates": ema.updates, **engine.numbers(), "meter": state["meter"]}
        checkpoint.Saver(target, mesh).save(state["step"], groups, rest)


def _engine(mesh: Mesh, sharding: str) -> TorchEngine:
    engine = build_engine(
        mesh, with_settings(ParallelConfig(), {"sharding": sharding}), SETTINGS, dtype=torch.float32, scale_loss=True
    )
    assert isinstance(engine, TorchEngine)
    return engine
