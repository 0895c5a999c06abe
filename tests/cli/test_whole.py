"""The command line over the real core, with a tiny model: what the tests that replace the core cannot tell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_cli.app import run
from tests.core.exported import export_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("model"))


def test_a_prompt_becomes_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "--model", str(model), "--prompt", "a red ball", "--output", str(tmp_path), "--sheet"]
    assert run([*words, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()
    assert run(words) == 0
    shown = capsys.readouterr().out
    for name in ("a-red-ball-42.mp4", "sheet.png"):
        assert (tmp_path / name).stat().st_size > 0
        assert name in shown.replace("\n", "")
    assert run(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run([*words, "--overwrite"]) == 0


def test_an_empty_prompt(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--model", str(model), "--prompt", "  "]) == 2
    assert "empty" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_and_leaves_nothing_half_written(
    number: signal.Signals, code: int, model: Path, tmp_path: Path
) -> None:
    words = ["sample", "--model", str(model), "--prompt", "a red ball", "--steps", "1000", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "opensora_cli", *words, "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("step", 0) >= 2:
            break
    process.send_signal(number)
    rest, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert json.loads(rest.splitlines()[-1])["exit_code"] == code
    assert errors == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
