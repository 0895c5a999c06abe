"""Checkpoints that are whole or absent, and known to be whole.

A checkpoint is a folder `step-00001000/` with the weights, their average, the optimizers' state and, written last, a
manifest of SHA-256 sums: the commit mark. One flipped bit loads without complaint from every format there is, so the
sums are checked on load, and the newest checkpoint that is whole is the one that a run resumes from.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_core.errors import CheckpointError
from opensora_core.files import (
    MANIFEST,
    refusal,
    replacing,
    require_space,
    verify_manifest,
    write_bytes,
    write_manifest,
)
from opensora_core.weights import apart


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    step: int
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    state: dict[str, Any]


def save(folder: Path, saved: Saved, keep: int) -> Path:
    """Write a checkpoint below `folder` and drop all but the newest `keep`.

    Raises:
        ResourceError: no space or no permission; what was there before stays, and nothing half-written does.
    """
    target = folder / f"step-{saved.step:08d}"
    needed = sum(t.nbytes for t in (*saved.weights.values(), *saved.average.values())) * 2
    require_space(target, needed)
    try:
        if target.exists():
            shutil.rmtree(target)
        for name, tensors in (("weights", saved.weights), ("average", saved.average)):
            with replacing(target / f"{name}.safetensors") as part:
                save_file(apart(tensors), part)
        with replacing(target / "optimizers.pt") as part:
            torch.save(saved.optimizers, part)
        write_bytes(target / "state.json", json.dumps({"step": saved.step, **saved.state}).encode())
        write_manifest(target)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    except BaseException as error:
        if not (target / MANIFEST).exists():
            shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, OSError):
            raise refusal(target, error) from error
        raise
    return target


def latest(folder: Path) -> tuple[Saved | None, list[str]]:
    """Load the newest whole checkpoint below `folder`, and say which newer ones were passed over, and why.

    Raises:
        CheckpointError: there are checkpoints, and not one of them is whole.
    """
    damaged: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify_manifest(path)
        except CheckpointError as error:
            damaged.append(error.message)
            continue
        state = json.loads((path / "state.json").read_text())
        return Saved(
            step=state.pop("step"),
            weights=load_file(path / "weights.safetensors"),
            average=load_file(path / "average.safetensors"),
            optimizers=torch.load(path / "optimizers.pt", weights_only=True),
            state=state,
        ), damaged
    if damaged:
        raise CheckpointError("no checkpoint is whole: " + "; ".join(damaged), f"remove {folder} to start over")
    return None, damaged
