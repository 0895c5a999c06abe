"""How the processes of a run share its samples: groups draw different ones, the members of a group draw one jointly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from opensora_core.config import Config
from opensora_core.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Sharing:
    """A number of processes as a product.

    Attributes:
        data: groups that draw different samples.
        cfg: processes that share the two halves of guidance.
        sequence: processes that share the frames of a sample.
    """

    data: int
    cfg: int
    sequence: int


def sharing_of(config: Config, processes: int) -> Sharing:
    """How so many processes share the work: as `parallel.*` says, and what that leaves open shares the frames.

    Raises:
        ConfigError: sizes that do not multiply to the number of processes, or that nothing could be done with.
    """
    wanted = {name: getattr(config.parallel, name) for name in ("data", "cfg", "sequence")}
    given = {name: size for name, size in wanted.items() if size}
    if any(size < 0 for size in wanted.values()) or not 1 <= wanted["cfg"] <= 2:
        raise ConfigError(
            f"--parallel {_spelled(wanted)} has a size that cannot be",
            "cfg is 1 or 2; data and sequence are 1 or more, or 0 for what the others leave",
        )
    if wanted["cfg"] == 2 and config.sampling.guidance == 1:
        raise ConfigError(
            "with --guidance 1 there is one prediction a step, which --parallel cfg=2 cannot share",
            "--parallel cfg=1, or another --guidance",
        )
    if config.parallel.engine != "torch":
        raise ConfigError(
            f"parallel.engine = {config.parallel.engine} trains; samples are drawn by torch alone",
            "--set parallel.engine=torch",
        )
    product = prod(given.values())
    rest, left = divmod(processes, product)
    if left or (rest > 1 and len(given) == len(wanted)):
        many = "1 process runs" if processes == 1 else f"{processes} processes run"
        raise ConfigError(
            f"--parallel {_spelled(given)} is for {product} processes, and {many}",
            f"--gpus {product}, or sizes that multiply to {processes}",
        )
    if not wanted["sequence"]:
        return Sharing(max(wanted["data"], 1), wanted["cfg"], rest)
    return Sharing(wanted["data"] or rest, wanted["cfg"], wanted["sequence"])


def rounds_of(requests: Sequence[T], groups: int, batch_size: int) -> list[tuple[Sequence[T], ...]]:
    """What each group draws, round by round.

    Neighbours go to different groups, so that the first requests are done first, and no group has a sample more than
    another has less; near the end a group's batch may be smaller than another's, or empty.
    """
    batches = [
        [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
        for own in (requests[group::groups] for group in range(groups))
    ]
    return list(itertools.zip_longest(*batches, fillvalue=()))


def _spelled(sizes: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())
