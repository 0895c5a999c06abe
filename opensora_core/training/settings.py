"""Settings of a training: refused early where they cannot be honoured, and the same from wherever a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from opensora_core import assets
from opensora_core.config import Config, ParallelConfig, with_settings
from opensora_core.errors import ConfigError, UsageError
from opensora_core.parallel import Mesh, processes_here
from opensora_core.parallel.engines import check_engine
from opensora_core.training.world import check_world

WORLD = "world"
_AT_LEAST_ONE = (
    "train.max_steps",
    "train.batch_size",
    "train.draws",
    "train.accumulate",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "data.cache_variants",
    "data.decode_threads",
    "validation.num_bins",
)
_SHARES = ("data.max_rejects", "train.recompute", "train.decay_fraction", "train.ema_decay")


def check_settings(config: Config, *, cache_only: bool = False) -> None:
    """Refuse what cannot be trained, before anything is loaded.

    Raises:
        UsageError: no data is named.
        ConfigError: settings that contradict each other or cannot be honoured.
    """
    train, data = config.train, config.data
    if not data.source:
        raise UsageError("no data is named", "--data MANIFEST or FOLDER, or --data world with --preset tiny")
    check_engine(config.parallel)
    for name in _AT_LEAST_ONE:
        if _value(config, name) < 1:
            raise ConfigError(f"{name} = {_value(config, name)} is less than 1", f"--set {name}=1")
    if train.seed < 0:
        raise ConfigError(f"train.seed = {train.seed} is negative", "a seed is 0 or more")
    for name in _SHARES:
        if not 0 <= _value(config, name) <= 1:
            raise ConfigError(f"{name} = {_value(config, name)} is no share", "a number from 0 to 1")
    if config.runtime.offload:
        raise ConfigError(
            "runtime.offload is for sampling: in training every part is needed in every step",
            "--cache DIR keeps the encoders out of memory; --set train.recompute=1 keeps activations out",
        )
    if train.accumulate > train.batch_size * train.draws:
        raise ConfigError(
            f"train.accumulate = {train.accumulate} parts of a batch of {train.batch_size}", "lower train.accumulate"
        )
    _check_trained(config)
    if cache_only and not data.cache:
        raise ConfigError("there is no cache to fill", "--cache DIR --cache-only")
    if data.source == WORLD:
        _check_world(config)


def _check_trained(config: Config) -> None:
    """Refuse what contradicts itself about which weights are trained."""
    train = config.train
    if train.lora_rank and train.trainable != "all":
        raise ConfigError(
            f"train.lora_rank = {train.lora_rank} trains an adapter, train.trainable = {train.trainable} the weights",
            "leave one of them out",
        )
    if train.trainable == "temporal-only" and not config.model.family.startswith("stdit"):
        raise ConfigError(
            f"a '{config.model.family}' has no temporal attention of its own", "--set train.trainable=all"
        )
    if train.trainable == "all-but-text" and config.model.condition != "text":
        raise ConfigError(
            f"a '{config.model.family}' does not read captions by cross attention", "--set train.trainable=all"
        )
    if config.model.lora:
        raise ConfigError(
            f"model.lora = {config.model.lora} is for sampling", "train.init takes the run of an adapter as well"
        )


def _check_world(config: Config) -> None:
    check_world(config)
    validation = config.validation
    if config.data.cache or config.train.init or config.train.lora_rank or validation.every or validation.sample_every:
        raise ConfigError(
            "--data world makes its clips as it goes and trains every part from nothing: no cache, --init, LoRA or "
            "validation",
            "osora bench world measures it; name a manifest or folder to train on clips",
        )


def _value(config: Config, path: str) -> float:
    group, name = path.split(".")
    value: float = getattr(getattr(config, group), name)
    return value


class Axes(TypedDict):
    """Sizes of the axes of a training's mesh."""

    sequence: int
    shard: int


def axes_of(parallel: ParallelConfig) -> Axes:
    """How the processes of a training are laid out.

    Raises:
        ConfigError: axes that a training does not have.
    """
    if parallel.cfg != 1:
        raise ConfigError(
            f"parallel.cfg = {parallel.cfg} is for sampling: training computes nothing twice", "--set parallel.cfg=1"
        )
    sequence = max(parallel.sequence, 1)
    # gradients and weights are dealt out over all that share a set of samples and frames; see the engines
    shard = {"replicate": 1, "zero2": 0, "zero3": 0, "hybrid": max(processes_here() // sequence, 1)}
    return {"sequence": sequence, "shard": shard[parallel.sharding]}


def check_axes(parallel: ParallelConfig, mesh: Mesh) -> None:
    """Refuse settings that do not go with the number of processes.

    Raises:
        ConfigError: a wanted number of groups that see other samples, and another one that there is.
    """
    if parallel.data and parallel.data != mesh.data.size:
        raise ConfigError(
            f"parallel.data = {parallel.data}, but {mesh.size} processes with sequence={mesh.sequence.size} "
            f"are {mesh.data.size} groups",
            f"--gpus {parallel.data * mesh.sequence.size}, or leave parallel.data out",
        )


def with_absolute_paths(config: Config) -> Config:
    """The same settings wherever the run is resumed from: what names a file or folder here does so absolutely."""
    changes = {}
    for name, value in (
        ("data.source", config.data.source),
        ("data.cache", config.data.cache),
        ("validation.data", config.validation.data),
        ("train.init", config.train.init),
    ):
        path = Path(value).expanduser()
        if value and value not in assets.ASSETS and value != WORLD and (path.exists() or name == "data.cache"):
            changes[name] = str(path.resolve())
    return with_settings(config, changes)
