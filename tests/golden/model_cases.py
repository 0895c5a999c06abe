"""Golden cases of the model room. `build_upstream` and `condition` serve the other rooms' cases as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_core.models import LatentTransformer, build, convert, init_from_image, load
from opensora_core.models.attention import Ragged
from opensora_core.models.captioned import CaptionedBlock
from opensora_core.models.dit import DiTBlock
from opensora_core.models.layers import (
    CaptionEmbedder,
    CrossAttention,
    LabelEmbedder,
    LinearFinalLayer,
    PatchEmbed,
    ScalarEmbedder,
    SelfAttention,
    TableFinalLayer,
    layer_norm,
    modulate,
)
from opensora_core.models.pixart import embed_scalars
from opensora_core.models.positions import spatial_table, temporal_table
from opensora_core.models.stdit import STDiTBlock
from opensora_core.tensors import Condition
from tests.golden.case import Case

FAMILIES = {"STDiT": "stdit", "DiT": "dit", "Latte": "latte", "PixArt": "pixart", "PixArtMS": "pixart-ms"}
LATENT = {"STDiT": (1, 32, 32), "PixArt": (1, 32, 32), "PixArtMS": (1, 32, 32)}  # DiT and Latte: (16, 32, 32)
TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal")


def translate(model: str, init_args: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the published constructor's names into ours; what is not given has the published default."""
    given = dict(init_args)
    given.pop("input_size", None)  # ours take any size
    # of no consequence for the numbers; paths are dropped in training only, and at random, which no case can record
    for ignored in (
        "drop_path",
        "dtype",
        "enable_flashattn",
        "enable_layernorm_kernel",
        "enable_sequence_parallelism",
        "freeze",
    ):
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


def dropout(case: Case) -> None:
    """Training with captions dropped where the recorded draw is below the rate; their masks stay."""
    model = build_upstream(case).train()
    rate = case.config["init_args"].get("class_dropout_prob", 0.1)
    assert model.caption_dropout == rate
    dropped = case.io["in.uniform"] < rate
    assert torch.equal(dropped, case.io["drop"])
    given = model.replace_captions(condition(case), dropped)
    case.close(model(case.io["in.x"], timestep(case), given), "out")


def blocks(case: Case) -> None:
    """One block of each kind on a stream of low variance, which shows the epsilon of its norms."""
    io, width, heads = case.io, case.config["hidden"], case.config["num_heads"]
    frames, places = case.config["d_t"], case.config["d_s"]
    x = io["x"].unflatten(1, (frames, places))
    t6 = io["t6"].unflatten(1, (6, -1))
    captions, mask = padded(io["captions"][0], io["lens"])
    ragged = Ragged.build(mask, "sdpa")
    stdit, dit = STDiTBlock(width, heads), DiTBlock(width, heads)
    pixart = CaptionedBlock(width, heads, over="all")
    for name, block in (("stdit_block", stdit), ("dit_block", dit), ("pixart_block", pixart)):
        block.load_state_dict(part(case, name))
    case.close(stdit(x, t6, captions, ragged).flatten(1, 2), "stdit_block.out")
    case.close(stdit(x, t6, captions, ragged, io["tpe"][0][:, None]).flatten(1, 2), "stdit_block.out_tpe")
    case.close(pixart(x, t6, captions, ragged).flatten(1, 2), "pixart_block.out")
    case.close(dit(x, io["c"]).flatten(1, 2), "dit_block.out")


def padded(packed: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Captions (M, D) one after the other -> (B, L, D) padded, and their mask (B, L)."""
    captions = torch.nn.utils.rnn.pad_sequence(list(packed.split(lengths.tolist())), batch_first=True)
    return captions, torch.arange(captions.shape[1]) < lengths[:, None]


def part(case: Case, name: str) -> dict[str, Tensor]:
    """The weights of one layer of a case."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in case.weights.items() if key.startswith(prefix)}


def layers(case: Case) -> None:
    """Every layer by itself."""
    io, weights, width, heads = case.io, case.weights, case.config["hidden"], case.config["num_heads"]

    for name in ("attention_bias", "attention_nobias", "attention_qknorm"):
        own = part(case, name)
        attention = SelfAttention(width, heads, over="space", bias="qkv.bias" in own, qk_norm="q_norm.weight" in own)
        attention.load_state_dict(own)
        case.close(attention(io["attention.x"][:, None])[:, 0], f"{name}.out")

    cross = CrossAttention(width, heads)
    cross.load_state_dict(part(case, "cross_attention"))
    captions, mask = padded(io["cross_attention.cond"][0], io["cross_attention.lens"])
    out = cross(io["attention.x"][:, None], captions, Ragged.build(mask, "sdpa"))
    case.close(out[:, 0], "cross_attention.out")

    # ours refuses what the patches do not divide, where the published layer pads with zeros: so pad, or crop, before
    for name, key in (("patch_embed", "patch_embed.out_padded"), ("patch_embed_122", "patch_embed_122.out")):
        kernel = weights[f"{name}.proj.weight"]
        embed = PatchEmbed(kernel.shape[1], tuple(kernel.shape[2:]), width)
        embed.load_state_dict(part(case, name))
        x = io["patch_embed.x"]
        sides = zip(x.shape[2:], embed.patch_size, strict=True)
        if key.endswith("padded"):
            changes = [(0, -side % patch) for side, patch in sides]
        else:
            changes = [(0, -(side % patch)) for side, patch in sides]
        x = F.pad(x, [change for pair in reversed(changes) for change in pair])
        case.close(embed(x).flatten(1, 2), key)

    captioner = CaptionEmbedder(*reversed(weights["caption_embedder.y_embedding"].shape), width)
    captioner.load_state_dict(part(case, "caption_embedder"))
    given = Condition(io["caption_embedder.y"][:, 0])
    case.close(captioner(given.tokens)[:, None], "caption_embedder.out")
    forced = captioner.replace(given, io["caption_embedder.force_drop_ids"] == 1)
    case.close(captioner(forced.tokens)[:, None], "caption_embedder.out_forced")

    rows = weights["label_embedder.embedding_table.weight"].shape[0]
    labeller = LabelEmbedder(rows - 1, True, width)
    labeller.load_state_dict(part(case, "label_embedder"))
    labels = Condition(io["label_embedder.labels"])
    case.close(labeller(labels.tokens), "label_embedder.out")
    forced = labeller.replace(labels, io["caption_embedder.force_drop_ids"] == 1)
    case.close(labeller(forced.tokens), "label_embedder.out_forced")

    times = ScalarEmbedder(width)
    times.load_state_dict(part(case, "t_embedder"))
    case.close(times(io["t_embedder.t"]), "t_embedder.out")
    for key in ("t_embedder.freq", "t_embedder.freq_odd_dim7"):
        case.close(times.sinusoid(io["t_embedder.t"], io[key].shape[1]), key)

    sizes = ScalarEmbedder(weights["size_embedder.mlp.2.bias"].shape[0])
    sizes.load_state_dict(part(case, "size_embedder"))
    embedded = embed_scalars(sizes, io["size_embedder.s"])
    case.close(embedded, "size_embedder.out")
    case.close(embedded.repeat(len(io["size_embedder.out_bs4"]) // len(embedded), 1), "size_embedder.out_bs4")

    shift, scale = io["modulate.shift"], io["modulate.scale"]
    case.close(modulate(layer_norm(width)(io["attention.x"])[:, None], shift, scale)[:, 0], "modulate.out")

    final: nn.Module
    for name, final in (
        ("final_layer_t2i", TableFinalLayer(width, weights["final_layer_t2i.linear.bias"].shape[0])),
        ("final_layer_dit", LinearFinalLayer(width, weights["final_layer_dit.linear.bias"].shape[0])),
    ):
        final.load_state_dict(part(case, name))
        case.close(final(io["attention.x"][:, None], io["final_layer.c"])[:, 0], f"{name}.out")
        case.close(final(io["small.x"][:, None], io["final_layer.c"])[:, 0], f"{name}.out_small")


def positions(case: Case) -> None:
    """Position tables at many sizes and scales, and folding tokens back into latents."""
    cpu = torch.device("cpu")
    for entry in case.config["pos"]:
        if "grid_hw" in entry:
            table = spatial_table(
                entry["dim"], *entry["grid_hw"], scale=entry["scale"], base=entry["base_size"], device=cpu
            )
        else:
            table = temporal_table(entry["dim"], entry["length"], scale=entry["scale"], device=cpu)
        case.close(table, entry["key"])
    for entry in case.config["unpatchify"]:
        embed = PatchEmbed(4, tuple(entry["patch_size"]), 8)
        sides = zip(entry["input_size"], entry["patch_size"], strict=True)
        frames, rows, columns = (side // patch for side, patch in sides)
        tokens = case.io[f"{entry['key']}.in"].unflatten(1, (frames, rows * columns))
        case.close(embed.fold(tokens, rows), f"{entry['key']}.out")


def raw(case: Case) -> dict[str, Tensor]:
    """The weights of a case as they were published."""
    return {key.removeprefix("raw."): value for key, value in case.io.items() if key.startswith("raw.")}


def import_dit_latte(case: Case) -> None:
    """Official weights of DiT, and the same under Latte's wrapping."""
    published, settings = raw(case), translate("DiT", case.config["init_args"])
    wrapped = {"ema": {**published, "temp_embed": torch.zeros(1, 2, settings["hidden_size"])}}
    for family, state, out in (("dit", published, "out"), ("latte", wrapped, "latte.out")):
        converted = convert(state, family)
        assert set(converted.dropped) == {"pos_embed"} | ({"temp_embed"} if family == "latte" else set())
        assert set(case.config[f"{family}_missing"]) <= set(TABLES)
        model = build(family, **settings).eval()
        assert load(model, converted.state) == []
        case.close(model(case.io["in.x"], timestep(case), condition(case)), out)


def import_pixart(case: Case) -> None:
    """PixArt's weights as the start of an STDiT; what temporal attention had before stays."""
    name, init_args = case.config["model"], case.config["init_args"]
    model = build(FAMILIES[name], **translate(name, init_args)).eval()
    before = {key.removeprefix("before."): value for key, value in case.io.items() if key.startswith("before.")}
    load_published(model, before)
    kept = init_from_image(model, {"state_dict": raw(case)})
    assert set(kept) == set(case.config["missing_keys"]) - set(TABLES)
    assert not case.config["unexpected_keys"]
    case.close(model(case.io["in.x"], timestep(case), condition(case)), "out")


HANDLERS: dict[str, Callable[[Case], None]] = {
    **{f"opensora.models {name}.forward": forward for name in FAMILIES},
    "CaptionEmbedder.token_drop / STDiT.forward": dropout,
    "STDiTBlock, PixArtBlock, DiTBlock": blocks,
    "opensora.models.layers.blocks": layers,
    "layers.blocks.get_*_sincos_pos_embed, STDiT.unpatchify": positions,
    "ckpt_utils.reparameter": import_dit_latte,
    "ckpt_utils.reparameter + load_state_dict(strict=False)": import_pixart,
}
