"""Whether the processes of a run fit together, and how fast they talk, before they begin.

    from opensora_core.parallel.fabric import check_fabric

    yield from check_fabric(mesh, {"settings": digest(to_dict(config)), "data": ...})

One machine with an older version or another copy of the data trains on without complaint, and wrongly.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from opensora_core import __version__
from opensora_core.errors import UsageError
from opensora_core.notice import Notice
from opensora_core.parallel.agreement import gathered
from opensora_core.parallel.mesh import Mesh

NUM_BYTES = {"cpu": 4 * 2**20}
NUM_BYTES_OF_GPUS = 64 * 2**20
REPEATS = 3
MAX_SHOWN = 8  # odd ranks that a message names


@dataclass(frozen=True)
class Fabric:
    """What connects the processes.

    Attributes:
        processes, hosts: how many they are, on how many machines.
        num_bytes: that each had in a measured collective.
        all_reduce, all_to_all: bytes that leave each process in a second, in the best of three tries.
    """

    processes: int
    hosts: int
    num_bytes: int
    all_reduce: float
    all_to_all: float


def digest(values: Any) -> str:
    """A short name for values that are long to show; what JSON does not know counts as its words."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


def check_fabric(mesh: Mesh, facts: Mapping[str, str]) -> Iterator[Fabric | Notice]:
    """Compare what all processes are and have, and measure the two collectives that a step consists of.

    Args:
        mesh: of the run; for one process there is nothing to check.
        facts: names and values that are to be the same everywhere, such as digests of settings and data. The versions
            of osora, torch and Python and the kind of the device are added.

    Raises:
        UsageError: a process differs; its rank, its machine and both values are named.
    """
    if mesh.size == 1:
        return
    hosts = compare(mesh, facts)
    models = Counter(gathered(mesh.whole, _model(mesh.device)))
    if len(models) > 1:
        shown = ", ".join(f"{count} x {name}" for name, count in models.most_common())
        yield Notice(f"the devices differ, and the slowest sets the pace: {shown}")
    yield _measured(mesh, hosts)


def compare(mesh: Mesh, facts: Mapping[str, str]) -> list[str]:
    """Compare what all processes are and have; returns the host of each.

    Args:
        mesh: of the run.
        facts: as for `check_fabric`.

    Raises:
        UsageError: a process differs; its rank, its machine and both values are named.
    """
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    own = {"osora": __version__, **facts, **versions, "device": mesh.device.type}
    everybody = gathered(mesh.whole, (socket.gethostname(), own))
    require_same(everybody)
    return [host for host, _ in everybody]


def require_same(everybody: list[tuple[str, dict[str, str]]]) -> None:
    """Check that all say the same.

    Args:
        everybody: host and facts of each rank.

    Raises:
        UsageError: they do not; whoever is not of the majority is named, or where there is none, not of rank 0's mind.
    """
    names = list(dict.fromkeys(name for _, facts in everybody for name in facts))
    for name in names:
        values = [facts.get(name, "nothing") for _, facts in everybody]
        (usual, most), *others = Counter(values).most_common()  # of equals the first, which is rank 0's
        if not others:
            continue
        odd = [rank for rank, value in enumerate(values) if value != usual]
        shown = ", ".join(f"rank {rank} on {everybody[rank][0]} has {values[rank]}" for rank in odd[:MAX_SHOWN])
        more = f", and {len(odd) - MAX_SHOWN} more" if len(odd) > MAX_SHOWN else ""
        which = f"{most} of {len(values)} have {usual}"
        raise UsageError(
            f"the processes differ in {name}: {shown}{more}; {which}",
            "bring the same to every machine, and start again",
        )


def _model(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _measured(mesh: Mesh, hosts: list[str]) -> Fabric:
    num_bytes = NUM_BYTES.get(mesh.device.type, NUM_BYTES_OF_GPUS)
    count = num_bytes // 4 // mesh.size * mesh.size
    sent, received = (torch.ones(count, device=mesh.device) for _ in range(2))
    share = (mesh.size - 1) / mesh.size * count * 4  # of what a process has and sends to the others
    reducing = _best(mesh, lambda: dist.all_reduce(sent))
    exchanging = _best(mesh, lambda: dist.all_to_all_single(received, sent))
    return Fabric(mesh.size, len(set(hosts)), count * 4, 2 * share / reducing, share / exchanging)


def _best(mesh: Mesh, collective: Callable[[], object]) -> float:
    """Seconds of the best of some tries, each as long as its slowest process took."""
    own: list[float] = []
    for _ in range(REPEATS + 1):  # the first one connects
        dist.barrier()
        start = time.perf_counter()
        collective()
        if mesh.device.type != "cpu":
            torch.accelerator.synchronize(mesh.device)
        own.append(time.perf_counter() - start)
    tries = list(zip(*gathered(mesh.whole, own), strict=True))[1:]
    best: float = min(max(times) for times in tries)
    return max(best, 1e-9)
