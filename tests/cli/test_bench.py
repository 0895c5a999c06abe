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
from opensora_cli.bench import SUITE_NAMES
from opensora_cli.sample import SAMPLERS
from opensora_core.config import Config


def test_names_kept_here_are_those_of_the_core() -> None:
    from opensora_core import bench, diffusion

    assert set(SAMPLERS) == diffusion.SAMPLERS.keys()
    assert SUITE_NAMES.keys() == bench.SUITES.keys()


@dataclass(frozen=True)
class Measurement:
    case: str
    metric: str
    value: float
    unit: str
    count: int


@dataclass
class Recorder:
    """Stands for a suite of `opensora_core.bench`."""

    config: Config = field(default_factory=Config)
    options: dict[str, Any] = field(default_factory=dict)

    def measure(self, config: Config, **options: Any) -> Iterator[Any]:
        self.config, self.options = config, options
        yield Measurement("seen", "color", 0.987654, "share", 480)


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    room = SimpleNamespace(SUITES={"world": recorder.measure}, Measurement=Measurement)
    machine = SimpleNamespace(describe=lambda config: {"device": "cpu"})
    monkeypatch.setitem(sys.modules, "opensora_core.bench", room)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "opensora_core.bench.machine", machine)  # type: ignore[arg-type]
    return recorder


def test_a_reader_gets_a_table_and_a_file(suite: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "world.json"
    assert run(["bench", "world", "--prompts", "30", "--output", str(file), "--device", "cpu"]) == 0
    assert suite.options == {"prompts": 30, "seeds": 2}
    assert suite.config.model.weights == "bundled"
    shown = capsys.readouterr().out
    assert "seen: color" in shown
    assert "0.988" in shown
    report = json.loads(file.read_text())
    assert report["measurements"] == [
        {"case": "seen", "metric": "color", "value": 0.987654, "unit": "share", "count": 480}
    ]
    assert report["device"] == "cpu"


def test_a_program_gets_a_line_per_number(suite: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "world", "--quick", "--json"]) == 0
    assert suite.options["seeds"] == 1
    assert json.loads(capsys.readouterr().out)["event"] == "measurement"


def test_an_unknown_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "wrld"]) == 2
    assert "'world'" in capsys.readouterr().err
