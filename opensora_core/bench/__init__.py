"""Measurements that anyone can repeat with one command: one file per suite, one line per suite in the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from opensora_core.bench import data, scaling, split, train, world
from opensora_core.bench.measurement import Event, Measurement
from opensora_core.sampling import Notice

__all__ = ["SUITES", "Event", "Measurement", "Notice"]

SUITES: dict[str, Callable[..., Iterator[Event]]] = {
    "world": world.measure,
    "train": train.measure,
    "data": data.measure,
    "split": split.measure,
    "scaling": scaling.measure,
}
"""Each is called as `measure(config, *, quick, ...)`, where the dots are options of its own."""
