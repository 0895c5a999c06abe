"""Reading a diffusers autoencoder from a folder, strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from opensora_core.errors import CheckpointError, WeightsError

CONFIG_FILE = "config.json"


def load_autoencoder(path: Path, class_name: str, *, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Read a folder that holds a diffusers autoencoder, or a diffusers pipeline with one in its `vae` folder.

    Args:
        path: the folder.
        class_name: the class of diffusers that its `config.json` must name.
        dtype: of the weights.
        device: where to put them.

    Returns:
        The diffusers model, frozen and in eval mode.

    Raises:
        WeightsError: there is no such folder.
        CheckpointError: it holds something else, or weights that are torn or do not fit.
    """
    folder = path / "vae" if (path / "model_index.json").is_file() else path
    _check_class(folder, class_name)

    import diffusers

    try:
        # accelerate, which the low-memory path needs, is no dependency; pickles are only ever read with weights_only
        model, info = getattr(diffusers, class_name).from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the {class_name} in {folder} cannot be read: {_first_line(error)}", f"delete {folder} and fetch it again"
        ) from error
    for kind in ("missing", "unexpected", "mismatched"):
        if keys := sorted(str(key) for key in info.get(f"{kind}_keys", ())):
            more = ", ..." if len(keys) > 10 else ""
            raise CheckpointError(
                f"the weights in {folder} do not fit {class_name}: {len(keys)} {kind}: {', '.join(keys[:10])}{more}",
                f"its weights and its {CONFIG_FILE} must belong together: fetch both again",
            )
    return model.to(device).eval().requires_grad_(False)


def _check_class(folder: Path, class_name: str) -> None:
    if not folder.is_dir():
        raise WeightsError(f"no VAE at {folder}: not a folder", "name a folder with --set vae.weights=DIR")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        found = config["_class_name"]
    except OSError:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"no VAE in {folder}: it has no {CONFIG_FILE}, but {held}",
            "name a folder in diffusers' layout with --set vae.weights=DIR",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"no VAE in {folder}: its {CONFIG_FILE} names no class of diffusers",
            "name a folder in diffusers' layout with --set vae.weights=DIR",
        ) from None
    if found != class_name:
        raise CheckpointError(
            f"{folder} holds a {found}, not the {class_name} that was asked for", "choose its kind with --set vae.kind"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
