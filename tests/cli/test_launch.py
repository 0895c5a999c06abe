"""`--gpus`, `--nodes` and their like: what is shown and what is refused; the processes themselves are tested below."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import opensora_core
from opensora_cli import options
from opensora_cli.app import run
from opensora_core.errors import UsageError

DOCUMENT = Path(__file__).parents[2] / "docs" / "multi-node.md"


@pytest.fixture(autouse=True)
def examined(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Training is another room's; here it is enough that it is asked."""
    seen: list[Any] = []

    def examine(config: Any, **options: Any) -> Iterator[Any]:
        seen.append(config)
        yield from ()

    training = SimpleNamespace(examine=examine)
    monkeypatch.setattr(opensora_core, "training", training, raising=False)
    monkeypatch.setitem(sys.modules, "opensora_core.training", training)
    for name in ("SLURM_JOB_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return seen


def typed(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", ["osora", *words])
    return run(words)


def commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    return [line.removeprefix("osora ") for block in blocks for line in block.splitlines() if line.startswith("osora")]


@pytest.mark.parametrize("line", commands())
def test_what_is_documented_can_be_started(
    line: str,
    examined: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("one\ntwo\nthree\n")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr("opensora_core.components.devices", lambda: [*(f"cuda:{n}" for n in range(8)), "cpu"])
    in_slurm = "--nodes 2 --output runs" in line
    if in_slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
    assert typed(line if "--dry-run" in line else f"{line} --dry-run", monkeypatch) == 0
    shown = capsys.readouterr()
    wanted = "#SBATCH --nodes=4" if "--submit" in line else "--nproc-per-node="
    assert wanted in shown.out and "train --data" in shown.out
    assert ("srun" in shown.out) == in_slurm and ("BatchMode=yes" in shown.out) == ("--hostfile" in line)
    assert len(examined) == 1 and not any(path.name != "hosts" for path in tmp_path.iterdir())


def test_a_plan_can_be_read_by_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("train --data x --gpus 2 --device cpu --output r --dry-run --json", monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[0])
    assert plan["event"] == "launch_plan" and plan["way"] == "torchrun" and plan["processes"] == 2
    words = plan["commands"][0]["words"]
    assert "--gpus" not in words and words[-2:] == ["--output", str(Path("r").absolute())]


def test_by_hand_nothing_is_started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MASTER_ADDR", "one")
    assert typed("train --data x --gpus 8 --nodes 2 --output r", monkeypatch) == 0
    shown = capsys.readouterr()
    assert "2 machines" in shown.err and "nothing is started" in shown.err
    lines = [line for line in shown.out.splitlines() if line.startswith("env ")]
    assert [f"--node-rank={node}" in line for node, line in enumerate(lines)] == [True, True]
    assert "meet at one:29500" in shown.err


@pytest.mark.parametrize(
    ("line", "words", "code"),
    [
        ("--gpus 2", "no GPU", 1),
        ("--gpus 0", "starts nothing", 2),
        ("--nodes 2 --submit", "asks Slurm", 2),
        ("--gpus 2 --nodes 2 --max-restarts 1", "somebody who starts", 2),
        ("--gpus 1 --nodes 2 --submit", "sbatch is not on this machine", 2),
        ("--hostfile none", "cannot read the host file", 2),
        ("--parallel sequnce=2", "did you mean 'sequence'", 2),
    ],
)
def test_what_cannot_be_started_is_refused(  # noqa: PLR0917
    line: str,
    words: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opensora_core.components.devices", lambda: ["cpu"])
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert typed(f"train --data x {line}", monkeypatch) == code
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_more_gpus_than_there_are_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr("opensora_core.components.devices", lambda: ["cuda:0", "cuda:1", "cpu"])
    assert typed("train --data x --gpus 3", monkeypatch) == 2
    assert "more than the 2" in capsys.readouterr().err
    assert typed("train --data x --gpus 2 --device cuda:1", monkeypatch) == 2


def test_a_rank_starts_no_others_and_shares_its_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert typed("train --data x --gpus 2", monkeypatch) == 2
    assert "torchrun has started" in capsys.readouterr().err
    assert typed("train --data x --dry-run", monkeypatch) == 2
    assert "--output" in capsys.readouterr().err


HELD = """
import ctypes, os, signal, threading
from opensora_cli import launch
launch.HELD_SECONDS = 0.1
def handler(*_): raise SystemExit(7)
signal.signal(signal.SIGTERM, handler)
launch.end_if_held(handler)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
lock = (ctypes.c_char * 64)()
held = ctypes.CDLL(None).pthread_mutex_lock
held(lock), held(lock)
"""


def test_a_rank_whose_main_thread_is_held_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "OSORA_LOGS": str(tmp_path)}
    held = subprocess.run([sys.executable, "-c", HELD], env=environment, timeout=60, check=False)
    assert held.returncode == 143
    assert json.loads((tmp_path / "rank-1.json").read_text())["message"] == "terminated"


def test_axes_are_settings() -> None:
    assert options.parse_axes("cfg=2,sequence=4") == {"parallel.cfg": 2, "parallel.sequence": 4}
    for word in ("cfg", "cfg=0", "cfg=2,cfg=2", "", "cfg=x"):
        with pytest.raises(UsageError):
            options.parse_axes(word)
