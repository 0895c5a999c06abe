"""A folder that `osora sample --model` takes, made of a run: half the bytes, and no optimizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from opensora_core import components
from opensora_core.config import Config, read_settings, to_dict, with_settings
from opensora_core.errors import UsageError
from opensora_core.files import replacing_folder, write_bytes, write_manifest
from opensora_core.runs import CONFIG_FILE, newest_checkpoint
from opensora_core.vae.patch import PatchVAE

MODEL_FILE = "model.safetensors"


def check_export(folder: Path) -> None:
    """Check that an export may go to a folder; worth asking before a training run, not after it.

    Raises:
        UsageError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UsageError(f"{folder} exists and is not empty", "remove it, or choose another --export")


def export(run: Path, folder: Path) -> None:
    """Make a model of a run's newest checkpoint: averaged weights in bf16, settings, SHA-256 manifest.

    Parts that the run trained itself (of the tiny model) come along; others are named in the settings.

    Raises:
        UsageError: the run has no checkpoint yet, or the folder holds something.
    """
    check_export(folder)
    if newest_checkpoint(run) is None:
        raise UsageError(f"the run in {run} has no checkpoint of a model yet", f"osora train --resume {run}")
    config = with_settings(Config(), read_settings(run / CONFIG_FILE))
    model = components.build_model(
        with_settings(config, {"model.weights": str(run), "runtime.device": "cpu", "runtime.dtype": "fp32"})
    )
    with replacing_folder(folder) as part:
        if (run / "vae").is_dir():
            PatchVAE.from_pretrained(run / "vae").save_pretrained(part / "vae", torch.bfloat16)
        if (run / "text").is_dir():
            from transformers import AutoTokenizer, T5EncoderModel

            T5EncoderModel.from_pretrained(run / "text", dtype=torch.bfloat16).save_pretrained(part / "text")
            AutoTokenizer.from_pretrained(run / "text").save_pretrained(part / "text")
        state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, part / MODEL_FILE)
        write_bytes(part / CONFIG_FILE, (json.dumps(to_dict(config), indent=1) + "\n").encode())
        for path in part.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for its owner's eyes only
        write_manifest(part)
