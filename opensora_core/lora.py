"""Adapters of low rank (LoRA, arXiv 2106.09685), in the layout of `peft`: a few numbers trained instead of the weights.

A linear layer W x becomes W x + alpha / rank * B A x, with A (rank, in) and B (out, rank). Only A and B are trained.
For sampling they are added into W, so that the model is as it was: the same layers, keys and speed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora_core.errors import CheckpointError, ConfigError
from opensora_core.files import replacing, write_bytes

SETTINGS_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

TARGETS = r"blocks\.\d+\..*\.(qkv|proj|q_linear|kv_linear|fc1|fc2)"
"""Which layers get an adapter: attention and MLP of every block; not the embedders, nor the last layer."""

_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# what makes more of an adapter than B A, or takes it for one of a base that was changed as well
_VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "kasa_config", "arrow_config", "alora_invocation_tokens",
    "layer_replication",
)  # fmt: skip
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_SHOWN = 10


def add_lora(model: nn.Module, rank: int, alpha: float = 0.0, *, seed: int = 0) -> None:
    """Give the layers of `TARGETS` adapters, which change nothing at first, and freeze everything else.

    Args:
        model: a model of `MODELS`; changed in place.
        rank: of the adapters, at least 1.
        alpha: their weight times their rank; 0 is the rank itself.
        seed: of the start values.

    Raises:
        ConfigError: a rank that is none.
    """
    if rank < 1:
        raise ConfigError(f"a LoRA of rank {rank} has nothing to train", "--set train.lora_rank=16")
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):  # peft draws start values of its own, which are replaced below
        inject_adapter_in_model(_settings(rank, alpha), model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        found = _MATRIX.fullmatch(name)
        parameter.requires_grad_(found is not None)
        if found is not None:
            start = torch.zeros(parameter.shape)
            if found["side"] == "A":
                nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(start)


def _settings(rank: int, alpha: float) -> Any:
    from peft import LoraConfig

    alpha = alpha or rank
    weight: Any = int(alpha) if alpha == int(alpha) else alpha  # peft says int, and computes with either
    return LoraConfig(r=rank, lora_alpha=weight, target_modules=TARGETS, lora_dropout=0.0, bias="none")


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters that `add_lora` gave a model: `blocks.0.attn.qkv.lora_A.weight` -> (rank, in), not copied."""
    return {_plain(name): parameter.detach() for name, parameter in model.named_parameters() if _MATRIX.fullmatch(name)}


def _plain(name: str) -> str:
    """A name without what peft puts around it in a model or a file."""
    return name.removeprefix(_PREFIX).replace(".default.weight", ".weight")


def save_lora(folder: Path, tensors: Mapping[str, Tensor], rank: int, alpha: float = 0.0) -> None:
    """Write an adapter as `peft` does, and as `peft.PeftModel.from_pretrained` reads it.

    Args:
        folder: gets `adapter_config.json` and `adapter_model.safetensors`; made if missing.
        tensors: from `lora_state`, or the same under the names of the model's parameters, as an EMA has them.
        rank: as given to `add_lora`.
        alpha: as given to `add_lora`.

    Raises:
        ResourceError: the file system refuses it.
    """
    settings = {**_settings(rank, alpha).to_dict(), "inference_mode": True}
    content = {_PREFIX + _plain(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(folder / TENSORS_FILE) as part:
        save_file(content, part, {"format": "pt"})
        part.chmod(0o644)  # safetensors writes for its owner's eyes only
    write_bytes(
        folder / SETTINGS_FILE, (json.dumps(settings, indent=2, sort_keys=True, default=sorted) + "\n").encode()
    )


def is_lora(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / SETTINGS_FILE).is_file()


@torch.no_grad()
def merge_lora(model: nn.Module, folder: Path, scale: float = 1.0) -> None:
    """Add an adapter into the weights: W += scale * alpha / rank * B A, computed in fp32.

    Args:
        model: a model without adapters; its layers and keys stay as they are.
        folder: an adapter of ours, or of `peft`. Nothing in it is run: only safetensors are read.
        scale: how strongly; 0 leaves the model alone, and a negative one turns it the other way.

    Raises:
        CheckpointError: no adapter, a torn one, one of another kind than plain LoRA, or of another model; what does not
            fit is named.
    """
    settings, tensors = _read_settings(folder), _read_tensors(folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices: dict[str, dict[str, Tensor]] = {}
    troubles = []
    for key, tensor in tensors.items():
        found = _MATRIX.fullmatch(_plain(key))
        if found is None:
            troubles.append(f"no matrix of a plain LoRA: {key}")
        elif found["layer"] not in layers:
            troubles.append(f"not of this model: {key}")
        else:
            matrices.setdefault(found["layer"], {})[found["side"]] = tensor
    for name, sides in matrices.items():
        troubles += [f"missing: {name}.lora_{side}.weight" for side in "AB" if side not in sides]
        if len(sides) == 2 and (trouble := _misfit(name, layers[name], sides["A"], sides["B"])):
            troubles.append(trouble)
    if troubles or not matrices:
        more = [f"and {len(troubles) - _SHOWN} more"] if len(troubles) > _SHOWN else []
        listed = "\n".join(f"  {line}" for line in [*troubles[:_SHOWN], *more]) or "  it is empty"
        raise CheckpointError(
            f"the adapter in {folder} does not fit the model:\n{listed}", "--model must name what it was trained on"
        )
    for name, sides in matrices.items():
        weight = layers[name].weight
        a, b = (sides[side].to(weight.device, torch.float32) for side in "AB")
        change = scale * _weight(settings, name, len(a)) * (b @ a)
        weight.copy_(weight.float() + change)


def _misfit(name: str, layer: nn.Linear, a: Tensor, b: Tensor) -> str:
    """What is wrong with the shapes of two matrices; empty if nothing is."""
    if a.ndim == b.ndim == 2 and b.shape[1] == len(a) and (len(b), a.shape[1]) == tuple(layer.weight.shape):
        return ""
    shown = " and ".join("x".join(map(str, matrix.shape)) for matrix in (b, a))
    return f"{name}: B and A are {shown}, but the weight is {'x'.join(map(str, layer.weight.shape))}"


def _weight(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """What B A of a layer is multiplied by, as peft has it."""
    alpha = float(settings["lora_alpha"])
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind, _ = settings["peft_type"], float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} does not describe a LoRA: {error!r}") from error
    unknown = [name for name in _VARIANTS if settings.get(name)]
    if (start := settings.get("init_lora_weights")) not in _STARTS:
        unknown.append(f"init_lora_weights={start}")
    if kind != "LORA" or unknown:
        raise CheckpointError(
            f"{folder} is no plain LoRA, but {', '.join([kind, *unknown])}", "merge it with peft, and name the result"
        )
    return dict(settings)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / TENSORS_FILE
    if not file.is_file():
        held = ", ".join(sorted(path.name for path in folder.iterdir() if path.name != SETTINGS_FILE)) or "nothing"
        raise CheckpointError(
            f"{folder} has no {TENSORS_FILE}, but {held}", "a pickle is not read: ask whoever made it for safetensors"
        )
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read, it is torn: {error}", "delete it and fetch it again") from error
    return tensors
