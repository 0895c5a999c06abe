"""What sets the families apart: sizes, positions, the order of attentions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora_core.models import MODELS, build, freeze
from opensora_core.models.positions import spatial_table, temporal_table
from opensora_core.models.stdit import STDiTBlock, STDiTParallelBlock
from tests.core.models.examples import WIDTH, condition, latents, stir, tiny

CPU = torch.device("cpu")
SPACETIME_CUBE = {"patch_size": (2, 2, 2)}


@pytest.mark.parametrize(
    ("family", "settings", "parameters"),
    [
        ("stdit", {}, 759_620_768),
        ("stdit-parallel", {}, 759_620_768),
        ("pixart", {}, 610_856_096),
        ("pixart-ms", {}, 611_349_152),
        ("dit", {}, 675_600_800),
        ("latte", {}, 675_600_800),
        ("dit", {"condition": "class", "num_classes": 1000}, 674_834_720),
        ("latte", {"condition": "class", "num_classes": 101}, 673_799_072),
        ("dit", SPACETIME_CUBE, 675_656_128),
        ("latte", SPACETIME_CUBE, 675_656_128),
    ],
)
def test_parameters_of_the_published_sizes(family: str, settings: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        model = build(family, **settings)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_temporal_attention_is_148_764_672_of_them() -> None:
    with torch.device("meta"):
        model = build("stdit")
    assert sum(weight.numel() for name, weight in model.named_parameters() if "attn_temp" in name) == 148_764_672
    # 550 published keys, two of which are position tables
    assert len(model.state_dict()) == 548


def block_inputs(block: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": draw(2, 3, 4, WIDTH),
        "t6": draw(2, 6, WIDTH),
        "captions": draw(2, 5, WIDTH),
        "frames": draw(3, 1, WIDTH),
    }


@pytest.mark.parametrize("kind", [STDiTBlock, STDiTParallelBlock])
def test_a_block_is_its_formula(kind: type[STDiTBlock]) -> None:
    block = kind(WIDTH, 4)
    given = block_inputs(block)
    x, frames = given["x"], given["frames"]
    s1, c1, g1, s2, c2, g2 = ((block.scale_shift_table + given["t6"])[:, i, None, None] for i in range(6))

    def norm(tokens: Tensor) -> Tensor:
        return (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def over_space(tokens: Tensor) -> Tensor:
        return torch.stack([block.attn(tokens[:, t : t + 1])[:, 0] for t in range(3)], dim=1)

    def over_time(tokens: Tensor) -> Tensor:
        return torch.cat([block.attn_temp(tokens[:, :, s : s + 1]) for s in range(4)], dim=2)

    m = norm(x) * (1 + c1) + s1
    if kind is STDiTBlock:
        expected = x + g1 * over_space(m)
        expected = expected + g1 * over_time(expected + frames)
    else:
        expected = x + g1 * (over_space(m) + over_time(m + frames))
    assert block.cross_attn is not None
    expected = expected + block.cross_attn(expected, given["captions"], None)
    expected = expected + g2 * block.mlp(norm(expected) * (1 + c2) + s2)
    out = block(x, given["t6"], given["captions"], None, frames)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_parallel_and_sequential_share_weights_but_not_results() -> None:
    one, other = stir(tiny("stdit")), tiny("stdit-parallel")
    other.load_state_dict(one.state_dict())
    x, times = latents(3, 4, 4), torch.tensor([1, 2])
    assert (one(x, times, condition("stdit")) - other(x, times, condition("stdit"))).abs().max() > 0.01


@pytest.mark.parametrize("variant", MODELS)
def test_frames_are_told_apart_and_see_each_other(variant: str) -> None:
    model, times = stir(tiny(variant)), torch.tensor([1, 2])
    x = latents(1, 4, 4).repeat(1, 1, 3, 1, 1)
    out = model(x, times, condition(variant))
    assert (out[:, :, 0] - out[:, :, 1]).abs().max() > 1e-3  # equal frames, at other positions
    x[:, :, 2] += 1
    assert (model(x, times, condition(variant))[:, :, 0] - out[:, :, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["dit", "pixart"])
def test_without_temporal_positions_equal_frames_stay_equal(variant: str) -> None:
    model = stir(tiny(variant, temporal_positions=False))
    out = model(latents(1, 4, 4).repeat(1, 1, 3, 1, 1), torch.tensor([1, 2]), condition(variant))
    torch.testing.assert_close(out[:, :, 0], out[:, :, 1])


@pytest.mark.parametrize(
    ("which", "trained"), [("not_temporal", {"attn_temp"}), ("text", {"attn", "attn_temp", "mlp"})]
)
def test_freezing(which: Any, trained: set[str]) -> None:
    model = tiny("stdit")
    freeze(model, which)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = {name.split(".")[2] for name in names if name.startswith("blocks.0.") and "table" not in name}
    assert parts == trained
    assert ("x_embedder.proj.weight" in names) == (which == "text")


def test_scales_divide_positions() -> None:
    # a grid of 4 at scale 0.5 takes every other position of a grid of 8
    small, large = (spatial_table(16, side, side, scale=scale, device=CPU) for side, scale in ((4, 0.5), (8, 1.0)))
    torch.testing.assert_close(small.view(4, 4, 16), large.view(8, 8, 16)[::2, ::2])
    torch.testing.assert_close(
        temporal_table(16, 4, scale=0.5, device=CPU), temporal_table(16, 8, scale=1.0, device=CPU)[::2]
    )


def test_a_base_stretches_both_axes_to_one_square() -> None:
    wide = spatial_table(16, 2, 8, scale=1.0, base=4, device=CPU).view(2, 8, 16)
    square = spatial_table(16, 4, 4, scale=1.0, device=CPU).view(4, 4, 16)
    torch.testing.assert_close(wide[:, ::2], square[::2])


def test_the_first_half_of_a_table_is_the_column() -> None:
    table = spatial_table(16, 3, 4, scale=1.0, device=CPU).view(3, 4, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 3, 8:])
    assert not torch.equal(table[0, 0, :8], table[0, 1, :8])
