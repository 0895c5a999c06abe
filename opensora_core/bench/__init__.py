"""Measurements that anyone can repeat with one command: one file per suite, one line per suite in the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from opensora_core.bench import world
from opensora_core.bench.measurement import Event, Measurement

__all__ = ["SUITES", "Event", "Measurement"]

SUITES: dict[str, Callable[..., Iterator[Event]]] = {
    "world": world.measure,
}
