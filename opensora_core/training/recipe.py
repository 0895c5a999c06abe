"""Stages of a training, one after the other: each begins with what the one before it made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from opensora_core.config import Config, flatten, to_dict, with_settings
from opensora_core.errors import InputError, UsageError
from opensora_core.files import write_bytes
from opensora_core.parallel import joined
from opensora_core.parallel.agreement import first
from opensora_core.runs import CHECKPOINTS, CONFIG_FILE, RECIPE_FILE, checkpoints, is_recipe, step_of
from opensora_core.training.events import Event, Stage
from opensora_core.training.run import train
from opensora_core.training.settings import check_settings


@dataclass(frozen=True)
class Chapter:
    """A stage of a recipe: its name, and the settings it is trained with."""

    name: str
    config: Config


def train_recipe(chapters: Sequence[Chapter], *, output: Path, resume: bool = False) -> Iterator[Event]:
    """Train stages one after the other, each in a run of its own below `output`.

    Args:
        chapters: the stages; the first one's `train.init` is where everything begins, the others' is replaced.
        output: gets `1-NAME/`, `2-NAME/`, ... and `recipe.json`.
        resume: go on with what is there; stages that are done are skipped.

    Raises:
        As `train`; everything is checked before the first stage begins.
    """
    with joined(torch.device("cpu")) as mesh:
        chapters = first(mesh, lambda: _begun(chapters, output, resume=resume))
    before: Path | None = None
    for number, chapter in enumerate(chapters, start=1):
        folder = output / f"{number}-{chapter.name}"
        config = chapter.config
        if before is not None:
            config = with_settings(config, {"train.init": str(before.resolve())})
        if not _is_done(folder, config):
            yield Stage(chapter.name, number, len(chapters), folder)
            yield from train(config, output=folder, resume=(folder / CONFIG_FILE).exists())
        before = folder


def _begun(chapters: Sequence[Chapter], output: Path, *, resume: bool) -> list[Chapter]:
    """Write a recipe down, or read what was written of it; returns its stages."""
    if is_recipe(output) and not resume:
        raise UsageError(f"{output} holds a recipe already", f"go on with it by --resume {output}")
    found = read_recipe(output) if resume else list(chapters)
    for chapter in found:
        check_settings(chapter.config)
    if not resume:
        content = [{"name": chapter.name, "settings": to_dict(chapter.config)} for chapter in found]
        write_bytes(output / RECIPE_FILE, (json.dumps(content, indent=1) + "\n").encode())
    return found


def read_recipe(folder: Path) -> list[Chapter]:
    """The stages of a recipe that was begun.

    Raises:
        UsageError: there is none.
        InputError: its file is damaged.
    """
    if not is_recipe(folder):
        raise UsageError(f"{folder} holds no recipe to resume", "leave out --resume to start one")
    try:
        content = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        return [Chapter(row["name"], with_settings(Config(), flatten(row["settings"]))) for row in content]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / RECIPE_FILE} is damaged: {error}", "start another recipe") from error


def _is_done(folder: Path, config: Config) -> bool:
    saved = checkpoints(folder / CHECKPOINTS)
    return bool(saved) and step_of(saved[0]) >= config.train.max_steps
