"""Prompts to files, end to end, with real parts that are tiny."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora_core import __version__, components, files, media, sampling
from opensora_core.config import Config, with_settings
from opensora_core.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    InputError,
    OsoraError,
    ResourceError,
    UsageError,
    WeightsError,
)
from opensora_core.models import LatentTransformer
from opensora_core.presets import preset
from opensora_core.sampling import Done, Gallery, Loading, Notice, Plan, Progress, Saved, Sheet
from opensora_core.sampling.planning import slug
from opensora_core.sampling.steady import NoiseSource, SteadyDenoiser, steady_layers
from opensora_core.tensors import Condition
from tests.core.exported import export_tiny, randomised, tiny_config

PROMPTS = ["a red ball over grass", "a blue cube at night", "a green cone in the snow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def config(folder: Path) -> Config:
    return tiny_config(folder)


@pytest.fixture(scope="module")
def plain_frames(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    output = tmp_path_factory.mktemp("plain")
    (saved,) = of(run(tiny_config(folder), PROMPTS[:1], output, format="png"), Saved)
    return media.read_video(saved.path).frames


def run(config: Config, prompts: list[str], output: Path, *, sheet: bool = False, **options: Any) -> list[Any]:
    return list(sampling.sample(config, sampling.plan(config, prompts, output, **options), sheet=sheet))


def of(events: list[Any], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def content(folder: Path, pattern: str = "*.mp4") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


# a run ------------------------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_video_that_knows_how_it_was_made(config, folder, tmp_path):
    events = run(config, PROMPTS[:1], tmp_path)
    (saved,) = of(events, Saved)
    assert saved.path == tmp_path / "a-red-ball-over-grass-42.mp4"
    assert (saved.prompt, saved.seed) == (PROMPTS[0], 42)
    assert [event.step for event in of(events, Progress)] == [0, 1, 2, 3]
    assert of(events, Progress)[-1].seconds_left == 0
    assert [event.part for event in of(events, Loading)] == ["text encoder", "VAE", "model"]
    assert events[-1] == Done(1, events[-1].seconds)
    video = media.read_video(saved.path)
    assert video.frames.shape == (4, 32, 48, 3)
    assert video.fps == 8
    facts = {
        "prompt": PROMPTS[0],
        "model": str(folder),
        "seed": 42,
        "steps": 3,
        "sampler": "euler",
        "guidance": config.sampling.guidance,
        "size": "32x48",
        "frames": 4,
        "fps": 8.0,
        "version": __version__,
    }
    assert video.metadata == {name: str(value) for name, value in facts.items()}
    (record,) = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert record.pop("seconds") > 0
    assert record == {"file": saved.path.name, **facts}
    assert not (tmp_path / "index.html").exists()
    assert not (tmp_path / "sheet.png").exists()


def test_several_samples_have_seeds_of_their_own_a_sheet_and_a_gallery(config, tmp_path):
    config = with_settings(config, {"sampling.num_samples": 2, "sampling.seed": 7})
    events = run(config, PROMPTS[:2], tmp_path, sheet=True)
    saved = of(events, Saved)
    assert [(event.prompt, event.seed) for event in saved] == [(p, s) for p in PROMPTS[:2] for s in (7, 8)]
    assert len(set(content(tmp_path).values())) == 4
    assert of(events, Sheet) == [Sheet(tmp_path / "sheet.png")]
    assert of(events, Gallery) == [Gallery(tmp_path / "index.html")]
    page = (tmp_path / "index.html").read_text()
    assert all(f'src="./{event.path.name}"' in page for event in saved)


@pytest.mark.parametrize("changes", [{"sampling.batch_size": 1}, {"sampling.batch_size": 3}, {"runtime.offload": True}])
def test_bytes_do_not_depend_on_batches_order_or_offloading(changes, config, tmp_path):
    run(with_settings(config, {"sampling.batch_size": 2}), PROMPTS, tmp_path / "a")
    events = run(with_settings(config, changes), PROMPTS[::-1], tmp_path / "b")
    assert len(of(events, Saved)) == 3
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_an_ancestral_sampler_does_not_depend_on_the_batch_either(folder, config, tmp_path):
    changes = {"diffusion.objective": "iddpm", "sampling.sampler": "iddpm", "model.learn_sigma": False}
    config = with_settings(config, changes)
    run(with_settings(config, {"sampling.batch_size": 3}), PROMPTS, tmp_path / "a", format="png")
    run(with_settings(config, {"sampling.batch_size": 1}), PROMPTS[1:2], tmp_path / "b", format="png")
    name = "a-blue-cube-at-night-42.png"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_batch_is_computed_at_once_where_bits_may_differ(config, tmp_path, monkeypatch):
    sizes = []
    original = LatentTransformer.null_condition

    def note(model, condition):
        model.register_forward_hook(lambda module, arguments, output: sizes.append(len(output)))
        return original(model, condition)

    monkeypatch.setattr(LatentTransformer, "null_condition", note)
    changes = {"sampling.batch_size": 3, "sampling.batch_invariant": False}
    run(with_settings(config, changes), PROMPTS, tmp_path)
    assert sizes == [6] * config.sampling.steps


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling.seed": 43},
        {"sampling.steps": 4},
        {"sampling.guidance": 1.0},
        {"sampling.guidance_channels": "first-three"},
        {"sampling.sampler": "heun"},
        {"runtime.dtype": "bf16"},
        {"video.num_frames": 8},
        {"video.width": 32},
    ],
)
def test_each_setting_changes_the_frames(changes, config, plain_frames, tmp_path):
    (saved,) = of(run(with_settings(config, changes), PROMPTS[:1], tmp_path, format="png"), Saved)
    frames = media.read_video(saved.path).frames
    assert frames.shape != plain_frames.shape or not np.array_equal(frames, plain_frames)


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp", "png"])
def test_every_format_carries_the_settings(suffix, config, tmp_path):
    (saved,) = of(run(config, PROMPTS[:1], tmp_path / f"x.{suffix}"), Saved)
    assert saved.path == tmp_path / f"x.{suffix}"
    assert media.read_video(saved.path).metadata["prompt"] == PROMPTS[0]


def test_one_frame_is_a_picture(config, tmp_path):
    changes = {"video.num_frames": 1, "model.patch_size": (1, 2, 2)}
    image = with_settings(config, changes)
    source = Path(config.model.weights)
    other = tmp_path / "image-model"
    shutil.copytree(source, other)
    (other / "manifest.json").unlink()
    from safetensors.torch import save_file

    save_file(randomised(components.empty_model(image)).state_dict(), other / "model.safetensors")
    image = with_settings(image, {"model.weights": str(other)})
    (saved,) = of(run(image, PROMPTS[:1], tmp_path / "out"), Saved)
    assert saved.path.suffix == ".png"
    assert media.read_video(saved.path).frames.shape == (1, 32, 48, 3)


def test_the_text_encoder_is_gone_before_the_denoiser_comes(config, tmp_path, monkeypatch):
    import gc
    import weakref

    alive: list[weakref.ref[Any]] = []
    build_text, build_model = components.build_text_encoder, components.build_model

    def text(*args: Any) -> Any:
        encoder = build_text(*args)
        alive.append(weakref.ref(encoder.model))
        return encoder

    def model(*args: Any) -> Any:
        gc.collect()
        assert [reference() for reference in alive] == [None]
        return build_model(*args)

    monkeypatch.setattr(components, "build_text_encoder", text)
    monkeypatch.setattr(components, "build_model", model)
    run(config, PROMPTS[:1], tmp_path)


def test_offloading_keeps_one_part_at_a_time(config, tmp_path, monkeypatch):
    import gc
    import weakref

    alive: dict[str, weakref.ref[Any]] = {}

    def watch(name: str, build: Any) -> Any:
        def built(*args: Any) -> Any:
            gc.collect()
            assert [part for part, reference in alive.items() if reference() is not None] == []
            alive[name] = weakref.ref(part := build(*args))
            return part

        return built

    for name in ("build_vae", "build_model", "build_text_encoder"):
        monkeypatch.setattr(components, name, watch(name, getattr(components, name)))
    run(with_settings(config, {"runtime.offload": True}), PROMPTS, tmp_path)
    with pytest.raises(AssertionError):
        run(config, PROMPTS[:1], tmp_path / "without")


# what is refused --------------------------------------------------------------------------------------------


def plan(config: Config, tmp_path: Path, *prompts: str, **options: Any) -> Plan:
    return sampling.plan(config, list(prompts or PROMPTS[:1]), options.pop("output", tmp_path / "out"), **options)


def test_nothing_is_overwritten_unless_told(config, tmp_path):
    run(config, PROMPTS[:1], tmp_path)
    before = content(tmp_path)
    with pytest.raises(InputError, match="exists already") as caught:
        plan(config, tmp_path, PROMPTS[1], PROMPTS[0], output=tmp_path)
    assert "--overwrite" in caught.value.hint
    run(with_settings(config, {"sampling.steps": 2}), PROMPTS[:1], tmp_path, overwrite=True)
    assert content(tmp_path).keys() == before.keys()
    assert content(tmp_path) != before


def test_a_sheet_that_is_there_gets_a_neighbour(config, tmp_path):
    (tmp_path / "sheet.png").write_bytes(b"mine")
    assert plan(config, tmp_path, output=tmp_path).sheet == tmp_path / "sheet-2.png"
    assert plan(config, tmp_path, output=tmp_path / "x.mp4").sheet == tmp_path / "x-sheet.png"


def test_a_gallery_shows_earlier_runs_and_spares_foreign_pages(config, tmp_path):
    run(config, PROMPTS[:1], tmp_path)
    with (tmp_path / "samples.jsonl").open("a") as records:
        records.write('not json\n{"file": "../secret.mp4"}\n{"file": "gone.mp4"}\n')
    run(config, PROMPTS[1:], tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<video") == 3
    (tmp_path / "index.html").write_text("mine")
    events = run(config, PROMPTS[1:], tmp_path, overwrite=True)
    assert of(events, Gallery) == []
    assert "left as it is" in of(events, Notice)[0].message
    assert (tmp_path / "index.html").read_text() == "mine"


@pytest.mark.parametrize("prompt", ["", "   ", "a\0b", "a \udcff b"])
def test_unusable_prompts_are_refused(prompt, config, tmp_path):
    with pytest.raises(InputError):
        plan(config, tmp_path, PROMPTS[0], prompt)


def test_long_and_repeated_prompts_are_told_of(config, tmp_path):
    made = plan(config, tmp_path, "ball " * 20_000, "a", "a ")
    assert any("99,999 characters is cut at 10,000" in notice for notice in made.notices)
    assert any("given 2 times" in notice for notice in made.notices)
    assert len(made.requests) == 2
    assert len(made.requests[0].prompt) <= 10_000


def test_a_prompt_that_is_cut_is_told_with_the_count(config, tmp_path):
    (notice,) = of(run(config, [PROMPTS[0] + " and grass" * 9], tmp_path), Notice)
    assert "tokens, of which the model reads the first 12" in notice.message


def test_the_bundled_model_says_when_it_knows_no_word(config, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("opensora_core.assets.search.BUNDLED_FOLDER", folder)
    config = with_settings(config, {"model.weights": "bundled"})
    made = plan(config, tmp_path, "the tax law of 1913", "a red ball")
    (notice,) = made.notices
    assert "tax law" in notice
    assert [part.path for part in made.weights] == [folder, folder / "vae", folder / "text"]
    assert len(of(list(sampling.sample(config, made)), Saved)) == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"video.height": 40}, (InputError, "40x48 is not a multiple of 16", "32x48 or 48x48")),
        ({"video.num_frames": 5}, (InputError, "5 frames", "4 or 6")),
        ({"video.height": 0}, (InputError, "0x48", "16x48")),
        ({"sampling.steps": 0}, (ConfigError, "--steps 0", "1")),
        ({"sampling.num_samples": 0}, (ConfigError, "--num-samples 0", "1")),
        ({"sampling.batch_size": -1}, (ConfigError, "--batch-size -1", "1")),
        ({"sampling.seed": -1}, (ConfigError, "--seed -1", "0")),
        ({"video.source_fps": 0.0}, (ConfigError, "0 frames per second", "--fps")),
        ({"sampling.sampler": "eular"}, (ConfigError, "eular", "euler")),
        ({"sampling.sampler": "iddpm"}, (ConfigError, "does not fit", "euler")),
        ({"runtime.device": "cuda:7"}, (DeviceError, "cuda:7", "cpu")),
        ({"runtime.dtype": "fp16"}, (ConfigError, "fp16 on a CPU", "bf16")),
        ({"model.weights": ""}, (UsageError, "no weights", "--model")),
        ({"model.weights": "no/such.pth"}, (UsageError, "no/such.pth", "")),
    ],
)
def test_settings_that_cannot_be_carried_out(changes, expected, config, tmp_path):
    error, message, hint = expected
    with pytest.raises(error, match=message) as caught:
        plan(with_settings(config, changes), tmp_path)
    assert hint in caught.value.hint


def test_missing_weights_are_planned_or_refused_offline(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("OSORA_WEIGHTS", str(tmp_path))
    config = with_settings(config, {"vae.kind": "kl", "vae.weights": "sd-vae-ft-ema"})
    (part,) = (part for part in plan(config, tmp_path).weights if part.kind == "vae")
    assert (part.name, part.path, part.size_bytes) == ("sd-vae-ft-ema", None, 334_615_452)
    with pytest.raises(WeightsError, match="offline"):
        plan(with_settings(config, {"runtime.offline": True}), tmp_path)
    monkeypatch.setattr("opensora_core.sampling.planning.free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match=r"needed about 335 MB"):
        plan(config, tmp_path)


def test_outputs_that_cannot_be(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for output, options, error, message in [
        (tmp_path / "x.avi", {}, InputError, "suffix"),
        (tmp_path / "x.mp4", {"format": "gif"}, InputError, "--format gif"),
        (tmp_path / "out", {"format": "avi"}, InputError, "unknown format"),
        (tmp_path / "file" / "out", {}, InputError, "is a file"),
    ]:
        with pytest.raises(error, match=message):
            plan(config, tmp_path, output=output, **options)
    with pytest.raises(InputError, match="one file, but 2 samples"):
        plan(config, tmp_path, *PROMPTS[:2], output=tmp_path / "x.mp4")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ResourceError, match="no permission"):
        plan(config, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(files, "free_bytes", lambda path: 100)
    with pytest.raises(ResourceError, match=r"needed .* free 100 bytes"):
        plan(config, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_names_are_safe_and_distinct(config, tmp_path):
    prompts = ["Ünï cödé!", "../../etc/passwd", "球", "🎈", "\x1b[31mred", "x" * 500, "A red ball.", "a red ball!"]
    made = plan(config, tmp_path, *prompts)
    names = [request.path.name for request in made.requests]
    assert all(request.path.parent == tmp_path / "out" for request in made.requests)
    assert len(set(names)) == len(prompts)
    assert all(len(name) < 90 and name.isascii() and name == Path(name).name for name in names)
    assert names[0] == "uni-code-42.mp4"
    assert names[1] == "etc-passwd-42.mp4"
    assert slug("球") == "sample"
    # a name is the prompt's own, whatever else is asked for; only twins need their hashes
    assert plan(config, tmp_path, "球").requests[0].path.name == names[2]
    assert names[6] != "a-red-ball-42.mp4"


def test_a_folder_may_have_a_dot_in_its_name(config, tmp_path):
    assert plan(config, tmp_path, output=tmp_path / "run.v1").requests[0].path.parent == tmp_path / "run.v1"
    (tmp_path / "dir.mp4").mkdir()
    assert plan(config, tmp_path, output=tmp_path / "dir.mp4").requests[0].path.parent == tmp_path / "dir.mp4"


# what goes wrong on the way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_earlier_files_and_nothing_else(reason, config, tmp_path, monkeypatch):
    written = media.write.WRITERS["mp4"]
    calls = []

    def failing(path: Path, *args: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise reason
        written(path, *args)

    monkeypatch.setitem(media.write.WRITERS, "mp4", failing)
    with pytest.raises((ResourceError, KeyboardInterrupt)):
        run(config, PROMPTS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-red-ball-over-grass-42.mp4", "samples.jsonl"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_comes_with_flags_that_help(error, config, tmp_path, monkeypatch):
    def build(*_: Any) -> None:
        raise error

    monkeypatch.setattr(components, "build_model", build)
    with pytest.raises(ResourceError, match="out of memory on cpu") as caught:
        run(with_settings(config, {"sampling.batch_size": 2}), PROMPTS, tmp_path)
    for flag in ("--batch-size 1", "--offload", "--size 16x24", "--frames 2", "--set vae.micro_batch=1"):
        assert flag in caught.value.hint
    smaller = {"sampling.batch_size": 1, "runtime.offload": True, "runtime.dtype": "bf16"}
    with pytest.raises(ResourceError) as caught:
        run(with_settings(config, smaller), PROMPTS, tmp_path)
    assert "--offload" not in caught.value.hint
    assert "--batch-size" not in caught.value.hint
    assert "--dtype" not in caught.value.hint


def test_a_download_tells_how_far_it_is_and_may_fail(config, tmp_path, monkeypatch):
    made = sampling.plan(config, PROMPTS[:1], tmp_path)
    missing = replace(made, weights=tuple(replace(part, path=None) for part in made.weights if part.kind == "vae"))
    locate = components.locate

    def slowly(config: Config, kind: Any, on_progress: Any = None) -> Any:
        for done in (1, 2, 3) if on_progress else ():
            on_progress(done * 10**6, 3 * 10**6)
        return locate(config, kind)

    monkeypatch.setattr(components, "locate", slowly)
    events = list(sampling.sample(config, missing))
    name = components.word_of(config, "vae")
    assert events[:2] == [Loading("VAE", name), Loading("VAE", f"{name}, 1 MB of 3 MB")]
    assert isinstance(events[-1], Done)

    def never(*_: Any) -> Any:
        raise WeightsError("cannot be had")

    monkeypatch.setattr(components, "locate", never)
    with pytest.raises(WeightsError, match="cannot be had"):
        list(sampling.sample(config, missing))


def test_other_bugs_are_not_taken_for_it(config, tmp_path, monkeypatch):
    def build(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(components, "build_model", build)
    with pytest.raises(RuntimeError, match="a bug"):
        run(config, PROMPTS[:1], tmp_path)


def test_numbers_that_are_none_are_not_shown(config, tmp_path, monkeypatch):
    build = components.build_model

    def broken(*args: Any) -> Any:
        model = build(*args)
        model.final_layer.linear.bias.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(components, "build_model", broken)
    with pytest.raises(OsoraError, match="beyond what the dtype holds"):
        run(config, PROMPTS[:1], tmp_path)
    assert content(tmp_path) == {}


def test_a_damaged_part_is_named(config, folder, tmp_path):
    for name in ("model.safetensors", "vae/config.json", "text/model.safetensors"):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, copy)
        damaged = bytearray((copy / name).read_bytes())
        damaged[-2] ^= 1
        (copy / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            run(with_settings(config, {"model.weights": str(copy)}), PROMPTS[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# steadiness -------------------------------------------------------------------------------------------------


def test_noise_is_of_the_prompt_and_the_seed_alone():
    shape, cpu = (4, 2, 3, 3), torch.device("cpu")
    together = NoiseSource([("a", 1), ("b", 1), ("a", 2)], shape, cpu)
    first, second = together(), together()
    assert not torch.equal(first, second)
    for row, sample in enumerate([("a", 1), ("b", 1), ("a", 2)]):
        alone = NoiseSource([sample], shape, cpu)
        assert torch.equal(alone()[0], first[row])
        assert torch.equal(alone()[0], second[row])
    assert len({tuple(noise.flatten()[:3].tolist()) for noise in first}) == 3


def _inputs(num_samples: int) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2 * num_samples, 4, 2, 4, 4, generator=generator)
    tokens = torch.randn(2 * num_samples, 12, 16, generator=generator)
    return latents, torch.full((2 * num_samples,), 500.0), Condition(tokens, torch.ones(2 * num_samples, 12) > 0)


@pytest.mark.parametrize("steady", [True, False])
def test_a_model_is_batched_only_where_that_changes_no_bit(steady):
    calls: list[int] = []

    def model(latents: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
        calls.append(len(latents))
        return latents * timestep.view(-1, 1, 1, 1, 1) + (0 if steady else len(latents))

    denoiser = SteadyDenoiser(model)
    latents, timestep, condition = _inputs(3)
    alone = [SteadyDenoiser(model).of(1)(latents[i::3], timestep[i::3], condition[i::3]) for i in range(3)]
    calls.clear()
    for _ in range(2):
        together = denoiser.of(3)(latents, timestep, condition)
        assert all(torch.equal(together[i::3], alone[i]) for i in range(3))
    assert calls == [2, 2, 2, 6, *([6] if steady else [2, 2, 2])]


def test_layers_of_few_rows_give_the_same_bits_in_every_batch(config):
    model = randomised(components.empty_model(config)).eval()
    expected = model(*_inputs(8))
    steady_layers(model)
    latents, timestep, condition = _inputs(8)
    with torch.no_grad():
        together = model(latents, timestep, condition)
        torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
        for rows in (slice(0, 1), slice(3, 5)):
            assert torch.equal(model(latents[rows], timestep[rows], condition[rows]), together[rows])


def test_a_preset_of_every_family_can_be_planned(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("OSORA_WEIGHTS", str(tmp_path))
    for name in ("16x256x256", "dit-1x256x256-class", "latte-16x256x256-class", "pixart-1x1024-ms"):
        config = with_settings(preset(name), {"runtime.device": "cpu"})
        made = sampling.plan(config, ["7"], tmp_path / "out")
        assert made.requests[0].path.suffix == (".png" if config.video.num_frames == 1 else ".mp4")
        assert all(part.path is None for part in made.weights)
