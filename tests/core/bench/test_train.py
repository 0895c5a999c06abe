"""`osora bench train`: what is counted, what fits, and that every case runs and says the same as the loop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora_core.bench import machine, train
from opensora_core.bench.measurement import Event, Measurement
from opensora_core.config import Config, with_settings
from opensora_core.errors import ResourceError
from opensora_core.presets import PRESETS, preset
from opensora_core.sampling import Notice
from opensora_core.training.events import TrainProgress
from opensora_core.training.report import peak_bytes

GIB = 2**30
METRICS = {
    "samples per second",
    "tokens per second",
    "time of a step",
    "time of a step, shortest",
    "time of a step, longest",
    "time spent waiting for data",
    "peak memory",
}


def tiny(**changes: Any) -> Config:
    settings = {
        "model.hidden_size": 48,
        "model.num_heads": 2,
        "model.depth": 2,
        "train.batch_size": 2,
        "train.draws": 1,
        "runtime.device": "cpu",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return with_settings(preset("tiny"), settings)


def numbers(events: list[Event]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for event in events:
        if isinstance(event, Measurement):
            found.setdefault(event.case, {})[event.metric] = event.value
    return found


def report(step: int, seconds: float, data_wait: float, mfu: float | None = None) -> TrainProgress:
    left = (train.NEVER - step) * seconds
    return TrainProgress(
        "model", step, train.NEVER, 1.0, 1e-3, 1.0, (), {}, 8 / seconds, 80 / seconds, data_wait, mfu, GIB * step, left
    )


def test_numbers_are_medians_and_waiting_is_a_share_of_all_the_time() -> None:
    steps = [report(3, 1.0, 0.0), report(4, 1.0, 0.0), report(5, 4.0, 0.75)]
    assert numbers(list(train.numbers_of("x", steps)))["x"] == pytest.approx(
        {
            "samples per second": 8.0,
            "tokens per second": 80.0,
            "time of a step": 1.0,
            "time of a step, shortest": 1.0,
            "time of a step, longest": 4.0,
            "time spent waiting for data": 0.5,
            "peak memory": 5.0,
        }
    )
    known = numbers(list(train.numbers_of("x", [report(1, 1.0, 0.0, 0.4)])))["x"]
    assert known["peak arithmetic reached (MFU)"] == 0.4


def test_all_three_cases_of_the_world_run_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(train, "QUICK", train.Length(0, 1, 1, 0.0))
    found = numbers(list(train.measure(tiny(), quick=True)))
    memory = {"estimated memory", "estimated activations", "measured activations"}
    assert {case: set(metrics) for case, metrics in found.items()} == {
        train.GIVEN: METRICS | memory,
        train.WHOLE: METRICS,
        train.CACHED: METRICS,
    }
    for metrics in found.values():  # 4 x 4 x 4 patches of latents of 16 x 8 x 8
        assert metrics["tokens per second"] == pytest.approx(64 * metrics["samples per second"])
        assert metrics["time of a step"] == pytest.approx(2 / metrics["samples per second"])
    assert not list(tmp_path.glob("osora*"))


def test_a_size_that_the_world_has_not_is_read_from_clips_of_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "QUICK", train.Length(0, 1, 1, 0.0))
    config = tiny(video__num_frames=4, video__width=96, train__num_workers=0)
    found = numbers(list(train.measure(config, quick=True)))
    assert found.keys() == {train.GIVEN, train.WHOLE, train.CACHED}
    for metrics in found.values():
        assert metrics["tokens per second"] == pytest.approx(1 * 4 * 6 * metrics["samples per second"])


def test_encoders_that_are_not_here_leave_the_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSORA_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(train, "QUICK", train.Length(0, 1, 1, 0.0))
    events = list(train.measure(tiny(vae__kind="kl", vae__weights="sd-vae-ft-ema"), quick=True))
    assert numbers(events).keys() == {train.GIVEN}
    assert ["sd-vae-ft-ema" in event.message for event in events if isinstance(event, Notice)] == [True]


@pytest.mark.parametrize("name", ["1x256x256", "dit-1x256x256", "latte-16x256x256-class", "pixart-1x1024-ms"])
def test_every_kind_of_condition_can_be_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in PRESETS
    size = {"model.hidden_size": 48, "model.num_heads": 2, "model.depth": 2, "video.height": 32, "video.width": 32}
    here = {"train.batch_size": 2, "runtime.device": "cpu", "train.init": "", "train.max_steps": 1}
    config = with_settings(preset(name), {**size, **here})
    task = train._given_task(config)
    [losses] = task.losses(0, torch.Generator().manual_seed(0), 1)
    assert torch.isfinite(losses["loss"])
    facts = task.facts(0)
    assert facts.tokens == 2 * config.video.num_frames * 4
    assert facts.flops > 0


@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_activations_are_those_that_were_estimated(recompute: float) -> None:
    config = tiny(model__depth=4, train__recompute=recompute)
    needed = train._estimate(config)
    measured = train.peak_activations(train._given_task(config), config)
    # what the backward pass computes with for a moment comes on top of what the forward pass keeps
    assert 0.95 * needed.activations <= measured <= 1.35 * needed.activations


def test_peak_counts_tensors_only_while_they_are_there() -> None:
    start = torch.zeros(1000)
    with machine.Alive() as alive:
        one = start + 1
        one.view(10, 100).mul_(2)
        del one
        for _ in range(5):
            start = start + 1
    assert alive.peak == 2 * 4000
    assert alive.now == 4000


def test_batch_then_depth_are_made_smaller_until_it_fits() -> None:
    wanted = tiny(model__hidden_size=96, model__depth=14, train__batch_size=8, train__accumulate=4)
    config, needed, told = train.fitting(wanted, None)
    assert (config, told) == (wanted, [])
    fixed = needed.total - needed.activations
    less, _, told = train.fitting(wanted, round(train.HEADROOM * fixed + needed.activations))
    assert (less.train.batch_size, less.train.accumulate, less.model.depth) == (4, 4, 14)
    assert "batch_size 4 instead of 8" in told[0]
    least, needed, told = train.fitting(wanted, fixed)
    assert (least.train.batch_size, least.train.accumulate, least.model.depth) == (1, 1, 6)
    assert train.HEADROOM * needed.total <= fixed
    assert "depth 6 instead of 14" in told[0]
    with pytest.raises(ResourceError, match="are free"):
        train.fitting(wanted, 10**5)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of a process is that of its whole life")
def test_a_peak_begins_anew() -> None:
    cpu = torch.device("cpu")
    high = bytearray(b"x" * 2**28)
    before = peak_bytes(cpu)
    del high
    machine.reset_peak()
    assert peak_bytes(cpu) < before - 2**27
    free = machine.free_bytes(cpu)
    assert free is not None and 2**20 < free < 2**50


def test_a_report_says_what_a_suite_depends_on() -> None:
    config = tiny(train__recompute=0.5)
    assert machine.describe(config, "train")["train.recompute"] == 0.5
    assert machine.describe(config, "world")["model"] == "bundled"
