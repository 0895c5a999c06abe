from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora_core.errors import CheckpointError
from opensora_core.models import (
    Converted,
    LatentTransformer,
    build,
    convert,
    diffusers_settings,
    guess_family,
    infer_settings,
    init_from_image,
    load,
)
from opensora_core.tensors import Condition
from tests.core.models.examples import CAPTION, CLASSES, HEADS, LENGTH, VARIANTS, WIDTH, condition, latents, stir, tiny

TIMES = torch.tensor([3, 731])
NULL = "y_embedder.y_embedding"
PAIRED = {"stdit-parallel": "stdit", "latte": "dit"}


def image_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the image models were published: a conv kernel without a time axis, and a position table."""
    kernel = state["x_embedder.proj.weight"].squeeze(2)
    return {**state, "x_embedder.proj.weight": kernel, "pos_embed": torch.zeros(1, 16, WIDTH)}


def tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "pos_embed": torch.zeros(1, 16, WIDTH), "pos_embed_temporal": torch.zeros(1, 4, WIDTH)}


@pytest.mark.parametrize(
    ("variant", "wrap", "layout", "dropped"),
    [
        ("stdit", lambda state: state, "osora", []),
        ("stdit", tables, "open-sora", ["pos_embed", "pos_embed_temporal"]),
        ("stdit", lambda state: {"ema": tables(state)}, "open-sora", ["pos_embed", "pos_embed_temporal"]),
        ("stdit", lambda state: {f"module.{key}": value for key, value in state.items()}, "osora", []),
        ("dit, classes", image_layout, "dit", ["pos_embed"]),
        (
            "dit, classes",
            lambda state: {"model": {}, "ema": image_layout(state), "args": "x"},
            "dit",
            ["model", "args", "pos_embed"],
        ),
        (
            "latte, classes",
            lambda state: {"ema": {**image_layout(state), "temp_embed": torch.zeros(1, 4, WIDTH)}},
            "latte",
            ["pos_embed", "temp_embed"],
        ),
        ("pixart", lambda state: {"state_dict": image_layout(state)}, "pixart", ["pos_embed"]),
        ("pixart-ms", lambda state: {"state_dict": image_layout(state)}, "pixart", ["pos_embed"]),
    ],
)
def test_published_layouts(variant: str, wrap: Any, layout: str, dropped: list[str]) -> None:
    state = stir(tiny(variant)).state_dict()
    family = variant.partition(",")[0]
    published = wrap(state)
    converted = convert(published, family)
    assert converted.layout == layout
    assert sorted(converted.dropped) == sorted(dropped)
    assert converted.absent == []
    assert load(tiny(variant), converted.state) == []
    assert all(torch.equal(converted.state[key], state[key]) for key in state)
    assert guess_family(published) == family


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_are_read_off_weights(variant: str) -> None:
    family = variant.partition(",")[0]
    model = tiny(variant, qk_norm=True)
    settings = infer_settings(model.state_dict())
    assert settings["family"] == PAIRED.get(family, family)
    assert settings["num_heads"] == HEADS
    again = build(**{**settings, "family": family})
    assert load(again, model.state_dict()) == []
    without = infer_settings(tiny(variant, learn_sigma=False, patch_size=(2, 2, 4), depth=3).state_dict())
    assert (without["learn_sigma"], without["patch_size"], without["depth"]) == (False, (2, 2, 4), 3)
    assert "num_heads" not in without


def test_weights_of_another_family_are_named() -> None:
    with pytest.raises(CheckpointError, match="weights of a 'pixart' model, but the model is 'dit'") as caught:
        convert(tiny("pixart").state_dict(), "dit")
    assert "--set model.family=pixart" in caught.value.hint
    latte = {"ema": {**image_layout(tiny("latte").state_dict()), "temp_embed": torch.zeros(1, 4, WIDTH)}}
    with pytest.raises(CheckpointError, match="weights of a 'latte' model, but the model is 'dit'"):
        convert(latte, "dit")


@pytest.mark.parametrize("state", [{}, {"epoch": 3}, {"conv.weight": torch.zeros(2)}, {"state_dict": {"a": 1}}])
def test_files_without_a_denoiser(state: dict[str, Any]) -> None:
    for read in (guess_family, infer_settings, lambda state: convert(state, "stdit")):
        with pytest.raises(CheckpointError, match="not a denoiser of a known layout"):
            read(state)


def test_an_incomplete_file() -> None:
    state = tiny("stdit").state_dict()
    del state["final_layer.linear.weight"]
    with pytest.raises(CheckpointError, match=r"incomplete: 'final_layer\.linear\.weight'"):
        infer_settings(state)
    with pytest.raises(CheckpointError, match=r"missing: final_layer\.linear\.weight"):
        load(tiny("stdit"), state)


def test_loading_is_strict_and_lists_ten() -> None:
    model, state = tiny("stdit"), stir(tiny("stdit")).state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    extra = {**state, "surplus": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="not of this model: surplus"):
        load(model, extra)
    partial = {key: value for key, value in state.items() if "mlp" not in key}
    with pytest.raises(CheckpointError) as caught:
        load(model, partial)
    assert caught.value.message.count("missing:") == 10
    assert f"and {len(state) - len(partial) - 10} more" in caught.value.message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_another_size_come_with_the_settings_they_need() -> None:
    state = tiny("stdit", hidden_size=64, patch_size=(2, 2, 2)).state_dict()
    with pytest.raises(CheckpointError, match="64x4x2x2x2 in the file, 48x4x1x2x2 in the model") as caught:
        load(tiny("stdit"), state)
    assert "--set model.hidden_size=64" in caught.value.hint
    assert "--set model.patch_size=2,2,2" in caught.value.hint
    assert "caption_channels" not in caught.value.hint


def test_a_model_takes_the_dtype_it_has_and_a_meta_model_that_of_the_file() -> None:
    state = {key: value.to(torch.bfloat16) for key, value in tiny("stdit").state_dict().items()}
    model = tiny("stdit")
    load(model, state)
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.float32
    with torch.device("meta"):
        model = tiny("stdit")
    load(model, state)
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert model.blocks[0].mlp.fc1.weight.requires_grad


@pytest.mark.parametrize("variant", ["stdit", "stdit-parallel"])
def test_an_stdit_from_pixart_treats_each_frame_as_the_image_model_does(variant: str) -> None:
    image, video = stir(tiny("pixart", temporal_positions=False)), tiny(variant)
    kept = init_from_image(video, {"state_dict": image_layout(image.state_dict())})
    assert len(kept) == 2 * 4
    assert all(".attn_temp." in key for key in kept)
    x, given = latents(3, 4, 4), condition("pixart")
    out = video(x, TIMES, given)
    for frame in range(3):
        torch.testing.assert_close(
            out[:, :, frame : frame + 1], image(x[:, :, frame : frame + 1], TIMES, given), atol=1e-5, rtol=1e-5
        )


def test_only_pixart_starts_an_stdit() -> None:
    with pytest.raises(CheckpointError, match="weights of a 'dit' model, but the model is 'pixart'"):
        init_from_image(tiny("stdit"), tiny("dit").state_dict())


# diffusers' own models, small and random


def stirred(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return module.eval()


SIZES = {
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}


def ours(theirs: Any, **settings: Any) -> tuple[LatentTransformer, Converted]:
    """Our model of what a folder of diffusers holds, from its settings to its weights."""
    inferred = infer_settings(theirs.state_dict())
    converted = convert(theirs.state_dict(), inferred["family"])
    assert converted.layout == "diffusers"
    beside = {**theirs.config, "_class_name": type(theirs).__name__}
    model = build(**inferred, **diffusers_settings(beside), **settings).eval()
    assert load(model, converted.state, absent=converted.absent) == converted.absent
    return model, converted


def agree(model: LatentTransformer, x: Tensor, given: Condition, expected: Tensor) -> None:
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(model(x, TIMES, given), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dit_of_diffusers() -> None:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import Timesteps

    theirs = stirred(DiTTransformer2DModel(**SIZES, num_embeds_ada_norm=CLASSES))
    # its weights are the published ones, but it spaces the frequencies of the timestep as in another model, and its
    # default for the epsilon of norms is 1e-5: both set to what the weights were trained with
    for module in theirs.modules():
        if isinstance(module, Timesteps):
            module.downscale_freq_shift = 0
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    model, converted = ours(theirs)
    assert len(converted.dropped) == 5
    assert all(key.startswith("transformer_blocks.1.norm1.emb.") for key in converted.dropped)
    x, labels = latents(1, 8, 8), torch.tensor([1, CLASSES])
    agree(model, x, Condition(labels), theirs(x[:, :, 0], TIMES, labels).sample[:, :, None])

    state = theirs.state_dict()
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    with pytest.raises(CheckpointError, match="differs from that of block 0"):
        convert(state, "dit")


@pytest.mark.parametrize("told", [False, True], ids=["pixart", "pixart-ms"])
@torch.no_grad()
def test_pixart_of_diffusers(told: bool) -> None:
    from diffusers import PixArtTransformer2DModel

    theirs = stirred(
        PixArtTransformer2DModel(
            **SIZES,
            cross_attention_dim=WIDTH,
            caption_channels=CAPTION,
            interpolation_scale=2,
            use_additional_conditions=told,
        )
    )
    model, converted = ours(theirs, caption_length=LENGTH)
    assert converted.absent == [NULL]
    assert infer_settings(theirs.state_dict())["family"] == ("pixart-ms" if told else "pixart")
    given = condition("pixart-ms" if told else "pixart")
    added = {"resolution": None, "aspect_ratio": None}
    if given.size is not None:
        added = {"resolution": given.size, "aspect_ratio": given.size[:, :1] / given.size[:, 1:]}
    for x in (latents(1, 8, 8), latents(1, 12, 8)):
        expected = theirs(
            x[:, :, 0], given.tokens, TIMES, added_cond_kwargs=added, encoder_attention_mask=given.mask
        ).sample
        agree(model, x, given, expected[:, :, None])


@torch.no_grad()
def test_latte_1_of_diffusers() -> None:
    from diffusers import LatteTransformer3DModel

    theirs = stirred(
        LatteTransformer3DModel(
            **SIZES,
            cross_attention_dim=WIDTH,
            caption_channels=CAPTION,
            norm_type="ada_norm_single",
            num_embeds_ada_norm=1000,
            video_length=3,
        )
    )
    model, converted = ours(theirs, caption_length=LENGTH)
    assert converted.absent == [NULL]
    assert len(model.blocks) == 4
    whole = Condition(condition("latte-1").tokens)  # the pipeline passes no mask
    for x in (latents(3, 8, 8), latents(3, 12, 8), latents(1, 8, 8)):
        agree(model, x, whole, theirs(x, TIMES, whole.tokens).sample)


def test_the_configuration_of_something_else() -> None:
    with pytest.raises(CheckpointError, match="class 'UNet2DConditionModel' does not load") as caught:
        diffusers_settings({"_class_name": "UNet2DConditionModel"})
    assert "DiTTransformer2DModel" in caught.value.hint


@torch.no_grad()
def test_a_null_caption_that_was_not_published_starts_as_zeros_on_a_meta_model() -> None:
    state = {key: value for key, value in stir(tiny("pixart")).state_dict().items() if key != NULL}
    with torch.device("meta"):
        model = tiny("pixart")
    assert load(model, state, absent=[NULL]) == [NULL]
    assert not model.state_dict()[NULL].any()
    assert model(latents(1, 4, 4), TIMES, model.null_condition(condition("pixart"))).isfinite().all()
