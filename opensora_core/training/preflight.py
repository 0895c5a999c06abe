"""What a training would do, without doing it: the doctor of the data, and what the model takes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opensora_core import assets, components
from opensora_core.config import Config, with_settings
from opensora_core.data.buckets import Bucket
from opensora_core.data.manifest import read_manifest, write_clips
from opensora_core.training.corpus import buckets_of, latent_shape, look, pace_of, require_some
from opensora_core.training.denoiser import sketch, tokens_and_flops
from opensora_core.training.events import CheckpointSaved, Event, Notice, Rejected, TrainProgress
from opensora_core.training.memory import estimate
from opensora_core.training.run import train
from opensora_core.training.settings import WORLD, check_settings, with_absolute_paths

MEASURED_STEPS = 4


@dataclass(frozen=True)
class BucketPlan:
    """A size that batches have: how many clips go there, and what a batch of them is."""

    size: str
    clips: int
    batch_size: int
    tokens_per_batch: int
    steps_per_epoch: float


@dataclass(frozen=True)
class Checkup:
    """What training would do.

    Attributes:
        source: of the data, and `format`, what it was read as.
        clips: how many there are, and `usable`, how many of them can be trained on.
        reasons: how many were left out, per reason; `examples` has a clip and its full reason for each.
        buckets: where the usable ones go.
        epochs: how often `train.max_steps` goes through them.
        parameters: of the model; `trained` of them are.
        teraflops: of training on the largest batch.
        memory: an estimate of the peak, in bytes, with what it is made of; see `MemoryEstimate`.
        checkpoint_bytes: what a checkpoint takes on the disk.
        tokens: of a batch, per bucket.
        seconds_per_step: measured, or None.
        seconds: for the whole run, or None.
    """

    source: str
    format: str
    clips: int
    usable: int
    reasons: dict[str, int]
    examples: dict[str, str]
    buckets: tuple[BucketPlan, ...]
    epochs: float
    parameters: int
    trained: int
    teraflops: float
    memory: dict[str, int]
    checkpoint_bytes: int
    tokens: tuple[int, ...]
    seconds_per_step: float | None = None
    seconds: float | None = None


def examine(config: Config, *, measure: bool = False, write_manifest: Path | None = None) -> Iterator[Event | Checkup]:
    """Look at data and settings, and say what training would do.

    Args:
        config: the settings.
        measure: also train a few steps, in a folder that is thrown away, to tell the time.
        write_manifest: write the clips down as they were counted, for `--data` to take.

    Raises:
        InputError: data that cannot be read, or of which nothing is usable.
        UsageError, ConfigError: as `train`.
    """
    config = with_absolute_paths(config)
    check_settings(config)
    buckets = buckets_of(config)
    checkup = _checkup(config, buckets)
    if config.data.source == WORLD:
        plans = (BucketPlan(str(buckets[0]), 0, buckets[0].batch_size, checkup.tokens[0], 0.0),)
        yield replace(checkup, source=WORLD, format="clips that are made as it goes", buckets=plans)
        return
    manifest = read_manifest(Path(config.data.source))
    yield from map(Notice, manifest.notes)
    found = yield from look(config, manifest, buckets, pace_of(config))
    if write_manifest is not None:
        write_clips(found.manifest, write_manifest)
        yield Notice(f"the clips as they were counted are in {write_manifest}: osora train --data {write_manifest}")
    require_some(config, found, buckets)
    examples: dict[str, str] = {}
    for clip, reason in found.rejects():
        examples.setdefault(reason.partition(":")[0], f"{clip}: {reason}")
    steps = [len(members) / bucket.batch_size for members, bucket in zip(found.members, buckets, strict=True)]
    checkup = replace(
        checkup,
        source=config.data.source,
        format=manifest.format,
        clips=len(manifest),
        usable=found.num_usable,
        reasons=dict(found.reasons.most_common()),
        examples=examples,
        buckets=tuple(
            BucketPlan(str(bucket), len(members), bucket.batch_size, tokens, count)
            for bucket, members, tokens, count in zip(buckets, found.members, checkup.tokens, steps, strict=True)
        ),
        epochs=config.train.max_steps / sum(steps),
    )
    if measure:
        seconds = yield from _measured(config)
        checkup = replace(checkup, seconds_per_step=seconds, seconds=seconds * config.train.max_steps)
    yield checkup


def _checkup(config: Config, buckets: Sequence[Bucket]) -> Checkup:
    """What there is to say of the model."""
    device = components.resolve_device(config.runtime.device)
    dtype = components.resolve_dtype(config.runtime.dtype, device)
    model = sketch(config)
    shapes = [latent_shape(config, bucket) for bucket in buckets]
    sizes = [tokens_and_flops(model, shape) for shape in shapes]
    largest = max(range(len(buckets)), key=lambda number: sizes[number][0] * buckets[number].batch_size)
    part = -(-buckets[largest].batch_size * config.train.draws // config.train.accumulate)
    memory = estimate(model, config.train, latent_shape=shapes[largest], batch_size=part, dtype=dtype)
    encoders = 0 if config.data.cache or config.data.source == WORLD else _encoder_bytes(config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Checkup(
        source="",
        format="",
        clips=0,
        usable=0,
        reasons={},
        examples={},
        buckets=(),
        epochs=0.0,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=trained,
        teraflops=sizes[largest][1] * buckets[largest].batch_size / 1e12,
        memory={
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "average of the weights": memory.average,
            "copies in the dtype of the arithmetic": memory.autocast_copies,
            "activations": memory.activations,
            "VAE and text encoder": encoders,
            "together": memory.total + encoders,
            "activations if no block recomputes": memory.activations_kept,
            "activations if all blocks recompute": memory.activations_recomputed,
        },
        checkpoint_bytes=memory.checkpoint,
        tokens=tuple(size[0] * bucket.batch_size for size, bucket in zip(sizes, buckets, strict=True)),
    )


def _encoder_bytes(config: Config) -> int:
    """What the files of VAE and text encoder have, or are known to have."""
    total = 0
    kinds: tuple[assets.Kind, ...] = ("vae", "text")
    for kind in kinds:
        word = components.word_of(config, kind)
        if not word:
            continue
        found = assets.find(word, kind=kind)
        if found is not None:
            files = [found.path] if found.path.is_file() else found.path.rglob("*")
            total += sum(file.stat().st_size for file in files if file.is_file())
        elif word in assets.ASSETS:
            total += assets.ASSETS[word].size_bytes
    return total


def _measured(config: Config) -> Generator[Event, None, float]:
    """Seconds of a step, the first one left out; nothing of the run is kept."""
    steps = {"train.max_steps": MEASURED_STEPS, "train.log_every": 1, "train.warmup_steps": 0}
    quiet = {"validation.every": 0, "validation.sample_every": 0, "train.wandb": ""}
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = train(with_settings(config, {**steps, **quiet}), output=Path(folder) / "run")
        for event in run:
            if isinstance(event, TrainProgress):
                seconds.append(len(event.sample_ids) / event.clips_per_second)
            elif not isinstance(event, Rejected | CheckpointSaved):
                yield event
    return statistics.median(seconds[1:])
