"""`osora bench`, and the names that the command line keeps of rooms that it must not import for its help."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opensora_cli.app import run
from opensora_cli.bench import CLUSTER_NAMES, SUITE_NAMES
from opensora_cli.sample import SAMPLERS
from opensora_core.config import Config


def test_names_kept_here_are_those_of_the_core() -> None:
    from opensora_core import bench, diffusion
    from opensora_core.bench.cluster import CLUSTERS
    from opensora_core.bench.machine import SETTINGS

    assert set(SAMPLERS) == diffusion.SAMPLERS.keys()
    assert SUITE_NAMES.keys() == bench.SUITES.keys() == SETTINGS.keys()
    assert list(CLUSTERS) == CLUSTER_NAMES


@dataclass(frozen=True)
class Measurement:
    case: str
    metric: str
    value: float
    unit: str
    count: int


@dataclass(frozen=True)
class Notice:
    message: str


@dataclass
class Recorder:
    """Stands for a suite of `opensora_core.bench`."""

    config: Config = field(default_factory=Config)
    options: dict[str, Any] = field(default_factory=dict)

    def measure(self, config: Config, **options: Any) -> Iterator[Any]:
        self.config, self.options = config, options
        yield Notice("a batch of 4 instead of 8")
        yield Measurement("seen", "color", 0.987654, "share", 480)


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    room = SimpleNamespace(SUITES=dict.fromkeys(SUITE_NAMES, recorder.measure), Measurement=Measurement, Notice=Notice)
    machine = SimpleNamespace(describe=lambda config, suite: {"device": "cpu"})
    monkeypatch.setitem(sys.modules, "opensora_core.bench", room)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "opensora_core.bench.machine", machine)  # type: ignore[arg-type]
    return recorder


def test_a_reader_gets_a_table_and_a_file(suite: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "world.json"
    assert run(["bench", "world", "--prompts", "30", "--output", str(file), "--device", "cpu"]) == 0
    assert suite.options == {"quick": False, "prompts": 30}
    assert suite.config.model.weights == "bundled"
    shown = capsys.readouterr().out
    assert "seen: color" in shown
    assert "0.988" in shown
    report = json.loads(file.read_text())
    assert report["measurements"] == [
        {"case": "seen", "metric": "color", "value": 0.987654, "unit": "share", "count": 480}
    ]
    assert report["device"] == "cpu"
    assert report["notices"] == ["a batch of 4 instead of 8"]


def test_a_program_gets_a_line_per_number(suite: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "world", "--quick", "--json"]) == 0
    assert suite.options == {"quick": True}
    lines = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["notice", "measurement"]


def test_a_preset_with_settings_reaches_the_suite(suite: Recorder) -> None:
    words = ["--preset", "16x256x256", "--set", "train.recompute=0.5", "--dtype", "bf16"]
    assert run(["bench", "train", *words]) == 0
    assert suite.options == {"quick": False}
    assert suite.config.model.hidden_size == 1152
    assert suite.config.train.recompute == 0.5
    assert suite.config.runtime.dtype == "bf16"


def test_clips_to_read_are_named_for_the_suite_that_reads_them(suite: Recorder, tmp_path: Path) -> None:
    assert run(["bench", "data", "--data", str(tmp_path)]) == 0
    assert suite.options == {"quick": False, "source": tmp_path}


@pytest.mark.parametrize(
    "words", [["train", "--prompts", "3"], ["data", "--seeds", "3"], ["train", "--data", "x"], ["world", "--data", "x"]]
)
def test_a_flag_of_another_suite_is_refused(
    words: list[str], suite: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *words]) == 2
    assert " ".join(words[1:]) in capsys.readouterr().err
    assert not suite.options


def test_an_unknown_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "wrld"]) == 2
    assert "'world'" in capsys.readouterr().err
