"""Checkpoints between layouts: written by any number of processes under any sharding, read by any other."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_core.errors import OsoraError, Stopped, TrainingError
from opensora_core.parallel import shards
from opensora_core.parallel.agreement import agreed
from opensora_core.parallel.local import on_ranks
from opensora_core.parallel.mesh import joined
from opensora_core.training.events import CheckpointSaved, TrainProgress
from tests.core.parallel import toy
from tests.core.training.saved import Saved, latest

SHARDINGS = ("replicate", "zero2", "zero3", "hybrid")


def newest(folder: Path) -> Saved:
    saved, damaged = latest(folder)
    assert saved is not None and not damaged
    return saved


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Saved):
        return all(same(getattr(a, n), getattr(b, n)) for n in ("step", "weights", "average", "optimizer", "state"))
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def losses(events: list[Any]) -> dict[int, float]:
    return {event.step: event.loss for event in events if isinstance(event, TrainProgress)}


def _two(folder: Path) -> dict[str, Any]:
    """All that is tried on two processes, in one start."""
    found: dict[str, Any] = {}
    for name in SHARDINGS:
        found[name] = losses(toy.fit(folder / name, name, scaled=True))
        toy.saved_again(folder / "one", folder / f"one-{name}", name)
    found["accumulated"] = losses(toy.fit(folder / "accumulated", "zero3", accumulate=2))
    found["asynchronous"] = toy.fit(folder / "async", "zero3", scaled=True, async_checkpoints=True, checkpoint_every=2)
    for name, task in {"nan": toy.Task(bad_step=4), "stopped": toy.Task(signal_at=2)}.items():
        try:
            toy.fit(folder / name, "zero3", task, checkpoint_every=2)
        except OsoraError as error:
            found[name] = error
    found["resumed"] = losses(toy.fit(folder / "begun", "zero2"))
    found["alone"] = _failing_alone()
    found["disk"] = _full_disk(folder / "disk")
    return found


def _full_disk(folder: Path) -> str:
    """What comes of it when only the last process cannot write."""
    write = shards.save_file

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    toy.fit(folder, "zero3", max_steps=2)
    if os.environ["RANK"] == "1":
        shards.save_file = full
    try:
        toy.fit(folder, "zero3", max_steps=4)
    except OsoraError as error:
        return error.message
    finally:
        shards.save_file = write
    return ""


def _failing_alone() -> str:
    with joined(toy.CPU) as mesh:
        try:
            with agreed(mesh.whole):
                if mesh.rank == 1:
                    raise ValueError("seven")
        except OsoraError as error:
            return error.message
        except ValueError:
            return "own"
    return ""


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("tried")
    toy.fit(folder / "one", "zero3", scaled=True)
    with pytest.raises(Stopped):
        toy.fit(folder / "begun", "zero3", toy.Task(signal_at=2))
    return folder, on_ranks(2, _two, folder, seconds=400)


Tried = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("name", SHARDINGS)
def test_two_processes_train_as_one(tried: Tried, tmp_path: Path, name: str) -> None:
    folder, (first, second) = tried
    expected = losses(toy.fit(tmp_path, "zero3", scaled=True))
    assert first[name] == second[name] and first[name].keys() == expected.keys()
    torch.testing.assert_close(list(first[name].values()), list(expected.values()), rtol=0, atol=1e-6)
    one, two = newest(folder / "one"), newest(folder / name)
    for group in ("weights", "average", "optimizer"):
        torch.testing.assert_close(getattr(two, group), getattr(one, group), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(list(first["accumulated"].values()), list(expected.values()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SHARDINGS)
def test_what_two_wrote_one_reads_and_the_other_way_round_to_the_bit(tried: Tried, tmp_path: Path, name: str) -> None:
    folder, _ = tried
    toy.saved_again(folder / name, tmp_path, "zero3")
    assert same(newest(tmp_path), newest(folder / name))
    assert same(newest(folder / f"one-{name}"), newest(folder / "one"))
    files = {path.name for path in (tmp_path / "step-6").iterdir()}
    assert files == {"weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def test_every_process_writes_its_own_part(tried: Tried) -> None:
    folder, _ = tried
    for name in SHARDINGS:
        sizes = [(folder / name / "step-6" / f"optimizer.{rank}.safetensors").stat().st_size for rank in range(2)]
        assert max(sizes) < 2 * min(sizes), name


def test_a_run_goes_on_at_another_number_of_processes(tried: Tried, tmp_path: Path) -> None:
    folder, (first, _) = tried
    expected = losses(toy.fit(tmp_path / "whole", "zero3"))
    shutil.copytree(folder / "stopped", tmp_path / "parts")
    for found in (losses(toy.fit(tmp_path / "parts", "zero3")), first["resumed"]):
        assert found.keys() == {4, 5, 6}
        torch.testing.assert_close(found, {step: expected[step] for step in found}, rtol=0, atol=1e-6)


def test_asynchronous_checkpoints_are_the_same_and_told_when_they_are_whole(tried: Tried) -> None:
    folder, (first, second) = tried
    told = [event for event in first["asynchronous"] if isinstance(event, CheckpointSaved)]
    assert [event.step for event in told] == [2, 4, 6]
    assert not any(isinstance(event, CheckpointSaved) for event in second["asynchronous"])
    assert same(newest(folder / "async"), newest(folder / "zero3"))
    assert not list((folder / "async").glob(".*"))


def test_a_number_that_is_none_on_one_process_stops_all_before_they_move(tried: Tried) -> None:
    folder, ends = tried
    for end in ends:
        assert isinstance(end["nan"], TrainingError) and "step 5; the clips of this batch: row 0" in end["nan"].message
    saved = newest(folder / "nan")
    assert saved.step == 4 and all(value.isfinite().all() for value in saved.weights.values())


def test_a_signal_to_one_process_stops_all_after_the_same_step(tried: Tried) -> None:
    folder, ends = tried
    for end in ends:
        assert isinstance(end["stopped"], Stopped) and end["stopped"].exit_code == 143
        assert "step 3 of 6" in end["stopped"].message
    assert newest(folder / "stopped").step == 3


def test_a_disk_that_is_full_for_one_is_told_by_all_and_leaves_nothing(tried: Tried) -> None:
    folder, ends = tried
    assert all("no space left" in end["disk"] for end in ends)
    assert [path.name for path in (folder / "disk").iterdir()] == ["step-2"]


def test_a_piece_that_is_missing_or_torn_is_refused(tried: Tried, tmp_path: Path) -> None:
    folder, _ = tried
    for name, damage in {"missing": None, "torn": 7}.items():
        copy = tmp_path / name
        shutil.copytree(folder / "zero3", copy)
        piece = copy / "step-6" / "ema.1.safetensors"
        content = piece.read_bytes()
        piece.unlink()
        if damage:
            piece.write_bytes(content[:-damage])
        with pytest.raises(OsoraError, match=r"ema\.1\.safetensors"):
            latest(copy)


def _four(folder: Path) -> None:
    toy.saved_again(folder / "one", folder / "four", "hybrid")
    toy.saved_again(folder / "four", folder / "four-again", "zero3")


def _back(folder: Path) -> None:
    toy.saved_again(folder / "four-again", folder / "two", "replicate")


@pytest.mark.slow
def test_two_one_four_two(tried: Tried, tmp_path: Path) -> None:
    folder, _ = tried
    toy.saved_again(folder / "zero2", tmp_path / "one", "zero3")
    on_ranks(4, _four, tmp_path, seconds=400)
    on_ranks(2, _back, tmp_path, seconds=400)
    expected = newest(folder / "zero2")
    for name in ("one", "four", "four-again", "two"):
        assert same(newest(tmp_path / name), expected), name
    index = json.loads((tmp_path / "four-again" / "step-6" / "shards.json").read_text())
    assert len(index["weights"]["blocks.0.0.weight"]["pieces"]) == 4


def test_an_error_of_one_is_an_error_of_all(tried: Tried) -> None:
    _, (first, second) = tried
    assert (first["alone"], second["alone"]) == ("another process failed: ValueError: seven", "own")


LONG = {"max_steps": 50, "checkpoint_every": 10, "decay_fraction": 0.0}


def _long(folder: Path) -> dict[int, float]:
    return losses(toy.fit(folder, "hybrid", **LONG))


def _dying(folder: Path) -> str:
    task = toy.Task(signal_at=25, signal_number=signal.SIGKILL)
    try:
        toy.fit(folder, "hybrid", task, **LONG)
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_four_processes_see_what_one_sees_and_outlive_a_dead_one(tmp_path: Path) -> None:
    expected = losses(toy.fit(tmp_path / "one", "zero3", **LONG))
    found = on_ranks(4, _long, tmp_path / "four", seconds=400)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="1 of 4 ranks told nothing"):
        on_ranks(4, _dying, tmp_path / "dying", seconds=200)
    assert newest(tmp_path / "dying").step == 20
    rest = on_ranks(2, _long, tmp_path / "dying", seconds=400)[0]
    assert rest.keys() == set(range(21, 51))
    torch.testing.assert_close(rest, {step: expected[step] for step in rest}, rtol=0, atol=1e-5)
