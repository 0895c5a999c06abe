"""What every family of `MODELS` keeps to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opensora_core.errors import ConfigError, InputError
from opensora_core.models import MODELS, build, load, settings_of
from opensora_core.models.layers import CaptionEmbedder
from tests.core.models.examples import CHANNELS, CLASSES, VARIANTS, condition, latents, stir, tiny

every_variant = pytest.mark.parametrize("variant", VARIANTS)
captioned = [variant for variant in VARIANTS if "classes" not in variant]
ragged = [variant for variant in VARIANTS if condition(variant).mask is not None]
TIMES = torch.tensor([3.0, 731.5])


def test_every_family_is_tried() -> None:
    assert {variant.partition(",")[0] for variant in VARIANTS} == set(MODELS)


@every_variant
def test_any_size_without_rebuilding(variant: str) -> None:
    model = stir(tiny(variant))
    for size in ((1, 4, 4), (3, 4, 8), (2, 10, 6)):
        out = model(latents(*size), TIMES, condition(variant))
        assert out.shape == (2, 2 * CHANNELS, *size)
        assert out.dtype == torch.float32
        assert out.isfinite().all()


@every_variant
def test_patches_of_several_frames_and_no_variance(variant: str) -> None:
    model = stir(tiny(variant, patch_size=(2, 2, 2), learn_sigma=False))
    assert model(latents(4, 4, 6), TIMES, condition(variant)).shape == (2, CHANNELS, 4, 4, 6)


@every_variant
def test_a_fresh_model_outputs_zero(variant: str) -> None:
    assert not tiny(variant)(latents(2, 4, 4), TIMES, condition(variant)).any()


@every_variant
def test_a_size_that_does_not_divide_is_told_with_its_values(variant: str) -> None:
    with pytest.raises(InputError, match=r"2x5x4 .* patches of 1x2x2"):
        tiny(variant)(latents(2, 5, 4), TIMES, condition(variant))


@every_variant
def test_latents_of_other_channels_are_refused(variant: str) -> None:
    with pytest.raises(InputError, match=f"latents of 3 channels, but the model takes {CHANNELS}"):
        tiny(variant)(latents(2, 4, 4)[:, :3], TIMES, condition(variant))


@every_variant
def test_every_weight_matters(variant: str) -> None:
    model = stir(tiny(variant))
    model(latents(3, 4, 4), TIMES, condition(variant)).square().sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert not idle


@every_variant
def test_the_samples_of_a_batch_do_not_see_each_other(variant: str) -> None:
    model, x, given = stir(tiny(variant)), latents(2, 4, 4), condition(variant)
    together = model(x, TIMES, given)
    apart = torch.cat([model(x[i : i + 1], TIMES[i : i + 1], given[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@every_variant
def test_the_timestep_is_never_rounded(variant: str) -> None:
    model = stir(tiny(variant)).to(torch.bfloat16)
    given = condition(variant).to(dtype=torch.bfloat16)
    # as bfloat16 both would be 1000
    one, other = (model(latents(1, 4, 4), torch.full((2,), t), given) for t in (998, 999))
    assert (one - other).abs().max() > 0.01
    whole, halved = (model(latents(1, 4, 4), torch.full((2,), t), given) for t in (998.0, 998.5))
    assert (whole - halved).abs().max() > 0.01


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_single(variant: str, dtype: torch.dtype) -> None:
    model, x, given = stir(tiny(variant)), latents(2, 4, 4), condition(variant)
    exact = model(x, TIMES, given)
    rounded = model.to(dtype)(x, TIMES, given)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.05


@every_variant
def test_autocast_keeps_the_stream_in_single_precision(variant: str) -> None:
    model, dtypes = stir(tiny(variant)), set()
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(latents(2, 4, 4), TIMES, condition(variant))
    assert dtypes == {torch.float32}


@every_variant
def test_weights_go_round_strictly(variant: str) -> None:
    model = stir(tiny(variant))
    state = model.state_dict()
    assert not [key for key in state if key.startswith("pos_embed")]
    with torch.device("meta"):
        other = tiny(variant)
    assert load(other, state) == []
    given = condition(variant)
    assert torch.equal(model(latents(2, 4, 4), TIMES, given), other(latents(2, 4, 4), TIMES, given))


@every_variant
def test_recomputed_activations_give_the_same_gradients(variant: str) -> None:
    results = []
    for share in (0.0, 0.5, 1.0):
        model = stir(tiny(variant, recompute=share)).train()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(latents(2, 4, 4), TIMES, condition(variant))
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("share", "recomputed"), [(0, []), (0.3, [3]), (0.5, [1, 3]), (0.75, [1, 2, 3]), (1, [0, 1, 2, 3])]
)
@pytest.mark.parametrize("variant", ["stdit", "dit"])
def test_recomputed_blocks_are_spread_over_the_depth(variant: str, share: float, recomputed: list[int]) -> None:
    model, runs = stir(tiny(variant, depth=4, recompute=share)), [0] * 4
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    model(latents(2, 4, 4), TIMES, condition(variant)).sum().backward()
    assert runs == [2 if number in recomputed else 1 for number in range(4)]
    assert [number for number in range(4) if model.recomputes(number)] == recomputed
    model.zero_grad()
    with torch.no_grad():
        model(latents(2, 4, 4), TIMES, condition(variant))
    assert sum(runs) == 8 + len(recomputed)


@every_variant
@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_between_nothing_and_all(variant: str, share: float) -> None:
    with pytest.raises(ConfigError, match=f"recompute={share}"):
        tiny(variant, recompute=share)


@every_variant
def test_training_draws_nothing(variant: str) -> None:
    model = stir(tiny(variant, caption_dropout=0.9)).train()
    assert model.caption_dropout == 0.9
    first, second = (model(latents(2, 4, 4), TIMES, condition(variant)) for _ in range(2))
    assert torch.equal(first, second)


@every_variant
def test_only_dropped_captions_are_replaced(variant: str) -> None:
    model, given = tiny(variant), condition(variant)
    changed = model.replace_captions(given, torch.tensor([True, False]))
    null = model.null_condition(given)
    assert torch.equal(changed.tokens[1], given.tokens[1])
    assert torch.equal(changed.tokens[0], null.tokens[0])
    assert not torch.equal(changed.tokens[0], given.tokens[0])
    assert changed.mask is given.mask
    assert null.size is given.size
    assert model(latents(1, 4, 4), TIMES, null).shape[0] == 2


@pytest.mark.parametrize("variant", ["dit, classes", "latte, classes"])
def test_the_null_class_comes_after_the_others(variant: str) -> None:
    assert tiny(variant).null_condition(condition(variant)).tokens.tolist() == [CLASSES, CLASSES]
    with pytest.raises(ConfigError, match="without a null class"):
        tiny(variant, caption_dropout=0.0).null_condition(condition(variant))


@pytest.mark.parametrize("variant", captioned)
def test_the_null_caption_is_saved_but_not_trained(variant: str) -> None:
    model = tiny(variant)
    assert "y_embedder.y_embedding" in model.state_dict()
    assert "y_embedder.y_embedding" not in dict(model.named_parameters())
    empty = torch.ones(2, 12)
    model.set_null_caption(empty)
    assert torch.equal(model.state_dict()["y_embedder.y_embedding"], empty)


@pytest.mark.parametrize("variant", ragged)
def test_short_captions_take_the_first_rows_and_long_ones_are_refused(variant: str) -> None:
    model, given = tiny(variant), condition(variant)
    assert isinstance(model.y_embedder, CaptionEmbedder)
    assert given.mask is not None
    short = type(given)(given.tokens[:, :2], given.mask[:, :2], given.size)
    assert torch.equal(model.null_condition(short).tokens[0], model.y_embedder.y_embedding[:2])
    long = type(given)(given.tokens.repeat(1, 2, 1))
    with pytest.raises(InputError, match=r"captions of 12 tokens, but the model's null caption has 6"):
        model.null_condition(long)


@pytest.mark.parametrize("variant", ragged)
def test_a_masked_token_has_no_say(variant: str) -> None:
    model, given = stir(tiny(variant)), condition(variant)
    assert given.mask is not None
    noisy = type(given)(torch.where(given.mask[..., None], given.tokens, 1e3), given.mask, given.size)
    x = latents(2, 4, 4)
    assert torch.equal(model(x, TIMES, given), model(x, TIMES, noisy))


@pytest.mark.parametrize("variant", ragged)
def test_the_mask_of_half_a_batch_is_tiled(variant: str) -> None:
    model, given = stir(tiny(variant)), condition(variant)
    assert given.mask is not None
    both = type(given).cat([given, model.null_condition(given)])
    half = type(given)(both.tokens, given.mask, given.size)
    x, times = latents(2, 4, 4).repeat(2, 1, 1, 1, 1), TIMES.repeat(2)
    # two sizes of one picture may be multiplied in another order than four
    torch.testing.assert_close(model(x, times, both), model(x, times, half), atol=1e-5, rtol=1e-5)


@every_variant
def test_the_condition_of_another_encoder_is_refused(variant: str) -> None:
    wrong = "dit, classes" if "classes" not in variant else "stdit"
    with pytest.raises(InputError, match="a condition of shape"):
        tiny(variant)(latents(2, 4, 4), TIMES, replace(condition(wrong), size=condition(variant).size))


def test_pixart_ms_must_be_told_the_size() -> None:
    with pytest.raises(InputError, match="told the size"):
        tiny("pixart-ms")(latents(1, 4, 4), TIMES, condition("pixart"))


@pytest.mark.parametrize("variant", ["dit", "latte"])
def test_a_whole_caption_is_no_pooled_vector(variant: str) -> None:
    with pytest.raises(InputError, match="captions of 6 tokens, but the model takes one pooled vector"):
        tiny(variant)(latents(2, 4, 4), TIMES, condition("stdit"))


@every_variant
def test_normalised_queries(variant: str) -> None:
    model = stir(tiny(variant, qk_norm=True))
    assert "blocks.0.attn.q_norm.weight" in model.state_dict()
    assert model(latents(2, 4, 4), TIMES, condition(variant)).isfinite().all()


def test_a_family_takes_the_settings_that_mean_something_to_it() -> None:
    assert "time_scale" in settings_of("stdit")
    assert "time_scale" not in settings_of("dit")
    assert settings_of("pixart-ms") == settings_of("pixart")
    assert all({"hidden_size", "recompute", "attention"} <= settings_of(family) for family in MODELS)


def test_an_unknown_family_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown model family 'stdt'") as caught:
        build("stdt")
    assert "'stdit'" in caught.value.hint


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        ("stdit", {"hidden_size": 50, "num_heads": 4}, "hidden_size=50"),
        ("pixart-ms", {"hidden_size": 64, "num_heads": 4}, "divisible by 3"),
        ("dit", {"condition": "text"}, "condition='text'"),
        ("dit", {"condition": "class"}, "num_classes=0"),
        ("stdit", {"attention": "flashy"}, "unknown attention backend 'flashy'"),
    ],
)
def test_settings_that_cannot_be_built(family: str, settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught, torch.device("meta"):
        build(family, **settings)
    assert caught.value.hint


@pytest.mark.slow
@every_variant
def test_a_compiled_model_is_one_graph(variant: str) -> None:
    torch._dynamo.reset()
    model, given = stir(tiny(variant)), condition(variant)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        expected = model(latents(2, 4, 4), TIMES, given)
        torch.testing.assert_close(compiled(latents(2, 4, 4), TIMES, given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["stdit", "dit"])
def test_recomputing_traces_without_a_break(variant: str) -> None:
    torch._dynamo.reset()
    model, given = stir(tiny(variant, recompute=0.5)).train(), condition(variant)
    gradients = []
    for module in (model, torch.compile(model, fullgraph=True, backend="eager", dynamic=False)):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(latents(2, 4, 4), TIMES, given)
        out.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", MODELS)
def test_a_model_traces_without_a_break_at_any_size(variant: str) -> None:
    torch._dynamo.reset()
    model, given = stir(tiny(variant)), condition(variant)
    traced = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size in ((2, 4, 4), (3, 4, 8)):  # the second makes the sizes symbols
            expected = model(latents(*size), TIMES, given)
            torch.testing.assert_close(traced(latents(*size), TIMES, given), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["stdit", "dit"])
def test_a_model_traces_without_a_break(variant: str) -> None:
    torch._dynamo.reset()
    model, given = stir(tiny(variant, depth=1)), condition(variant)
    traced = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        expected = model(latents(2, 4, 4), TIMES, given)
        torch.testing.assert_close(traced(latents(2, 4, 4), TIMES, given), expected, atol=1e-5, rtol=1e-5)
