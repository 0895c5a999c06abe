"""Published weights -> ours. Takes dicts of tensors; reading files is the business of `assets`.

Ours are Open-Sora 1.0's keys without the position tables (FACTS 5, 6). What else is understood:

    open-sora   the same with position tables, bare or under "ema"
    dit         facebookresearch/DiT: flat, a conv kernel without a time axis, `pos_embed`
    latte       Vchitect/Latte: under "ema"; like dit, with `temp_embed`
    pixart      PixArt-alpha: under "state_dict", a conv kernel without a time axis, `pos_embed`
    diffusers   DiTTransformer2DModel, PixArtTransformer2DModel, LatteTransformer3DModel (Latte-1)

Position tables are recomputed for the size at hand, never loaded. Whatever is left out is named in `Converted.dropped`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensora_core.errors import CheckpointError

NULL_CAPTION = "y_embedder.y_embedding"
_TABLES = (
    "pos_embed",
    "pos_embed_spatial",
    "pos_embed_temporal",
    "temp_embed",
    "pos_embed.pos_embed",
    "temp_pos_embed",
)
_CONTAINERS = ("ema", "state_dict", "model_state_dict", "model", "module")
_SAME_KEYS = {"stdit-parallel": "stdit", "latte": "dit"}
_SHOWN = 10


@dataclass(frozen=True)
class Converted:
    """Weights under our keys.

    Attributes:
        state: our keys -> tensors.
        dropped: keys of the file that are not among them: position tables, duplicates, entries that are no tensors.
        absent: our keys that this layout does not have. diffusers publishes PixArt and Latte-1 without a null caption:
            call `set_null_caption` of the model with the text encoder's embedding of the empty caption.
        layout: the layout that was recognised.
    """

    state: dict[str, Tensor]
    dropped: list[str]
    absent: list[str]
    layout: str


def convert(state: Mapping[str, Any], family: str) -> Converted:
    """Bring the content of a file to the keys of a family.

    Args:
        state: what the file holds, in any layout of this module.
        family: a name of `MODELS`.

    Raises:
        CheckpointError: not the weights of a denoiser, or of another family.
    """
    converted = _ours(state)
    found = guess_family(converted.state)
    # the layout of Latte's own release is the only thing that tells its weights from DiT's; DiT's may start a Latte
    wrong = found != _SAME_KEYS.get(family, family) or (converted.layout == "latte" and family == "dit")
    if wrong:
        found = "latte" if converted.layout == "latte" else found
        raise CheckpointError(
            f"the file holds weights of a '{found}' model, but the model is '{family}'",
            f"`--set model.family={found}`, or a preset of that family: `osora sample --help`",
        )
    return converted


def guess_family(state: Mapping[str, Any]) -> str:
    """Tell which family weights belong to; where families share their keys, the one of which more was published.

    Raises:
        CheckpointError: not the weights of a denoiser.
    """
    converted = _ours(state)
    keys = converted.state.keys()
    if "blocks.0.attn_temp.qkv.weight" in keys:
        return "stdit"
    if "blocks.0.adaLN_modulation.1.weight" in keys:
        return "latte" if converted.layout == "latte" else "dit"
    if "csize_embedder.mlp.0.weight" in keys:
        return "pixart-ms"
    if "blocks.1.attn.qkv.weight" in keys and "blocks.1.cross_attn.q_linear.weight" not in keys:
        return "latte-1"
    return "pixart"


def infer_settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """Read off weights the settings of `ModelConfig` that they determine; `family` as `guess_family` has it.

    The number of heads shows only where queries are normalised. A table of n classes is taken to have a null class.

    Raises:
        CheckpointError: not the weights of a denoiser.
    """
    converted = _ours(state)
    ours = converted.state
    try:
        kernel, out = ours["x_embedder.proj.weight"], ours["final_layer.linear.weight"]
        hidden_size, in_channels, *patch_size = kernel.shape
        settings: dict[str, Any] = {
            "family": guess_family(state),
            "in_channels": in_channels,
            "patch_size": tuple(patch_size),
            "hidden_size": hidden_size,
            "depth": len({key.split(".")[1] for key in ours if key.startswith("blocks.")}),
            "mlp_ratio": ours["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
            "learn_sigma": out.shape[0] == 2 * in_channels * math.prod(patch_size),
            "qk_norm": "blocks.0.attn.q_norm.weight" in ours,
        }
        if settings["qk_norm"]:
            settings["num_heads"] = hidden_size // ours["blocks.0.attn.q_norm.weight"].shape[0]
        if "y_embedder.embedding_table.weight" in ours:
            settings["condition"] = "class"
            settings["num_classes"] = ours["y_embedder.embedding_table.weight"].shape[0] - 1
        else:
            settings["condition"] = "pooled" if "blocks.0.adaLN_modulation.1.weight" in ours else "text"
            settings["caption_channels"] = ours["y_embedder.y_proj.fc1.weight"].shape[1]
            if NULL_CAPTION in ours:
                settings["caption_length"] = ours[NULL_CAPTION].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"these weights of layout '{converted.layout}' are incomplete: {error}") from error
    return settings


def diffusers_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read off the `config.json` beside diffusers' weights the settings that the weights do not tell.

    Raises:
        CheckpointError: the configuration of something else.
    """
    name = config.get("_class_name")
    known = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "LatteTransformer3DModel")
    if name not in known:
        raise CheckpointError(f"a diffusers model of class '{name}' does not load", f"these do: {', '.join(known)}")
    settings: dict[str, Any] = {"num_heads": config["num_attention_heads"]}
    if name != "LatteTransformer3DModel":
        settings["temporal_positions"] = False
    if name != "DiTTransformer2DModel":
        # diffusers stretches every size to the grid that the model was trained on
        settings["base_size"] = config["sample_size"] // config["patch_size"]
        settings["space_scale"] = float(config.get("interpolation_scale") or max(config["sample_size"] // 64, 1))
    return settings


def load(model: nn.Module, state: Mapping[str, Tensor], *, absent: Collection[str] = ()) -> list[str]:
    """Load weights under our keys, strictly. A model on the meta device takes over the tensors themselves.

    Args:
        model: a model of `MODELS`.
        state: our keys -> tensors, as from `convert`.
        absent: keys that may be missing; they keep their start values.

    Returns:
        The keys that were missing, of those that may be.

    Raises:
        CheckpointError: anything else missing, anything extra, or a shape that differs; the first ten are listed.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    troubles = [f"missing: {key}" for key in missing if key not in absent]
    troubles += [f"not of this model: {key}" for key in state if key not in own]
    troubles += [
        f"{key}: {_sides(state[key])} in the file, {_sides(own[key])} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if troubles:
        raise CheckpointError(f"the weights do not fit the model:\n{_listed(troubles)}", _difference(state, own))
    if any(tensor.is_meta for tensor in own.values()):
        model.load_state_dict(state, strict=False, assign=True)
        _materialise(model, missing)
    else:
        model.load_state_dict(state, strict=False)
    return missing


def init_from_image(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Start an STDiT from the weights of PixArt, in any layout; temporal attention keeps its start values.

    Its projections start at zero, so the new model treats every frame as the image model would.

    Returns:
        The keys that the image model does not have.

    Raises:
        CheckpointError: not a PixArt model, or one of another size.
    """
    converted = convert(state, "pixart")
    temporal = [key for key in model.state_dict() if ".attn_temp." in key]
    return load(model, converted.state, absent=[*temporal, *converted.absent])


# Layouts


def _ours(state: Mapping[str, Any]) -> Converted:
    """Recognise a layout and translate its keys, whatever the family."""
    ours, dropped = _unwrap(state)
    diffusers = any(key.startswith("transformer_blocks.0.") for key in ours)
    if diffusers:
        ours, duplicates = _from_diffusers(ours)
        dropped += duplicates
    layout = _layout(ours, diffusers)
    tables = [key for key in ours if key in _TABLES]
    for key in tables:
        del ours[key]
    kernel = ours["x_embedder.proj.weight"]
    if kernel.dim() == 4:
        ours["x_embedder.proj.weight"] = kernel.unsqueeze(2)
    captioned = "y_embedder.y_proj.fc1.weight" in ours
    return Converted(ours, dropped + tables, [NULL_CAPTION] if captioned and NULL_CAPTION not in ours else [], layout)


def _unwrap(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Find the tensors in what a file holds, and name what lies beside them."""
    for container in _CONTAINERS:
        if isinstance(state.get(container), Mapping):
            flat, dropped = _unwrap(state[container])
            return flat, [key for key in state if key != container] + dropped
    flat = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    return flat, [key for key, value in state.items() if not isinstance(value, Tensor)]


def _layout(flat: Mapping[str, Tensor], diffusers: bool) -> str:
    """Name the layout that these keys, by now in our spelling, came in."""
    kernel = flat.get("x_embedder.proj.weight")
    if kernel is None or kernel.dim() not in (4, 5) or "blocks.0.attn.qkv.weight" not in flat:
        found = ", ".join(sorted(flat)[:_SHOWN]) or "no tensors at all"
        raise CheckpointError(
            f"this is not a denoiser of a known layout; it holds {found}",
            "see docs/weights.md for what loads",
        )
    if diffusers:
        return "diffusers"
    if "temp_embed" in flat:
        return "latte"
    if kernel.dim() == 4:
        return "pixart" if "blocks.0.scale_shift_table" in flat else "dit"
    return "open-sora" if any(key in flat for key in _TABLES) else "osora"


_RENAMED = [
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"adaln_single\.emb\.timestep_embedder\.", "t_embedder."),
    (r"adaln_single\.emb\.resolution_embedder\.", "csize_embedder."),
    (r"adaln_single\.emb\.aspect_ratio_embedder\.", "ar_embedder."),
    (r"adaln_single\.linear\.", "t_block.1."),
    (r"caption_projection\.linear_([12])\.", r"y_embedder.y_proj.fc\1."),
    (r"blocks\.0\.norm1\.emb\.timestep_embedder\.", "t_embedder."),
    (r"blocks\.0\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"(\w+embedder)\.linear_1\.", r"\1.mlp.0."),
    (r"(\w+embedder)\.linear_2\.", r"\1.mlp.2."),
    (r"(blocks\.\d+)\.norm1\.linear\.", r"\1.adaLN_modulation.1."),
    (r"(blocks\.\d+)\.attn1\.to_out\.0\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.attn2\.to_q\.", r"\1.cross_attn.q_linear."),
    (r"(blocks\.\d+)\.attn2\.to_out\.0\.", r"\1.cross_attn.proj."),
    (r"(blocks\.\d+)\.ff\.net\.0\.proj\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.ff\.net\.2\.", r"\1.mlp.fc2."),
    (r"scale_shift_table$", "final_layer.scale_shift_table"),
    (r"proj_out(_2)?\.", "final_layer.linear."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
]

_JOINED = [
    ("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
]


def _from_diffusers(flat: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Translate diffusers' keys; also return those of DiT's embedders that repeat block 0's in every block."""
    by_turns = any(key.startswith("temporal_transformer_blocks.") for key in flat)
    ours: dict[str, Tensor] = {}
    duplicates: list[str] = []
    for original, tensor in flat.items():
        key = _numbered(original, by_turns)
        if repeated := re.match(r"blocks\.[1-9]\d*(\.norm1\.emb\..*)", key):
            first = flat.get("transformer_blocks.0" + repeated[1])
            if first is None or not torch.equal(first, tensor):
                raise CheckpointError(f"{original} differs from that of block 0, which no DiT model can express")
            duplicates.append(original)
            continue
        for pattern, replacement in _RENAMED:
            key = re.sub("^" + pattern, replacement, key)
        ours[key] = tensor
    _join(ours)
    return ours, duplicates


def _numbered(key: str, by_turns: bool) -> str:
    """Number spatial and temporal blocks by turns, where there are both."""
    found = re.match(r"(temporal_)?transformer_blocks\.(\d+)\.(.*)", key)
    if not found:
        return key
    temporal, number, rest = found[1] is not None, int(found[2]), found[3]
    return f"blocks.{2 * number + temporal if by_turns else number}.{rest}"


def _join(ours: dict[str, Tensor]) -> None:
    """Stack the projections that we compute in one product."""
    blocks = {key.split(".")[1] for key in ours if key.startswith("blocks.")}
    for block in blocks:
        for joined, parts in _JOINED:
            for kind in ("weight", "bias"):
                keys = [f"blocks.{block}.{part}.{kind}" for part in parts]
                if all(key in ours for key in keys):
                    ours[f"blocks.{block}.{joined}.{kind}"] = torch.cat([ours.pop(key) for key in keys])


# Loading


def _materialise(model: nn.Module, keys: Iterable[str]) -> None:
    """Put zeros where a model on the meta device was given nothing."""
    for key in keys:
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        empty = torch.zeros_like(getattr(module, name), device="cpu")
        setattr(module, name, nn.Parameter(empty) if name in module._parameters else empty)


def _difference(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """A hint: what the file is, where that differs from what the model is."""
    try:
        file, model = infer_settings(state), infer_settings(own)
    except CheckpointError as error:
        return error.message
    differing = {name: value for name, value in file.items() if model.get(name) != value}
    if not differing:
        return "the file is of this size and family, so it is not whole: save or download it again"
    return "the file says: " + " ".join(f"--set model.{name}={_word(value)}" for name, value in differing.items())


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _listed(troubles: list[str]) -> str:
    more = len(troubles) - _SHOWN
    return "\n".join(f"  {trouble}" for trouble in troubles[:_SHOWN]) + (f"\n  and {more} more" if more > 0 else "")


def _sides(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
