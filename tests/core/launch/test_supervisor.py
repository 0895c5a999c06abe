"""Two real processes under torchrun, one of which fails in all the ways in which processes do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from opensora_core.launch import Ended, Restarting, Supervisor, records
from tests.core.launch.starting import planned

ROOT = Path(__file__).parents[3]
START_SECONDS = 200.0  # on a machine that has much else to do


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def supervise(faults: str, folder: Path, restarts: int = 0, **sizes: Any) -> tuple[list[Any], Ended]:
    supervisor = Supervisor(planned(faults, folder, **sizes), folder / "logs", restarts)
    return list(supervisor.run()), supervisor.ended


def of_job(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "tests.core.launch.job" in words and str(folder) in words and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def none_left(folder: Path, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while of_job(folder) and time.monotonic() < end:
        time.sleep(0.2)
    return not of_job(folder)


def seconds_since_fault(folder: Path) -> float:
    return time.time() - float((folder / "met").read_text())


@pytest.mark.timeout(600)
def test_a_killed_rank_is_named_and_nobody_is_left(tmp_path: Path) -> None:
    _, ended = supervise("kill", tmp_path)
    assert seconds_since_fault(tmp_path) < 30
    assert ended.code == 1 and ended.rank == 1
    assert re.fullmatch(r"rank 1 \(.*, pid \d+\) was ended by SIGKILL.*", ended.reason), ended.reason
    assert "rank 1" in (tmp_path / "logs" / "rank-0.log").read_text(), "the other one knows why it ended"
    assert ended.tail[-1].startswith("stepped") and none_left(tmp_path, 0)


def test_who_was_killed_is_to_blame_though_torchrun_asked_the_others_to_stop(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    records._write(tmp_path, replace(records._own(0), pid=child.pid))
    records._write(tmp_path, replace(records._own(1), code=143, at=2.0, message="terminated"))
    plan = planned("none", tmp_path)(0)
    judge = Supervisor(lambda _: plan, tmp_path)._judge
    assert judge(plan, [1]).reason.endswith("got SIGTERM") and judge(plan, [1]).code == 143
    (tmp_path / "launcher.log").write_text(f"failed (exitcode: -9) local_rank: 0 (pid: {child.pid}) of binary\n")
    ended = judge(plan, [1])
    assert (ended.code, ended.rank) == (1, 0) and ended.reason.endswith("was ended by SIGKILL")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_goes_on_from_where_it_was_after_each_failure(tmp_path: Path) -> None:
    events, ended = supervise("raise,kill", tmp_path, restarts=3, steps=7)
    reasons = [event.reason for event in events if isinstance(event, Restarting)]
    assert [("the loss is not" in reason, "SIGKILL" in reason) for reason in reasons] == [(True, False), (False, True)]
    assert ended.code == 0 and (tmp_path / "step").read_text() == "7"
    steps = [line for line in (tmp_path / "logs" / "rank-1.log").read_text().splitlines() if "step " in line]
    assert [int(line.split()[-1]) for line in steps] == list(range(7)), "three starts, one log, and no step twice"
    assert none_left(tmp_path, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "the loss is not a number"),
        ("bug", "ValueError: a bug"),
        ("stop", "gives no sign of life"),
        ("exit", "SystemExit"),
        ("vanish", "is gone"),
        ("hang", "not arrived: rank 1"),
    ],
)
def test_whoever_fails_is_named_and_nobody_is_left(fault: str, words: str, tmp_path: Path) -> None:
    _, ended = supervise(fault, tmp_path, timeout=10.0)
    assert seconds_since_fault(tmp_path) < 30
    assert ended.code == 1 and ended.rank == 1, ended
    said = ended.reason + (tmp_path / "logs" / "rank-0.log").read_text()
    assert words in said and "rank 1" in said
    assert ended.tail and ended.log == tmp_path / "logs" / "rank-1.log"
    assert none_left(tmp_path, 0)


@pytest.mark.slow
def test_processes_that_differ_are_not_started_again(tmp_path: Path) -> None:
    events, ended = supervise("differ", tmp_path, restarts=3)
    assert ended.code == 2 and not any(isinstance(event, Restarting) for event in events)
    assert "rank 1" in ended.reason and "has odd" in ended.reason and not (tmp_path / "step").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_launcher_takes_its_processes_with_it(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.core.launch.starting", str(tmp_path)]
    launcher = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_SECONDS
        while not (tmp_path / "step").exists() and time.monotonic() < end:
            time.sleep(0.2)
        assert (tmp_path / "step").exists() and len(of_job(tmp_path)) >= 2
        launcher.send_signal(number)
        launcher.wait(30)
        assert none_left(tmp_path, 10)
    finally:
        for process in [launcher, *of_job(tmp_path)]:
            process.kill()
        launcher.wait()
    if number == signal.SIGINT:  # python's own way; the command line turns SIGTERM into the same
        assert {record.code for record in records.read(tmp_path / "logs").values()} == {143}, "each saved and said so"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell who started whom")
def test_a_rank_that_was_orphaned_before_it_could_ask_ends_at_once() -> None:
    code = "from opensora_core.launch import end_with_parent; end_with_parent(); print('goes on')"
    environment = {**os.environ, "OSORA_LAUNCHER": str(os.getpid())}
    adopted = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert adopted.returncode == 1 and not adopted.stdout
    agent = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    command = [sys.executable, "-c", agent, code]
    started = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert started.returncode == 0 and started.stdout == "goes on\n"


def test_two_starts_in_one_folder_have_logs_of_their_own(tmp_path: Path) -> None:
    with records.own_folder(tmp_path) as first, records.own_folder(tmp_path) as second:
        assert [first.name, second.name] == ["logs", "logs-2"]
    with records.own_folder(tmp_path) as again:
        assert again == first


def test_a_record_that_is_torn_is_passed_over(tmp_path: Path) -> None:
    records.begin(tmp_path, 0)
    (tmp_path / "rank-1.json").write_text('{"rank": 1')
    found = records.read(tmp_path)
    assert list(found) == [0] and found[0].pid == os.getpid() and not found[0].is_gone
    records.end(tmp_path, 0, 1, "why", (1,))
    records.end(tmp_path, 0, 0)
    assert records.read(tmp_path)[0].message == "why", "the first word counts"


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 100_000 + b"\nsecond last\n\n\xff last\n\n")
    assert records.tail(log, 2) == ("second last", "\ufffd last")
    assert records.tail(tmp_path / "none") == ()
