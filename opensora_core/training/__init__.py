"""From data to weights: `train` yields events, `export` makes a folder that `osora sample --model` takes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from opensora_core import components
from opensora_core.config import Config, TrainConfig, to_dict, with_settings
from opensora_core.errors import ConfigError, InputError, UsageError
from opensora_core.files import replacing, write_bytes, write_manifest
from opensora_core.text import load_text_encoder
from opensora_core.training.loop import CheckpointSaved, Event, Resumed, Task, TrainProgress, fit
from opensora_core.training.world import AutoencoderTask, DenoiserTask, TextTask, make_text_encoder
from opensora_core.vae.patch import PatchVAE

__all__ = ["CheckpointSaved", "Event", "Resumed", "TrainProgress", "check_export", "export", "train"]

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"


def train(config: Config, *, output: Path, data: str = "world", resume: bool = False) -> Iterator[Event]:
    """Train autoencoder, text encoder and denoiser from nothing, one after the other.

    Args:
        config: the settings; saved in the run's folder.
        output: the run's folder: `vae/`, `text/`, `model.safetensors` and `config.json` once done, and `checkpoints/`.
        data: what to train on; `world`, the procedural one.
        resume: go on with the run that is in the folder, from its newest whole checkpoints.

    Raises:
        UsageError: data that is not known, a folder that holds a run already, or none to resume.
        ConfigError: settings that this data cannot train.
        TrainingError, CheckpointError, ResourceError, Stopped: see `fit`.
    """
    if data != "world":
        raise UsageError(f"unknown data '{data}'", "known: world")
    _check(config)
    started = (output / CONFIG_FILE).exists()
    if started and not resume:
        raise UsageError(f"{output} holds a run already", "go on with it by --resume, or choose another --output")
    if resume and not started:
        raise UsageError(f"{output} holds no run to resume", "leave out --resume to start one")
    write_bytes(output / CONFIG_FILE, (json.dumps(to_dict(config), indent=1) + "\n").encode())
    device = components.resolve_device(config.runtime.device)
    components.tune_allocator(device)
    parts: tuple[Callable[[Config, Path, torch.device], Iterator[Event]], ...] = (_train_vae, _train_text, _train_model)
    with (output / METRICS_FILE).open("a", buffering=1) as metrics:
        for part in parts:
            for event in part(config, output, device):
                if isinstance(event, TrainProgress):
                    metrics.write(json.dumps(dataclasses.asdict(event)) + "\n")
                yield event


def _check(config: Config) -> None:
    from opensora_core import world

    video = config.video
    size = (video.num_frames, video.height, video.width)
    if size != (world.NUM_FRAMES, world.SIZE, world.SIZE):
        shown = "x".join(map(str, size))
        raise InputError(f"the world is 16x64x64, not {shown}", "use --preset tiny")
    runtime = config.runtime
    if runtime.dtype not in ("auto", "fp32") or runtime.compile or runtime.offload:
        raise ConfigError(
            "this trainer computes in fp32, neither compiled nor offloaded, but the settings say "
            f"dtype {runtime.dtype}, compile {runtime.compile}, offload {runtime.offload}",
            "leave runtime.dtype, runtime.compile and runtime.offload as they are",
        )
    if (config.vae.kind, config.text.kind) != ("patch", "t5"):
        raise InputError(
            f"only a 'patch' VAE and a 't5' text encoder are trained from nothing, "
            f"not '{config.vae.kind}' and '{config.text.kind}'",
            "use --preset tiny",
        )


def _fit(task: Task, train: TrainConfig, output: Path) -> Iterator[Event]:
    return fit(task, train, output / CHECKPOINTS / task.name)


def _train_vae(config: Config, output: Path, device: torch.device) -> Iterator[Event]:
    if (output / "vae").exists():
        return
    torch.manual_seed(config.train.seed)
    vae = PatchVAE(latent_channels=config.model.in_channels).to(device)
    settings = {"max_steps": config.train.vae_steps, "batch_size": 12, "lr": 2e-3, "warmup_steps": 30}
    recipe = with_settings(config.train, settings)
    task = AutoencoderTask(vae, batch_size=recipe.batch_size, seed=recipe.seed)
    yield from _fit(task, recipe, output)
    vae.cpu().eval()
    task.measure_statistics()
    with _WholeFolder(output / "vae") as folder:
        vae.save_pretrained(folder)


def _train_text(config: Config, output: Path, device: torch.device) -> Iterator[Event]:
    if (output / "text").exists():
        return
    start = output / CHECKPOINTS / "text-start"
    if not start.exists():
        with _WholeFolder(start) as folder:
            make_text_encoder(
                folder,
                width=config.model.caption_channels,
                max_length=config.model.caption_length,
                seed=config.train.seed,
            )
    settings = {"max_steps": config.train.text_steps, "batch_size": 128, "lr": 2e-3, "warmup_steps": 50}
    recipe = with_settings(config.train, settings)
    task = TextTask(start, batch_size=recipe.batch_size, seed=recipe.seed, max_length=config.model.caption_length)
    task.module.to(device)
    yield from _fit(task, recipe, output)
    with _WholeFolder(output / "text") as folder:
        task.encoder.cpu().save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)


def _train_model(config: Config, output: Path, device: torch.device) -> Iterator[Event]:
    if (output / MODEL_FILE).exists():
        return
    vae = PatchVAE.from_pretrained(output / "vae")
    text = load_text_encoder(
        "t5",
        output / "text",
        max_length=config.model.caption_length,
        cleaning=config.text.cleaning,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    torch.manual_seed(config.train.seed)
    model = components.empty_model(config).to(device)
    objective = components.build_objective(config)
    task = DenoiserTask(model, vae, text, objective, batch_size=config.train.batch_size, seed=config.train.seed)
    yield from _fit(task, config.train, output)
    with replacing(output / MODEL_FILE) as part:
        save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, part)


class _WholeFolder:
    """A temporary folder that takes its name only when the block ends without an error."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.part = target.with_name(f".{target.name}.part")

    def __enter__(self) -> Path:
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        return self.part

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.part.rename(self.target)
        else:
            shutil.rmtree(self.part, ignore_errors=True)


def check_export(folder: Path) -> None:
    """Check that an export may go to a folder; worth asking before a training run, not after it.

    Raises:
        UsageError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UsageError(f"{folder} exists and is not empty", "remove it, or choose another --export")


def export(run: Path, folder: Path) -> None:
    """Make a folder of a finished run that `osora sample --model` takes: bf16 weights, settings, SHA-256 manifest.

    Raises:
        UsageError: the run is not finished, or the folder holds something.
    """
    check_export(folder)
    if not (run / MODEL_FILE).exists():
        raise UsageError(f"the run in {run} is not finished", f"osora train --output {run} --resume")
    from transformers import AutoTokenizer, T5EncoderModel

    with _WholeFolder(folder) as part:
        PatchVAE.from_pretrained(run / "vae").save_pretrained(part / "vae", torch.bfloat16)
        T5EncoderModel.from_pretrained(run / "text", dtype=torch.bfloat16).save_pretrained(part / "text")
        AutoTokenizer.from_pretrained(run / "text").save_pretrained(part / "text")
        state = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(run / MODEL_FILE).items()}
        save_file(state, part / MODEL_FILE)
        shutil.copy(run / CONFIG_FILE, part / CONFIG_FILE)
        for path in part.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for its owner's eyes only
        write_manifest(part)
