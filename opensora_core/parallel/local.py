"""Calling a function on several new processes of this machine that meet, as a launcher would start them."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from opensora_core.launch.hosts import free_port


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 120.0) -> list[Any]:
    """Call a function on `size` new processes with one thread each, which find each other by `joined`.

    Args:
        size: number of processes.
        function: importable, as the processes are started anew; what it takes and returns goes through pickle.
        *arguments: for each of them.
        seconds: after which all are killed.

    Returns:
        What each returned, by rank.

    Raises:
        RuntimeError: one of them failed, with its traceback, or told nothing in time.
    """
    context = mp.get_context("forkserver")  # imports torch once, however often this is called
    context.set_forkserver_preload(["torch.distributed.fsdp", "opensora_core.components", "opensora_core.parallel"])
    results: Any = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_call, args=((rank, size, port), results, function, arguments)) for rank in range(size)
    ]
    end = time.monotonic() + seconds
    found: dict[int, Any] = {}
    failures: list[str] = []
    try:
        for process in processes:
            process.start()
        while len(found) + len(failures) < size and time.monotonic() < end:
            if results.empty():
                if not failures and not any(process.is_alive() for process in processes) and results.empty():
                    break  # a rank that died tells nothing
                time.sleep(0.02)
                continue
            rank, value, failure = results.get()
            if failure is None:
                found[rank] = value
            else:
                failures.append(f"rank {rank}:\n{failure}")
                end = min(end, time.monotonic() + 5)  # the others may wait for it for ever
        for process in processes:
            process.join(max(end - time.monotonic(), 1))
    finally:
        for process in processes:
            process.kill()
    if failures:
        raise RuntimeError("\n".join(failures))
    if len(found) < size:
        codes = [process.exitcode for process in processes]
        raise RuntimeError(f"{size - len(found)} of {size} ranks told nothing in {seconds} s; they ended with {codes}")
    return [found[rank] for rank in range(size)]


def _call(place: tuple[int, int, int], results: Any, function: Callable[..., Any], arguments: Any) -> None:
    rank, size, port = place
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
