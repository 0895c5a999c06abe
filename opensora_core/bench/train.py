"""How fast a preset trains on this machine, and where the time and the memory of a step go.

The loop is the one that trains. It is broken off after a few steps, so no checkpoint is ever written, and each step is
a report of its own. Weights are random, because a step takes as long with any others.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora_core import assets, components, training, world
from opensora_core.bench import machine
from opensora_core.bench.measurement import Event, Measurement
from opensora_core.config import Config, with_settings
from opensora_core.diffusion.objective import Objective
from opensora_core.errors import InputError, ResourceError, Stopped
from opensora_core.files import readable
from opensora_core.media import write_video
from opensora_core.models import LatentTransformer
from opensora_core.sampling import Notice, Progress
from opensora_core.tensors import Condition
from opensora_core.training.corpus import latent_shape
from opensora_core.training.denoiser import DenoiserTask, fit_denoiser, prepare, sketch, tokens_and_flops
from opensora_core.training.events import Facts, TrainProgress, Working
from opensora_core.training.memory import MemoryEstimate, estimate
from opensora_core.training.settings import WORLD, with_absolute_paths
from opensora_core.training.world import WorldTask, check_world
from opensora_core.vae.patch import PatchVAE

GIVEN, WHOLE, CACHED = "latents and captions given", "whole step", "cached"
HEADROOM = 1.2  # of an estimate: what is computed with for a moment, and what libraries keep
MOST_CLIPS = 16  # that are written to be read again and again
NEVER = 10**6

_GIB = 2**30


@dataclass(frozen=True)
class Length:
    """How long a case goes on.

    Attributes:
        warm_up: steps left out: the first ones allocate, compile, and wait for the loader to start.
        most: measured steps.
        least: measured steps, even if the time is over.
        seconds: the time.
    """

    warm_up: int
    most: int
    least: int
    seconds: float


FULL, QUICK = Length(2, 30, 3, 120.0), Length(1, 6, 1, 10.0)


def measure(config: Config, *, quick: bool = False) -> Iterator[Event]:
    """Measure the step alone, then with data and encoders, then with data from a cache.

    The whole step reads `data.source`: the invented world, or clips. Where none is named, or the world is not of the
    model's size, clips of the world are written at that size. The cached case always trains on such clips.

    Args:
        config: the settings, as for `train`. Depth and batch are made smaller where memory does not do; it is told.
        quick: a few steps of each.

    Raises:
        ResourceError: not even one sample of a model of two blocks fits.
        ConfigError, DeviceError, InputError: as `train`.
    """
    length = QUICK if quick else FULL
    config = _breaking_off(with_absolute_paths(config))
    device = components.resolve_device(config.runtime.device)
    components.tune_allocator(device)
    config, needed, shrunk = fitting(config, machine.free_bytes(device))
    yield from map(Notice, shrunk)

    yield from _given(config, needed, length)
    missing = _missing_encoders(config)
    if missing:
        yield Notice(
            f"'{WHOLE}' and '{CACHED}' are left out: {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not on this machine; docs/weights.md says how to get them"
        )
        return
    free, encoders = machine.free_bytes(device), _encoder_bytes(config)
    if free is not None and HEADROOM * needed.total + encoders > free:
        yield Notice(
            f"'{WHOLE}' and '{CACHED}' are left out: the model takes {readable(needed.total)}, VAE and text encoder "
            f"{readable(encoders)}, and {readable(free)} are free"
        )
        return
    with tempfile.TemporaryDirectory(prefix="osora-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        clips = folder / "clips"
        if _is_world(config):
            yield from _rows(WHOLE, lambda: fit_denoiser(_world_task(config), config, folder / "whole"), length)
        else:
            source = config.data.source if config.data.source not in ("", WORLD) else str(_written(config, clips))
            changes = {"data.source": source, "data.cache": ""}
            run = partial(training.train, with_settings(config, changes), output=folder / "whole")
            yield from _rows(WHOLE, run, length)
        changes = {"data.source": str(_written(config, clips)), "data.cache": str(folder / "cache")}
        run = partial(training.train, with_settings(config, changes), output=folder / "cached")
        yield from _rows(CACHED, run, length)


def _breaking_off(config: Config) -> Config:
    """Settings of a run that reports every step, never comes to a checkpoint, and does nothing beside training."""
    return with_settings(
        config,
        {
            "train.init": "",
            "train.max_steps": NEVER,
            "train.log_every": 1,
            "train.checkpoint_every": NEVER,
            "train.wandb": "",
            "validation.every": 0,
            "validation.sample_every": 0,
        },
    )


# what fits ------------------------------------------------------------------------------------------------------------


def fitting(config: Config, free_bytes: int | None) -> tuple[Config, MemoryEstimate, list[str]]:
    """Make the batch smaller, then the model less deep, until training fits into memory.

    Args:
        config: the settings.
        free_bytes: on the device; None where that is not known, and then everything fits.

    Returns:
        The settings, what they take, and what was changed, in words.

    Raises:
        ResourceError: nothing fits.
    """
    wanted, needed = config, _estimate(config)
    before = needed
    while free_bytes is not None and HEADROOM * needed.total > free_bytes:
        batch, depth = config.train.batch_size, config.model.depth
        if batch > 1:
            changes = {"train.batch_size": batch // 2, "train.accumulate": min(config.train.accumulate, batch // 2)}
        elif depth > 2:
            changes = {"model.depth": max(depth // 4 * 2, 2)}  # even: blocks of some families come in pairs
        else:
            raise ResourceError(
                f"training takes {readable(before.total)}, with two blocks and one sample {readable(needed.total)}, "
                f"and {readable(free_bytes)} are free",
                "choose a smaller preset, or --set train.recompute=1",
            )
        config = with_settings(config, changes)
        needed = _estimate(config)
    if config == wanted:
        return config, needed, []
    changed = [
        f"{name} {getattr(getattr(config, group), name)} instead of {getattr(getattr(wanted, group), name)}"
        for group, name in (("train", "batch_size"), ("train", "accumulate"), ("model", "depth"))
        if getattr(getattr(config, group), name) != getattr(getattr(wanted, group), name)
    ]
    free = readable(free_bytes or 0)
    return config, needed, [f"training takes {readable(before.total)} and {free} are free: {', '.join(changed)}"]


def _estimate(config: Config) -> MemoryEstimate:
    device = components.resolve_device(config.runtime.device)
    return estimate(
        sketch(config),
        config.train,
        latent_shape=latent_shape(config, config.video),
        batch_size=-(-config.train.batch_size * config.train.draws // config.train.accumulate),
        dtype=components.resolve_dtype(config.runtime.dtype, device),
    )


def _encoders(config: Config) -> Iterator[tuple[str, Path | None]]:
    """Every encoder that has weights, and where they are on this disk."""
    kinds: tuple[tuple[assets.Kind, str], ...] = (("vae", "the VAE"), ("text", "the text encoder"))
    for kind, called in kinds:
        if word := components.word_of(config, kind):
            found = assets.find(word, kind=kind)
            yield f"{called} '{word}'", found.path if found else None


def _missing_encoders(config: Config) -> list[str]:
    return [name for name, path in _encoders(config) if path is None]


def _encoder_bytes(config: Config) -> int:
    total = 0
    for _, path in _encoders(config):
        files = [] if path is None else [path] if path.is_file() else path.rglob("*")
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


# cases ----------------------------------------------------------------------------------------------------------------


class GivenTask(DenoiserTask):
    """A denoiser on one batch of random latents and captions of full length, which is on its device already.

    Args:
        model: the denoiser.
        objective: what it learns.
        latent_shape: (C, T, h, w) of a sample.
        condition: of the batch.
        dtype: of the arithmetic.
    """

    def __init__(
        self,
        model: LatentTransformer,
        objective: Objective,
        latent_shape: tuple[int, ...],
        condition: Condition,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model, objective, dtype)
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(len(condition), *latent_shape, generator=generator).to(device)
        self.condition = condition.to(device)
        self.tokens, self.flops = tokens_and_flops(model, latent_shape)

    def batch(self, step: int) -> int:
        """Nothing to make."""
        return step

    def encoded(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """The batch that is there."""
        return self.latents, self.condition

    def facts(self, batch: int) -> Facts:
        """What the report says of a batch."""
        seen = len(self.condition) * self.draws
        return Facts((), seen * self.tokens, seen * self.flops)


def _given_task(config: Config) -> GivenTask:
    model = components.build_initial_model(config)
    prepare(model, config)
    device = next(model.parameters()).device
    dtype = components.resolve_dtype(config.runtime.dtype, device)
    return GivenTask(
        model, components.build_objective(config), latent_shape(config, config.video), _condition(config), dtype
    )


def _condition(config: Config) -> Condition:
    """A batch of what the text encoder of these settings would give."""
    model, count = config.model, config.train.batch_size
    generator = torch.Generator().manual_seed(1)
    if model.condition == "class":
        return Condition(torch.randint(model.num_classes, (count,), generator=generator))
    length = model.caption_length if model.condition == "text" else 1
    tokens = torch.randn(count, length, model.caption_channels, generator=generator)
    mask = torch.ones(count, length, dtype=torch.bool) if model.condition == "text" else None
    size = torch.tensor([[config.video.height, config.video.width]], dtype=torch.float32).repeat(count, 1)
    return Condition(tokens, mask, size if model.family == "pixart-ms" else None)


def _given(config: Config, needed: MemoryEstimate, length: Length) -> Iterator[Event]:
    alone = with_settings(config, {"train.num_workers": 0})
    with tempfile.TemporaryDirectory(prefix="osora-", ignore_cleanup_errors=True) as folder:
        yield from _rows(GIVEN, lambda: fit_denoiser(_given_task(config), alone, Path(folder)), length)
    yield Measurement(GIVEN, "estimated memory", needed.total / _GIB, "GiB", 1)
    if not config.runtime.compile:  # what is compiled hides its tensors, and is not what was estimated
        activations = needed.activations + needed.autocast_copies
        yield Measurement(GIVEN, "estimated activations", activations / _GIB, "GiB", 1)
        yield Measurement(GIVEN, "measured activations", peak_activations(_given_task(config), config) / _GIB, "GiB", 1)


def _world_task(config: Config) -> WorldTask:
    """The invented world with the VAE and text encoder that are named, both on the CPU of the loader's worker."""
    model = components.build_initial_model(config)
    prepare(model, config)
    return WorldTask(
        model,
        PatchVAE.from_pretrained(components.locate(config, "vae").path),
        components.build_text_encoder(with_settings(config, {"runtime.device": "cpu", "runtime.dtype": "fp32"})),
        components.build_objective(config),
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        dtype=components.resolve_dtype(config.runtime.dtype, next(model.parameters()).device),
    )


def _is_world(config: Config) -> bool:
    """Whether the model trains on the invented world as it is."""
    try:
        check_world(config)
    except InputError:
        return False
    return config.data.source == WORLD


def _written(config: Config, folder: Path) -> Path:
    """A folder of clips of the world, brought to the size, length and rate of `video`, each with its caption."""
    if folder.exists():
        return folder
    folder.mkdir()
    video = config.video
    times = np.arange((video.num_frames - 1) * video.frame_interval + 1) % world.NUM_FRAMES
    rows, columns = (np.arange(side) * world.SIZE // side for side in (video.height, video.width))
    for index in range(min(config.train.batch_size, MOST_CLIPS)):
        rng = np.random.default_rng([config.train.seed, index])
        scene = world.draw_scene(rng, "train")
        frames = world.render(scene, rng)[times][:, rows][:, :, columns]
        write_video(folder / f"clip{index}.mp4", frames, video.source_fps)
        (folder / f"clip{index}.txt").write_text(world.caption(scene, rng) + "\n", encoding="utf-8")
    return folder


# numbers --------------------------------------------------------------------------------------------------------------


def _rows(case: str, run: Callable[[], Iterator[training.Event]], length: Length) -> Iterator[Event]:
    """Let a run go on for as long as it takes, break it off, and tell the numbers of its steps."""
    gc.collect()  # what the case before left
    machine.reset_peak()
    reports: list[TrainProgress] = []
    total = length.warm_up + length.most
    begin = time.monotonic()
    events = run()
    try:
        for event in events:
            if isinstance(event, training.Notice):
                yield Notice(f"{case}: {event.message}")
            elif isinstance(event, Working):
                yield Progress(f"{case}: {event.task}", event.step, event.total, event.seconds_left)
                begin = time.monotonic()
            elif isinstance(event, TrainProgress):
                reports.append(event)
                spent = time.monotonic() - begin
                yield Progress(case, len(reports), total, spent / len(reports) * (total - len(reports)))
                measured = len(reports) - length.warm_up
                if measured >= length.most or (measured >= length.least and spent > length.seconds):
                    break
    except Stopped as error:  # there is no run to go on with, as the loop thinks
        raise Stopped(f"stopped while '{case}' was measured", signal_number=error.exit_code - 128) from error
    finally:
        if isinstance(events, Generator):
            events.close()
    yield from numbers_of(case, reports[length.warm_up :])


def numbers_of(case: str, reports: Sequence[TrainProgress]) -> Iterator[Measurement]:
    """Medians over steps of one report each, but of waiting the share of all the time: it comes in bursts."""
    count = len(reports)
    seconds = [report.seconds_left / (report.total - report.step) for report in reports]
    waited = sum(report.data_wait * taken for report, taken in zip(reports, seconds, strict=True))
    yield Measurement(case, "samples per second", _median(report.clips_per_second for report in reports), "1/s", count)
    yield Measurement(case, "tokens per second", _median(report.tokens_per_second for report in reports), "1/s", count)
    yield Measurement(case, "time of a step", statistics.median(seconds), "s", count)
    yield Measurement(case, "time of a step, shortest", min(seconds), "s", count)
    yield Measurement(case, "time of a step, longest", max(seconds), "s", count)
    yield Measurement(case, "time spent waiting for data", waited / sum(seconds), "share", count)
    reached = [report.mfu for report in reports if report.mfu is not None]
    if reached:
        yield Measurement(case, "peak arithmetic reached (MFU)", _median(reached), "share", count)
    yield Measurement(case, "peak memory", max(report.peak_bytes for report in reports) / _GIB, "GiB", count)


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def peak_activations(task: DenoiserTask, config: Config) -> int:
    """Bytes of tensors that forward and backward of a batch have at once, beyond weights, gradients and the batch.

    Counted as they are made and freed, on any device. What a kernel takes for a moment within itself is not seen.
    """
    model = task.model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:  # there already, so that they do not come while activations go
            parameter.grad = torch.zeros_like(parameter)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(config.train.seed)
    task.draws = config.train.draws
    batch = task.batch(0)
    alive = machine.Alive()
    with alive:
        for part in task.losses(batch, generator, config.train.accumulate):
            part["loss"].backward()  # type: ignore[no-untyped-call]
            del part
    return alive.peak
