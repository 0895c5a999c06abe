"""Weights that come to this machine, and memory that is given back."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Iterator

import torch

from opensora_core import components, parallel
from opensora_core.assets import Kind
from opensora_core.config import Config
from opensora_core.files import readable
from opensora_core.parallel import Axis
from opensora_core.sampling.events import Event, Loading
from opensora_core.sampling.planning import Part

PARTS: dict[Kind, str] = {"text": "text encoder", "vae": "VAE", "model": "model"}
"""What the parts are called in events."""


def fetch(config: Config, part: Part, everyone: Axis) -> Iterator[Event]:
    """Download a part that is not on this machine: its first process does, and everyone waits for that.

    Raises:
        WeightsError: it cannot be had.
        ResourceError: no space or no permission.
    """
    missing = part.path is None and parallel.local_rank() == 0
    if any(parallel.gathered(everyone, missing)):
        if missing:
            yield from _download(config, part.kind)
        parallel.gathered(everyone, None)


def _download(config: Config, kind: Kind) -> Iterator[Event]:
    """Download a part in a thread of its own, and tell how far it is."""
    news: queue.Queue[tuple[int, int] | None] = queue.Queue()
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            components.locate(config, kind, lambda done, total: news.put((done, total)))
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)
        news.put(None)

    name = components.word_of(config, kind)
    yield Loading(PARTS[kind], name)
    threading.Thread(target=work, daemon=True).start()
    told = 0.0
    while (item := news.get()) is not None:
        if time.monotonic() - told > 0.5:
            told, (done, total) = time.monotonic(), item
            yield Loading(PARTS[kind], f"{name}, {readable(done)}" + (f" of {readable(total)}" if total else ""))
    if outcome[0] is not None:
        raise outcome[0]


def free() -> None:
    """Give memory back that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
