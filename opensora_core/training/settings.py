"""Settings of a training: refused early where they cannot be honoured, and the same from wherever a run is resumed."""

from __future__ import annotations

from pathlib import Path

from opensora_core import assets
from opensora_core.config import Config, with_settings
from opensora_core.errors import ConfigError, UsageError
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
