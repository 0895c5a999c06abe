"""`osora train`: from words to settings, and its events on a screen. The core is replaced by a recorder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import opensora_core
from opensora_cli.app import run
from opensora_core.config import Config, to_dict, with_settings
from opensora_core.errors import Stopped, UsageError
from opensora_core.presets import RECIPES, preset


@dataclass(frozen=True)
class TrainProgress:
    part: str = "model"
    step: int = 10
    total: int = 200
    metrics: dict[str, float] = field(default_factory=lambda: {"loss": 0.51234})
    lr: float = 1e-3
    clips_per_second: float = 12.34
    tokens_per_second: float = 56789.0
    data_wait: float = 0.03
    mfu: float | None = 0.456
    peak_bytes: int = 2 * 10**9
    seconds_left: float = 83.0


@dataclass(frozen=True)
class CheckpointSaved:
    part: str
    step: int
    path: Path


@dataclass
class Recorder:
    """Stands for `opensora_core.training`."""

    config: Config = field(default_factory=Config)
    options: dict[str, Any] = field(default_factory=dict)
    exported: list[tuple[Path, Path]] = field(default_factory=list)
    chapters: list[Any] = field(default_factory=list)
    stopped: bool = False

    class Chapter(NamedTuple):
        name: str
        config: Config

    def train_recipe(self, chapters: list[Any], *, output: Path, resume: bool = False) -> Iterator[Any]:
        self.chapters, self.options = chapters, {"output": output, "resume": resume}
        yield from ()

    def examine(self, config: Config, *, measure: bool, write_manifest: Path | None = None) -> Iterator[Any]:
        self.config, self.options = config, {"measure": measure, "write_manifest": write_manifest}
        yield from ()

    def fill_cache(self, config: Config) -> Iterator[Any]:
        self.config, self.options = config, {"fill": True}
        yield from ()

    def train(self, config: Config, *, output: Path, resume: bool) -> Iterator[Any]:
        self.config, self.options = config, {"output": output, "resume": resume}
        yield TrainProgress()
        yield CheckpointSaved("model", 10, output / "checkpoints")
        if self.stopped:
            raise Stopped("stopped after step 10", "repeat it with --resume", 15)

    def check_export(self, folder: Path) -> None:
        assert not self.options, "asked before the run, not after it"
        if folder.name == "full":
            raise UsageError(f"{folder} exists and is not empty")

    def export(self, run: Path, folder: Path) -> None:
        self.exported.append((run, folder))


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "opensora_core.training", recorder)  # type: ignore[arg-type]
    monkeypatch.setattr(opensora_core, "training", recorder, raising=False)
    return recorder


def test_the_tiny_preset_is_the_default(core: Recorder) -> None:
    assert run(["train"]) == 0
    assert core.config == preset("tiny")
    assert core.config.data.source == "world"
    assert core.options["output"].parent == Path("runs") and core.options["output"].name.startswith("tiny-")
    assert core.options["resume"] is False
    assert core.exported == []


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--steps", "7"], {"train.max_steps": 7}),
        (["--batch-size", "3"], {"train.batch_size": 3}),
        (["--lr", "1e-4"], {"train.lr": 1e-4}),
        (["--seed", "5"], {"train.seed": 5}),
        (["--device", "cpu"], {"runtime.device": "cpu"}),
        (["--set", "train.muon_lr=0.01"], {"train.muon_lr": 0.01}),
        (["--data", "clips"], {"data.source": "clips"}),
        (["--cache", "c"], {"data.cache": "c"}),
        (["--max-rejects", "0.5"], {"data.max_rejects": 0.5}),
        (["--init", "bundled"], {"train.init": "bundled"}),
        (["--lora-rank", "8"], {"train.lora_rank": 8}),
        (["--keep", "5"], {"train.keep_checkpoints": 5}),
        (["--dtype", "bf16"], {"runtime.dtype": "bf16"}),
        (["--compile"], {"runtime.compile": True}),
    ],
)
def test_each_flag_changes_its_setting(words: list[str], changes: dict[str, Any], core: Recorder) -> None:
    assert run(["train", *words]) == 0
    assert core.config == with_settings(preset("tiny"), changes)


def test_a_resumed_run_keeps_its_settings(core: Recorder, tmp_path: Path) -> None:
    started = with_settings(preset("tiny"), {"train.max_steps": 123, "model.depth": 2})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(started)))
    assert run(["train", "--output", str(tmp_path), "--resume", "--device", "cpu"]) == 0
    assert core.config == with_settings(started, {"runtime.device": "cpu"})
    assert core.options["resume"] is True


def test_a_finished_run_is_exported(core: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--output", "r", "--export", str(tmp_path / "m")]) == 0
    assert core.exported == [(Path("r"), tmp_path / "m")]
    assert f"osora sample --model {tmp_path / 'm'}" in capsys.readouterr().err


def test_a_reader_sees_a_line_per_report(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train"]) == 0
    shown = capsys.readouterr()
    assert "model 10/200  loss 0.5123  lr 1.00e-03  12.3 clips/s  5.68e+04 tokens/s  MFU 46%" in shown.err
    assert "data wait 3%  2.0 GB  1:23 left" in shown.err
    assert "/checkpoints" in shown.err
    assert shown.out == ""


def test_a_program_reads_one_event_a_line(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["train_progress", "checkpoint_saved", "notice"]
    assert events[0]["metrics"] == {"loss": 0.51234}


def test_a_run_that_is_stopped_says_how_to_go_on(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    core.stopped = True
    assert run(["train", "--export", "nowhere"]) == 143
    assert capsys.readouterr().err.endswith("error: stopped after step 10\n hint: repeat it with --resume\n")
    assert core.exported == []


def test_an_export_that_cannot_be_is_refused_before_the_run(core: Recorder, tmp_path: Path) -> None:
    assert run(["train", "--output", str(tmp_path / "run"), "--export", str(tmp_path / "full")]) == 2
    assert not core.options and not core.exported


@pytest.mark.parametrize(
    "words", [["--resume", "RUN"], ["--resume=RUN"], ["--output", "RUN", "--resume"], ["--resume"]]
)
def test_a_run_is_resumed_by_name_by_output_or_from_inside(
    words: list[str], core: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = with_settings(preset("16x256x256"), {"train.max_steps": 77, "data.source": "clips"})
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "config.json").write_text(json.dumps(to_dict(started)))
    monkeypatch.chdir(run_folder if words == ["--resume"] else tmp_path)
    assert run(["train", *(word.replace("RUN", str(run_folder)) for word in words), "--json"]) == 0
    assert core.config == started
    assert core.options["resume"] is True and core.options["output"].resolve() == run_folder


def test_nothing_to_resume_names_what_there_is(
    core: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.json").write_text("{}")
    assert run(["train", "--resume"]) == 2
    assert "osora train --resume runs/mine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--stage", "1"], "1x256x256"),
        (["--stage", "1", "--preset", "1x512x512"], "1x512x512"),
        (["--stage", "2"], "16x256x256"),
        (["--stage", "3"], "16x512x512"),
        (["--stage", "3", "--preset", "16x256x256-hq"], "16x256x256-hq"),
        (["--stage", "3", "--preset", "64x512x512"], "64x512x512"),
    ],
)
def test_a_stage_is_a_preset(words: list[str], name: str, core: Recorder) -> None:
    assert run(["train", *words, "--data", "clips"]) == 0
    assert core.config == with_settings(preset(name), {"data.source": "clips"})
    assert core.options["output"].name.startswith(f"{name}-")


def test_a_recipe_has_all_stages_and_their_data(core: Recorder) -> None:
    words = ["--recipe", "three-stages", "--data", "videos", "--data", "1=images", "--data", "3=best", "--steps", "9"]
    assert run(["train", *words]) == 0
    assert [chapter.name for chapter in core.chapters] == list(RECIPES["three-stages"])
    assert [chapter.config.data.source for chapter in core.chapters] == ["images", "videos", "best", "best", "best"]
    assert all(chapter.config.train.max_steps == 9 for chapter in core.chapters)
    assert core.options["output"].name.startswith("three-stages-")


def test_a_recipe_is_resumed(core: Recorder, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("[]")
    assert run(["train", "--resume", str(tmp_path)]) == 0
    assert core.options == {"output": tmp_path, "resume": True}
    assert run(["train", "--resume", str(tmp_path), "--steps", "3"]) == 2


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--dry-run"], {"measure": False, "write_manifest": None}),
        (["--dry-run=measure"], {"measure": True, "write_manifest": None}),
        (["--dry-run", "--write-manifest", "c.jsonl"], {"measure": False, "write_manifest": Path("c.jsonl")}),
        (["--cache", "c", "--cache-only"], {"fill": True}),
    ],
)
def test_what_only_looks_or_prepares(words: list[str], options: dict[str, Any], core: Recorder) -> None:
    assert run(["train", "--data", "clips", *words]) == 0
    assert core.options == options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "4"], "there is no stage 4"),
        (["--stage", "2", "--preset", "64x512x512"], "none of stage 2"),
        (["--recipe", "two-stages"], "unknown recipe"),
        (["--recipe", "three-stages", "--stage", "1"], "its own stages"),
        (["--recipe", "three-stages", "--data", "a", "--cache-only"], "not for a recipe"),
        (["--data", "a", "--data", "b"], "given 2 times"),
        (["--dry-run=twice"], "--dry-run=twice is unknown"),
        (["--write-manifest", "c.jsonl"], "for --dry-run"),
    ],
)
def test_words_that_contradict_each_other(
    words: list[str], message: str, core: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *words]) == 2
    assert message in capsys.readouterr().err
    assert not core.options


def test_a_bare_flag_of_another_verb_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--prompt", "train", "--dry-run"]) == 0
    assert "train" in capsys.readouterr().out
