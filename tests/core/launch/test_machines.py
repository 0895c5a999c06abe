"""Two machines on one: network namespaces with an address each, and one of them is cut off in mid-run."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from opensora_core import launch
from opensora_core.launch import LaunchPlan, Supervisor, Wish
from tests.core.launch.test_supervisor import none_left

ROOT = Path(__file__).parents[3]
NAMES = {"10.77.0.1": "osora-a", "10.77.0.2": "osora-b"}

SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
case $2 in 10.77.0.1) name=osora-a;; *) name=osora-b;; esac
exec ip netns exec $name unshare --uts sh -c "hostname $name && $3"
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[None]:
    """Two namespaces that a pair of virtual cards connects."""
    try:
        for name in NAMES.values():
            ip("netns", "add", name)
        subprocess.run(["ip", "netns", "exec", "osora-a", "unshare", "--uts", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        for name in NAMES.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        ip("link", "add", "card", "netns", "osora-a", "type", "veth", "peer", "card", "netns", "osora-b")
        for address, name in NAMES.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "card")
            ip("-n", name, "link", "set", "card", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def plan(machines: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchPlan:
    """What `--hostfile` starts, with an ssh that enters a namespace."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
    hosts = tmp_path / "hosts"
    hosts.write_text("\n".join(NAMES))
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # no name of a card: gloo has to be told
    wish = Wish(gpus=1, hostfile=hosts)
    found = launch.plan(wish, ["JOB"], logs=tmp_path / "logs", environment=environment)
    job = shlex.join(["tests.core.launch.job", "none", str(tmp_path), "100000", "60"])
    commands = [
        replace(command, words=(*command.words[:-1], command.words[-1].replace("opensora_cli JOB", job)))
        for command in found.commands
    ]
    return replace(found, commands=tuple(commands))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_is_cut_off_is_named_and_both_end(plan: LaunchPlan, tmp_path: Path) -> None:
    supervisor = Supervisor(lambda attempt: plan, tmp_path / "logs")
    running = threading.Thread(target=lambda: list(supervisor.run()))
    running.start()
    end = time.monotonic() + 240
    while not (tmp_path / "step").exists() and running.is_alive() and time.monotonic() < end:
        time.sleep(0.2)
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").glob("*.log")}
    assert (tmp_path / "step").exists(), logs
    time.sleep(2)
    cut = time.monotonic()
    ip("-n", "osora-b", "link", "set", "card", "down")
    running.join(60)
    seconds = time.monotonic() - cut
    assert not running.is_alive() and seconds < 30, seconds
    assert supervisor.ended.code != 0 and "osora-b" in supervisor.ended.reason, supervisor.ended
    assert "cut off" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert "does not answer" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert none_left(tmp_path, 10)
