"""Optimizers: who decays, how the rate falls, and that a state survives its file."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from opensora_core.config import TrainConfig, with_settings
from opensora_core.errors import CheckpointError, ConfigError
from opensora_core.muon import Muon, orthogonal
from opensora_core.parallel.engines.state import load_optimizer, optimizer_tensors
from opensora_core.training import optim
from opensora_core.training.optim import Optimizer, build_optimizers, lr_factor, set_lr
from opensora_core.weights import apart
from tests.core.models.examples import stir, tiny

SETTINGS = TrainConfig(max_steps=6, lr=1e-2, weight_decay=0.1, warmup_steps=2)
OPTIMIZERS = ("adamw", "adamw, not fused", "muon", "adamw-8bit")


def settings(optimizer: str) -> TrainConfig:
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    return with_settings(SETTINGS, {"optimizer": optimizer.partition(",")[0]})


def steps(module: nn.Module, optimizers: list[Optimizer], train: TrainConfig, *numbers: int) -> None:
    for step in numbers:
        set_lr(optimizers, step, train)
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def model() -> nn.Module:
    return stir(tiny("stdit", hidden_size=64)).train()  # large enough that some moments go to 8 bits


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_steps_a_file_and_three_more_are_six(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    if optimizer == "adamw, not fused":
        monkeypatch.setattr(optim, "_FUSED", set())
    train = settings(optimizer)
    straight = model()
    steps(straight, build_optimizers(straight, train), train, *range(6))

    first = model()
    optimizers = build_optimizers(first, train)
    assert [group.get("fused") for group in optimizers[0].param_groups].count(True) == 2 * (
        optimizer in ("adamw", "muon")
    )
    steps(first, optimizers, train, *range(3))
    tensors, rest = optimizer_tensors(first, optimizers)
    save_file(apart(tensors), tmp_path / "optimizer.safetensors")
    rest = json.loads(json.dumps(rest))

    second = model()
    second.load_state_dict(first.state_dict())
    optimizers = build_optimizers(second, train)
    load_optimizer(second, optimizers, load_file(tmp_path / "optimizer.safetensors"), rest)
    steps(second, optimizers, train, 3, 4, 5)
    expected = straight.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.state_dict().items())


def test_the_state_has_the_names_of_the_parameters() -> None:
    module = model()
    train = settings("muon")
    optimizers = build_optimizers(module, train)
    steps(module, optimizers, train, 0)
    tensors, rest = optimizer_tensors(module, optimizers)
    assert tensors["blocks.0.attn.qkv.weight/momentum_buffer"].shape == (192, 64)
    assert tensors["final_layer.linear.weight/exp_avg"].shape == module.get_parameter("final_layer.linear.weight").shape
    assert tensors["final_layer.linear.weight/step"] == 1
    assert rest["AdamW"]["group"]["betas"] == [0.9, 0.999] and "lr" not in rest["AdamW"]["group"]


def test_eight_bits_are_a_quarter_of_the_memory_and_nearly_as_good() -> None:
    train, exact = settings("adamw-8bit"), settings("adamw")
    modules = [nn.Linear(128, 128), nn.Linear(128, 128)]
    modules[1].load_state_dict(modules[0].state_dict())
    start = modules[0].weight.detach().clone()
    sizes = []
    for module, settings_ in zip(modules, (train, exact), strict=True):
        optimizers = build_optimizers(module, settings_)
        steps(module, optimizers, settings_, *range(6))
        tensors = optimizer_tensors(module, optimizers)[0]
        sizes.append(sum(tensor.nbytes for name, tensor in tensors.items() if "qmap" not in name))
    assert sizes[0] < 0.3 * sizes[1]
    assert (modules[0].weight - modules[1].weight).norm() < 0.05 * (modules[1].weight - start).norm()


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes") as caught:
        build_optimizers(nn.Linear(2, 2), with_settings(SETTINGS, {"optimizer": "adamw-8bit"}))
    assert "pip install bitsandbytes" in caught.value.hint
    with pytest.raises(ConfigError, match="does not run on 'meta'"):
        build_optimizers(nn.Linear(2, 2, device="meta"), with_settings(SETTINGS, {"optimizer": "adamw-8bit"}))


def test_a_device_without_fused_kernels_goes_without() -> None:
    (optimizer,) = build_optimizers(nn.Linear(2, 2, device="meta"), SETTINGS)
    assert not any(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("variant", ["stdit", "dit, classes"])
def test_biases_norms_tables_and_embeddings_do_not_decay(variant: str) -> None:
    module = stir(tiny(variant, qk_norm=True))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizers = build_optimizers(module, with_settings(SETTINGS, {"warmup_steps": 0}))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in module.named_parameters():
        still = parameter.ndim == 1 or "table" in name
        torch.testing.assert_close(parameter.detach(), before[name] * (1 if still else 1 - 1e-3), msg=name)
    assert any("table" in name for name in before)


@pytest.mark.parametrize(
    ("saved", "run", "told"),
    [
        ("muon", "adamw", "the state of AdamW and Muon, but the run trains with AdamW"),
        ("adamw", "muon", "the state of AdamW, but the run trains with AdamW and Muon"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(saved: str, run: str, told: str) -> None:
    module = model()
    optimizers = build_optimizers(module, settings(saved))
    steps(module, optimizers, settings(saved), 0)
    with pytest.raises(CheckpointError, match=told):
        load_optimizer(module, build_optimizers(module, settings(run)), *optimizer_tensors(module, optimizers))


def test_the_state_of_another_model_is_refused() -> None:
    module, other, frozen = nn.Linear(2, 2), nn.Linear(3, 2), nn.Linear(2, 2)
    optimizers = build_optimizers(module, SETTINGS)
    steps(module, optimizers, SETTINGS, 0)
    saved = optimizer_tensors(module, optimizers)
    with pytest.raises(CheckpointError, match=r"exp_avg of 'weight' is \(2, 2\), not \(2, 3\)"):
        load_optimizer(other, build_optimizers(other, SETTINGS), *saved)
    frozen.bias.requires_grad_(False)
    with pytest.raises(CheckpointError, match="state of 'bias', which this run does not train"):
        load_optimizer(frozen, build_optimizers(frozen, SETTINGS), *saved)


def test_the_rate_falls_along_a_line_or_a_cosine() -> None:
    line = TrainConfig(max_steps=10, warmup_steps=2, decay_fraction=0.4)
    assert [lr_factor(step, line) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    cosine = with_settings(line, {"decay": "cosine"})
    expected = [0.5, *[1] * 6, *((1 + math.cos(math.pi * done)) / 2 for done in (0.25, 0.5, 0.75))]
    assert [lr_factor(step, cosine) for step in range(10)] == pytest.approx(expected)
    assert lr_factor(10, cosine) == 0


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_our_muon_is_torchs_in_more_digits(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (Muon([ours], lr=0.1, weight_decay=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1))
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # what bf16 leaves
    states = [optimizer.state[parameter] for optimizer, parameter in zip(optimizers, (ours, theirs), strict=True)]
    assert states[0].keys() == states[1].keys()
    assert torch.equal(states[0]["momentum_buffer"], states[1]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32), (32, 40)])
def test_matrices_of_any_shape_are_orthogonalised_as_torch_does(shape: tuple[int, int]) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    torch.manual_seed(0)
    matrix = torch.randn(shape)
    ours = orthogonal(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    theirs = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    assert ours.shape == matrix.shape
    torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0)  # theirs is in bf16
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.5 and values.max() < 1.3
