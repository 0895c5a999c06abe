"""`--gpus` and `--nodes`: the command that was typed, in many processes.

A verb adds the options of `opensora_cli.options` (GpusOpt, NodesOpt, HostfileOpt, SubmitOpt, MaxRestartsOpt) and, once
its settings and the folder that it writes to are known,

    wish = launch.wished(gpus=gpus, nodes=nodes, hostfile=hostfile, submit=submit, max_restarts=max_restarts)
    if launch.launched_many(wish, output, settings, dry_run=dry_run):
        return
    launch.as_rank(output)
    ...  # what one process does; `launch.is_first()` says whether this is the one that speaks

The processes get the same words less those of launching, and `--output FOLDER`, so the folder is the same for all.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import typer

import opensora_core
from opensora_cli.console import console
from opensora_core import launch
from opensora_core.config import Config
from opensora_core.errors import DeviceError, UsageError
from opensora_core.launch import LOGS, Wish, records
from opensora_core.launch.plan import LOGS_VARIABLE, TERMINAL_VARIABLE
from opensora_core.runs import CONFIG_FILE, is_checkpoint, is_recipe

__all__ = [
    "Wish",
    "as_rank",
    "enter_rank",
    "is_first",
    "is_started",
    "is_watched",
    "launched_many",
    "leave_rank",
    "rank",
    "wished",
]


HELD_SECONDS = 3.0  # that a main thread has to see a signal

_is_watched = False


def rank() -> int:
    """Which of the processes of a run this one is."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that speaks, and writes what is written once."""
    return rank() == 0


def is_watched() -> bool:
    """Whether whoever started this process tells on the terminal how it ended."""
    return _is_watched


def is_started() -> bool:
    """Whether torchrun, or something that speaks like it, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def wished(
    *, gpus: int | None, nodes: int | None, hostfile: Path | None, submit: bool, max_restarts: int | None
) -> Wish:
    """What the flags ask for.

    Raises:
        UsageError: this process has been started as one of many already.
    """
    wish = Wish(gpus, nodes, hostfile, submit, max_restarts or 0)
    if is_started() and (wish.is_many or gpus is not None):
        raise UsageError(
            "torchrun has started this process already, and --gpus, --nodes and their like start more",
            "leave out one of the two",
        )
    return wish


def launched_many(
    wish: Wish, folder: Path, config: Config, *, output: Path | None = None, dry_run: bool = False
) -> bool:
    """Start the processes that are wished for and see them to their end, or say what would be started.

    Args:
        wish: see `wished`.
        folder: that the command writes to, the same for all processes.
        config: the resolved settings.
        output: what they get as `--output`, where that is a file in the folder.
        dry_run: start nothing.

    Returns:
        Whether the work of the command is done, or handed to somebody else.

    Raises:
        UsageError, InputError, DeviceError: what is wished for cannot be started.
        ResourceError: a folder that cannot be written, or a command that does not start.
        typer.Exit: the processes failed, with their exit code.
    """
    if not wish.is_many:
        return False
    folder = _home(folder)
    typed, valued = sys.argv[1:], _valued(sys.argv[1])

    def plan(attempt: int, logs: Path = folder / LOGS) -> launch.LaunchPlan:
        words = launch.inner_words(typed, (output or folder).absolute(), valued)
        if attempt and ((folder / CONFIG_FILE).exists() or is_recipe(folder)):
            words = launch.again_words(typed, folder, valued, recipe=is_recipe(folder))
        return launch.plan(wish, words, logs=logs, engine=config.parallel.engine, attempt=attempt)

    first = plan(0)
    if first.way == "torchrun":
        _check_devices(first.processes, config.runtime.device)
    if dry_run or first.way == "by hand":
        console.show(first)
        return not dry_run
    launch.require_tool(first.way)
    if first.way == "sbatch":
        console.notice(launch.submit(first))
        return True
    with records.own_folder(folder) as logs:
        supervisor = launch.Supervisor(lambda attempt: plan(attempt, logs), logs, wish.max_restarts)
        console.follow(supervisor.run())
    if supervisor.ended.code:
        raise typer.Exit(supervisor.ended.code)
    return True


def _valued(verb: str) -> frozenset[str]:
    """The flags of a command that a word follows in every case."""
    from opensora_cli.app import app
    from opensora_cli.train import BARE

    found: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    options = (item for item in found[verb].params if not getattr(item, "is_flag", False))
    return frozenset(name for item in options for name in item.opts) - BARE.keys()


def _home(folder: Path) -> Path:
    """The run's folder, of which `folder` may be a checkpoint."""
    return folder.resolve().parents[1] if is_checkpoint(folder) else folder.absolute()


def _check_devices(processes: int, device: str) -> None:
    """Refuse more processes than there are devices for, before anything is started."""
    import torch

    from opensora_core.components import resolve_device

    kind = resolve_device(device).type
    if kind == "cpu" and device == "auto" and processes > 1:
        raise DeviceError(
            f"--gpus {processes}, and this machine has no GPU", "add --device cpu to compute on its cores, over gloo"
        )
    if kind == "mps" and processes > 1:
        raise UsageError(f"--gpus {processes}, and MPS is one device that processes cannot share", "leave out --gpus")
    if kind not in ("cpu", "mps"):
        found = torch.accelerator.device_count()
        if processes > found:
            raise UsageError(f"--gpus {processes} is more than the {found} of this machine", f"--gpus {found}")
        if ":" in device and processes > 1:
            raise UsageError(
                f"--device {device} is one device, and --gpus {processes} wants others too", f"--device {kind}"
            )


def enter_rank() -> None:
    """Take the place of a rank, before anything is said: called once, first of all."""
    if not is_started():
        return
    launch.end_with_parent()
    global _is_watched  # noqa: PLW0603 - one process has one
    own_terminal = os.environ.pop(TERMINAL_VARIABLE, None)
    if own_terminal is not None:
        _is_watched = True
        if is_first():
            os.dup2(int(own_terminal), 2)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, int(own_terminal))
        os.close(nothing)
    if LOGS_VARIABLE in os.environ:
        _speak_into(Path(os.environ[LOGS_VARIABLE]))


def _speak_into(logs: Path) -> None:
    """Let what this rank says go into its log; rank 0 speaks on the terminal as well."""
    path = records.log_of(logs, rank())
    logs.mkdir(parents=True, exist_ok=True)
    records.begin(logs, rank())
    if is_first():
        console.keep(path)
        last_words = logging.getLogger(opensora_core.__name__)  # of the watchdog, whose main thread cannot speak
        last_words.addHandler(logging.FileHandler(path))
        last_words.addHandler(logging.StreamHandler())
        return
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def as_rank(folder: Path) -> None:
    """Let the ranks other than 0 speak into their logs, if torchrun was called by hand and nobody has said where.

    Args:
        folder: that the command writes to.
    """
    if is_started() and LOGS_VARIABLE not in os.environ:
        logs = _home(folder) / LOGS
        os.environ[LOGS_VARIABLE] = str(logs)
        _speak_into(logs)


def end_if_held(handler: Callable[[int, FrameType | None], None]) -> None:
    """Let SIGTERM end this rank even where its main thread is held outside Python, such as by a peer that never comes.

    Called by the main thread. Who handles the signal otherwise, to save a checkpoint first, is left to do so.

    Args:
        handler: of SIGTERM, which puts another in its place when it runs.
    """
    if is_started():
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_end_if_held, args=(reader, handler), daemon=True).start()


def _end_if_held(reader: int, handler: Callable[[int, FrameType | None], None]) -> None:
    while signal.SIGTERM not in os.read(reader, 1):
        pass
    time.sleep(HELD_SECONDS)
    if signal.getsignal(signal.SIGTERM) is handler:
        console.failure = "terminated", ()
        leave_rank(128 + signal.SIGTERM)


def leave_rank(code: int) -> None:
    """Leave a record of how this process ends, if it is one of many: called once, last of all."""
    if is_started() and LOGS_VARIABLE in os.environ:
        message, ranks = console.failure if code else ("", ())
        records.end(Path(os.environ[LOGS_VARIABLE]), rank(), code, message, ranks)
    if code and is_started():  # threads of a backend that wait for a lost process would hold this one
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
