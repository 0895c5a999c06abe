"""Plans whose processes run `job.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from opensora_core import launch
from opensora_core.launch import LaunchPlan, Supervisor, Wish


def planned(faults: str, folder: Path, *, steps: int = 6, timeout: float = 60.0) -> Callable[[int], LaunchPlan]:
    """What starts two processes of the job."""

    def plan(attempt: int) -> LaunchPlan:
        found = launch.plan(Wish(gpus=2), ["JOB"], logs=folder / "logs", attempt=attempt, environment={})
        words = found.commands[0].words
        job = ("tests.core.launch.job", faults, str(folder), str(steps), str(timeout))
        command = replace(found.commands[0], words=(*words[: words.index("opensora_cli")], *job))
        return replace(found, commands=(command,))

    return plan


if __name__ == "__main__":  # a launcher of its own, to be killed
    where = Path(sys.argv[1])
    for _ in Supervisor(planned("none", where, steps=100_000), where / "logs").run():
        pass
