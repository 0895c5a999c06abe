"""Training on several processes: the numbers of one, whatever is shared how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opensora_core import components
from opensora_core.config import Config, with_settings
from opensora_core.errors import OsoraError
from opensora_core.parallel.local import on_ranks
from opensora_core.presets import preset
from opensora_core.training import export, fill_cache, train
from tests.core.exported import export_tiny
from tests.core.training.clips import clips_config, make_clips
from tests.core.training.saved import latest
from tests.core.training.test_world import SMALL

SHARDINGS, MORE_SHARDINGS = ("replicate", "zero3"), ("zero2", "hybrid")  # the rest is slow
KINDS, MORE_KINDS = ("looks", "cached", "frames"), ("adapter", "coarse", "compiled", "world")
STEPS = 10

Tried = tuple[Path, Path, list[list[str]]]
"""What runs started from, where they are, and how they ended on each of two processes."""


def config_of(made: Path, **changes: Any) -> Config:
    """Settings of a run from a model of which no weight is zero; names of settings have `__` for a dot."""
    settings = {
        "train.init": str(made / "model"),
        "train.batch_size": 4,
        "train.max_steps": STEPS,
        "train.checkpoint_every": 5,
        "train.keep_checkpoints": 9,
        "train.lr": 1e-3,
    }
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return with_settings(clips_config(made / "model", made / "clips"), settings)


def variants(made: Path, cache: Path) -> dict[str, Config]:
    """What else a run may do, each on its own sharding; a few steps of it."""
    short = {"train__max_steps": 4, "train__checkpoint_every": 4}
    return {
        "looks": config_of(
            made,
            **short,
            data__source=str(made / "broken"),
            data__max_rejects=1.0,
            train__recompute=1.0,
            parallel__sharding="zero2",  # keeps weights gathered after a look at them
            parallel__text="shard",
            validation__every=2,
            validation__sample_every=4,
            validation__num_clips=3,
        ),
        "adapter": config_of(
            made,
            **short,
            train__lora_rank=4,
            train__draws=2,
            train__accumulate=2,
            train__optimizer="adamw",
            train__async_checkpoints=True,
            parallel__text="broadcast",
        ),
        "cached": config_of(
            made, **short, data__cache=str(cache), data__cache_variants=2, parallel__sharding="replicate"
        ),
        "frames": config_of(made, **short, parallel__sequence=2),
        "coarse": config_of(made, **short, runtime__dtype="bf16", train__optimizer="adamw"),
        "compiled": config_of(made, **short, runtime__compile=True, train__recompute=0.5),
        "world": with_settings(preset("tiny"), SMALL | {"train.vae_steps": 4, "train.text_steps": 3}),
    }


def rows(run: Path) -> dict[tuple[str, int], tuple[float, float, tuple[str, ...]]]:
    """Loss, gradient norm and clips of every step of every part."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {(row["part"], row["step"]): (row["loss"], row["grad_norm"], tuple(row["sample_ids"])) for row in lines}


def _ends(jobs: list[tuple[Config, Path]]) -> list[str]:
    """Train runs one after the other on the processes that call it; returns what each ended with."""
    ends = []
    for config, output in jobs:
        try:
            for _ in train(config, output=output):
                pass
            ends.append("")
        except OsoraError as error:
            ends.append(f"{error.exit_code} {error.message}")
    return ends


def _two(made: Path, out: Path, shardings: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """All that is tried on two processes, in one start."""
    jobs = [(config_of(made, parallel__sharding=name), out / name) for name in shardings]
    found = variants(made, out / "cache-two")
    if "cached" in kinds:
        for _ in fill_cache(found["cached"]):
            pass
    jobs += [(found[name], out / name) for name in kinds]
    jobs += [
        (config_of(made, train__batch_size=3), out / "odd"),
        (config_of(made, data__buckets="4x32x48:4 4x32x32:3"), out / "odd-bucket"),
        (config_of(made, parallel__data=4), out / "groups"),
        (config_of(made), out / shardings[-1]),
    ]
    return _ends(jobs)


def _tried(made: Path, shardings: Sequence[str], kinds: Sequence[str]) -> Tried:
    """Runs on one process and on two."""
    out = made / "-".join(kinds)
    export_tiny(made / "model")
    make_clips(made / "clips")
    make_clips(made / "broken")
    (made / "broken" / "clip3.mp4").write_bytes(b"no clip at all")
    jobs = [(config_of(made), out / "one" / "plain")]
    found = variants(made, out / "cache-one")
    jobs += [(with_settings(found[name], {"parallel.sequence": 0}), out / "one" / name) for name in kinds]
    assert _ends(jobs) == [""] * len(jobs)
    return made, out, on_ranks(2, _two, made, out, shardings, kinds, seconds=900)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    return _tried(tmp_path_factory.mktemp("tried"), SHARDINGS, KINDS)


@pytest.fixture(scope="module")
def tried_more(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    return _tried(tmp_path_factory.mktemp("more"), MORE_SHARDINGS, MORE_KINDS)


def compare(run: Path, one: Path, steps: int, limit: float = 1e-5) -> None:
    """Check that a run has the numbers and clips of another one."""
    expected, found = rows(one), rows(run)
    assert found.keys() == expected.keys() and sum(part == "model" for part, _ in found) == steps
    for step, (loss, norm, clips) in expected.items():
        assert found[step][2] == clips
        assert abs(found[step][0] - loss) < limit * max(loss, 1) and abs(found[step][1] / norm - 1) < 10 * limit, step


@pytest.mark.parametrize("name", SHARDINGS)
def test_two_processes_train_as_one_under_every_sharding(tried: Tried, name: str) -> None:
    _, out, _ = tried
    compare(out / name, out / "one" / "plain", STEPS)


@pytest.mark.parametrize("name", KINDS)
def test_whatever_a_run_does_its_numbers_are_those_of_one_process(tried: Tried, name: str) -> None:
    _, out, _ = tried
    compare(out / name, out / "one" / name, 4)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # compiles, and starts workers that import torch
def test_more_of_it_is_as_one_process_does_it(tried_more: Tried) -> None:
    _, out, _ = tried_more
    for name in MORE_SHARDINGS:
        compare(out / name, out / "one" / "plain", STEPS)
    for name in MORE_KINDS:
        # under bf16 gathered weights are rounded, and not only products
        compare(out / name, out / "one" / name, 2 if name == "world" else 4, 2e-2 if name == "coarse" else 1e-5)


def test_batches_that_do_not_divide_are_refused_by_name(tried: Tried) -> None:
    _, _, ends = tried
    assert ends[0] == ends[1]
    assert ends[0][:-4] == [""] * len(SHARDINGS + KINDS)
    odd, bucket, groups, again = ends[0][-4:]
    assert odd.startswith("2 2 groups") and "train.batch_size = 3" in odd
    assert bucket.startswith("2 ") and "4x32x32 = 3" in bucket
    assert groups.startswith("2 parallel.data = 4, but 2 processes")
    assert again.startswith("2 ") and "holds a run already" in again


def test_clips_that_cannot_be_read_are_written_down_once(tried: Tried) -> None:
    _, out, _ = tried
    assert (out / "looks" / "rejects.jsonl").read_text() == (out / "one" / "looks" / "rejects.jsonl").read_text()


def test_looks_on_the_way_see_what_one_process_sees(tried: Tried) -> None:
    _, out, _ = tried
    seen = [
        [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        for run in (out / "one" / "looks", out / "looks")
    ]
    assert [row["step"] for row in seen[1]] == [2, 4]
    for one, two in zip(*seen, strict=True):
        torch.testing.assert_close(two["bins"], one["bins"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two["ema_bins"], one["ema_bins"], rtol=1e-4, atol=1e-5)
        assert two["bins"] != two["ema_bins"]
    names = {path.name for path in (out / "looks" / "samples" / "step-4").iterdir()}
    assert names == {path.name for path in (out / "one" / "looks" / "samples" / "step-4").iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_adapter_of_two_processes_is_that_of_one(tried_more: Tried) -> None:
    _, out, _ = tried_more
    files = [
        run / "checkpoints" / "step-4" / "lora" / "adapter_model.safetensors"
        for run in (out / "one" / "adapter", out / "adapter")
    ]
    one, two = map(load_file, files)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_what_is_made_of_a_run_does_not_know_how_it_was_saved(tried: Tried, tmp_path: Path) -> None:
    made, out, _ = tried
    saved, _ = latest(out / "zero3" / "checkpoints")
    assert saved is not None
    config = with_settings(config_of(made), {"model.weights": str(out / "zero3")})
    model = components.build_model(config)
    torch.testing.assert_close(dict(model.state_dict()), saved.weights | saved.average, rtol=0, atol=0)
    start = components.build_initial_model(config_of(made, train__init=str(out / "zero3")))
    torch.testing.assert_close(dict(start.state_dict()), saved.weights | saved.average, rtol=0, atol=0)
    export(out / "zero3", tmp_path / "model")
    content = load_file(tmp_path / "model" / "model.safetensors")
    assert content.keys() == saved.weights.keys()
    assert all(torch.equal(content[name], saved.average[name].bfloat16()) for name in saved.average)
