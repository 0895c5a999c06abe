"""What a training takes: told beforehand, and compared with what is there when it runs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from opensora_core.config import TrainConfig, with_settings
from opensora_core.lora import add_lora, lora_state
from opensora_core.models import LatentTransformer, build, freeze
from opensora_core.parallel.engines.state import optimizer_tensors
from opensora_core.training.ema import EMA
from opensora_core.training.memory import MemoryEstimate, estimate, forward_flops, peak_flops, peak_of, training_flops
from opensora_core.training.optim import build_optimizers
from tests.core.models.examples import CHANNELS, LENGTH, VARIANTS, condition, latents, stir, tiny

SIZE = (3, 8, 12)
BATCH = 2
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def told(model: LatentTransformer, dtype: torch.dtype = torch.float32, optimizer: str = "adamw") -> MemoryEstimate:
    train = with_settings(TrainConfig(), {"optimizer": optimizer})
    return estimate(model, train, latent_shape=(CHANNELS, *SIZE), batch_size=BATCH, dtype=dtype)


def content(tensor: Tensor) -> bytes:
    """The whole storage behind a tensor."""
    count = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.detach().as_strided((count,), (1,), 0).view(torch.uint8).numpy().tobytes()


def saved(model: LatentTransformer, variant: str, dtype: torch.dtype) -> int:
    """Bytes that a forward pass keeps, without weights and their copies in half precision."""
    kept: dict[int, Tensor] = {}
    weights = {content(weight.to(dtype)) for weight in model.state_dict().values()}
    half = torch.autocast("cpu", dtype) if dtype is not torch.float32 else nullcontext()

    def pack(tensor: Tensor) -> Tensor:
        if content(tensor) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half:
        out = model(latents(*SIZE, batch=BATCH), torch.zeros(BATCH), condition(variant, BATCH))
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_the_whole_model_keeps(variant: str, dtype: torch.dtype) -> None:
    model = stir(tiny(variant, depth=4)).train()
    with torch.device("meta"):
        unreal = tiny(variant, depth=4)
    assert told(unreal, dtype) == told(model, dtype)
    assert told(model, dtype).activations == pytest.approx(saved(model, variant, dtype), rel=0.01)


@pytest.mark.parametrize("adapted", [True, False])
def test_activations_of_what_is_partly_frozen(adapted: bool) -> None:
    model = stir(tiny("stdit", depth=4)).train()
    whole = told(model).activations
    if adapted:
        add_lora(model, 4)
    else:
        freeze(model, "not_temporal")
    assert told(model).activations < whole
    # the first block, below which nothing is trained, keeps less than it is taken for
    assert told(model).activations == pytest.approx(saved(model, "stdit", torch.float32), rel=0.1)


@pytest.mark.parametrize("variant", ["stdit", "latte-1"])
def test_recomputing_trades_them_away(variant: str) -> None:
    none, half, all_ = (told(tiny(variant, depth=4, recompute=share)) for share in (0, 0.5, 1))
    assert none.activations == none.activations_kept == half.activations_kept == all_.activations_kept
    assert all_.activations == all_.activations_recomputed == none.activations_recomputed
    assert none.activations > half.activations > all_.activations
    stream = 4 * BATCH * 3 * 4 * 6 * 48
    deeper = told(tiny(variant, depth=8, recompute=1)).activations
    assert deeper - all_.activations == 4 * stream
    assert none.total - all_.total == none.activations - all_.activations


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "muon"])
@pytest.mark.parametrize("adapted", [False, True])
def test_what_stays_for_the_whole_run(optimizer: str, adapted: bool) -> None:
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    model = stir(tiny("stdit", hidden_size=64)).train()
    if adapted:
        add_lora(model, 4)
    expected = told(model, torch.bfloat16, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        model(latents(*SIZE), torch.zeros(2), condition("stdit")).square().sum().backward()
    optimizers = build_optimizers(model, with_settings(TrainConfig(), {"optimizer": optimizer}))
    for one in optimizers:
        one.step()

    def size(tensors: list[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    moments = [value for name, value in optimizer_tensors(model, optimizers)[0].items() if value.ndim]
    moments = [value for value in moments if value.shape != (256,) or value.dtype is not torch.float32]  # shared maps
    state, average = model.state_dict(), EMA(model, 0.9).shadow
    assert expected.weights == size(list(state.values()))
    assert expected.gradients == size([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert expected.average == size(list(average.values()))
    assert expected.optimizer == pytest.approx(size(moments), rel=0.02)
    kept = (
        [*lora_state(model).values(), *average.values(), *average.values()]
        if adapted
        else [*state.values(), *average.values()]
    )
    assert expected.checkpoint == size(kept) + expected.optimizer
    if not adapted:  # of layers whose input has no gradient, none is kept
        ends = (model.get_parameter(f"{name}.weight") for name in ("t_embedder.mlp.0", "y_embedder.y_proj.fc1"))
        used = [*(module.weight for module in model.linears()), model.x_embedder.proj.weight]
        assert expected.autocast_copies == 2 * (sum(map(Tensor.numel, used)) - sum(map(Tensor.numel, ends)))
    assert told(model).autocast_copies == 0


@every_variant
def test_operations_are_those_that_torch_counts(variant: str) -> None:
    model = stir(tiny(variant, attention="math"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents(*SIZE, batch=1), torch.zeros(1), condition(variant, 1))
    assert forward_flops(model, (CHANNELS, *SIZE)) == counter.get_total_flops()
    assert training_flops(model, (CHANNELS, *SIZE)) == 3 * counter.get_total_flops()


def test_operations_follow_the_captions() -> None:
    model = tiny("stdit")
    short, whole, long = (forward_flops(model, (CHANNELS, *SIZE), length) for length in (2, LENGTH, 99))
    assert short < whole == long == forward_flops(model, (CHANNELS, *SIZE))


def test_the_published_model_at_its_largest_size() -> None:
    with torch.device("meta"):
        model = build("stdit")
    assert training_flops(model, (4, 16, 64, 64), 120) == pytest.approx(73.2e12, rel=1e-3)
    assert training_flops(model, (4, 16, 32, 32), 120) == pytest.approx(17.1e12, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_device(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
