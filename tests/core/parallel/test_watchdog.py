"""Who is named when processes part; the ways in which they really die are in tests/core/launch."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opensora_core.errors import ConfigError, OsoraError, TrainingError, UsageError
from opensora_core.launch import records
from opensora_core.parallel import Mesh, joined
from opensora_core.parallel.fabric import Fabric, check_fabric, require_same
from opensora_core.parallel.local import on_ranks
from opensora_core.parallel.watchdog import Beat, Parted, _place, _Thread, watching

MACHINE = records.machine()


def beat(rank: int, **values: Any) -> Beat:
    return Beat(rank, f"host-{rank}", 1, "elsewhere", **{"step": 7, "calls": 70, **values})


def verdict(own: Beat, *others: Beat, silent: float = 0.0, untold: float = 0.0, size: int = 3) -> Parted | None:
    """What a process finds that has seen these."""
    thread = object.__new__(_Thread)
    now = time.monotonic()
    thread._timeout, thread._lost, thread._began = 60.0, 20.0, now - 100
    thread._beat, thread._talked = own, now - untold
    thread._seen = {other.rank: (other, now - silent) for other in others}
    thread._watched = [rank for rank in range(size) if rank != own.rank] if own.rank == 0 else [0]
    return thread._find()


def test_as_long_as_all_go_on_nobody_is_blamed() -> None:
    waits = {"waits": True, "still": 59.0}
    assert verdict(beat(0, **waits), beat(1, still=3600.0), beat(2, state="done"), silent=19) is None


def test_who_does_not_come_to_a_collective_is_named() -> None:
    waits = {"waits": True, "place": "all_reduce of loop.py:9 update"}
    late = beat(2, step=6, calls=69, place="dataset.py:4 read")
    found = verdict(beat(0, still=61.0, **waits), beat(1, still=61.0, **waits), late)
    assert found is not None and found.ranks == (2,)
    assert "rank 2 (host-2, pid 1) is in step 6, at dataset.py:4 read" in found.message
    assert "all_reduce of loop.py:9 update" in found.message


def test_of_collectives_that_differ_the_one_that_is_behind_is_named() -> None:
    waits = {"waits": True, "still": 61.0}
    found = verdict(beat(0, calls=70, **waits), beat(1, calls=69, **waits), beat(2, calls=70, **waits))
    assert found is not None and found.ranks == (1,)


@pytest.mark.parametrize(
    ("other", "silent", "words"),
    [
        ({"state": "failed", "words": "no space left"}, 0.0, "failed in step 7: no space left"),
        ({}, 21.0, "gives no sign of life for 21 s"),
    ],
)
def test_a_process_that_is_no_more_is_named(other: dict[str, Any], silent: float, words: str) -> None:
    found = verdict(beat(0), beat(1, **other), silent=silent, size=2)
    assert found is not None and found.ranks == (1,) and words in found.message


def test_a_process_id_counts_on_its_own_machine_only() -> None:
    gone = Beat(1, "here", 2**22 + 1, MACHINE)
    found = verdict(Beat(0, "here", 1, MACHINE), gone, size=2)
    assert found is not None and "is gone" in found.message
    assert verdict(beat(0), gone, size=2) is None


def test_one_that_is_cut_off_knows_it_but_not_when_all_is_done() -> None:
    found = verdict(beat(1), beat(0), silent=21, untold=21)
    assert found is not None and "does not answer" in found.message
    assert verdict(beat(1), beat(0, state="done"), silent=21, untold=21) is None


@pytest.fixture(autouse=True)
def _end_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "one")
    monkeypatch.setenv("MASTER_PORT", "1")


def test_one_process_watches_nobody_and_errors_stay_what_they_are() -> None:
    mesh = Mesh(torch.device("cpu"))
    with pytest.raises(TrainingError, match="mine"), watching(mesh) as watch:
        watch.step(1)
        raise TrainingError("mine")
    with pytest.raises(ConfigError, match="lost_seconds"), watching(mesh, lost_seconds=0.5):
        pass
    assert list(check_fabric(mesh, {})) == []


def test_a_place_is_told_in_words() -> None:
    place, seconds = _place(sys._getframe())
    assert place.startswith("test_watchdog.py:") and place.endswith("test_a_place_is_told_in_words") and seconds == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["a", "a", "b"], "rank 2 on host-2 has b; 2 of 3 have a"),
        (["a", "b"], "rank 1 on host-1 has b; 1 of 2 have a"),
        (["b", "a", "a"], "rank 0 on host-0 has b; 2 of 3 have a"),
    ],
)
def test_the_odd_one_is_named_with_its_value(values: list[str], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        require_same([(f"host-{rank}", {"torch": "2", "data": value}) for rank, value in enumerate(values)])
    assert refused.value.message == f"the processes differ in data: {words}"
    require_same([("host", {"torch": "2"})] * 3)


def meeting(folder: str) -> dict[str, Any]:
    """What a rank finds out about the fabric, about one that differs, and about one that fails; in one start."""
    told: dict[str, Any] = {}
    with joined(torch.device("cpu"), timeout_seconds=60) as mesh:
        (told["fabric"],) = check_fabric(mesh, {"data": "same"})
        try:
            list(check_fabric(mesh, {"data": f"of {mesh.rank}"}))
        except UsageError as error:
            told["odd"] = error.message
        with watching(mesh, lost_seconds=4) as watch:  # all is well, and is so again for the next
            watch.step(0)
            dist.barrier()
        try:
            with watching(mesh, lost_seconds=4, logs=Path(folder)) as watch:
                watch.step(3)
                if mesh.rank == 1:
                    raise TrainingError("the loss is not a number")
                time.sleep(2.5)
                raise RuntimeError("[gloo] Connection closed by peer")
        except OsoraError as error:
            told["end"] = (type(error).__name__, error.message)
    return told


def test_two_processes_check_each_other(tmp_path: Path) -> None:
    zero, one = on_ranks(2, meeting, str(tmp_path))
    fabric = zero["fabric"]
    assert isinstance(fabric, Fabric) and (fabric.processes, fabric.hosts) == (2, 1)
    assert fabric.all_reduce > 1e6 and fabric.all_to_all > 1e6 and one["fabric"] == fabric
    assert zero["odd"] == one["odd"] and "has of 1; 1 of 2 have of 0" in zero["odd"]
    assert one["end"] == ("TrainingError", "the loss is not a number")
    kind, message = zero["end"]
    assert kind == "Parted" and message.startswith("rank 1 (") and "failed in step 3: the loss is" in message
