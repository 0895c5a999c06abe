"""The training loop: one page that every part of a model goes through.

Each draw of a step comes from a generator seeded by (seed, step), and each batch is a function of (seed, step): nothing
about randomness is saved, and a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from opensora_core.config import TrainConfig
from opensora_core.errors import CheckpointError, Stopped, TrainingError
from opensora_core.training import checkpoint
from opensora_core.training.ema import EMA
from opensora_core.training.events import CheckpointSaved, Event, Facts, Resumed
from opensora_core.training.optim import build_optimizers, load_optimizer, optimizer_tensors, set_lr
from opensora_core.training.report import Meter


class Task:
    """What the loop needs to know of a part in training.

    Attributes:
        name: of the part.
        module: what is trained, averaged and saved.
    """

    name: str
    module: nn.Module

    def batch(self, step: int) -> Any:
        """Make the batch of a step, a function of the step alone. Runs in a worker process."""
        raise NotImplementedError

    def losses(self, batch: Any, generator: torch.Generator, parts: int) -> Iterator[dict[str, Tensor]]:
        """Compute scalars in `parts` parts that add up to the batch's; "loss" is minimised, the others are reported."""
        raise NotImplementedError

    def received(self, batch: Any) -> Iterator[Event]:
        """Tell what happened while the batch was made."""
        return iter(())

    def facts(self, batch: Any) -> Facts:
        """Say what the report is to know of a batch."""
        return Facts()

    def after(self, step: int, ema: EMA) -> Iterator[Event]:
        """Look at the weights after a step, and leave them as they are."""
        return iter(())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the module."""
        return self.module.state_dict()

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.module.load_state_dict(state)

    def also_save(self, folder: Path, ema: EMA) -> None:
        """Write more into a checkpoint."""


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


def fit(
    task: Task,
    train: TrainConfig,
    folder: Path,
    *,
    num_workers: int = 1,
    settings: dict[str, Any] | None = None,
    scale_loss: bool = False,
    peak_flops: float | None = None,
) -> Iterator[Event]:
    """Train a task to `train.max_steps`, from its newest checkpoint if it has one.

    Args:
        task: what to train; its module is left with the averaged weights.
        train: steps, rates, seed, intervals.
        folder: where the checkpoints go.
        num_workers: processes that make batches; 0 makes them in this one.
        settings: the resolved settings of the run, kept with every checkpoint.
        scale_loss: keep gradients within what fp16 holds; steps that overflow are left out, as is usual there.
        peak_flops: of the device, for the report.

    Raises:
        TrainingError: a loss or gradient that is not a number; nothing of that step is kept.
        CheckpointError: the run has checkpoints, and none of them is whole, or they are of another model.
        ResourceError: a checkpoint cannot be written.
        Stopped: a signal asked for it, and a checkpoint is there.
    """
    trainer = _Trainer(task, train, folder, settings, scale_loss)
    meter = Meter(task.name, train, trainer.device, peak_flops)
    yield from trainer.restore(meter)
    loader: DataLoader[Any] = DataLoader(
        _Batches(task, train.max_steps),
        batch_size=None,
        sampler=range(trainer.step, train.max_steps),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=leave_signals_to_parent,
    )
    with _stop_signals() as stop:
        for batch in meter.waiting(loader):
            yield from task.received(batch)
            facts = task.facts(batch)
            values = trainer.backward(batch)
            trainer.require_finite(values, facts)
            lr = trainer.update()
            step, is_last = trainer.step, trainer.step == train.max_steps
            meter.add(values, facts, len(facts.ids) or train.batch_size)
            if step % train.log_every == 0 or is_last:
                yield meter.report(step, values, lr, facts)
            with meter.paused():
                yield from task.after(step, trainer.ema)
                if step % train.checkpoint_every == 0 or is_last or stop:
                    yield trainer.save(meter)
            if stop and not is_last:
                message = f"{task.name}: stopped after step {step} of {train.max_steps}; nothing is lost"
                raise Stopped(message, "repeat the command with --resume to go on", stop[0])
    trainer.finish()


class _Trainer:
    """The state of a training: weights, their average, the optimizers, and the step that they are at."""

    def __init__(
        self, task: Task, train: TrainConfig, folder: Path, settings: dict[str, Any] | None, scale_loss: bool
    ) -> None:
        self.task, self.train, self.folder, self.settings = task, train, folder, settings
        module = task.module.train()
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.device = self.trained[0].device
        self.optimizers = build_optimizers(module, train)
        self.ema = EMA(module, train.ema_decay, train.ema_warmup)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scale_loss)
        self.step = self.kept = 0

    def restore(self, meter: Meter) -> Iterator[Event]:
        """Go on from the newest whole checkpoint, if there is one."""
        saved, damaged = checkpoint.latest(self.folder)
        if saved is None:
            return
        try:
            self.task.load(saved.weights)
            self.ema.load(saved.average, saved.state["updates"])
            load_optimizer(self.task.module, self.optimizers, saved.optimizer, saved.state["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint of step {saved.step} in {self.folder} is of another model: {error}",
                "resume with the settings that the run was started with, or start another with --init",
            ) from error
        self.scaler.load_state_dict(saved.state["scaler"])
        meter.load(saved.state["meter"])
        self.step = self.kept = saved.step
        yield Resumed(self.task.name, saved.step, tuple(damaged))

    def backward(self, batch: Any) -> dict[str, float]:
        """Compute losses and clipped gradients of a batch; returns the losses and the norm before clipping."""
        generator = torch.Generator(self.device).manual_seed(step_seed(self.train.seed, self.step))
        sums: dict[str, Tensor] = {}
        for part in self.task.losses(batch, generator, self.train.accumulate):
            self.scaler.scale(part["loss"]).backward()  # type: ignore[no-untyped-call]
            for name, value in part.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        sums["grad_norm"] = nn.utils.clip_grad_norm_(self.trained, self.train.grad_clip)
        numbers = torch.stack([value.float() for value in sums.values()]).tolist()  # waits for the device once
        return dict(zip(sums, numbers, strict=True))

    def require_finite(self, values: dict[str, float], facts: Facts) -> None:
        """Check a step before the optimizers move, and let old checkpoints go once the newest has proved itself.

        Raises:
            TrainingError: a loss or gradient is not a number.
        """
        overflows = self.scaler.is_enabled() and self.scaler.get_scale() > 1  # the scaler leaves such a step out
        if not math.isfinite(values["loss"]) or not (overflows or math.isfinite(values["grad_norm"])):
            clips = f"; the clips of this batch: {', '.join(facts.ids)}" if facts.ids else ""
            good = f"the checkpoint of step {self.kept} is whole" if self.kept else "no step was saved yet"
            raise TrainingError(
                f"{self.task.name}: loss {values['loss']}, gradient norm {values['grad_norm']} "
                f"at step {self.step + 1}{clips}",
                f"{good}; lower the rate: --set train.lr={self.train.lr / 3:g}",
            )
        if self.step == self.kept:
            checkpoint.drop_old(self.folder, self.train.keep_checkpoints)

    def update(self) -> float:
        """Take the step; returns its learning rate."""
        lr = set_lr(self.optimizers, self.step, self.train)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.ema.update()
        self.step += 1
        return lr

    def save(self, meter: Meter) -> CheckpointSaved:
        """Write a checkpoint."""
        tensors, rest = optimizer_tensors(self.task.module, self.optimizers)
        state = {
            "updates": self.ema.updates,
            "optimizer": rest,
            "scaler": self.scaler.state_dict(),
            "meter": meter.state(),
        }
        content = checkpoint.Saved(self.step, self.task.state(), self.ema.shadow, tensors, state)
        path = checkpoint.save(self.folder, content, self.settings, lambda part: self.task.also_save(part, self.ema))
        self.kept = self.step
        return CheckpointSaved(self.task.name, self.step, path)

    def finish(self) -> None:
        """Leave the averaged weights in the module."""
        checkpoint.drop_old(self.folder, self.train.keep_checkpoints)
        self.ema.apply()


def leave_signals_to_parent(worker: int) -> None:
    """Let a loader worker ignore what asks the run to stop, and often reaches the whole group (Ctrl-C, Slurm).

    Were the worker to die, the last step would with it. It ends when its parent does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
