"""What one process of a run does, in small: it takes its place, meets the others, and steps; and one of them fails."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from opensora_cli import launch
from opensora_cli.console import console
from opensora_core.errors import OsoraError, Stopped, TrainingError
from opensora_core.parallel import joined
from opensora_core.parallel.fabric import check_fabric
from opensora_core.parallel.watchdog import watching


@dataclass(frozen=True)
class Stepped:
    """A step is done."""

    step: int


def work(fault: str, folder: Path, steps: int, timeout: float) -> Iterator[object]:
    """Step, and save each step; rank 1 meets its fault at the third one."""
    state = folder / "step"
    asked: list[int] = []
    with (
        joined(torch.device("cpu"), timeout_seconds=timeout) as mesh,
        watching(mesh, timeout_seconds=timeout, lost_seconds=6, logs=folder / "logs") as watch,
    ):
        yield from check_fabric(mesh, {"settings": "odd" if fault == "differ" and mesh.rank else "usual"})
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        sums = torch.zeros(1)
        first = int(state.read_text()) if state.exists() else 0
        for step in range(first, steps):
            watch.step(step)
            if mesh.rank == 1 and step == first + 2 and fault != "none":
                (folder / "met").write_text(str(time.time()))
                meet(fault)
            dist.all_reduce(sums.fill_(len(asked)))
            if mesh.is_first:
                state.write_text(str(step + 1))
            yield Stepped(step)
            if sums.item():
                raise Stopped(f"stopped after step {step}", "go on with --resume", signal.SIGTERM)
            time.sleep(0.05)


def meet(fault: str) -> None:
    """Fail in one of the ways in which processes do."""
    if fault == "raise":
        raise TrainingError("the loss is not a number")
    if fault == "bug":
        raise ValueError("a bug")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "exit":
        sys.exit(0)
    if fault == "vanish":
        os._exit(0)
    if fault == "hang":
        time.sleep(600)


def main() -> None:
    """Take the place of `opensora_cli.__main__`; the n-th start meets the n-th fault."""
    launch.enter_rank()
    folder, steps, timeout = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    fault = [*sys.argv[1].split(","), "none"][int(os.environ.get("OSORA_ATTEMPT", "0")) :][0]
    code = 0
    try:
        console.follow(work(fault, folder, steps, timeout))
    except OsoraError as error:
        console.fail(error.message, error.hint)
        code = error.exit_code
    except Exception as error:
        console.fail(f"internal error, {type(error).__name__}: {error}")
        code = 1
    launch.leave_rank(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
