"""What a run measures of itself, and where it writes that down: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from opensora_core.config import Config, TrainConfig, to_dict
from opensora_core.errors import ConfigError
from opensora_core.files import append_line
from opensora_core.runs import METRICS_FILE, VALIDATION_FILE
from opensora_core.training.events import Event, Facts, Sampled, TrainProgress, Validated

T = TypeVar("T")


class Meter:
    """Sums and clocks between two reports.

    Args:
        part: what is trained.
        train: its settings.
        device: whose memory is told.
        peak_flops: of the device in the dtype of the arithmetic; None where it is not known.
    """

    def __init__(self, part: str, train: TrainConfig, device: torch.device, peak_flops: float | None = None) -> None:
        self.part, self.train, self.device, self.peak_flops = part, train, device, peak_flops
        self.sums: dict[str, float] = {}
        self.count = 0
        self._restart()

    def _restart(self) -> None:
        self.sums, self.count = {}, 0
        self.clips = self.steps = self.tokens = 0
        self.flops = self.waited = self.idle = 0.0
        self.started = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs so that its next means are those of an uninterrupted one."""
        return {"sums": self.sums, "count": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.sums, self.count = dict(state["sums"]), state["count"]

    def waiting(self, source: Iterable[T]) -> Iterator[T]:
        """Pass items on, and keep the time that they took to come."""
        items = iter(source)
        while True:
            begin = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            self.waited += time.monotonic() - begin
            yield item

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the speed."""
        begin = time.monotonic()
        yield
        self.idle += time.monotonic() - begin

    def add(self, values: Mapping[str, float], facts: Facts, num_clips: int) -> None:
        """Count a step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        self.steps += 1
        self.clips += num_clips
        self.tokens += facts.tokens
        self.flops += facts.flops

    def report(self, step: int, values: Mapping[str, float], lr: float, facts: Facts) -> TrainProgress:
        """A row, after which everything is counted anew."""
        seconds = max(time.monotonic() - self.started - self.idle, 1e-9)
        known = self.peak_flops is not None and self.flops > 0
        row = TrainProgress(
            part=self.part,
            step=step,
            total=self.train.max_steps,
            loss=values["loss"],
            lr=lr,
            grad_norm=values["grad_norm"],
            sample_ids=facts.ids,
            metrics={name: value / self.count for name, value in self.sums.items()},
            clips_per_second=self.clips / seconds,
            tokens_per_second=self.tokens / seconds,
            data_wait=min(self.waited / seconds, 1.0),
            mfu=self.flops / seconds / self.peak_flops if known and self.peak_flops else None,
            peak_bytes=peak_bytes(self.device),
            seconds_left=(self.train.max_steps - step) * seconds / max(self.steps, 1),
        )
        self._restart()
        return row


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has taken: on the GPU, if it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Recorder:
    """Writes a run's events into its folder. Rows of steps that a resumed run repeats come again; the last one counts.

    Args:
        run: the folder.
        config: `train.wandb` names a project to report to as well.
        first_step: that a run goes on after; what TensorBoard drew beyond it is hidden. None hides nothing.

    Raises:
        ConfigError: Weights & Biases is wanted and not installed.
    """

    def __init__(self, run: Path, config: Config, first_step: int | None = 0) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.run = run
        purge = None if first_step is None else first_step + 1
        self.board: Any = SummaryWriter(str(run / "tensorboard"), purge_step=purge)
        self.wandb: Any = _wandb_run(run, config) if config.train.wandb else None

    def write(self, event: Event) -> None:
        """Write what the event measured, if it did."""
        if isinstance(event, TrainProgress):
            append_line(self.run / METRICS_FILE, json.dumps(dataclasses.asdict(event)))
            numbers = {f"{event.part}/{name}": value for name, value in event.metrics.items()}
            names = ("lr", "clips_per_second", "tokens_per_second", "data_wait", "mfu", "peak_bytes")
            numbers |= {f"{event.part}/{name}": getattr(event, name) for name in names}
            self._draw(numbers, event.step)
        elif isinstance(event, Validated):
            append_line(self.run / VALIDATION_FILE, json.dumps(dataclasses.asdict(event)))
            numbers = {"validation/loss": event.loss, "validation/ema_loss": event.ema_loss}
            for name, values in (("loss", event.bins), ("ema_loss", event.ema_bins)):
                numbers |= {f"validation/{name}_bin{index}": value for index, value in enumerate(values)}
            self._draw(numbers, event.step)
        elif isinstance(event, Sampled):
            self._show(event)

    def _draw(self, numbers: Mapping[str, float | None], step: int) -> None:
        known = {name: value for name, value in numbers.items() if value is not None}
        for name, value in known.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        if self.wandb is not None:
            self.wandb.log(known, step=step)

    def _show(self, event: Sampled) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(event.sheet) as sheet:
            self.board.add_image("samples", np.asarray(sheet.convert("RGB")), event.step, dataformats="HWC")
        self.board.flush()
        if self.wandb is not None:
            import wandb

            self.wandb.log({"samples": wandb.Image(str(event.sheet))}, step=event.step)

    def close(self) -> None:
        """Finish the files."""
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _wandb_run(run: Path, config: Config) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"train.wandb is '{config.train.wandb}', but Weights & Biases is not installed",
            'pip install "osora[wandb]", or leave train.wandb empty: TensorBoard is written anyway',
        ) from error
    # the same id on a resume, so that the curve goes on; another one for a folder of the same name elsewhere
    where = run.resolve()
    identity = f"{where.name}-{hashlib.sha256(str(where).encode()).hexdigest()[:8]}"
    return wandb.init(
        project=config.train.wandb,
        name=run.name,
        id=identity,
        resume="allow",
        dir=run,
        config=to_dict(config),
    )
