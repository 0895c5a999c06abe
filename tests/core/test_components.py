"""Settings become parts: on a device that is there, with weights of any layout, or with an error that says why not."""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_core import components, diffusion, files, media, sampling
from opensora_core.config import Config, with_settings
from opensora_core.errors import CheckpointError, ConfigError, DeviceError, InputError, UsageError, WeightsError
from opensora_core.presets import PRESETS, preset
from opensora_core.sampling import Saved
from tests.core.exported import export_tiny, randomised, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def config(folder: Path) -> Config:
    return tiny_config(folder)


# devices and dtypes ------------------------------------------------------------------------------------------


def test_a_device_is_the_best_there_is_or_the_one_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert components.resolve_device("auto") == torch.device("cuda:0")
    assert components.resolve_device("cuda") == torch.device("cuda:0")
    assert components.resolve_device("cuda:1") == torch.device("cuda:1")
    assert components.resolve_device("cpu") == CPU
    for name in ("cuda:2", "mps", "tpu"):
        with pytest.raises(DeviceError, match=f"no device '{name}'") as caught:
            components.resolve_device(name)
        assert "cuda:0 or cuda:1 or cpu" in caught.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert components.resolve_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert components.resolve_device("auto") == torch.device("mps")


def test_a_dtype_is_what_the_device_is_fast_at():
    cuda = torch.device("cuda:0")
    assert components.resolve_dtype("auto", CPU) == torch.float32
    assert components.resolve_dtype("auto", cuda) == torch.bfloat16
    assert components.resolve_dtype("bf16", CPU) == torch.bfloat16
    assert components.resolve_dtype("fp16", cuda) == torch.float16
    with pytest.raises(ConfigError, match=r"0\.2 GFLOP/s"):
        components.resolve_dtype("fp16", CPU)
    with pytest.raises(ConfigError, match="unknown dtype"):
        components.resolve_dtype("fp8", CPU)


def test_pixels_are_not_rounded_to_eight_bits(config):
    assert components.vae_dtype(with_settings(config, {"runtime.dtype": "bf16"}), CPU) == torch.float32
    fp16 = with_settings(config, {"runtime.dtype": "fp16"})
    assert components.vae_dtype(fp16, torch.device("cuda:0")) == torch.float16


def test_the_allocator_is_tuned_for_runs_on_the_cpu(monkeypatch):
    calls: list[tuple[int, int]] = []
    library = type("Library", (), {"mallopt": staticmethod(lambda *arguments: calls.append(arguments))})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    components.tune_allocator(torch.device("cuda:0"))
    assert calls == []
    components.tune_allocator(CPU)
    assert [option for option, _ in calls] == [-1, -3]
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # musl, macOS
    components.tune_allocator(CPU)
    assert len(calls) == 2


# parts ------------------------------------------------------------------------------------------


def test_an_export_of_ours_gives_all_parts(config, folder):
    encoder = components.build_text_encoder(config)
    condition = encoder.encode(["a red ball"])
    assert condition.tokens.shape == (1, 12, 16)
    vae = components.build_vae(config)
    assert vae.latent_shape(4, 32, 48) == (4, 4, 4, 6)
    assert components.spatial_stride(config) == vae.stride[1] == 8
    model = components.build_model(config)
    expected = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_file_of_an_export_brings_its_other_parts(config, folder):
    config = with_settings(config, {"model.weights": str(folder / "model.safetensors")})
    assert components.word_of(config, "vae") == str(folder / "vae")
    assert components.word_of(config, "text") == str(folder / "text")
    assert components.word_of(with_settings(config, {"vae.weights": "sd-vae-ft-mse"}), "vae") == "sd-vae-ft-mse"


def test_an_export_on_the_hub_brings_its_other_parts(config):
    config = with_settings(config, {"model.weights": "hf:owner/repo@v1"})
    assert components.word_of(config, "vae") == "hf:owner/repo/vae@v1"
    config = with_settings(config, {"model.weights": "hf:owner/repo/model.safetensors"})
    assert components.word_of(config, "text") == "hf:owner/repo/text"
    assert components.word_of(with_settings(config, {"model.weights": "bundled"}), "vae") == "bundled"


def test_dtypes_reach_the_parts(config):
    config = with_settings(config, {"runtime.dtype": "bf16", "text.dtype": "fp32"})
    assert {parameter.dtype for parameter in components.build_model(config).parameters()} == {torch.bfloat16}
    assert components.build_text_encoder(config).encode(["a"]).tokens.dtype == torch.float32
    config = with_settings(config, {"text.dtype": "auto"})
    assert components.build_text_encoder(config).encode(["a"]).tokens.dtype == torch.bfloat16


def test_random_weights_are_for_those_who_name_none(config):
    model = components.build_model(with_settings(config, {"model.weights": ""}))
    assert model.final_layer.linear.weight.abs().max() == 0  # as training starts
    with pytest.raises(UsageError, match="no weights are named for the vae"):
        components.build_vae(with_settings(config, {"vae.weights": ""}))


@pytest.mark.parametrize("name", PRESETS)
def test_the_objective_of_every_preset_takes_its_sampler(name):
    config = preset(name)
    objective = components.build_objective(config)
    assert isinstance(objective, diffusion.SAMPLERS[config.sampling.sampler].fits)
    if config.diffusion.objective == "iddpm":
        assert objective.learn_sigma == config.model.learn_sigma


def test_every_preset_s_model_can_be_built():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in components.empty_model(preset(name)).parameters())
            for name in ("16x256x256", "pixart-1x512x512", "pixart-1x1024-ms", "dit-1x256x256-class")
        }
    assert sizes == {
        "16x256x256": 759_620_768,
        "pixart-1x512x512": 610_856_096,
        "pixart-1x1024-ms": 611_349_152,
        "dit-1x256x256-class": 674_834_720,
    }


# weights of others ------------------------------------------------------------------------------------------


def _published(config: Config, path: Path) -> dict[str, Any]:
    """A file in the layout of Open-Sora 1.0: position tables among the weights, in a pickle."""
    state = dict(randomised(components.empty_model(config)).state_dict())
    torch.save({**state, "pos_embed": torch.zeros(1, 4, 64), "pos_embed_temporal": torch.zeros(1, 2, 64)}, path)
    return state


def test_a_published_file_is_converted_and_kept(config, tmp_path):
    state = _published(config, tmp_path / "x.pth")
    config = with_settings(config, {"model.weights": str(tmp_path / "x.pth")})
    for _ in range(2):
        model = components.build_model(config)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert (tmp_path / "x.safetensors").exists()


def test_what_the_user_should_know_of_a_file_is_told(config, tmp_path, monkeypatch):
    _published(config, tmp_path / "x.pth")
    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    notes: list[str] = []
    components.build_model(with_settings(config, {"model.weights": str(tmp_path / "x.pth")}), None, notes.append)
    assert len(notes) == 1
    assert "converted anew each time" in notes[0]


def test_weights_of_another_architecture_are_named(config, tmp_path):
    _published(with_settings(config, {"model.family": "pixart"}), tmp_path / "p.pth")
    with pytest.raises(CheckpointError, match="'pixart'") as caught:
        components.build_model(with_settings(config, {"model.weights": str(tmp_path / "p.pth")}))
    assert str(tmp_path / "p.pth") in caught.value.message
    assert "model.family=pixart" in caught.value.hint


def test_weights_of_another_size_are_named(config, folder):
    with pytest.raises(CheckpointError, match=r"do not fit(?s:.)*blocks\.1") as caught:
        components.build_model(with_settings(config, {"model.depth": 1}))
    assert "model.depth=2" in caught.value.hint


def test_a_vae_is_no_denoiser(config, folder):
    with pytest.raises(CheckpointError, match="not a denoiser"):
        components.build_model(with_settings(config, {"model.weights": str(folder / "vae")}))


def test_weights_without_a_null_caption_take_the_empty_caption_s(config, folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    del state["y_embedder.y_embedding"]
    save_file(state, tmp_path / "x.safetensors")
    config = with_settings(config, {"model.weights": str(tmp_path / "x.safetensors")})
    with pytest.raises(WeightsError, match="null caption"):
        components.build_model(config)
    empty = torch.randn(12, 16)
    assert torch.equal(components.build_model(config, empty).y_embedder.y_embedding, empty)


# whole runs of other kinds ------------------------------------------------------------------------------------------


def run(config: Config, prompts: list[str], output: Path) -> list[Any]:
    return [event for event in sampling.sample(config, sampling.plan(config, prompts, output)) if type(event) is Saved]


def _autoencoder(folder: Path) -> None:
    """A tiny AutoencoderKL in the layout of sd-vae-ft-ema."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)


def test_classes_by_name_or_number_with_an_image_autoencoder(config, tmp_path):
    _autoencoder(tmp_path / "vae")
    config = with_settings(
        preset("dit-1x256x256-class"),
        {
            "video.height": 16,
            "video.width": 24,
            "model.hidden_size": 64,
            "model.depth": 2,
            "model.num_heads": 4,
            "model.weights": str(tmp_path / "dit.pt"),
            "vae.weights": str(tmp_path / "vae"),
            "sampling.steps": 2,
            "runtime.device": "cpu",
        },
    )
    torch.save(randomised(components.empty_model(config)).state_dict(), tmp_path / "dit.pt")
    assert components.spatial_stride(config) == 2
    saved = run(config, ["207", "goldfish"], tmp_path / "out")
    assert [event.path.name for event in saved] == ["207-42.png", "goldfish-42.png"]
    first, second = (media.read_video(event.path).frames for event in saved)
    assert first.shape == second.shape == (1, 16, 24, 3)
    assert (first != second).any()
    by_number = run(config, ["1"], tmp_path / "number")  # goldfish; another prompt, and so another noise
    assert (media.read_video(by_number[0].path).frames != first).any()
    with pytest.raises(InputError, match="no such animal"):
        run(config, ["no such animal at all"], tmp_path / "out")


def test_pixart_ms_is_told_the_size(config, folder, tmp_path):
    changes = {
        "model.family": "pixart-ms",
        "model.hidden_size": 96,
        "model.patch_size": (1, 2, 2),
        "model.weights": str(tmp_path / "ms.pth"),
        "vae.weights": str(folder / "vae"),
        "text.weights": str(folder / "text"),
    }
    config = with_settings(config, changes)
    _published(config, tmp_path / "ms.pth")
    seen = []

    def watch(module: Any, arguments: Any) -> None:
        seen.append(arguments[2].size)

    with torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, arguments: watch(module, arguments) if type(module).__name__ == "PixArtMS" else None
    ):
        run(config, ["a red ball"], tmp_path / "out")
    assert len(seen) == 3
    assert seen[0].tolist() == [[32, 48], [32, 48]]


@pytest.mark.slow
def test_a_compiled_model_draws_the_same_picture(config, tmp_path):
    plain = run(config, ["a red ball"], tmp_path / "a")[0]
    compiled = run(with_settings(config, {"runtime.compile": True}), ["a red ball"], tmp_path / "b")[0]
    frames = [media.read_video(event.path).frames.astype(int) for event in (plain, compiled)]
    assert abs(frames[0] - frames[1]).mean() < 2


def test_settings_saved_with_an_export_are_those_of_the_run(folder):
    from opensora_core.presets import resolve

    saved = json.loads((folder / "config.json").read_text())
    from opensora_core.config import flatten

    config, _ = resolve(saved=flatten(saved), flags={"model.weights": str(folder)})
    assert config == tiny_config(folder)


def test_a_folder_that_lost_a_file_is_named(config, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "text" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        components.build_text_encoder(with_settings(config, {"model.weights": str(tmp_path / "copy")}))
