"""Processes that die, hang, run out of memory or meet a full disk."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from opensora_core.curation.crew import Crew, Lost, Returned, Said, Tell
from opensora_core.errors import ResourceError


def work(job: str, task: str, tell: Tell) -> str:
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "exit":
        os._exit(3)
    if task == "hang":
        time.sleep(60)
    if task == "slow":
        for _ in range(300):
            tell("working")
            time.sleep(0.1)
    if task == "memory":
        try:
            return f"{len(bytearray(2**30))}"
        except MemoryError:
            return "no memory"
    if task == "full":
        raise ResourceError("no space left", "free some")
    tell("begun")
    return f"{job} {task}"


def run(*tasks: str, workers: int = 1) -> list[Any]:
    crew: Crew[str, str, str] = Crew(
        work, "did", num_workers=workers, stall_seconds=1.5, task_seconds=3, task_bytes=200 * 2**20
    )
    return [word for word in crew.run(tasks) if isinstance(word, Said | Returned | Lost)]


def test_tasks_return_what_they_made_and_tell_on_the_way() -> None:
    words = run("a", "b")
    assert [(word.task, word.result) for word in words if isinstance(word, Returned)] == [
        ("a", "did a"),
        ("b", "did b"),
    ]
    assert [(word.task, word.word) for word in words if isinstance(word, Said)] == [("a", "begun"), ("b", "begun")]


def test_a_process_that_dies_or_hangs_costs_its_task_only() -> None:
    words = run("die", "a", "exit", "hang", "slow", "b", workers=2)
    lost = {word.task: word.reason for word in words if isinstance(word, Lost)}
    assert lost == {
        "die": "its process was killed by SIGKILL",
        "exit": "its process ended with code 3",
        "hang": "hung: nothing was read for stall_seconds=1.5",
        "slow": "took longer than source_seconds=3",
    }
    assert sorted(word.result for word in words if isinstance(word, Returned)) == ["did a", "did b"]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="only Linux counts")  # noqa: PTH110
def test_memory_beyond_the_limit_is_refused() -> None:
    assert [word.result for word in run("memory") if isinstance(word, Returned)] == ["no memory"]


def test_a_full_disk_ends_all_of_it() -> None:
    with pytest.raises(ResourceError, match="no space left"):
        run("a", "full", "b")
