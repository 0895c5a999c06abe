"""What lies in a run's folder: which checkpoint is whole, and who may write."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from opensora_core.errors import CheckpointError, ResourceError, UsageError
from opensora_core.files import write_manifest
from opensora_core.runs import (
    checkpoints,
    is_checkpoint,
    is_run,
    newest_checkpoint,
    newest_whole,
    only_writer,
    step_of,
)

REPO = Path(__file__).parents[2]


def save(run: Path, step: int) -> Path:
    """A checkpoint with the files that tell one."""
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    for name in ("weights.safetensors", "ema.safetensors", "optimizer.safetensors"):
        (folder / name).write_bytes(f"{name} {step}".encode())
    write_manifest(folder)
    return folder


def damage(folder: Path, how: str) -> None:
    weights = folder / "weights.safetensors"
    if how == "a bit":
        weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "gone":
        (folder / "optimizer.safetensors").unlink()
    elif how == "unfinished":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text('{"weights')


DAMAGES = ("a bit", "cut", "gone", "unfinished", "torn manifest")


# ---------------------------------------------------------------------- checkpoints


def test_steps_are_numbers_and_not_words(tmp_path: Path) -> None:
    for step in (9, 10, 100, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-200.left").mkdir()
    (tmp_path / "checkpoints" / "step-").mkdir()
    (tmp_path / "checkpoints" / ".step-300.part").mkdir()
    (tmp_path / "checkpoints" / "step-ten").mkdir()
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-100", "step-10", "step-9", "step-2"]
    assert newest_whole(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints" / "step-100"


@pytest.mark.parametrize(
    ("name", "step"), [("step-0", 0), ("step-12", 12), ("step-1.left", -1), ("step--1", -1), ("last-3", -1), ("3", -1)]
)
def test_a_name_tells_its_step(name: str, step: int) -> None:
    assert step_of(Path("checkpoints") / name) == step


@pytest.mark.parametrize("how", DAMAGES)
def test_the_newest_whole_checkpoint_is_behind_the_damaged_ones(how: str, tmp_path: Path) -> None:
    folders = [save(tmp_path, step) for step in (8, 9, 10, 11)]
    for folder in folders[2:]:
        damage(folder, how)
    found, damaged = newest_whole(tmp_path / "checkpoints")
    assert found == folders[1] and newest_checkpoint(tmp_path) == folders[1]
    assert len(damaged) == 2 and "step-11" in damaged[0] and "step-10" in damaged[1]


def test_a_run_without_a_whole_checkpoint_is_not_begun_over_in_silence(tmp_path: Path) -> None:
    for step, how in enumerate(DAMAGES):
        damage(save(tmp_path, step), how)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-4.*step-0") as caught:
        newest_checkpoint(tmp_path)
    assert str(tmp_path / "checkpoints") in caught.value.hint


def test_where_there_is_no_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "checkpoints") == (None, [])
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_named_by_itself_is_checked_too(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    save(tmp_path, 4)
    assert newest_checkpoint(folder) == folder
    damage(folder, "a bit")
    with pytest.raises(CheckpointError, match="damaged"):
        newest_checkpoint(folder)


def test_runs_and_checkpoints_are_told_apart(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert is_checkpoint(folder) and not is_checkpoint(tmp_path) and not is_checkpoint(tmp_path / "missing")
    assert not is_run(tmp_path) and not is_run(folder) and not is_run(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{}")
    assert is_run(tmp_path)
    (folder / "ema.safetensors").unlink()
    assert not is_checkpoint(folder)


# ---------------------------------------------------------------------- the writer

HOLD = """
import os, sys, time
from pathlib import Path
from opensora_core.runs import only_writer
with only_writer(Path(sys.argv[1])):
    child = os.fork() if "fork" in sys.argv else 1
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@contextmanager
def another_writer(run: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds a run, and the pid of what it forked."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, run, *words], cwd=REPO, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_a_run_has_one_writer_and_the_other_is_told_who(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    with another_writer(run) as (process, _):
        with pytest.raises(UsageError) as caught, only_writer(run):
            pytest.fail("two writers")
        assert caught.value.message == f"{run} is in use by process {process.pid} on {socket.gethostname()}"
        assert "--output" in caught.value.hint
        process.kill()  # kill -9: nothing is tidied up
        process.wait()
        assert (run / ".lock-holder").exists()
        with only_writer(run):
            assert json.loads((run / ".lock-holder").read_text())["pid"] == os.getpid()
    assert not (run / ".lock-holder").exists()


def test_a_worker_that_outlives_its_run_does_not_hold_it(tmp_path: Path) -> None:
    with another_writer(tmp_path, "fork") as (process, worker):
        with pytest.raises(UsageError), only_writer(tmp_path):
            pytest.fail("two writers")
        process.kill()
        process.wait()
        try:
            for _ in range(100):  # it lets go as soon as it runs, and would hold on for a minute if it did not
                with suppress(UsageError), only_writer(tmp_path):
                    return
                time.sleep(0.05)
            pytest.fail("the worker holds the run of a writer that is gone")
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_writer_that_fails_lets_go(error: type[BaseException], tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(error), only_writer(tmp_path):
            raise error
    with only_writer(tmp_path), pytest.raises(UsageError), only_writer(tmp_path):
        pytest.fail("two writers")


@pytest.mark.parametrize("torn", ["", "[1]", '{"pid": 1}', "\udcff"])
def test_a_torn_word_on_who_it_is_does_not_matter(torn: str, tmp_path: Path) -> None:
    with only_writer(tmp_path):
        (tmp_path / ".lock-holder").write_text(torn, errors="surrogateescape")
        with pytest.raises(UsageError, match="in use by another process"), only_writer(tmp_path):
            pytest.fail("two writers")


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write"), only_writer(tmp_path / "file" / "run"):
        pytest.fail("there is no such folder")
    (tmp_path / "run" / ".lock-holder").mkdir(parents=True)
    with pytest.raises(ResourceError, match="cannot write"), only_writer(tmp_path / "run"):
        pytest.fail("nobody could be told who writes")
    (tmp_path / "run" / ".lock-holder").rmdir()
    with only_writer(tmp_path / "run"):
        pass
