"""Golden cases of the model room. `build_upstream` and `condition` serve the other rooms' cases as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opensora_core.models import LatentTransformer, build
from opensora_core.models.positions import spatial_table, temporal_table
from opensora_core.tensors import Condition
from tests.golden.case import Case

FAMILIES = {"STDiT": "stdit", "DiT": "dit", "Latte": "latte", "PixArt": "pixart", "PixArtMS": "pixart-ms"}
LATENT = {"STDiT": (1, 32, 32), "PixArt": (1, 32, 32), "PixArtMS": (1, 32, 32)}  # DiT and Latte: (16, 32, 32)
TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal")


def translate(model: str, init_args: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the published constructor's names into ours; what is not given has the published default."""
    given = dict(init_args)
    given.pop("input_size", None)  # ours take any size
    assert not given.pop("drop_path", 0.0), "no published configuration drops paths"
    for ignored in ("dtype", "enable_flashattn", "enable_layernorm_kernel", "enable_sequence_parallelism", "freeze"):
        given.pop(ignored, None)
    settings: dict[str, Any] = {}
    for theirs, ours in (
        ("pred_sigma", "learn_sigma"),
        ("class_dropout_prob", "caption_dropout"),
        ("model_max_length", "caption_length"),
    ):
        if theirs in given:
            settings[ours] = given.pop(theirs)
    settings["temporal_positions"] = not given.pop("no_temporal_pos_emb", False)
    if "patch_size" in given:
        settings["patch_size"] = tuple(given.pop("patch_size"))
    if model in ("DiT", "Latte"):
        kind = given.pop("condition", "text")
        settings["condition"] = "pooled" if kind == "text" else "class"
        settings["num_classes"] = 0 if kind == "text" else int(kind.removeprefix("label_"))
    return {**settings, **given}


def load_published(model: LatentTransformer, weights: Mapping[str, Tensor]) -> None:
    """Load published weights strictly; only their position tables are left out."""
    model.load_state_dict({key: value for key, value in weights.items() if key not in TABLES})


def build_upstream(case: Case) -> LatentTransformer:
    """Build our model for a case from `model` and `init_args`, load its weights, compare its position tables."""
    name, init_args = case.config["model"], case.config["init_args"]
    model = build(FAMILIES[name], **translate(name, init_args))
    load_published(model, case.weights)
    compare_tables(case, name, init_args, model)
    return model.eval()


def compare_tables(case: Case, name: str, init_args: Mapping[str, Any], model: LatentTransformer) -> None:
    """Compare the position tables among published weights with ours."""
    size = init_args.get("input_size", LATENT.get(name, (16, 32, 32)))
    frames, rows, columns = (side // patch for side, patch in zip(size, model.x_embedder.patch_size, strict=True))
    space_scale, time_scale = getattr(model, "space_scale", 1.0), getattr(model, "time_scale", 1.0)
    base = math.isqrt(rows * columns) if name.startswith("PixArt") else None
    cpu = torch.device("cpu")
    space = spatial_table(model.hidden_size, rows, columns, scale=space_scale, base=base, device=cpu)
    time = temporal_table(model.hidden_size, frames, scale=time_scale, device=cpu)
    for key, table in zip(TABLES, (space, space, time), strict=True):
        if key in case.weights:
            case.close(table[None], case.weights[key], key)


def condition(case: Case, name: str = "") -> Condition:
    """What a case is conditioned on: captions without their dim of one, or labels; the mask as it was given.

    `name` is an entry of `io`, by default `in.y` or `y`; mask and size are those with the same prefix.
    """
    name = name or ("in.y" if "in.y" in case.io else "y")
    prefix = name[: name.rfind(".") + 1]
    y = case.io[name]
    tokens = y if y.dim() == 1 else y.flatten(1, -2)
    return Condition(tokens, case.io.get(f"{prefix}mask"), case.io.get(f"{prefix}data_info.hw"))


def timestep(case: Case) -> Tensor:
    """The timestep, under either of its published names."""
    return case.io["in.timestep"] if "in.timestep" in case.io else case.io["in.t"]


def forward(case: Case) -> None:
    """Output, intermediates and, where the case has them, gradients."""
    model = build_upstream(case)
    seen = watch(model)
    x, conditioned = case.io["in.x"], condition(case)
    if "loss_weight" in case.io:
        x = x.clone().requires_grad_()
        conditioned.tokens.requires_grad_()
    out = model(x, timestep(case), conditioned)
    case.close(out, "out")
    for name, value in seen.items():
        if f"mid.{name}" in case.io:
            case.close(as_published(value, case.io[f"mid.{name}"]), f"mid.{name}")
    if "loss_weight" in case.io:
        loss = (out * case.io["loss_weight"]).sum()
        case.close(loss[None], "loss")
        loss.backward()
        assert x.grad is not None and conditioned.tokens.grad is not None
        case.close(x.grad, "grad_in.x")
        case.close(conditioned.tokens.grad.view_as(case.io["in.y"]), "grad_in.y")
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        expected = {key.removeprefix("grad.") for key in case.io if key.startswith("grad.")}
        assert expected - set(TABLES) == set(gradients), expected ^ set(gradients)
        for name, gradient in gradients.items():
            assert gradient is not None, name
            case.close(gradient, f"grad.{name}")


def watch(model: LatentTransformer) -> dict[str, Tensor]:
    """Collect the outputs of the modules as a forward comes by."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: seen.update({name: output})

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(note(name))
    return seen


def as_published(ours: Tensor, theirs: Tensor) -> Tensor:
    """Give our (B, T, S, D) tokens, or anything else, the published shape."""
    if ours.dim() == 4 and len(ours) != len(theirs) and len(theirs) == ours.shape[0] * ours.shape[2]:
        ours = ours.transpose(1, 2)  # a temporal block of Latte: (B * S, T, D)
    return ours.reshape(theirs.shape)


HANDLERS: dict[str, Callable[[Case], None]] = {f"opensora.models {name}.forward": forward for name in FAMILIES}
