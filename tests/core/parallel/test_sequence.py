"""Sequence parallelism: many processes compute what one does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opensora_core.errors import ConfigError
from opensora_core.lora import add_lora
from opensora_core.models import MODELS, LatentTransformer
from opensora_core.parallel import Axis, Cut, Mesh, attend_by_heads, counted, joined, sequence_parallel
from opensora_core.parallel.local import on_ranks
from opensora_core.tensors import Condition
from tests.core.models.examples import CHANNELS, VARIANTS, WIDTH, condition, latents, stir, tiny
from tests.golden.case import Case
from tests.golden.conftest import HERE as GOLDEN
from tests.golden.model_cases import build_upstream
from tests.golden.model_cases import condition as published_condition
from tests.golden.model_cases import timestep as published_timestep

CPU = torch.device("cpu")
FORWARD, GRADIENT = 1e-6, 1e-5  # norm of the difference over the norm: of the prediction, of each weight's gradient
TIMESTEP = torch.tensor([37.5, 901.0])
SHAPE = (5, 4, 6)  # frames that do not divide; 2 x 3 patches
FULL = ("dit", "pixart", "pixart-ms")


def cases(size: int) -> dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]]:
    """Every family over uneven frames and over a single one; then what only some of them have."""
    found: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {}
    for variant in VARIANTS:
        found[f"{variant}: 5 frames, not square"] = variant, {}, SHAPE
        found[f"{variant}: one frame"] = variant, {}, (1, 4, 4)
    found["stdit: even"] = "stdit", {}, (4, 4, 4)
    found["stdit: one patch, recomputed"] = "stdit", {"recompute": 1.0}, (3, 2, 2)
    found["stdit: frames in the stream, normed"] = "stdit", {"frame_positions": "stream", "qk_norm": True}, (3, 4, 6)
    found["stdit: patches of two frames"] = "stdit", {"patch_size": (2, 2, 2)}, (6, 6, 2)
    found["latte-1: recomputed by half, normed"] = "latte-1", {"recompute": 0.5, "qk_norm": True}, (3, 4, 6)
    for variant in FULL:
        found[f"{variant}: uneven heads"] = variant, {"num_heads": 3 if size == 2 else 6}, (3, 4, 6)
        found[f"{variant}: few heads, recomputed"] = variant, {"num_heads": size - 1, "recompute": 1.0}, SHAPE
    found["dit: few heads, one frame, normed"] = "dit", {"num_heads": 1, "qk_norm": True}, (1, 4, 4)
    assert {variant.partition(",")[0] for variant, _, _ in found.values()} == MODELS.keys()
    return found


def loss_of(prediction: Tensor) -> Tensor:
    target = torch.linspace(-1, 1, prediction[0].numel()).view_as(prediction[0])
    return (prediction.float() - target).square().mean()


def told(variant: str) -> Condition:
    """Captions of 3 and of 5 tokens: with one alone, what the queries ask would make no difference."""
    return condition(variant, 6)[torch.tensor([2, 4])]


def outcome(model: Callable[..., Tensor], variant: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and loss, after the backward pass."""
    prediction = model(x, TIMESTEP, told(variant))
    loss = loss_of(prediction)
    loss.backward()
    return prediction.detach(), loss.detach()


def gradients_of(model: LatentTransformer, axis: Axis | None = None) -> dict[str, Tensor]:
    """Take the gradients by name; their mean over an axis."""
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    result: dict[str, Tensor] = {}
    for name, gradient in found.items():
        assert gradient is not None, f"{name} has no gradient"
        result[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        if axis is not None:
            dist.all_reduce(result[name], group=axis.group)
            result[name] = result[name] / axis.size
    model.zero_grad()
    return result


def off(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient. That of a key's bias is zero but for round-off (FACTS 10.1)."""
    assert found.keys() == expected.keys()
    for name in [name for name in expected if name.endswith("k_norm.bias")]:
        assert max(found.pop(name).norm(), expected.pop(name).norm()) < 1e-5
    return max(off(found[name], expected[name]) for name in expected)


Errors = dict[str, tuple[float, float, float]]


def errors(mesh: Mesh) -> Errors:
    """Of every case: how far prediction, loss and the worst gradient are from those of one process."""
    result = {}
    for name, (variant, settings, shape) in cases(mesh.size).items():
        model, x = stir(tiny(variant, **settings)), latents(*shape)
        prediction, loss = outcome(model, variant, x)
        gradients = gradients_of(model)
        undo = sequence_parallel(model, mesh.sequence)
        shared_prediction, shared_loss = outcome(model, variant, x)
        apart = worst(gradients_of(model, mesh.sequence), gradients)
        with torch.inference_mode():
            assert torch.equal(model(x, TIMESTEP, told(variant)), shared_prediction)
        undo()
        assert torch.equal(model(x, TIMESTEP, told(variant)), prediction)
        result[name] = off(shared_prediction, prediction), abs(float(shared_loss / loss) - 1), apart
    return result


def wrong(found: Errors) -> Errors:
    assert len(found) > len(VARIANTS)
    return {name: value for name, value in found.items() if max(value[:2]) > FORWARD or value[2] > GRADIENT}


# What is checked by one start of processes: functions of the mesh that return what a test reads.


def mixed_frames(mesh: Mesh) -> tuple[float, float]:
    """How far the prediction is off as it is, and if spatial attention exchanged tokens, as upstream's does."""
    model, x = stir(tiny("stdit")), latents(4, 4, 4)
    alone = model(x, TIMESTEP, told("stdit"))
    sequence_parallel(model, mesh.sequence)
    right = off(model(x, TIMESTEP, told("stdit")), alone)
    for block in model.blocks:
        mixed = partial(
            attend_by_heads, block.attn.attend, tokens=Cut.even(1, 4 * 2, mesh.sequence), axis=mesh.sequence
        )
        block.attn.attend = mixed
    return right, off(model(x, TIMESTEP, told("stdit")), alone)


def published_numbers(mesh: Mesh) -> int:
    """Compare with what the published release computed, for each kind of attention."""
    names = ("stdit_base", "stdit_scale2_mask", "latte_text", "dit_text", "pixart_video")
    for name in names:
        case = Case(GOLDEN / "fixtures" / name)
        model = build_upstream(case)
        sequence_parallel(model, mesh.sequence)
        case.close(model(case.io["in.x"], published_timestep(case), published_condition(case)), "out")
    return len(names)


def bytes_sent(mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Forward, backward and gathered bytes."""
    result = {}
    for name, variant, settings, shape in (
        ("time, even", "stdit", {}, (4, 4, 4)),
        ("time, uneven", "stdit", {}, SHAPE),
        ("time, recomputed", "stdit", {"recompute": 1.0}, SHAPE),
        ("heads", "dit", {}, (4, 4, 4)),
        ("heads, uneven", "dit", {"num_heads": 3}, SHAPE),
        ("ring", "dit", {"num_heads": 1}, SHAPE),
        ("space", "latte", {"depth": 1}, SHAPE),
    ):
        model = stir(tiny(variant, **settings))
        sequence_parallel(model, mesh.sequence)
        with counted() as forward:
            prediction = model(latents(*shape), TIMESTEP, told(variant))
        with counted() as backward:
            loss_of(prediction).backward()
        assert backward.sent["gather"] == 0
        result[name] = forward.total - forward.sent["gather"], backward.total, forward.sent["gather"]
    model = stir(tiny("stdit"))
    sequence_parallel(model, mesh.sequence)
    with counted() as traffic, torch.autocast("cpu", torch.bfloat16):
        loss_of(model(latents(4, 4, 4), TIMESTEP, told("stdit"))).backward()
    result["time, bf16"] = (traffic.sent["exchange"],)
    return result


def rounded(mesh: Mesh) -> dict[str, tuple[float, float]]:
    """How far half precision is from fp32, on one process and on two."""
    result = {}
    for variant, settings in (("stdit", {}), ("latte-1", {}), ("pixart", {}), ("dit", {"num_heads": 1})):
        for how in ("weights", "autocast"):
            model, x = stir(tiny(variant, qk_norm=True, **settings)), latents(*SHAPE)
            exact = model(x, TIMESTEP, told(variant)).detach()
            model = model.bfloat16() if how == "weights" else model
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                alone = outcome(model, variant, x)[0]
                gradients = gradients_of(model)
                sequence_parallel(model, mesh.sequence)
                shared = outcome(model, variant, x)[0]
                shared_gradients = gradients_of(model, mesh.sequence)
            total = [
                torch.cat([gradient.float().flatten() for gradient in one.values()])
                for one in (shared_gradients, gradients)
            ]
            assert off(*total) < 0.05, (variant, how, off(*total))
            result[f"{variant}, {how}"] = off(alone, exact), off(shared, exact)
    return result


def compiled(mesh: Mesh) -> float:
    """Blocks that a compiler traced, with another number of frames after the first."""
    worse = 0.0
    for variant, settings, lengths in (("stdit", {"recompute": 0.5}, (5, 1)), ("pixart", {"num_heads": 1}, (5,))):
        model = stir(tiny(variant, **settings))
        sequence_parallel(model, mesh.sequence)
        for block in model.blocks:
            block.compile(backend="aot_eager")
        for frames in lengths:
            x, plain = latents(frames, 4, 6), stir(tiny(variant, **settings))
            alone, shared = outcome(plain, variant, x)[0], outcome(model, variant, x)[0]
            apart = worst(gradients_of(model, mesh.sequence), gradients_of(plain))
            worse = max(worse, off(shared, alone) / FORWARD, apart / GRADIENT)
    return worse


def adapters(mesh: Mesh) -> float:
    model, x = stir(tiny("stdit")), latents(*SHAPE)
    add_lora(model, rank=2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(weight.requires_grad * torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
    outcome(model, "stdit", x)
    gradients = gradients_of(model)
    sequence_parallel(model, mesh.sequence)
    outcome(model, "stdit", x)
    return worst(gradients_of(model, mesh.sequence), gradients)


def averaged_by_others(mesh: Mesh) -> tuple[float, float]:
    """Gradients that FSDP and DDP average over the axis."""
    alone, x = stir(tiny("stdit")), latents(*SHAPE)
    outcome(alone, "stdit", x)
    expected = gradients_of(alone)

    sharded: Any = stir(tiny("stdit", recompute=0.5))
    sequence_parallel(sharded, mesh.sequence)
    assert mesh.grid is not None
    for module in (*sharded.blocks, sharded):
        fully_shard(module, mesh=mesh.grid["sequence"])
    outcome(sharded, "stdit", x)
    by_fsdp = worst(gradients_of(sharded), dict(expected))

    copied = stir(tiny("stdit"))
    sequence_parallel(copied, mesh.sequence)
    outcome(DistributedDataParallel(copied, process_group=mesh.sequence.group), "stdit", x)
    return by_fsdp, worst(gradients_of(copied), expected)


def two_at_once(mesh: Mesh) -> float:
    """Two predictions of other sizes, before either's backward pass, which recomputes."""
    model = stir(tiny("stdit", recompute=1.0))

    def both() -> None:
        first, second = (model(latents(frames, 4, 4), TIMESTEP, told("stdit")) for frames in (5, 2))
        (loss_of(first) + loss_of(second)).backward()

    both()
    expected = gradients_of(model)
    sequence_parallel(model, mesh.sequence)
    both()
    return worst(gradients_of(model, mesh.sequence), expected)


def deep_copied(mesh: Mesh) -> float:
    """A copy has weights of its own, and shares frames as its original does."""
    model, x = stir(tiny("pixart")), latents(*SHAPE)
    expected = model(x, TIMESTEP, told("pixart"))
    keys = model.state_dict().keys()
    sequence_parallel(model, mesh.sequence)
    assert model.state_dict().keys() == keys
    copied = copy.deepcopy(model)
    for weight in model.parameters():
        weight.data.fill_(torch.nan)
    with counted() as traffic:
        result = off(copied(x, TIMESTEP, told("pixart")), expected)
    assert traffic.calls == {"exchange": 4, "gather": 1}
    return result


def refused(mesh: Mesh) -> str:
    model = tiny("dit", num_heads=1, attention="flex")
    with pytest.raises(ConfigError) as caught:
        sequence_parallel(model, mesh.sequence)
    return f"{caught.value.message}; {caught.value.hint}"


Check = Callable[[Mesh], Any]
CHECKS: tuple[Check, ...] = (
    errors, mixed_frames, published_numbers, bytes_sent, rounded, averaged_by_others, two_at_once, deep_copied, refused,
)  # fmt: skip


def run(checks: tuple[Check, ...], size: int) -> dict[str, Any]:
    with joined(CPU, sequence=size) as mesh:
        return {check.__name__: check(mesh) for check in checks}


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    """What every check found, by rank."""
    return on_ranks(2, run, CHECKS, 2, seconds=300)


def test_two_processes_compute_what_one_does(two: list[dict[str, Any]]) -> None:
    assert [wrong(found["errors"]) for found in two] == [{}, {}]


@pytest.mark.slow
def test_four_processes_compute_what_one_does() -> None:
    assert [wrong(found["errors"]) for found in on_ranks(4, run, (errors,), 4, seconds=300)] == [{}] * 4


def test_spatial_attention_sees_one_frame_at_a_time(two: list[dict[str, Any]]) -> None:
    """Upstream's mixes frame k of every process (FACTS 9.4), which this would tell."""
    for found in two:
        right, mixed = found["mixed_frames"]
        assert right <= FORWARD
        assert mixed > 0.1


def test_the_published_numbers_come_out(two: list[dict[str, Any]]) -> None:
    assert [found["published_numbers"] for found in two] == [5, 5]


def test_no_more_is_sent_than_the_formula_says(two: list[dict[str, Any]]) -> None:
    batch, blocks, width, out, word = 2, 2, WIDTH, 2 * CHANNELS * 4, 4
    for rank, found in enumerate(two):
        sent = found["bytes_sent"]
        # two exchanges per block, each of the activations of this process but for what it keeps
        activations = batch * (4 // 2) * 4 * width * word
        per_block = 2 * activations * (2 - 1) // 2
        assert sent["time, even"] == (blocks * per_block, blocks * per_block, batch * 2 * 4 * out * word)
        assert sent["time, bf16"] == (blocks * per_block,)  # forward and backward, at half the size
        # frames (3, 2) for patches (3, 3): t * (S - s) tokens, and back (T - t) * s
        frames, patches = (3, 2)[rank], 3
        forward, backward = frames * (6 - patches), (5 - frames) * patches
        uneven = blocks * (forward + backward) * batch * width * word
        gathered = batch * 3 * 6 * out * word
        assert sent["time, uneven"] == (uneven, uneven, gathered)
        assert sent["time, recomputed"] == (uneven, 2 * uneven, gathered)
        # queries, keys and values there, and the heads back
        assert sent["heads"][:2] == (2 * blocks * per_block,) * 2
        tokens, heads = (18, 12)[rank], (2, 1)[rank]
        per_token = batch * (width // 3) * word
        there, back = tokens * (3 - heads), (30 - tokens) * heads
        assert sent["heads, uneven"][0] == blocks * per_token * (3 * there + back)
        assert sent["heads, uneven"][1] == blocks * per_token * (there + 3 * back)
        # keys and values once round, then again with their gradients, which also come home
        largest = 2 * batch * 18 * width * word
        assert sent["ring"][:2] == (blocks * largest, blocks * 3 * largest)
        assert sent["space"][:2] == (0, 0)


def test_half_precision_is_no_worse_than_on_one_process(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert not {name: errors for name, errors in found["rounded"].items() if errors[1] > 1.2 * errors[0]}


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_and_adapters_get_the_same_gradients() -> None:
    for found in on_ranks(2, run, (compiled, adapters), 2, seconds=300):
        assert found["compiled"] <= 1
        assert found["adapters"] <= GRADIENT


def test_whoever_averages_gradients_is_right(two: list[dict[str, Any]]) -> None:
    assert all(max(found["averaged_by_others"]) <= GRADIENT for found in two)


def test_a_block_recomputes_the_grid_that_it_saw(two: list[dict[str, Any]]) -> None:
    assert all(found["two_at_once"] <= GRADIENT for found in two)


def test_a_copy_of_a_model_shares_frames_as_well(two: list[dict[str, Any]]) -> None:
    assert all(found["deep_copied"] <= FORWARD for found in two)


def test_a_backend_that_the_ring_does_not_know_is_refused(two: list[dict[str, Any]]) -> None:
    message = two[0]["refused"]
    assert "2 processes that share 1 heads" in message and "'flex'" in message and "model.attention=auto" in message


def test_an_axis_of_one_changes_nothing() -> None:
    model = tiny("stdit")
    before = dict(vars(model))
    sequence_parallel(model, Axis("sequence"))()
    assert vars(model) == before
