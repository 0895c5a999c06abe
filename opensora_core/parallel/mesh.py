"""Who computes what: the processes of a run as a grid with named axes.

    replicate   copies of the weights, which see other samples
    shard       parts of the weights, whose owners see other samples too
    cfg         the conditional and the unconditional half of a sample
    sequence    the frames of a sample

Neighbours on the last axis are neighbours in rank, so what talks most shares a machine. One process is a grid of one
and takes the same path as many: its axes have one member and no process group, and every collective leaves things as
they are.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from opensora_core.errors import ConfigError, UsageError
from opensora_core.launch.hosts import is_loopback, own_address

AXES = ("replicate", "shard", "cfg", "sequence")


@dataclass(frozen=True)
class Axis:
    """The processes that share a job, seen by one of them.

    Attributes:
        name: of the axis.
        size: how many they are.
        rank: which one this is, from 0.
        group: what their collectives go through; None where there is only one.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: Any = None


@dataclass(frozen=True)
class Mesh:
    """The grid of a run, seen by one of its processes.

    Attributes:
        device: that this process computes on.
        rank: of this process among all.
        size: of the grid.
        replicate: axis of the copies.
        shard: axis of the parts of the weights.
        data: both of them as one axis: who is on it sees other samples.
        cfg: axis of guidance.
        sequence: axis of the frames.
        grid: torch's own description, for FSDP and its like; None for one process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    replicate: Axis = field(default_factory=lambda: Axis("replicate"))
    shard: Axis = field(default_factory=lambda: Axis("shard"))
    data: Axis = field(default_factory=lambda: Axis("data"))
    cfg: Axis = field(default_factory=lambda: Axis("cfg"))
    sequence: Axis = field(default_factory=lambda: Axis("sequence"))
    grid: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    @property
    def whole(self) -> Axis:
        """Everybody, as one axis."""
        return Axis("whole", self.size, self.rank, dist.group.WORLD if self.size > 1 else None)


def launched() -> int:
    """How many processes a launcher (torchrun and those that speak like it) has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of the processes of this machine this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes_here() -> int:
    """How many of the run's processes are on this machine; all of them, where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched()))


def place(device: torch.device) -> torch.device:
    """The device of this process, where `device` names a kind: each process of a machine takes another one."""
    if device.type in ("cpu", "mps") or (device.index is not None and launched() == 1):
        return device
    return torch.device(device.type, local_rank() if launched() > 1 else (device.index or 0))


@contextmanager
def joined(
    device: torch.device, *, sequence: int = 1, cfg: int = 1, shard: int = 1, timeout_seconds: float = 600.0
) -> Iterator[Mesh]:
    """Meet the other processes of the run, and part from them in the end.

    Args:
        device: that this process computes on.
        sequence: size of that axis.
        cfg: size of that axis.
        shard: size of that axis; 0 takes all that the others leave. What is left over replicates.
        timeout_seconds: that a collective may take.

    Raises:
        ConfigError: sizes that the number of processes does not divide into.
        UsageError: the others cannot be met.
    """
    size = launched()
    sizes = _sizes(size, sequence=sequence, cfg=cfg, shard=shard)
    if size == 1:
        yield Mesh(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _name_the_card(size)
    backend = {"cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}.get(device.type, "gloo")
    try:
        store, rank = _meeting_place(timeout_seconds)
        # a prefix for each time: what lies there of the last one names addresses that are gone
        store = PrefixStore(f"osora/{next(_times)}", store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_seconds + _MARGIN)
        )
    except (ValueError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR', 'nowhere')}:{os.environ.get('MASTER_PORT', '')}"
        raise UsageError(
            f"the other processes of this run cannot be met at {where}: {error}",
            "--gpus or --nodes start them; on several machines GLOO_SOCKET_IFNAME names the network card",
        ) from error
    try:
        grid = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        data = grid["replicate", "shard"]._flatten("data")
        axes = {name: _axis(name, grid[name]) for name in AXES} | {"data": _axis("data", data)}
        yield Mesh(device, dist.get_rank(), size, grid=grid, **axes)
    finally:
        dist.destroy_process_group()


def _name_the_card(size: int) -> None:
    """Let gloo speak through the card that leads to the other machines, where it would offer them 127.0.0.1.

    It takes the address that this machine's name stands for, which in Debian's hosts file is one that nobody else can
    reach; and where the name stands for nothing, the loopback.
    """
    if size <= processes_here() or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if sys.platform != "linux":
        return
    import fcntl

    with suppress(OSError):
        if not is_loopback(socket.gethostbyname(socket.gethostname())):
            return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        first = socket.gethostbyname(os.environ["MASTER_ADDR"])
        wanted = own_address() if is_loopback(first) else own_address(first)
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # a card without an address
                asked = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, name.encode().ljust(256, b"\0"))
                if socket.inet_ntoa(asked[20:24]) == wanted:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return


_SIOCGIFADDR = 0x8915
_times = count()
_MARGIN = 60.0  # seconds after which torch ends what waits, unless the watchdog has said who is missing before


@cache
def _meeting_place(timeout_seconds: float) -> tuple[Store, int]:
    """Where the processes meet, which lasts as long as they do, however often they part; and the rank of this one."""
    store, rank, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds + _MARGIN))))
    return store, rank


def _sizes(size: int, *, sequence: int, cfg: int, shard: int) -> tuple[int, int, int, int]:
    rest, left = divmod(size, sequence * cfg)
    shard = shard or max(rest, 1)
    if left or rest % shard:
        shown = f"sequence={sequence}, cfg={cfg}" + (f", shard={shard}" if shard > 1 else "")
        raise ConfigError(
            f"{size} processes do not divide into {shown}", f"--gpus {sequence * cfg * shard}, or a multiple of it"
        )
    return rest // shard, shard, cfg, sequence


def _axis(name: str, part: DeviceMesh) -> Axis:
    return Axis(name, part.size(), part.get_local_rank(), part.get_group() if part.size() > 1 else None)
