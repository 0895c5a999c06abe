"""A few processes of this machine on one training step, in turns with one process on its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora_core import models
from opensora_core.bench.measurement import Event, Measurement
from opensora_core.config import ParallelConfig, TrainConfig
from opensora_core.models import LatentTransformer
from opensora_core.parallel import Axis, Cut, Mesh, counted, exchange, gathered, joined, launched, sequence_parallel
from opensora_core.parallel.engines import build_engine
from opensora_core.parallel.local import on_ranks
from opensora_core.sampling import Progress
from opensora_core.tensors import Condition


@dataclass(frozen=True)
class Work:
    """What is measured: an STDiT, the latent (C, T, h, w) of a sample, and how often it steps.

    Attributes:
        width: D.
        depth: blocks.
        latent: of a sample.
        repeats: steps that count; one more comes before them.
    """

    width: int
    depth: int
    latent: tuple[int, int, int, int]
    repeats: int

    @property
    def frames(self) -> int:
        """T, as the patch is one frame deep."""
        return self.latent[1]

    @property
    def patches(self) -> int:
        """S, of patches of 2 x 2."""
        return self.latent[2] * self.latent[3] // 4


FULL, QUICK = Work(384, 8, (4, 16, 32, 32), 5), Work(192, 4, (4, 8, 16, 16), 5)
HEADS, CAPTION = 6, 64

SHARDINGS = ("replicate", "zero2", "zero3")
_CPU = torch.device("cpu")
_SECONDS = 900.0  # after which processes are given up


def measure_ranks(*, quick: bool) -> Iterator[Event]:
    """Measure two processes that share frames, and two that share samples; four as well, unless it is to be quick.

    Each has one thread. Times are medians over steps; one process steps in turns with the several, on an idle machine.
    """
    sizes, work = ((2,), QUICK) if quick else ((2, 4), FULL)
    repeats = work.repeats
    total = len(sizes) * (1 + len(SHARDINGS))
    done = 0
    for size in sizes:
        yield Progress(f"{size} processes share frames", done, total, None)
        found = on_ranks(size, share_frames, work, seconds=_SECONDS)
        done += 1
        yield from _frames(f"{size} processes share frames", size, found, work)
        for sharding in SHARDINGS:
            case = f"{size} processes share samples ({sharding})"
            yield Progress(case, done, total, None)
            found = on_ranks(size, share_samples, sharding, work, seconds=_SECONDS)
            done += 1
            alone, together = _times(found, "alone"), _times(found, "together")
            yield Measurement(case, "time of a step", together, "s", repeats)
            yield Measurement(case, "of one process", alone, "s", repeats)
            yield Measurement(case, "times as fast", alone / together, "x", repeats)


def _frames(case: str, size: int, found: list[dict[str, Any]], work: Work) -> Iterator[Measurement]:
    repeats = work.repeats
    alone, together, sending = (_times(found, name) for name in ("alone", "together", "sending"))
    yield Measurement(case, "time of a step", together, "s", repeats)
    yield Measurement(case, "of one process", alone, "s", repeats)
    yield Measurement(case, "times as fast", alone / together, "x", repeats)
    yield Measurement(case, "exchanges alone", sending, "s", repeats)
    ideal = alone / size + sending
    yield Measurement(case, "of the ideal share and the exchanges", together / ideal, "x", repeats)
    sent = found[0]["sent"] / (2 * work.depth)
    yield Measurement(case, "sent by a process, per block and pass", sent, "B", 1)
    formula = 2 * (4 * work.frames * work.patches * work.width / size) * (size - 1) / size
    yield Measurement(case, "by the formula", formula, "B", 1)


def _times(found: list[dict[str, Any]], name: str) -> float:
    """The median over steps of the slowest process."""
    return float(
        statistics.median(max(times) for times in zip(*(each[name] for each in found if each[name]), strict=True))
    )


# on every process -----------------------------------------------------------------------------------------------------


def share_frames(work: Work) -> dict[str, Any]:
    """Step on one sample by itself (rank 0, while the others rest), with its frames shared, and with the sending alone.

    Returns:
        Seconds of the steps under `alone` (of rank 0), `together`, `sending`; bytes that its exchanges have `sent`.
    """
    with joined(_CPU, sequence=launched()) as mesh:
        axis, model, inputs = mesh.sequence, _model(work), _inputs(work, 1)
        result: dict[str, Any] = {"alone": [], "together": [], "sending": []}
        for number in range(work.repeats + 1):
            alone = [_timed(partial(_step, model, *inputs), mesh)] if axis.rank == 0 else _wait(mesh)
            undo = sequence_parallel(model, axis)
            with counted() as traffic:
                together = _timed(partial(_step, model, *inputs), mesh)
            undo()
            sending = _timed(partial(_send, work, axis), mesh)
            if number:  # the first one allocates
                result["alone"] += alone
                result["together"].append(together)
                result["sending"].append(sending)
            result["sent"] = traffic.sent["exchange"]
        return result


def share_samples(sharding: str, work: Work) -> dict[str, Any]:
    """Step on a batch of a sample per process by itself (rank 0), and with each process on its own sample."""
    size = launched()
    parallel = ParallelConfig(sharding=sharding)  # type: ignore[arg-type]
    with joined(_CPU, shard=1 if sharding == "replicate" else 0) as mesh:
        whole, own = _inputs(work, size), _inputs(work, 1)
        result: dict[str, Any] = {"alone": [], "together": []}
        single = _trained(_model(work), Mesh(_CPU), parallel)
        shared = _trained(_model(work), mesh, parallel)
        for number in range(work.repeats + 1):
            alone = [_timed(partial(single, *whole), mesh)] if mesh.rank == 0 else _wait(mesh)
            together = _timed(partial(shared, *own), mesh)
            if number:
                result["alone"] += alone
                result["together"].append(together)
        return result


def _model(work: Work) -> LatentTransformer:
    torch.manual_seed(0)
    model = models.build(
        "stdit",
        hidden_size=work.width,
        depth=work.depth,
        num_heads=HEADS,
        caption_channels=CAPTION,
        caption_length=16,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.train()


def _inputs(work: Work, count: int) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, *work.latent, generator=generator)
    tokens = torch.randn(count, 16, CAPTION, generator=generator)
    return latents, torch.full((count,), 500), Condition(tokens, torch.ones(count, 16, dtype=torch.bool))


def _step(model: LatentTransformer, latents: Tensor, timestep: Tensor, condition: Condition) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    model(latents, timestep, condition).square().mean().backward()


def _trained(model: LatentTransformer, mesh: Mesh, parallel: ParallelConfig) -> Callable[..., None]:
    """A whole step of an engine, optimizer included."""
    engine = build_engine(mesh, parallel, TrainConfig(), dtype=torch.float32)
    called = engine.prepare(model, model, lambda module: [torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)])

    def step(latents: Tensor, timestep: Tensor, condition: Condition) -> None:
        engine.backward(called(latents, timestep, condition).square().mean())
        engine.clip(1.0)
        engine.update()

    return step


def _send(work: Work, axis: Axis) -> None:
    """The exchanges of a step and nothing else."""
    held, wanted = Cut.even(1, work.frames, axis), Cut.even(2, work.patches, axis)
    x = torch.zeros(1, held.sizes[axis.rank], work.patches, work.width)
    for _ in range(2 * work.depth):  # forward and backward
        (y,) = exchange([x], held, wanted, axis)
        (x,) = exchange([y], wanted, held, axis)


def _timed(step: Callable[[], None], mesh: Mesh) -> float:
    """Seconds of a step that all begin together."""
    gathered(mesh.whole, 0)
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _wait(mesh: Mesh) -> list[float]:
    """Rest while rank 0 works on its own: its next meeting is the others' too."""
    gathered(mesh.whole, 0)
    return []
