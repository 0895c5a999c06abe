"""A folder of small captioned clips, a model small enough to train on them in a test, and runs to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from opensora_core.config import Config, with_settings
from opensora_core.media import write_video
from opensora_core.presets import preset
from opensora_core.training import Event, train
from tests.core.exported import SETTINGS

NUM_CLIPS = 7


def make_clips(folder: Path, count: int = NUM_CLIPS, num_frames: int = 9, size: tuple[int, int] = (40, 56)) -> Path:
    """Write clips in which every frame has a colour of its own, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        colours = rng.integers(0, 255, (num_frames, 1, 1, 3), np.uint8)
        write_video(folder / f"clip{index}.mp4", np.broadcast_to(colours, (num_frames, *size, 3)).copy(), 8)
        (folder / f"clip{index}.txt").write_text(f"a flicker of colours, number {index}\n")
    return folder


def clips_config(model: Path, clips: Path, **changes: Any) -> Config:
    """Settings that train the tiny model of `tests.core.exported` on clips; names of settings have `__` for a dot."""
    settings = {
        **SETTINGS,
        "vae.weights": str(model / "vae"),
        "text.weights": str(model / "text"),
        "video.frame_interval": 2,
        "data.source": str(clips),
        "train.max_steps": 6,
        "train.batch_size": 2,
        "train.num_workers": 0,
        "train.log_every": 1,
        "train.checkpoint_every": 2,
        "train.warmup_steps": 0,
        "train.decay_fraction": 0.0,
        "train.lr": 1e-3,
    }
    return with_settings(
        preset("tiny"), {**settings, **{name.replace("__", "."): value for name, value in changes.items()}}
    )


def run(config: Config, output: Path, **options: Any) -> list[Event]:
    """Train, and collect the events."""
    return list(train(config, output=output, **options))


def rows(output: Path) -> dict[int, tuple[str, str, str, tuple[str, ...]]]:
    """What a run reported of each step, to the last bit; of a step that was repeated, the last word."""
    found = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["part"] == "model":
            numbers = (row["loss"].hex(), row["lr"].hex(), row["grad_norm"].hex())
            found[row["step"]] = (*numbers, tuple(row["sample_ids"]))
    return found


def sums(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 sums of a checkpoint's weights, average and optimizer."""
    content = json.loads((checkpoint / "manifest.json").read_text())
    return {name: content[name] for name in ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")}
