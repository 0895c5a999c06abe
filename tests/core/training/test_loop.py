"""The loop: a run that was stopped equals one that was not, and what cannot go on stops with nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora_core.config import TrainConfig, with_settings
from opensora_core.errors import CheckpointError, Stopped, TrainingError
from opensora_core.parallel import shards
from opensora_core.training import loop
from opensora_core.training.events import CheckpointSaved, Event, Facts, Resumed, TrainProgress
from opensora_core.training.loop import fit
from tests.core.training.saved import Saved, latest

SETTINGS = TrainConfig(
    max_steps=6, batch_size=4, optimizer="muon", lr=1e-2, warmup_steps=2, decay_fraction=0.5, ema_decay=0.9, log_every=1
)


class Task(loop.Task):
    """A regression with draws in the batch and in the loss, matrices in blocks for Muon, and a norm for AdamW."""

    name = "toy"

    def __init__(self, bad_step: int = -1, signal_at: int = -1) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.ModuleDict(
            {"blocks": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))}
        )
        self.bad_step, self.signal_at = bad_step, signal_at

    def batch(self, step: int) -> Tensor:
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        return batch * float("nan") if step == self.bad_step else batch

    def losses(self, batch: Tensor, generator: torch.Generator, parts: int) -> Iterator[dict[str, Tensor]]:
        noise = torch.randn(batch.shape, generator=generator)
        if torch.equal(batch, self.batch(self.signal_at)):
            os.kill(os.getpid(), signal.SIGTERM)
        for rows, noises in zip(batch.chunk(parts), noise.chunk(parts), strict=True):
            error = self.module["blocks"](rows + noises) - rows  # type: ignore[index]
            yield {"loss": error.square().sum() / batch.numel()}

    def facts(self, batch: Tensor) -> Facts:
        return Facts(ids=tuple(f"row {index}" for index in range(len(batch))), tokens=8, flops=100.0)


def run(folder: Path, task: Task | None = None, workers: int = 0, **changes: Any) -> tuple[list[Event], Saved]:
    settings = with_settings(SETTINGS, changes)
    events = list(fit(task or Task(), settings, folder, num_workers=workers))
    saved, _ = latest(folder)
    assert saved is not None
    return events, saved


def losses(events: list[Event]) -> dict[int, str]:
    """The loss of every step, to the last bit."""
    return {event.step: event.metrics["loss"].hex() for event in events if isinstance(event, TrainProgress)}


def same(a: Saved, b: Saved) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
        if isinstance(x, list):
            return len(x) == len(y) and all(map(equal, x, y))
        return bool(x == y)

    return all(equal(getattr(a, name), getattr(b, name)) for name in ("weights", "average", "optimizer", "state"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, workers: int) -> None:
    whole, expected = run(tmp_path / "whole")
    with pytest.raises(Stopped) as caught:
        for _ in fit(Task(signal_at=2), SETTINGS, tmp_path / "parts", num_workers=workers):
            pass
    assert caught.value.exit_code == 143
    assert "step 3 of 6" in caught.value.message and "--resume" in caught.value.hint
    rest, actual = run(tmp_path / "parts", workers=workers)
    assert rest[0] == Resumed("toy", 3)
    assert losses(rest) == {step: loss for step, loss in losses(whole).items() if step > 3}
    assert same(actual, expected)


def test_the_module_is_left_with_the_average(tmp_path: Path) -> None:
    task = Task()
    _, saved = run(tmp_path, task)
    for name, value in task.module.named_parameters():
        torch.testing.assert_close(value.detach(), saved.average[name], rtol=0, atol=0)
    assert any(not torch.equal(saved.weights[name], saved.average[name]) for name in saved.average)


def test_a_loss_that_is_not_a_number_stops_before_it_does_harm(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 5; the clips of this batch: row 0"):
        run(tmp_path, Task(bad_step=4), **{"checkpoint_every": 2})
    saved, _ = latest(tmp_path)
    assert saved is not None and saved.step == 4
    assert all(value.isfinite().all() for value in saved.weights.values())


def test_old_checkpoints_make_room(tmp_path: Path) -> None:
    events, _ = run(tmp_path, **{"checkpoint_every": 1, "keep_checkpoints": 2})
    assert sum(isinstance(event, CheckpointSaved) for event in events) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-5", "step-6"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest"])
@pytest.mark.parametrize("file", ["weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: str, file: str) -> None:
    run(tmp_path, **{"checkpoint_every": 3})
    broken = tmp_path / "step-6" / ("manifest.json" if damage == "no manifest" else file)
    content = bytearray(broken.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        broken.write_bytes(content)
    elif damage == "truncate":
        broken.write_bytes(content[:-1])
    else:
        broken.unlink()
    saved, damaged = latest(tmp_path)
    assert saved is not None and saved.step == 3
    assert len(damaged) == 1 and "step-6" in damaged[0]
    shutil.rmtree(tmp_path / "step-3")
    with pytest.raises(CheckpointError, match="step-6"):
        latest(tmp_path)


def test_a_save_that_fails_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, **{"max_steps": 2})
    before = sorted(tmp_path.rglob("*"))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(Exception, match="no space left"):
        run(tmp_path, **{"max_steps": 4})
    assert sorted(tmp_path.rglob("*")) == before


def test_the_rate_warms_up_stays_and_falls(tmp_path: Path) -> None:
    events, _ = run(tmp_path)
    rates = [event.lr / SETTINGS.lr for event in events if isinstance(event, TrainProgress)]
    torch.testing.assert_close(rates, [0.5, 1.0, 1.0, 1.0, 2 / 3, 1 / 3])


def test_a_scaled_loss_goes_on_with_its_scale(tmp_path: Path) -> None:
    def scaled(folder: Path, task: Task) -> Saved:
        list(fit(task, SETTINGS, folder, num_workers=0, scale_loss=True))
        saved, _ = latest(folder)
        assert saved is not None
        return saved

    whole = scaled(tmp_path / "whole", Task())
    with pytest.raises(Stopped):
        scaled(tmp_path / "parts", Task(signal_at=2))
    assert same(scaled(tmp_path / "parts", Task()), whole)
    assert whole.state["scaler"]["scale"] > 1 and whole.state["scaler"]["_growth_tracker"] == 6
    _, plain = run(tmp_path / "plain")
    for name, value in plain.weights.items():
        torch.testing.assert_close(whole.weights[name], value, rtol=1e-3, atol=1e-4)


def test_an_overflow_of_a_scaled_loss_leaves_the_step_out(tmp_path: Path) -> None:
    class Overflowing(Task):
        def losses(self, batch: Tensor, generator: torch.Generator, parts: int) -> Iterator[dict[str, Tensor]]:
            for losses in super().losses(batch, generator, parts):
                # infinite gradients of a finite loss, once
                bad = torch.equal(batch, self.batch(2))
                yield {"loss": _Exploding.apply(losses["loss"]) if bad else losses["loss"]}

    events = list(fit(Overflowing(), SETTINGS, tmp_path, num_workers=0, scale_loss=True))
    saved, _ = latest(tmp_path)
    assert saved is not None and saved.step == 6
    assert saved.state["scaler"]["scale"] == 2.0**15  # halved once
    assert all(value.isfinite().all() for value in saved.weights.values())
    with pytest.raises(TrainingError):
        list(fit(Overflowing(), SETTINGS, tmp_path / "unscaled", num_workers=0))
    assert any(isinstance(event, CheckpointSaved) for event in events)


class _Exploding(torch.autograd.Function):
    """Nothing forward, infinity backward."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("inf")
