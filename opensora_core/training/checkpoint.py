"""Saving and loading the state of a run: everything in safetensors or JSON, whole or absent, and finite.

What lies where is told by `opensora_core.runs`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_core.errors import TrainingError
from opensora_core.files import replacing_folder, require_space, write_bytes, write_manifest
from opensora_core.runs import AVERAGE_FILE, CONFIG_FILE, WEIGHTS_FILE, checkpoints, newest_whole
from opensora_core.weights import apart

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        step: how many steps were done.
        weights: the module's state, or of an adapter what was trained.
        average: the average of what is trained.
        optimizer: state of the optimizers per parameter.
        state: the rest, as JSON knows it.
    """

    step: int
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path,
    saved: Saved,
    settings: dict[str, Any] | None = None,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint below `folder`.

    Args:
        folder: of the checkpoints.
        saved: what to keep.
        settings: the resolved settings of the run.
        also: writes more into the checkpoint before it is sealed.

    Raises:
        TrainingError: a weight is not finite; nothing is written.
        ResourceError: no space or no permission; what was there before stays, and nothing half-written does.
    """
    tensors = {WEIGHTS_FILE: saved.weights, AVERAGE_FILE: saved.average, OPTIMIZER_FILE: saved.optimizer}
    for name in (WEIGHTS_FILE, AVERAGE_FILE):
        for key, tensor in tensors[name].items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise TrainingError(
                    f"{key} is not finite after step {saved.step}, so nothing is saved",
                    "resume with a lower rate: --resume --set train.lr=...",
                )
    target = folder / f"step-{saved.step}"
    require_space(target, sum(tensor.nbytes for group in tensors.values() for tensor in group.values()))
    with replacing_folder(target) as part:
        for name, group in tensors.items():
            save_file(apart({key: tensor.detach().cpu() for key, tensor in group.items()}), part / name)
            (part / name).chmod(0o644)  # safetensors writes for its owner's eyes only
        if settings is not None:
            write_bytes(part / CONFIG_FILE, (json.dumps(settings, indent=1) + "\n").encode())
        if also is not None:
            also(part)
        write_bytes(part / STATE_FILE, json.dumps({"step": saved.step, **saved.state}).encode())
        write_manifest(part)
    return target


def drop_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def load(path: Path) -> Saved:
    """Read a checkpoint, whose sums have been checked."""
    state = json.loads((path / STATE_FILE).read_text())
    return Saved(
        step=state.pop("step"),
        weights=load_file(path / WEIGHTS_FILE),
        average=load_file(path / AVERAGE_FILE),
        optimizer=load_file(path / OPTIMIZER_FILE),
        state=state,
    )


def latest(folder: Path) -> tuple[Saved | None, list[str]]:
    """Load the newest whole checkpoint below `folder`, and say which newer ones were passed over, and why.

    Raises:
        CheckpointError: there are checkpoints, and not one of them is whole.
    """
    path, damaged = newest_whole(folder)
    return (None if path is None else load(path)), damaged
