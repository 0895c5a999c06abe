"""Training on clips: exact resume, broken clips, the cache, stages of a recipe, adapters, and what a run leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora_core import components
from opensora_core.config import Config, to_dict, with_settings
from opensora_core.errors import CheckpointError, InputError, ResourceError, TrainingError, UsageError
from opensora_core.runs import only_writer
from opensora_core.training import (
    Chapter,
    Checkup,
    Rejected,
    Resumed,
    Sampled,
    Stage,
    TrainProgress,
    Validated,
    examine,
    export,
    fill_cache,
    train,
    train_recipe,
)
from tests.core.exported import export_tiny
from tests.core.training.clips import NUM_CLIPS, clips_config, make_clips, rows, run, sums


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips"))


def test_the_report_has_what_it_promises(model: Path, clips: Path, tmp_path: Path) -> None:
    config = clips_config(model, clips, train__max_steps=4)
    reports = [event for event in run(config, tmp_path / "run") if isinstance(event, TrainProgress)]
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert all(len(report.sample_ids) == 2 and report.sample_ids[0].endswith(".mp4") for report in reports)
    assert all(report.tokens_per_second > 0 and 0 <= report.data_wait <= 1 for report in reports)
    assert len({name for report in reports[:3] for name in report.sample_ids}) == 6  # nothing comes twice in an epoch
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "lr", "grad_norm", "sample_ids"} <= row.keys()
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_cut_short_goes_on_across_epochs(model: Path, clips: Path, tmp_path: Path, workers: int) -> None:
    whole = clips_config(model, clips, train__max_steps=11)  # 7 clips in batches of 2: epochs end in the middle of some
    run(whole, tmp_path / "whole")
    for steps in (3, 4, 8, 11):
        config = with_settings(whole, {"train.max_steps": steps, "train.num_workers": workers})
        events = run(config, tmp_path / "parts", resume=steps > 3)
        assert steps == 3 or any(isinstance(event, Resumed) for event in events)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    last = Path("checkpoints") / "step-11"
    assert sums(tmp_path / "parts" / last) == sums(tmp_path / "whole" / last)


def _killed_at_random(config: Config, output: Path, seed: int, kills: int) -> None:
    """Train in processes of their own, of which some are killed with all their workers."""
    settings = output.parent / "settings.json"
    settings.write_text(json.dumps(to_dict(config)))
    rng = random.Random(seed)
    words = [sys.executable, "-m", "opensora_cli", "train", "--config", str(settings), "--json"]
    for attempt in range(kills + 1):
        where = ["--resume", str(output)] if output.exists() else ["--output", str(output)]
        process = subprocess.Popen(
            [*words, *where], stdout=subprocess.PIPE, text=True, start_new_session=True, env=_single_threaded()
        )
        assert process.stdout is not None
        if attempt < kills:
            begun = rng.randint(1, 3)
            for line in process.stdout:
                event = json.loads(line)
                begun -= event["event"] == "train_progress"
                if begun <= 0:
                    break
            time.sleep(rng.random() * 0.1)  # into a step, a save, or the reading of data
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
    assert process.returncode == 0


def _single_threaded() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _kill_and_compare(model: Path, clips: Path, folder: Path, kills: int, **changes: Any) -> None:
    config = clips_config(model, clips, train__max_steps=30, train__checkpoint_every=1, **changes)
    _killed_at_random(config, folder / "whole", seed=0, kills=0)
    _killed_at_random(config, folder / "killed", seed=kills, kills=kills)
    assert rows(folder / "killed") == rows(folder / "whole")
    assert sums(folder / "killed/checkpoints/step-30") == sums(folder / "whole/checkpoints/step-30")
    assert not list(folder.rglob("*.part"))


def test_kill_nine_changes_nothing(model: Path, clips: Path, tmp_path: Path) -> None:
    _kill_and_compare(model, clips, tmp_path, kills=2)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_times_kill_nine_changes_nothing(model: Path, clips: Path, tmp_path: Path, workers: int) -> None:
    _kill_and_compare(model, clips, tmp_path, kills=10, train__num_workers=workers)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, code: int, model: Path, clips: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.json"
    config = clips_config(model, clips, train__max_steps=10_000, train__checkpoint_every=10_000, train__num_workers=1)
    settings.write_text(json.dumps(to_dict(config)))
    output = tmp_path / "run"
    words = [
        sys.executable,
        "-m",
        "opensora_cli",
        "train",
        "--config",
        str(settings),
        "--output",
        str(output),
        "--json",
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=_single_threaded(), start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("step", 0) >= 2 and "lr" in line:
            break
    os.killpg(process.pid, number)  # as a terminal and Slurm do: the loader's worker gets it too
    rest, _ = process.communicate(timeout=30)
    events = [json.loads(line) for line in rest.splitlines()]
    assert process.returncode == code
    assert events[-1]["hint"] == f"resume with: osora train --resume {output}"
    saved = [event["step"] for event in events if event["event"] == "checkpoint_saved"]
    assert len(saved) == 1 and (output / f"checkpoints/step-{saved[0]}/manifest.json").exists()


def test_parts_of_a_batch_give_the_same_numbers(model: Path, clips: Path, tmp_path: Path) -> None:
    whole = clips_config(model, clips, train__max_steps=2, train__batch_size=4)
    run(whole, tmp_path / "whole")
    run(with_settings(whole, {"train.accumulate": 3}), tmp_path / "parts")
    for step in (1, 2):
        a, b = (float.fromhex(rows(tmp_path / name)[step][0]) for name in ("whole", "parts"))
        assert a == pytest.approx(b, rel=1e-4)


def test_half_precision_and_recomputation_stay_close(model: Path, clips: Path, tmp_path: Path) -> None:
    config = clips_config(model, clips, train__max_steps=2)
    run(config, tmp_path / "plain")
    run(with_settings(config, {"train.recompute": 1.0}), tmp_path / "recomputed")
    assert rows(tmp_path / "recomputed") == rows(tmp_path / "plain")
    run(with_settings(config, {"runtime.dtype": "bf16"}), tmp_path / "half")
    a, b = (float.fromhex(rows(tmp_path / name)[2][0]) for name in ("plain", "half"))
    assert a != b and a == pytest.approx(b, rel=0.02)
    state = components.read_denoiser(tmp_path / "half").state
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_a_broken_clip_is_told_and_the_next_one_stands_in(model: Path, clips: Path, tmp_path: Path) -> None:
    folder = make_clips(tmp_path / "clips")
    config = clips_config(model, folder, train__max_steps=8, train__checkpoint_every=8, data__max_rejects=0.3)
    run(with_settings(config, {"train.max_steps": 1}), tmp_path / "run")  # the clips are counted while all are well
    broken = folder / "clip3.mp4"
    broken.write_bytes(broken.read_bytes()[:700])
    outcomes = []
    for workers in (0, 2):
        again = with_settings(config, {"train.num_workers": workers})
        events = run(again, tmp_path / "run", resume=True)
        told = [event for event in events if isinstance(event, Rejected)]
        outcomes.append(rows(tmp_path / "run"))
        if workers == 0:
            assert [event.clip for event in told] == ["clip3.mp4"]
            assert told[0].share == pytest.approx(1 / NUM_CLIPS)
            (tmp_path / "run/checkpoints/step-8").rename(tmp_path / "away")
    assert outcomes[0] == outcomes[1]
    assert all("clip3.mp4" not in ids for *_, ids in list(outcomes[0].values())[1:])
    lines = (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["clip"] == "clip3.mp4"


def test_too_many_broken_clips_stop_the_run(model: Path, tmp_path: Path) -> None:
    folder = make_clips(tmp_path / "clips")
    for index in range(2):
        (folder / f"clip{index}.mp4").write_bytes(b"not a video %d" % index)
    with pytest.raises(TrainingError, match=r"of 7 clips cannot be read, 14\.3%, and the limit is 5\.0%") as caught:
        run(clips_config(model, folder), tmp_path / "run")
    assert "--max-rejects" in caught.value.hint
    kept = clips_config(model, folder, data__max_rejects=0.5, train__max_steps=1)
    run(kept, tmp_path / "run")  # nothing was trained yet, so the folder is free
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert len(reasons) == 2 and all("unreadable" in reason for reason in reasons)


def test_no_usable_clip_names_the_limit(model: Path, clips: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"video__frame_interval": 5}, "too short"),
        ({"video__height": 160, "video__width": 160}, "too small"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            run(clips_config(model, clips, **changes), tmp_path / "run")
        assert f"none of the {NUM_CLIPS} clips" in caught.value.message and "clip0.mp4" in caught.value.message
        assert not (tmp_path / "run").exists()


def test_one_writer_a_run(model: Path, clips: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path / "run"), pytest.raises(UsageError, match=f"process {os.getpid()} on "):
        run(clips_config(model, clips), tmp_path / "run")
    run(clips_config(model, clips, train__max_steps=1), tmp_path / "run")
    with pytest.raises(UsageError, match="holds a run already"):
        run(clips_config(model, clips), tmp_path / "run")


def test_an_exploding_run_keeps_what_was_good(model: Path, clips: Path, tmp_path: Path) -> None:
    config = clips_config(model, clips, train__checkpoint_every=1, train__keep_checkpoints=1)
    run(with_settings(config, {"train.max_steps": 2}), tmp_path / "run")
    mad = with_settings(config, {"train.lr": 1e20, "train.muon_lr": 1e20})
    with pytest.raises(TrainingError) as caught:
        run(mad, tmp_path / "run", resume=True)
    assert "clip" in caught.value.message and "train.lr" in caught.value.hint
    good = tmp_path / "run/checkpoints/step-2"
    assert good.exists(), "the last one whose loss was finite is kept, whatever --keep says"
    for folder in (tmp_path / "run/checkpoints").iterdir():
        assert all(tensor.isfinite().all() for tensor in components.read_denoiser(folder).state.values())
    events = run(config, good, resume=True)
    assert any(isinstance(event, Resumed) and event.step == 2 for event in events)


def test_the_cache_takes_the_place_of_the_encoders(
    model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = clips_config(model, clips, train__max_steps=3)
    run(plain, tmp_path / "plain")
    cached = with_settings(plain, {"data.cache": str(tmp_path / "cache"), "data.cache_dtype": "fp32"})
    list(fill_cache(cached))
    for name in ("build_vae", "build_text_encoder"):
        monkeypatch.setattr(components, name, lambda config: pytest.fail("the cache is full"))
    run(cached, tmp_path / "cached")
    assert rows(tmp_path / "cached") == rows(tmp_path / "plain")  # within the first epoch nothing is drawn differently
    monkeypatch.undo()
    other = with_settings(cached, {"video.frame_interval": 1})
    assert any("encoding clips" in str(event) for event in run(other, tmp_path / "other"))


def test_validation_measures_and_shows_without_touching_the_run(model: Path, clips: Path, tmp_path: Path) -> None:
    held_out = make_clips(tmp_path / "held-out", count=3)
    plain = clips_config(model, clips, train__max_steps=4)
    watched = with_settings(
        plain,
        {
            "validation.every": 2,
            "validation.data": str(held_out),
            "validation.num_clips": 2,
            "validation.num_bins": 3,
            "validation.sample_every": 4,
            "validation.prompts": "a red ball|a blue cube",
        },
    )
    run(plain, tmp_path / "plain")
    events = run(watched, tmp_path / "watched")
    assert rows(tmp_path / "watched") == rows(tmp_path / "plain")
    measured = [event for event in events if isinstance(event, Validated)]
    assert [event.step for event in measured] == [2, 4]
    assert len(measured[0].bins) == 3 and measured[0].bins != measured[0].ema_bins
    (shown,) = (event for event in events if isinstance(event, Sampled))
    assert len(shown.paths) == 2 and all(path.stat().st_size for path in (*shown.paths, shown.sheet))
    again = run(watched, tmp_path / "again")
    assert [event for event in again if isinstance(event, Validated)] == measured


def test_an_adapter_is_trained_kept_small_and_sampled(model: Path, clips: Path, tmp_path: Path) -> None:
    config = clips_config(
        model, clips, train__init=str(model), train__lora_rank=2, train__max_steps=3, train__optimizer="adamw"
    )
    run(config, tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step-3"
    assert (checkpoint / "lora/adapter_model.safetensors").exists()
    assert (checkpoint / "weights.safetensors").stat().st_size < (model / "model.safetensors").stat().st_size / 4
    base = with_settings(config, {"model.weights": str(model), "model.lora": ""})
    by_run = components.build_model(with_settings(base, {"model.weights": str(tmp_path / "run")}))
    by_name = components.build_model(with_settings(base, {"model.lora": str(tmp_path / "run")}))
    untouched = components.build_model(base)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(by_run.state_dict()[name], by_name.state_dict()[name])
    assert not torch.equal(by_run.state_dict()[name], untouched.state_dict()[name])
    events = run(with_settings(config, {"train.max_steps": 4}), tmp_path / "run", resume=True)
    assert any(isinstance(event, Resumed) for event in events)


def test_freezing_trains_what_it_says(model: Path, clips: Path, tmp_path: Path) -> None:
    config = clips_config(model, clips, train__init=str(model), train__max_steps=2, train__trainable="temporal-only")
    run(config, tmp_path / "run")
    after = components.read_denoiser(tmp_path / "run").state
    before = components.read_denoiser(model).state
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".attn_temp." in name for name in changed)


def test_a_run_is_a_model_a_start_and_an_export(model: Path, clips: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    config = clips_config(model, clips, train__max_steps=2)
    run(config, first)
    second = with_settings(
        config, {"train.init": str(first), "train.max_steps": 1, "train.lr": 0.0, "train.muon_lr": 0.0}
    )
    run(second, tmp_path / "second")
    a, b = (components.read_denoiser(folder).state for folder in (first, tmp_path / "second"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    export(first, tmp_path / "export")
    exported = components.build_model(with_settings(config, {"model.weights": str(tmp_path / "export")}))
    assert torch.allclose(exported.state_dict()["final_layer.linear.weight"], a["final_layer.linear.weight"], atol=1e-2)
    with pytest.raises(UsageError, match="keeps the clips that it began with"):
        run(with_settings(config, {"data.source": str(tmp_path)}), first, resume=True)
    with pytest.raises(CheckpointError, match="another model"):
        run(with_settings(config, {"model.depth": 1, "train.max_steps": 3}), first, resume=True)


TEXT = {"model__patch_size": "1x2x2", "model__temporal_positions": "true"}
CLASSES = {"model__condition": "class", "model__num_classes": 101, "text__kind": "class", "text__weights": ""}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("stdit-parallel", TEXT),
        ("pixart", TEXT),
        ("pixart-ms", {**TEXT, "model__hidden_size": 48}),
        ("latte-1", TEXT),
        ("dit", CLASSES),
        ("latte", CLASSES),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_every_family_trains(family: str, changes: dict[str, Any], cached: bool, model: Path, tmp_path: Path) -> None:
    folder = make_clips(tmp_path / "clips", count=3)
    for path in folder.glob("*.txt"):
        path.write_text("Apply Eye Makeup")
    cache = {"data__cache": str(tmp_path / "cache")} if cached else {}
    config = clips_config(model, folder, model__family=family, train__max_steps=2, **changes, **cache)
    reports = [event for event in run(config, tmp_path / "run") if isinstance(event, TrainProgress)]
    assert len(reports) == 2 and all(report.loss > 0 and report.grad_norm > 0 for report in reports)


def test_out_of_memory_gives_advice(model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("opensora_core.training.denoiser.DenoiserTask.denoise", full)
    with pytest.raises(ResourceError, match="out of memory on cpu") as caught:
        run(clips_config(model, clips), tmp_path / "run")
    for flag in ("--batch-size 1", "train.recompute=1", "--cache", "--dtype bf16"):
        assert flag in caught.value.hint


def test_a_recipe_trains_stage_after_stage_and_goes_on(model: Path, clips: Path, tmp_path: Path) -> None:
    image = clips_config(
        model, clips, video__num_frames=1, model__patch_size="1x2x2", train__max_steps=2, train__checkpoint_every=1
    )
    video = with_settings(image, {"video.num_frames": 2})
    chapters = [Chapter("images", image), Chapter("videos", video)]
    output = tmp_path / "recipe"
    events = train_recipe(chapters, output=output)
    for event in events:
        if isinstance(event, TrainProgress) and event.step == 2:
            break
    events.close()  # type: ignore[attr-defined]
    rest = list(train_recipe([], output=output, resume=True))
    assert [event.name for event in rest if isinstance(event, Stage)] == ["images", "videos"]
    assert json.loads((output / "2-videos/config.json").read_text())["train"]["init"] == str(output / "1-images")
    assert list(train_recipe([], output=output, resume=True)) == []
    with pytest.raises(UsageError, match="holds a recipe already"):
        next(iter(train_recipe(chapters, output=output)))


def test_the_doctor_tells_what_training_would_do(model: Path, clips: Path, tmp_path: Path) -> None:
    folder = make_clips(tmp_path / "clips", count=5)
    (folder / "clip1.mp4").write_bytes(b"nonsense")
    (folder / "clip2.txt").unlink()
    (folder / "copy.mp4").write_bytes((folder / "clip0.mp4").read_bytes())
    (folder / "copy.txt").write_text("a copy")
    config = clips_config(model, folder, data__buckets="4x32x48 2x32x32", data__max_rejects=1.0)
    manifest = tmp_path / "counted.jsonl"
    (checkup,) = (
        event for event in examine(config, measure=True, write_manifest=manifest) if isinstance(event, Checkup)
    )
    assert (checkup.clips, checkup.usable) == (6, 3)
    assert checkup.reasons == {"unreadable": 1, "no caption": 1, "duplicate": 1}
    assert "clip1.mp4" in checkup.examples["unreadable"]
    assert [plan.clips for plan in checkup.buckets] == [3, 0]
    assert checkup.memory["activations if all blocks recompute"] < checkup.memory["activations if no block recomputes"]
    assert checkup.seconds_per_step is not None and checkup.seconds_per_step > 0
    counted = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert {row["num_frames"] for row in counted if row.get("num_frames")} == {9}
    run(with_settings(config, {"data.source": str(manifest), "train.max_steps": 1}), tmp_path / "run")
    saved = tmp_path / "run/checkpoints/step-1"
    total = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert checkup.checkpoint_bytes == pytest.approx(total, rel=0.1)


def test_events_of_a_run_are_not_lost_on_a_reader_that_stops(model: Path, clips: Path, tmp_path: Path) -> None:
    events = train(clips_config(model, clips), output=tmp_path / "run")
    next(events)
    events.close()  # type: ignore[attr-defined]
    run(clips_config(model, clips, train__max_steps=1), tmp_path / "run")
