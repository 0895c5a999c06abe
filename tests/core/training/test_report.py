"""What a run measures of itself can be read back, wherever it is written."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opensora_core.config import Config, TrainConfig, with_settings
from opensora_core.errors import ConfigError
from opensora_core.media import write_contact_sheet
from opensora_core.training.events import Facts, Notice, Sampled, TrainProgress, Validated
from opensora_core.training.report import Meter, Recorder
from opensora_core.training.validation import prompts_of


def progress(step: int, **changes: Any) -> TrainProgress:
    known: dict[str, Any] = {
        "part": "model",
        "total": 10,
        "loss": 9.0,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "sample_ids": ("é.mp4",),
        "metrics": {"loss": 1.0 / step, "grad_norm": 0.25},
        "clips_per_second": 4.0,
        "tokens_per_second": 4096.0,
        "data_wait": 0.125,
        "mfu": None,
        "peak_bytes": 10**9,
        "seconds_left": 3.0,
    }
    return TrainProgress(step=step, **known | changes)


def sampled(run: Path, step: int) -> Sampled:
    sheet = run / "samples" / f"step-{step}" / "sheet.png"
    sheet.parent.mkdir(parents=True)
    write_contact_sheet([("a red ball", np.full((4, 16, 16, 3), 200, np.uint8))], sheet)
    return Sampled(step, (sheet.with_name("0.mp4"),), sheet)


def record(run: Path, *events: Any, first_step: int = 0, **settings: Any) -> None:
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    recorder = Recorder(run, with_settings(Config(), changes), first_step)
    try:
        for event in events:
            recorder.write(event)
    finally:
        recorder.close()


def drawn(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0}).Reload()


def curve(run: Path, name: str) -> dict[int, float]:
    return {event.step: event.value for event in drawn(run).Scalars(name)}


# ---------------------------------------------------------------------- TensorBoard and JSON lines


def test_tensorboard_reads_back_what_was_measured_and_sampled(tmp_path: Path) -> None:
    shown = sampled(tmp_path, 4)
    validated = Validated(4, 0.5, 0.25, (0.75, 0.25), (0.375, 0.125))
    record(tmp_path, Notice("nothing to draw"), progress(2), progress(4, mfu=0.5), validated, shown)
    assert curve(tmp_path, "model/loss") == {2: 0.5, 4: 0.25}  # the mean since the last row, not the last step's
    assert curve(tmp_path, "model/mfu") == {4: 0.5}
    assert curve(tmp_path, "model/tokens_per_second") == {2: 4096, 4: 4096}
    assert curve(tmp_path, "model/lr") == pytest.approx({2: 1e-3, 4: 1e-3})
    for name, value in (("loss", 0.5), ("ema_loss", 0.25), ("loss_bin0", 0.75), ("ema_loss_bin1", 0.125)):
        assert curve(tmp_path, f"validation/{name}") == {4: value}
    (image,) = drawn(tmp_path).Images("samples")
    with Image.open(io.BytesIO(image.encoded_image_string)) as found, Image.open(shown.sheet) as sheet:
        assert image.step == 4 and np.array_equal(np.asarray(found), np.asarray(sheet.convert("RGB")))


def test_rows_are_lines_of_json(tmp_path: Path) -> None:
    record(tmp_path, progress(2), Validated(2, 0.5, 0.25, (0.5,), (0.25,)), progress(3))
    record(tmp_path, progress(4))
    rows, measured = (
        [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        for name in ("metrics.jsonl", "validation.jsonl")
    )
    assert [(row["part"], row["step"]) for row in rows] == [("model", 2), ("model", 3), ("model", 4)]
    assert rows[0]["loss"] == 9.0 and rows[0]["metrics"]["loss"] == 0.5 and rows[0]["sample_ids"] == ["é.mp4"]
    assert [(row["step"], row["bins"]) for row in measured] == [(2, [0.5])]


def test_rows_are_there_before_the_run_ends(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, Config())
    recorder.write(progress(1))
    assert curve(tmp_path, "model/loss") == {1: 1.0}
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    recorder.close()


def test_what_a_resumed_run_repeats_is_drawn_once(tmp_path: Path) -> None:
    record(tmp_path, *(progress(step) for step in (1, 2, 3, 4)))
    record(tmp_path, progress(3, metrics={"loss": 7.0}), first_step=2)
    assert curve(tmp_path, "model/loss") == {1: 1.0, 2: 0.5, 3: 7.0}


# ---------------------------------------------------------------------- Weights & Biases


class StandIn(types.ModuleType):
    """Of Weights & Biases what is called, which keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.num_finished = 0

    def init(self, **options: Any) -> StandIn:
        self.begun.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.num_finished += 1

    def Image(self, path: str) -> tuple[str, str]:  # noqa: N802 - its name
        return ("image", path)


def test_weights_and_biases_gets_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    shown = sampled(tmp_path, 2)
    for _ in range(2):
        record(tmp_path, progress(2), Validated(2, 0.5, 0.25, (), ()), shown, train__wandb="balls")
    first, again = stand_in.begun
    assert first["project"] == "balls" and first["config"]["train"]["wandb"] == "balls" and first["dir"] == tmp_path
    assert first["id"] == again["id"] and again["resume"] == "allow"
    model, validation, samples = stand_in.rows[:3]
    assert model[0] == 2 and model[1]["model/loss"] == 0.5 and "model/mfu" not in model[1]
    assert validation == (2, {"validation/loss": 0.5, "validation/ema_loss": 0.25})
    assert samples == (2, {"samples": ("image", str(shown.sheet))})
    assert stand_in.num_finished == 2


def test_it_is_not_called_unless_a_project_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    record(tmp_path, progress(1))
    with pytest.raises(ConfigError, match=r"train\.wandb is 'balls'") as caught:
        record(tmp_path / "run", progress(1), train__wandb="balls")
    assert "osora[wandb]" in caught.value.hint


# ---------------------------------------------------------------------- the meter and the prompts


def test_a_row_has_means_of_all_steps_since_the_last() -> None:
    meter = Meter("model", TrainConfig(max_steps=10), torch.device("cpu"), peak_flops=1e12)
    for loss in (1.0, 2.0, 6.0):
        meter.add({"loss": loss, "grad_norm": 1.0}, Facts(("a",), tokens=100, flops=1e6), num_clips=2)
    row = meter.report(3, {"loss": 6.0, "grad_norm": 1.0}, 1e-3, Facts(("a",)))
    assert (row.loss, row.metrics) == (6.0, {"loss": 3.0, "grad_norm": 1.0})
    assert row.tokens_per_second == pytest.approx(50 * row.clips_per_second)
    assert row.mfu is not None and row.mfu == pytest.approx(1e4 / 1e12 * row.tokens_per_second)
    assert row.peak_bytes > 10**6 and row.seconds_left == pytest.approx(7 * 2 / row.clips_per_second)
    meter.add({"loss": 5.0, "grad_norm": 1.0}, Facts(), num_clips=2)
    assert meter.report(4, {"loss": 5.0, "grad_norm": 1.0}, 1e-3, Facts()).metrics["loss"] == 5.0


def test_the_means_of_a_resumed_run_are_those_of_an_uninterrupted_one() -> None:
    meters = [Meter("model", TrainConfig(), torch.device("cpu")) for _ in range(2)]
    meters[0].add({"loss": 1.0}, Facts(), num_clips=1)
    meters[1].load(json.loads(json.dumps(meters[0].state())))
    for meter in meters:
        meter.add({"loss": 4.0}, Facts(), num_clips=1)
    rows = [meter.report(2, {"loss": 4.0, "grad_norm": 0.0}, 1.0, Facts()) for meter in meters]
    assert rows[0].metrics == rows[1].metrics == {"loss": 2.5} and rows[1].mfu is None


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("", []),
        (" | ", []),
        ("a red ball", ["a red ball"]),
        ("a red ball| a blue cube |", ["a red ball", "a blue cube"]),
        ("no/such/file.txt", ["no/such/file.txt"]),
    ],
)
def test_prompts_are_parted_by_bars(text: str, prompts: list[str]) -> None:
    assert prompts_of(text) == prompts


@pytest.mark.parametrize("content", ["a red ball\n\n ein Käse \n", "a red ball\r\nein Käse", "a red ball|ein Käse"])
def test_prompts_of_a_file_are_its_lines(content: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content.encode())
    assert prompts_of(str(file)) == ["a red ball", "ein Käse"]


def test_prompts_may_be_longer_than_the_name_of_a_file() -> None:
    prompts = [f"a red ball that rolls by for the {number}th time" for number in range(100)]
    assert prompts_of("|".join(prompts)) == prompts


def test_a_run_that_begins_anew_before_its_first_checkpoint_draws_one_curve(tmp_path: Path) -> None:
    record(tmp_path, *(progress(step) for step in (1, 2, 3)))
    record(tmp_path, progress(1, metrics={"loss": 7.0}), first_step=0)
    assert curve(tmp_path, "model/loss") == {1: 7.0}
