"""The training loop: one page that every part of a model goes through.

Each draw of a step comes from a generator seeded by (seed, step), and each batch is a function of (seed, step): nothing
about randomness is saved, and a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from opensora_core.config import TrainConfig
from opensora_core.errors import Stopped, TrainingError
from opensora_core.training import checkpoint
from opensora_core.training.ema import EMA
from opensora_core.training.optim import build_optimizers, set_lr


@dataclass(frozen=True)
class TrainProgress:
    """One line of the report; losses are means since the last one."""

    part: str
    step: int
    total: int
    metrics: dict[str, float]
    lr: float
    clips_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint that a run can resume from."""

    part: str
    step: int
    path: Path


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on; `damaged` tells of newer checkpoints that were not whole."""

    part: str
    step: int
    damaged: tuple[str, ...] = ()


Event = TrainProgress | CheckpointSaved | Resumed


class Task(Protocol):
    """What the loop needs to know of a part in training.

    Attributes:
        name: of the part; its checkpoints lie in a folder of that name.
        module: what is trained, averaged and saved.
    """

    name: str
    module: nn.Module

    def batch(self, step: int) -> Any:
        """Make the batch of a step, a function of the step alone. Runs in a worker process."""
        ...

    def losses(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute scalars; "loss" is minimised, the others are reported."""
        ...


class _Batches(Dataset[Any]):
    """A data set whose items are the batches of a run."""

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.steps = task, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Any:
        return self.task.batch(step)


def step_seed(seed: int, step: int) -> int:
    """One seed per (seed, step), far apart for neighbours."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63


def fit(task: Task, train: TrainConfig, folder: Path, *, num_workers: int = 1) -> Iterator[Event]:
    """Train a task to `train.max_steps`, from its newest checkpoint if it has one.

    Args:
        task: what to train; its module is left with the averaged weights.
        train: steps, rates, seed, intervals.
        folder: where the checkpoints go.
        num_workers: processes that make batches; 0 makes them in this one.

    Raises:
        TrainingError: a loss or gradient that is not a number; nothing of that step is kept.
        CheckpointError: the run has checkpoints, and none of them is whole.
        ResourceError: a checkpoint cannot be written.
    """
    module = task.module.train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizers = build_optimizers(module, train)
    ema = EMA(module, train.ema_decay, train.ema_warmup)
    saved, damaged = checkpoint.latest(folder)
    if saved is not None:
        module.load_state_dict(saved.weights)
        ema.load(saved.average, saved.state["updates"])
        for optimizer, state in zip(optimizers, saved.optimizers, strict=True):
            optimizer.load_state_dict(state)
        yield Resumed(task.name, saved.step, tuple(damaged))
    step = reported = kept = saved.step if saved else 0

    def save() -> CheckpointSaved:
        content = checkpoint.Saved(
            step=step,
            weights=module.state_dict(),
            average=ema.shadow,
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            state={"updates": ema.updates},
        )
        return CheckpointSaved(task.name, step, checkpoint.save(folder, content, train.keep_checkpoints))

    loader: DataLoader[Any] = DataLoader(
        _Batches(task, train.max_steps),
        batch_size=None,
        sampler=range(step, train.max_steps),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_leave_signals_to_parent,
    )
    device = trained[0].device
    sums: dict[str, float] = {}
    started = time.monotonic()
    with _stop_signals() as stop:
        for batch in loader:
            losses = task.losses(batch, torch.Generator(device).manual_seed(step_seed(train.seed, step)))
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(trained, train.grad_clip)
            if not (torch.isfinite(norm) and torch.isfinite(losses["loss"])):
                raise TrainingError(
                    f"{task.name}: loss {losses['loss'].item()}, gradient norm {norm.item()} at step {step}",
                    f"the checkpoint of step {kept} is whole; lower the rate: --set train.lr={train.lr / 3:g}",
                )
            lr = set_lr(optimizers, step, train)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            ema.update()
            step += 1
            for name, value in {**losses, "grad_norm": norm}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            if step % train.log_every == 0 or step == train.max_steps:
                seconds, num_steps = time.monotonic() - started, step - reported
                yield TrainProgress(
                    part=task.name,
                    step=step,
                    total=train.max_steps,
                    metrics={name: value / num_steps for name, value in sums.items()},
                    lr=lr,
                    clips_per_second=num_steps * train.batch_size / seconds,
                    seconds_left=(train.max_steps - step) * seconds / num_steps,
                )
                sums, started, reported = {}, time.monotonic(), step
            if step % train.checkpoint_every == 0 or step == train.max_steps or stop:
                yield save()
                kept = step
            if stop and step < train.max_steps:
                message = f"{task.name}: stopped after step {step} of {train.max_steps}; nothing is lost"
                raise Stopped(message, "repeat the command with --resume to go on", stop[0])
    ema.apply()


def _leave_signals_to_parent(worker: int) -> None:
    # Ctrl-C reaches the whole process group; a worker that dies of it would take the last step with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list that the first SIGINT or SIGTERM is put into; the second one acts as ever."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        received.append(number)
        for name, handler in before.items():
            signal.signal(name, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
