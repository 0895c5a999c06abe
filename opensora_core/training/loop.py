"""The training loop: one page that every part of a model goes through, on however many processes.

Each draw of a step comes from a generator seeded by (seed, step, place in the batch), and each batch is a function of
(seed, step): nothing about randomness is saved, a resumed run equals an uninterrupted one, and processes that share a
batch see what one would.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opensora_core.config import ParallelConfig, TrainConfig
from opensora_core.data.order import Share
from opensora_core.errors import CheckpointError, Stopped, TrainingError, UsageError
from opensora_core.parallel import Mesh
from opensora_core.parallel.agreement import gathered, mean
from opensora_core.parallel.engines import Engine, build_engine
from opensora_core.parallel.shards import Stored
from opensora_core.runs import step_of
from opensora_core.training import checkpoint
from opensora_core.training.ema import EMA
from opensora_core.training.events import CheckpointSaved, Event, Facts, Resumed
from opensora_core.training.optim import build_optimizers, set_lr
from opensora_core.training.report import Meter
from opensora_core.training.task import Crew, Task, step_seed

__all__ = ["Crew", "Task", "fit", "leave_signals_to_parent", "require_shares"]


class _Batches(Dataset[Any]):
    """A data set whose items are the batches of a run."""

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.steps = task, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Any:
        return self.task.batch(step)


def fit(
    task: Task,
    train: TrainConfig,
    folder: Path,
    *,
    crew: Crew | None = None,
    parallel: ParallelConfig | None = None,
    num_workers: int = 1,
    settings: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    scale_loss: bool = False,
    peak_flops: float | None = None,
) -> Iterator[Event]:
    """Train a task to `train.max_steps`, from its newest checkpoint if it has one.

    Args:
        task: what to train; its module is left with the averaged weights.
        train: steps, rates, seed, intervals; the batch is that of all processes together.
        folder: where the checkpoints go.
        crew: who trains; None is this process alone.
        parallel: the engine and its settings.
        num_workers: processes that make batches; 0 makes them in this one.
        settings: the resolved settings of the run, kept with every checkpoint.
        dtype: of the arithmetic.
        scale_loss: keep gradients within what fp16 holds; steps that overflow are left out, as is usual there.
        peak_flops: of the device, for the report.

    Raises:
        UsageError: a batch that the processes cannot share equally.
        ConfigError: what the engine cannot do.
        TrainingError: a loss or gradient that is not a number; nothing of that step is kept.
        CheckpointError: the run has checkpoints, and none of them is whole, or they are of another model.
        ResourceError: a checkpoint cannot be written.
        Stopped: a signal asked for it, and a checkpoint is there.
    """
    crew = crew or Crew(Mesh(next(task.module.parameters()).device))
    mesh = crew.mesh
    require_shares({"train.batch_size": train.batch_size}, mesh)
    engine = build_engine(mesh, parallel or ParallelConfig(), train, dtype=dtype, scale_loss=scale_loss)
    saver = checkpoint.Saver(folder, mesh, settings, asynchronous=train.async_checkpoints)
    trainer = _Trainer(task, train, mesh, engine, saver)
    meter = Meter(task.name, train, mesh.device, peak_flops and peak_flops * mesh.size)
    yield from trainer.restore(meter)
    loader: DataLoader[Any] = DataLoader(
        _Batches(task, train.max_steps),
        batch_size=None,
        sampler=range(trainer.step, train.max_steps),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=leave_signals_to_parent,
    )
    try:
        with _stop_signals() as stop:
            for batch in meter.waiting(loader):
                if crew.watch is not None:
                    crew.watch.step(trainer.step)
                yield from task.received(batch)
                facts = task.facts(batch)
                values, stopped_by = trainer.backward(batch, stop)
                trainer.require_finite(values, facts)
                lr = trainer.update()
                step, is_last = trainer.step, trainer.step == train.max_steps
                meter.add(values, _of_all(facts, task.share), len(facts.ids) * task.share.size or train.batch_size)
                if step % train.log_every == 0 or is_last:
                    yield meter.report(step, values, lr, replace(facts, ids=trainer.ids_of_all(facts)))
                with meter.paused():
                    yield from task.after(step, trainer.ema)
                    if step % train.checkpoint_every == 0 or is_last or stopped_by:
                        yield from trainer.save(meter)
                    yield from trainer.saved(wait=is_last or stopped_by is not None)
                if stopped_by and not is_last:
                    message = f"{task.name}: stopped after step {step} of {train.max_steps}; nothing is lost"
                    raise Stopped(message, "repeat the command with --resume to go on", stopped_by)
    finally:
        trainer.saver.leave()
    trainer.finish()


def require_shares(sizes: dict[str, int], mesh: Mesh) -> None:
    """Check that the processes can share batches equally.

    Args:
        sizes: of batches, by what they are called.
        mesh: of the run.

    Raises:
        UsageError: they cannot; the sizes are named.
    """
    each = mesh.data.size
    odd = {name: size for name, size in sizes.items() if size % each}
    if odd:
        named = ", ".join(f"{name} = {size}" for name, size in odd.items())
        better = -(-max(odd.values()) // each) * each
        raise UsageError(
            f"{each} groups of processes cannot share a batch equally: {named}",
            f"batches of multiples of {each}, such as {better}, or another number of processes",
        )


def _of_all(facts: Facts, share: Share) -> Facts:
    """What all processes did together, where all do the same."""
    return replace(facts, tokens=facts.tokens * share.size, flops=facts.flops * share.size)


class _Trainer:
    """The state of a training: weights, their average, the optimizers, and the step that they are at."""

    def __init__(self, task: Task, train: TrainConfig, mesh: Mesh, engine: Engine, saver: checkpoint.Saver) -> None:
        self.task, self.train, self.mesh, self.engine, self.saver = task, train, mesh, engine, saver
        task.share, task.mesh = Share(mesh.data.rank, mesh.data.size), mesh
        module = task.module.train()
        task.called = engine.prepare(module, task.root, lambda trained: build_optimizers(trained, train))
        self.ema = EMA(module, train.ema_decay, train.ema_warmup, settle=engine.settle)
        self.step = self.kept = 0

    def restore(self, meter: Meter) -> Iterator[Event]:
        """Go on from the newest whole checkpoint, if there is one."""
        path, state, damaged = checkpoint.newest(self.saver.folder, self.mesh)
        if path is None:
            return
        try:
            stored = Stored(path)
            stored.fill(checkpoint.WEIGHTS, self.task.state())
            self.ema.load(stored, state["updates"])
            self.engine.load(stored, state)
            self.engine.settle()
        except (RuntimeError, KeyError, ValueError, CheckpointError) as error:
            raise CheckpointError(
                f"the checkpoint of step {state['step']} in {self.saver.folder} is of another model: {error}",
                getattr(error, "hint", "")
                or "resume with the settings that the run was started with, or start another with --init",
            ) from error
        meter.load(state["meter"])
        self.step = self.kept = state["step"]
        yield Resumed(self.task.name, self.step, tuple(damaged))

    def backward(self, batch: Any, stop: list[int]) -> tuple[dict[str, float], int | None]:
        """Compute losses and clipped gradients of a batch.

        Returns:
            The losses and the norm before clipping, in the mean over all processes; and by which signal any of them
            was asked to stop.
        """
        generator = torch.Generator(self.mesh.device).manual_seed(step_seed(self.train.seed, self.step))
        sums: dict[str, Tensor] = {}
        for part in self.task.losses(batch, generator, self.train.accumulate):
            self.engine.backward(part["loss"])
            for name, value in part.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        sums["grad_norm"] = self.engine.clip(self.train.grad_clip)
        flags = torch.tensor([float(number in stop) for number in _SIGNALS], device=self.mesh.device)
        stacked = torch.cat([torch.stack([value.float() for value in sums.values()]), flags])
        numbers = mean(self.mesh.whole, stacked).tolist()  # waits for the device once
        stopped_by = [number for number, flag in zip(_SIGNALS, numbers[len(sums) :], strict=True) if flag]
        return dict(zip(sums, numbers, strict=False)), stopped_by[0] if stopped_by else None

    def ids_of_all(self, facts: Facts) -> tuple[str, ...]:
        """The samples of the whole batch, in its order."""
        return tuple(name for ids in gathered(self.mesh.data, facts.ids) for name in ids)

    def require_finite(self, values: dict[str, float], facts: Facts) -> None:
        """Check a step before the optimizers move, and let old checkpoints go once the newest has proved itself.

        Raises:
            TrainingError: a loss or gradient is not a number, here or elsewhere.
        """
        norm_counts = not self.engine.skips_overflows
        if not math.isfinite(values["loss"]) or (norm_counts and not math.isfinite(values["grad_norm"])):
            ids = self.ids_of_all(facts)
            clips = f"; the clips of this batch: {', '.join(ids)}" if ids else ""
            good = f"the checkpoint of step {self.kept} is whole" if self.kept else "no step was saved yet"
            raise TrainingError(
                f"{self.task.name}: loss {values['loss']}, gradient norm {values['grad_norm']} "
                f"at step {self.step + 1}{clips}",
                f"{good}; lower the rate: --set train.lr={self.train.lr / 3:g}",
            )
        if self.step == self.kept and self.mesh.is_first:
            checkpoint.drop_old(self.saver.folder, self.train.keep_checkpoints)

    def update(self) -> float:
        """Take the step; returns its learning rate."""
        lr = set_lr(self.engine.optimizers, self.step, self.train)
        self.engine.update()
        self.ema.update()
        self.step += 1
        return lr

    def save(self, meter: Meter) -> Iterator[Event]:
        """Write a checkpoint, or begin to."""
        yield from self.saved(wait=True)
        groups = {
            checkpoint.WEIGHTS: self.task.state(),
            checkpoint.AVERAGE: self.ema.shadow,
            **self.engine.tensors(),
        }
        state = {"updates": self.ema.updates, **self.engine.numbers(), "meter": meter.state()}
        path = self.saver.save(self.step, groups, state, self.task.also_save(self.ema), self.engine.save)
        if path is not None:
            self.kept = self.step
            yield CheckpointSaved(self.task.name, self.step, path)

    def saved(self, *, wait: bool) -> Iterator[Event]:
        """Tell of a checkpoint that was being written and is whole now."""
        path = self.saver.wait() if wait else self.saver.finished()
        if path is not None:
            self.kept = step_of(path)
            yield CheckpointSaved(self.task.name, self.kept, path)

    def finish(self) -> None:
        """Leave the averaged weights in the module."""
        if self.mesh.is_first:
            checkpoint.drop_old(self.saver.folder, self.train.keep_checkpoints)
        self.ema.apply()


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
