"""Checkpoints as a whole, for tests to compare: nothing else needs more of one than its own rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from opensora_core.parallel.shards import Stored
from opensora_core.runs import newest_whole
from opensora_core.training import checkpoint


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds, brought together.

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


def load(path: Path) -> Saved:
    """Read a checkpoint, whose sums have been checked, as a whole."""
    state = json.loads((path / checkpoint.STATE_FILE).read_text())
    stored = Stored(path)
    return Saved(
        step=state.pop("step"),
        weights=stored.read(checkpoint.WEIGHTS),
        average=stored.read(checkpoint.AVERAGE),
        optimizer=stored.read("optimizer"),
        state=state,
    )


def latest(folder: Path) -> tuple[Saved | None, list[str]]:
    """Load the newest whole checkpoint below `folder`, and say which newer ones were passed over, and why.

    Raises:
        CheckpointError: there are checkpoints, and not one of them is whole.
    """
    path, damaged = newest_whole(folder)
    return (None if path is None else load(path)), damaged
