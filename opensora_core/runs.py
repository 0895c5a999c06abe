"""What lies where in the folder of a training run, and who may write there.

    runs/NAME/
        config.json         the resolved settings
        clips.jsonl         the clips that it learns from, as they were counted when it began
        rejects.jsonl       the clips that it could not use, with the reason
        metrics.jsonl       a row per report
        validation.jsonl    a row per validation
        tensorboard/        the same, drawn
        samples/            what the model made of prompts on the way
        logs/               of several processes: what each said, and how it ended
        checkpoints/step-N/ weights, their average, the optimizer, the settings, and a manifest of SHA-256 sums;
                            of several processes in parts, and `shards.json` says what is where

A checkpoint takes its name when it is whole. One flipped bit loads without complaint from every format there is, so the
sums are checked before one is used.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from opensora_core.errors import CheckpointError, UsageError
from opensora_core.files import refusal, verify_manifest

CONFIG_FILE = "config.json"
CLIPS_FILE = "clips.jsonl"
REJECTS_FILE = "rejects.jsonl"
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE = "weights.safetensors"
AVERAGE_FILE = "ema.safetensors"
SHARDS_FILE = "shards.json"
LORA_FOLDER = "lora"
RECIPE_FILE = "recipe.json"
LOCK_FILE = ".lock"
HOLDER_FILE = ".lock-holder"


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training run."""
    return (folder / CONFIG_FILE).is_file() and (folder / CHECKPOINTS).is_dir()


def is_recipe(folder: Path) -> bool:
    """Whether a folder holds the runs of a recipe."""
    return (folder / RECIPE_FILE).is_file()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return (folder / SHARDS_FILE).is_file() or ((folder / WEIGHTS_FILE).is_file() and (folder / AVERAGE_FILE).is_file())


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells, or -1."""
    name, _, step = checkpoint.name.partition("-")
    return int(step) if name == "step" and step.isdecimal() else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder of checkpoints, newest first, whole or not."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of, reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in a folder of checkpoints, and what is wrong with each newer one.

    Raises:
        CheckpointError: there are checkpoints, and not one of them is whole.
    """
    damaged: list[str] = []
    for path in checkpoints(folder):
        try:
            verify_manifest(path)
        except CheckpointError as error:
            damaged.append(error.message)
            continue
        return path, damaged
    if damaged:
        raise CheckpointError("no checkpoint is whole: " + "; ".join(damaged), f"remove {folder} to start over")
    return None, damaged


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or the folder itself if it is a checkpoint; None where there is none.

    Raises:
        CheckpointError: there are checkpoints, and not one of them is whole.
    """
    if is_checkpoint(run):
        verify_manifest(run)
        return run
    return newest_whole(run / CHECKPOINTS)[0]


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Hold a run's folder against other processes; the system lets go of it when this one ends, however it ends.

    Raises:
        UsageError: another process holds it; its pid and host are named.
        ResourceError: the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / LOCK_FILE)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"{run} is in use by {_holder(run)}", "wait for it, stop it, or name another --output"
        ) from None
    except OSError as error:
        raise refusal(run, error) from error
    try:
        try:
            (run / HOLDER_FILE).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        except OSError as error:
            raise refusal(run, error) from error
        yield
    finally:
        with suppress(OSError):  # a disk that fails must not keep the lock
            (run / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def _holder(run: Path) -> str:
    try:
        holder = json.loads((run / HOLDER_FILE).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
