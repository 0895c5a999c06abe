"""What a folder with a model says of itself, before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opensora_core.curation.captions.prompt import MOST_FRAMES, MOST_PROMPT
from opensora_core.errors import CheckpointError

OWN_FILE = "osora.json"
"""What a model that is made for this wants: `frames`, `at`, `prompt`, `max_tokens`, `layout`."""

GRID_TYPES = ("llava", "llava_next", "vipllava")
"""Types that were trained on one picture at a time, and so do better with the frames in one."""

ONE_PICTURE = (
    *("blip-2", "instructblip", "git", "paligemma", "kosmos-2", "vision-encoder-decoder", "pix2struct", "florence2"),
)
"""Types that take no more than one picture."""


def type_of(folder: Path) -> str:
    """The type of model in a folder.

    Raises:
        CheckpointError: it holds none that turns images and text into text.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = str(found["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(
            f"no captioner in {folder}: it has no config.json that names a model_type",
            "name a folder in transformers' layout, such as a download of hf:llava-hf/llava-v1.6-mistral-7b-hf",
        ) from None
    from transformers.models.auto import modeling_auto

    if name not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        told = "; its own code would be needed, which is never run" if "auto_map" in found else ""
        raise CheckpointError(
            f"{folder} holds a model of type {name}, which does not turn images and text into text{told}",
            "LLaVA, LLaVA-NeXT, LLaVA-OneVision and Qwen-VL do, among others",
        )
    return name


def own_settings(folder: Path) -> dict[str, Any]:
    """What `osora.json` of a folder asks for; nothing where there is none.

    Raises:
        CheckpointError: it cannot be read, or asks for what cannot be.
    """
    path = folder / OWN_FILE
    if not path.is_file():
        return {}
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
        at = own.get("at") or []
        is_sound = all(0 <= float(share) <= 1 for share in at) and len(at) <= MOST_FRAMES
        is_sound &= 0 < int(own.get("frames") or len(at) or 1) <= MOST_FRAMES and int(own.get("max_tokens") or 1) > 0
        is_sound &= own.get("layout", "separate") in ("separate", "grid")
        is_sound &= isinstance(prompt := own.get("prompt", ""), str) and len(prompt) <= MOST_PROMPT
    except (OSError, ValueError, ArithmeticError, TypeError, AttributeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise CheckpointError(f"{path} cannot be read", "it holds frames, at, prompt, max_tokens and layout")
    return dict(own)


def cure(error: Exception, folder: Path) -> str:
    """What to do about a folder that could not be read."""
    if isinstance(error, ImportError):
        return "install what it names, or choose another model"
    return f"delete {folder} and fetch it again"


def first_line(error: Exception) -> str:
    """What an error of a library says, without the rest of its page."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
