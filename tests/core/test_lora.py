"""Adapters: nothing at first, little to train, and merged or not the same model; files are peft's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora_core import components, runs, sampling
from opensora_core.config import to_dict, with_settings
from opensora_core.errors import CheckpointError, ConfigError, UsageError
from opensora_core.files import write_manifest
from opensora_core.lora import (
    SETTINGS_FILE,
    TARGETS,
    TENSORS_FILE,
    add_lora,
    is_lora,
    lora_state,
    merge_lora,
    save_lora,
)
from opensora_core.models import LatentTransformer
from tests.core.exported import export_tiny, tiny_config
from tests.core.models.examples import VARIANTS, condition, latents, stir, tiny

TIMES = torch.tensor([3.0, 731.5])
RANK, ALPHA = 4, 6.0
LAYER = "blocks.1.cross_attn.kv_linear"


def outcome(model: nn.Module, variant: str = "stdit") -> Tensor:
    with torch.no_grad():
        result: Tensor = model(latents(2, 4, 4), TIMES, condition(variant))
    return result


def adapted(variant: str = "stdit") -> LatentTransformer:
    """A model whose adapters have something to say."""
    model = stir(tiny(variant))
    add_lora(model, RANK, ALPHA)
    generator = torch.Generator().manual_seed(5)
    for name, value in lora_state(model).items():
        if "lora_B" in name:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_lora(tmp_path / "adapter", lora_state(adapted()), RANK, ALPHA)
    return tmp_path / "adapter"


def edit(adapter: Path, change: Any) -> None:
    """Let `change` loose on the settings and tensors of an adapter."""
    settings, tensors = json.loads((adapter / SETTINGS_FILE).read_text()), load_file(adapter / TENSORS_FILE)
    change(settings, tensors)
    (adapter / SETTINGS_FILE).write_text(json.dumps(settings))
    save_file(tensors, adapter / TENSORS_FILE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_adapter_changes_nothing_and_trains_alone(variant: str) -> None:
    plain, model = stir(tiny(variant)), stir(tiny(variant))
    add_lora(model, RANK)
    torch.testing.assert_close(outcome(model, variant), outcome(plain, variant), atol=1e-6, rtol=1e-6)
    model(latents(2, 4, 4), TIMES, condition(variant)).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(lora_state(model))
    kinds = {name.split(".lora_")[0].split(".", 2)[2] for name in trained}
    expected = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    if any(".cross_attn." in name for name in plain.state_dict()):
        expected |= {"cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"}
    if variant.startswith("stdit"):
        expected |= {"attn_temp.qkv", "attn_temp.proj"}
    assert kinds == expected
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_start_values_come_from_the_seed_alone() -> None:
    states = []
    before = torch.get_rng_state()
    for seed in (1, 1, 2):
        model = tiny("stdit")
        add_lora(model, RANK, seed=seed)
        states.append(lora_state(model)[f"{LAYER}.lora_A.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="rank 0"):
        add_lora(tiny("stdit"), 0)


@pytest.mark.parametrize("variant", ["stdit", "latte-1", "dit"])
def test_merged_is_the_same_as_beside(tmp_path: Path, variant: str) -> None:
    model, merged = adapted(variant), stir(tiny(variant))
    expected, plain = outcome(model, variant), outcome(merged, variant)
    assert (expected - plain).abs().max() > 0.01
    save_lora(tmp_path, lora_state(model), RANK, ALPHA)
    keys = list(merged.state_dict())
    merge_lora(merged, tmp_path)
    torch.testing.assert_close(outcome(merged, variant), expected, atol=1e-5, rtol=1e-5)
    assert list(merged.state_dict()) == keys
    assert all(type(module) is nn.Linear for module in merged.modules() if isinstance(module, nn.Linear))
    merge_lora(merged, tmp_path, scale=-1.0)
    torch.testing.assert_close(outcome(merged, variant), plain, atol=1e-5, rtol=1e-5)


def test_it_is_added_in_single_precision(adapter: Path) -> None:
    single, half = stir(tiny("stdit")), stir(tiny("stdit")).to(torch.bfloat16)
    weight = half.get_parameter(f"{LAYER}.weight")
    before = weight.detach().float()
    merge_lora(half, adapter)
    merge_lora(single, adapter)
    a, b = (load_file(adapter / TENSORS_FILE)[f"base_model.model.{LAYER}.lora_{side}.weight"] for side in "AB")
    assert torch.equal(weight, (before + ALPHA / RANK * (b @ a)).to(torch.bfloat16))


def test_peft_reads_ours(adapter: Path) -> None:
    from peft import PeftModel

    assert is_lora(adapter) and not is_lora(adapter.parent)
    theirs = PeftModel.from_pretrained(stir(tiny("stdit")), str(adapter))
    torch.testing.assert_close(outcome(theirs), outcome(adapted()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "special", [{}, {"use_rslora": True}, {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"qkv": 9}}]
)
def test_ours_reads_what_peft_wrote(tmp_path: Path, special: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["qkv", "fc1"], init_lora_weights="gaussian", **special)
    theirs = get_peft_model(stir(tiny("stdit")), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(str(tmp_path))
    ours = stir(tiny("stdit"))
    merge_lora(ours, tmp_path)
    torch.testing.assert_close(outcome(ours), outcome(theirs), atol=1e-5, rtol=1e-5)


def test_names_of_parameters_do_as_well(adapter: Path, tmp_path: Path) -> None:
    named = {name: value for name, value in adapted().named_parameters() if value.requires_grad}
    assert any(".lora_A.default.weight" in name for name in named)
    save_lora(tmp_path / "other", named, RANK, ALPHA)
    for file in (SETTINGS_FILE, TENSORS_FILE):
        assert (tmp_path / "other" / file).read_bytes() == (adapter / file).read_bytes()


KEY = f"base_model.model.{LAYER}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s, t: t.pop(KEY), f"missing: {LAYER}.lora_A.weight"),
        (
            lambda s, t: t.update({KEY: t[KEY][:, :-1].contiguous()}),
            f"{LAYER}: B and A are 96x4 and 4x47, but .* 96x48",
        ),
        (lambda s, t: t.update({KEY: t[KEY][:-1]}), "B and A are 96x4 and 3x48"),
        (lambda s, t: t.update({KEY.replace(".1.", ".7."): t.pop(KEY)}), r"not of this model: .*blocks\.7\."),
        (
            lambda s, t: t.update({f"{LAYER}.lora_magnitude_vector": t[KEY] + 1}),
            "no matrix of a plain LoRA: .*magnitude",
        ),
        (lambda s, t: t.clear(), "it is empty"),
        (lambda s, t: s.update(peft_type="LOHA"), "no plain LoRA, but LOHA"),
        (lambda s, t: s.update(use_dora=True), "no plain LoRA, but LORA, use_dora"),
        (lambda s, t: s.update(init_lora_weights="pissa"), "init_lora_weights=pissa"),
        (lambda s, t: s.update(lora_alpha="x"), "does not describe a LoRA"),
        (lambda s, t: s.pop("peft_type"), "does not describe a LoRA"),
    ],
)
def test_what_does_not_fit_is_named(adapter: Path, change: Any, told: str) -> None:
    model = stir(tiny("stdit"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edit(adapter, change)
    with pytest.raises(CheckpointError, match=told):
        merge_lora(model, adapter)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pickles_and_torn_files_are_refused(adapter: Path) -> None:
    content = (adapter / TENSORS_FILE).read_bytes()
    (adapter / TENSORS_FILE).write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="torn"):
        merge_lora(tiny("stdit"), adapter)
    (adapter / TENSORS_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"but adapter_model\.bin") as caught:
        merge_lora(tiny("stdit"), adapter)
    assert "safetensors" in caught.value.hint
    with pytest.raises(CheckpointError, match="does not describe a LoRA"):
        merge_lora(tiny("stdit"), adapter.parent)


def adapter_of(model: nn.Module, folder: Path, value: float) -> Path:
    """Write an adapter for a model, which becomes the adapted one."""
    add_lora(model, RANK, ALPHA)
    for name, tensor in lora_state(model).items():
        tensor.fill_(value if "lora_B" in name else 0.2)
    save_lora(folder, lora_state(model), RANK, ALPHA)
    return folder


def seal(checkpoint: Path) -> None:
    """Make a checkpoint whole."""
    for file in (runs.WEIGHTS_FILE, runs.AVERAGE_FILE):
        save_file({}, checkpoint / file)
    write_manifest(checkpoint)


@pytest.mark.parametrize("place", ["", "lora", "checkpoints/step-2/lora"])
def test_a_model_is_built_with_the_adapter_that_a_path_names(tmp_path: Path, place: str) -> None:
    config = tiny_config(export_tiny(tmp_path / "model"))
    plain, expected = components.build_model(config), components.build_model(config)
    folder = adapter_of(components.build_model(config), tmp_path / "run" / place, 0.1)
    if "step" in place:
        seal(folder.parent)
    merge_lora(expected, folder, 0.5)
    built = components.build_model(
        with_settings(config, {"model.lora": str(tmp_path / "run"), "model.lora_scale": 0.5})
    )
    assert built.state_dict().keys() == plain.state_dict().keys()
    for name, value in built.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
        assert torch.equal(value, plain.state_dict()[name]) == (re.fullmatch(TARGETS + ".weight", name) is None)
    with pytest.raises(UsageError, match="no adapter in"):
        components.build_model(with_settings(config, {"model.lora": str(tmp_path / "model")}))


def test_a_run_that_trained_an_adapter_takes_another_on_top(tmp_path: Path) -> None:
    base = tiny_config(export_tiny(tmp_path / "model"))
    step = tmp_path / "run" / "checkpoints" / "step-2"
    own = adapter_of(components.build_model(base), step / runs.LORA_FOLDER, 0.1)
    other = adapter_of(components.build_model(base), tmp_path / "other", -0.3)
    (step / runs.CONFIG_FILE).write_text(json.dumps(to_dict(with_settings(base, {"train.init": base.model.weights}))))
    seal(step)
    config = with_settings(base, {"model.weights": str(step), "model.lora_scale": 0.5})
    expected = [components.build_model(base) for _ in range(2)]
    merge_lora(expected[0], own, 0.5)
    merge_lora(expected[1], own)
    merge_lora(expected[1], other, 0.5)
    for named, model in (("", expected[0]), (str(step), expected[0]), (str(other), expected[1])):
        built = components.build_model(with_settings(config, {"model.lora": named})).state_dict()
        assert all(torch.equal(value, built[name]) for name, value in model.state_dict().items()), named


def test_a_sample_tells_which_adapter_made_it(tmp_path: Path) -> None:
    config = with_settings(tiny_config(export_tiny(tmp_path / "model")), {"sampling.steps": 1})
    model = components.build_model(config)
    add_lora(model, RANK)
    save_lora(tmp_path / "adapter", lora_state(model), RANK)
    given = {"model.lora": str(tmp_path / "adapter"), "model.lora_scale": 0.5}
    for folder, changes in (("without", {}), ("with", given)):
        settings = with_settings(config, changes)
        list(sampling.sample(settings, sampling.plan(settings, ["a red ball"], tmp_path / folder)))
        (record,) = map(json.loads, (tmp_path / folder / "samples.jsonl").read_text().splitlines())
        assert (record.get("lora"), record.get("lora_scale")) == tuple(changes.values() or (None, None))
