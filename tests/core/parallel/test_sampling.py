"""`osora sample` on several processes: what one would draw, file for file."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora_cli import app
from opensora_core import media, sampling
from opensora_core.config import Config, with_settings
from opensora_core.errors import ConfigError, OsoraError, ResourceError
from opensora_core.parallel import in_halves
from opensora_core.parallel.local import on_ranks
from opensora_core.parallel.mesh import Axis
from opensora_core.presets import preset
from opensora_core.sampling import Request, Saved
from opensora_core.sampling.sharing import Sharing, rounds_of, sharing_of
from opensora_core.sampling.writing import Writer
from opensora_core.vae.patch import PatchVAE
from tests.core.exported import export_tiny, tiny_config

PROMPTS = ("a red ball over grass", "a blue cube at night", "a green cone in the snow")
BUNDLED = {"video.num_frames": 12, "video.height": 32, "video.width": 48, "sampling.steps": 3, "runtime.device": "cpu"}

Outcome = dict[str, Any]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _config(folder: Path | None, changes: dict[str, Any]) -> Config:
    """The tiny STDiT of a folder, or the model that ships: a DiT with full attention and pooled captions."""
    if folder is None:
        return with_settings(preset("tiny"), {**BUNDLED, **changes})
    return with_settings(tiny_config(folder), changes)


def _draw(
    folder: Path | None,
    output: Path,
    changes: dict[str, Any],
    *,
    sheet: bool = False,
    prompts: Sequence[str] = PROMPTS,
) -> Outcome:
    """Sample as one process of a run; returns what it drew and said."""
    drawn: dict[str, np.ndarray] = {}
    write = Writer.write

    def noting(self: Writer, vae: Any, batches: Any, latents: Any) -> Any:
        own = batches[self.mesh.data.rank]
        drawn.update((request.path.name, value.numpy().copy()) for request, value in zip(own, latents, strict=True))
        return write(self, vae, batches, latents)

    config = _config(folder, changes)
    plan = sampling.plan(config, prompts, output)
    Writer.write = noting  # type: ignore[method-assign]
    try:
        events = list(sampling.sample(config, plan, sheet=sheet))
    finally:
        Writer.write = write  # type: ignore[method-assign]
    names = [event.path.name for event in events if isinstance(event, Saved)]
    return {"latents": drawn, "saved": names, "notices": [e.message for e in events if isinstance(e, sampling.Notice)]}


def _run_layouts(layouts: list[tuple[Path | None, Path, dict[str, Any], dict[str, Any]]]) -> list[Outcome]:
    """Several runs one after the other in the same processes."""
    outcomes = []
    apart = PatchVAE.frames_apart
    for folder, output, changes, options in layouts:
        PatchVAE.frames_apart = options.pop("frames_apart", True)
        outcomes.append(_draw(folder, output, changes, **options))
        PatchVAE.frames_apart = apart
    return outcomes


def _content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, less the times that are in some of them."""
    seconds = re.compile(rb'("seconds": |seconds[^0-9]{1,40}?)[0-9.]+')
    return {path.name: seconds.sub(b"", path.read_bytes()) for path in folder.iterdir() if path.is_file()}


def _frames(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: media.read_video(path).frames for path in folder.glob("*.mp4")}


def _records(folder: Path) -> list[str]:
    return [json.loads(line)["file"] for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("tiny"))


LAYOUTS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    # three samples in batches of two: the groups' batches are of different sizes
    "data": (True, {"parallel.data": 2, "sampling.batch_size": 2}, {"sheet": True}),
    "data, offloaded": (True, {"parallel.data": 2, "sampling.batch_size": 1, "runtime.offload": True}, {}),
    "cfg": (True, {"parallel.cfg": 2, "sampling.batch_size": 2}, {}),
    "sequence": (True, {"sampling.batch_size": 2, "parallel.text": "broadcast"}, {"sheet": True}),
    "videos in one piece": (True, {"sampling.batch_size": 3, "parallel.text": "shard"}, {"frames_apart": False}),
    "DiT, cfg": (False, {"parallel.cfg": 2}, {}),
    "DiT, sequence": (False, {"parallel.data": 1}, {}),
    "one frame": (True, {"video.num_frames": 2}, {}),
}


@pytest.fixture(scope="module")
def two_processes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """All that two processes do in these tests, as each of them tells it; a start of processes costs seconds."""
    root = tmp_path_factory.mktemp("drawn")
    runs = [
        (folder if is_stdit else None, root / name, changes, options)
        for name, (is_stdit, changes, options) in LAYOUTS.items()
    ]
    return on_ranks(2, _draw_and_fail, runs, folder, root, seconds=280.0), root


@pytest.fixture(scope="module")
def drawn(two_processes: Any, folder: Path) -> dict[str, tuple[list[Outcome], Path]]:
    """Every layout on two processes; and what one process draws, as `STDiT`, `DiT` and `short`."""
    ranks, root = two_processes
    found = {name: ([rank[0][number] for rank in ranks], root / name) for number, name in enumerate(LAYOUTS)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has: sums of several come in another order
    found["STDiT"] = [_draw(folder, root / "STDiT", {"sampling.batch_size": 2}, sheet=True)], root / "STDiT"
    found["DiT"] = [_draw(None, root / "DiT", {})], root / "DiT"
    found["short"] = [_draw(folder, root / "short", {"video.num_frames": 2})], root / "short"
    torch.set_num_threads(threads)
    return found


def _alone(name: str) -> str:
    return "short" if name == "one frame" else "STDiT" if LAYOUTS[name][0] else "DiT"


@pytest.mark.parametrize("name", LAYOUTS)
def test_several_processes_draw_what_one_draws(name, drawn):
    ranks, output = drawn[name]
    (one,), alone = drawn[_alone(name)]
    for rank in ranks:
        assert rank["latents"]
        for file, latents in rank["latents"].items():
            np.testing.assert_allclose(latents, one["latents"][file], atol=1e-5, rtol=0)
    assert set().union(*(rank["latents"] for rank in ranks)) == set(one["latents"])
    ours, theirs = _frames(output), _frames(alone)
    assert ours.keys() == theirs.keys()
    assert all(np.abs(ours[file].astype(int) - theirs[file]).max() <= 1 for file in ours)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_first_process_tells_and_records_all_in_order(name, drawn):
    (first, second), output = drawn[name]
    (one,), alone = drawn[_alone(name)]
    assert first["saved"] == one["saved"] == _records(output) == _records(alone)
    assert second["saved"] == []


@pytest.mark.parametrize("name", ["data", "data, offloaded"])
def test_groups_write_the_bytes_of_one_process(name, drawn):
    theirs, ours = _content(drawn["STDiT"][1]), _content(drawn[name][1])
    if name == "data":
        assert ours.keys() == theirs.keys() >= {"sheet.png", "index.html", "samples.jsonl"}
        assert [len(rank["latents"]) for rank in drawn[name][0]] == [2, 1]
    assert {file: theirs[file] for file in ours} == ours


def test_halves_on_two_processes_are_the_halves_of_one(drawn):
    for name in ("cfg", "DiT, cfg"):
        first, second = drawn[name][0]
        assert all(np.array_equal(first["latents"][file], second["latents"][file]) for file in first["latents"])
        one = drawn[_alone(name)][0][0]["latents"]
        assert all(np.abs(first["latents"][file] - one[file]).max() <= 1e-6 for file in one)


def test_processes_without_a_frame_of_their_own_are_told_of(drawn):
    first, _ = drawn["one frame"][0]
    assert any("2 processes share 1 frame of the model" in notice for notice in first["notices"])


@pytest.mark.slow
def test_four_processes_share_halves_and_frames(folder, tmp_path):
    changes: list[tuple[Path | None, dict[str, Any]]] = [
        (folder, {"parallel.cfg": 2}),
        (None, {"parallel.cfg": 2, "parallel.sequence": 2}),
        (folder, {"parallel.data": 2, "parallel.sequence": 2, "sampling.batch_size": 2}),
        (folder, {"parallel.data": 4}),
    ]
    runs = [(place, tmp_path / str(number), item, {}) for number, (place, item) in enumerate(changes)]
    ranks = on_ranks(4, _run_layouts, runs, seconds=240.0)
    alone = {place: _draw(place, tmp_path / f"alone-{place is None}", {}) for place in (folder, None)}
    for number, (place, _) in enumerate(changes):
        one = alone[place]["latents"]
        for rank in ranks:
            for file, latents in rank[number]["latents"].items():
                np.testing.assert_allclose(latents, one[file], atol=1e-5, rtol=0)
        assert ranks[0][number]["saved"] == _records(tmp_path / str(number)) == list(one)
    assert [list(rank[3]["latents"]) for rank in ranks] == [[name] for name in alone[folder]["latents"]] + [[]]


# what goes wrong ------------------------------------------------------------------------------------------------------


def _type(output: Path) -> int:
    """Run the command in this process, as one of those that a launcher has started."""
    with output.with_suffix(f".{os.environ['RANK']}").open("w") as out, contextlib.redirect_stdout(out):
        words = ["sample", "--device", "cpu", *SMALL, *SEVERAL, "--parallel", "data=2", "--sheet", "--json"]
        return app.run([*words, "--output", str(output)])


def _draw_and_fail(runs: Any, folder: Path, root: Path) -> tuple[list[Outcome], str, str, str]:
    """Draw; be asked for different things; find no space in the second process. Returns the errors, of each its own."""
    outcomes = _run_layouts(runs)
    rank = os.environ["RANK"]
    assert _type(root / "typed") == 0
    try:
        _draw(folder, root / "odd", {}, prompts=PROMPTS[int(rank) :])
    except OsoraError as error:
        odd = error.message

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank == "1":
            patch.setitem(media.write.WRITERS, "mp4", refuse)
        try:
            _draw(folder, root / "full", {"parallel.data": 2})
        except OsoraError as error:
            kind, message = type(error).__name__, error.message
    gc.collect()  # the traceback holds what the other one is connected to
    return outcomes, kind, message, odd


def test_what_fails_for_one_ends_all_with_its_message(two_processes):
    ((_, _, first, odd), (_, kind, second, same)), root = two_processes
    assert odd == same
    assert "the processes differ in prompts: rank 1 on" in odd
    assert kind == ResourceError.__name__
    assert "no space left for" in second
    assert "rank 1" in first
    assert second in first
    assert [path.name for path in (root / "full").glob("*.mp4")] == ["a-red-ball-over-grass-42.mp4"]


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        ({}, 1, Sharing(1, 1, 1)),
        ({}, 8, Sharing(1, 1, 8)),
        ({"parallel.cfg": 2}, 8, Sharing(1, 2, 4)),
        ({"parallel.data": 8}, 8, Sharing(8, 1, 1)),
        ({"parallel.data": 2, "parallel.cfg": 2}, 8, Sharing(2, 2, 2)),
        ({"parallel.sequence": 2}, 8, Sharing(4, 1, 2)),
        ({"parallel.sequence": 2, "parallel.cfg": 2, "parallel.data": 2}, 8, Sharing(2, 2, 2)),
    ],
)
def test_what_is_left_open_shares_the_frames(changes, processes, expected):
    assert sharing_of(with_settings(Config(), changes), processes) == expected


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        (
            {"parallel.cfg": 2, "parallel.sequence": 4},
            4,
            ("cfg=2,sequence=4 is for 8 processes, and 4 pro", "--gpus 8"),
        ),
        ({"parallel.data": 2, "parallel.sequence": 2}, 8, ("data=2,cfg=1,sequence=2 is for 4 processes", "--gpus 4")),
        ({"parallel.data": 3}, 8, ("data=3,cfg=1 is for 3 processes, and 8 processes run", "multiply to 8")),
        ({"parallel.cfg": 2}, 1, ("cfg=2 is for 2 processes, and 1 process runs", "--gpus 2")),
        ({"parallel.cfg": 3}, 3, ("cfg=3", "cfg is 1 or 2")),
        ({"parallel.data": -1}, 2, ("data=-1", "data and sequence are 1 or more")),
        ({"parallel.cfg": 2, "sampling.guidance": 1.0}, 2, ("--guidance 1", "--parallel cfg=1")),
        ({"parallel.engine": "colossalai"}, 2, ("colossalai trains", "torch")),
    ],
)
def test_sizes_that_cannot_be_are_named(changes, processes, expected, folder, tmp_path):
    message, hint = expected
    config = with_settings(tiny_config(folder), changes)
    with pytest.raises(ConfigError, match=message) as caught:
        sampling.plan(config, PROMPTS, tmp_path, processes=processes)
    assert hint in caught.value.hint


def test_groups_without_a_sample_are_told_of(folder, tmp_path):
    config = with_settings(tiny_config(folder), {"parallel.data": 8})
    shared, idle = sampling.plan(config, PROMPTS, tmp_path, processes=8).notices
    assert "8 processes share the work: data=8 x cfg=1 x sequence=1" in shared
    assert "3 samples for 8 groups of processes: 5 have nothing to draw" in idle


def test_neighbours_go_to_different_groups():
    requests = [Request(str(number), number, 0, 0, Path(str(number))) for number in range(7)]
    rounds = [
        [[request.index for request in batch] for batch in batches]
        for batches in rounds_of(requests, groups=2, batch_size=2)
    ]
    assert rounds == [[[0, 2], [1, 3]], [[4, 6], [5]]]
    assert [list(map(len, batches)) for batches in rounds_of(requests[:5], 4, 1)] == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_one_process_computes_both_halves() -> None:
    def denoiser(*_: Any) -> torch.Tensor:
        raise OsoraError("called")

    assert in_halves(denoiser, Axis("cfg")) is denoiser


# the command ----------------------------------------------------------------------------------------------------------


def _osora(*words: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "opensora_cli", "sample", "--device", "cpu", *SMALL, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)


SMALL = ("--steps", "2", "--frames", "4", "--size", "32x32")
SEVERAL = tuple(word for prompt in PROMPTS for word in ("--prompt", prompt))


def test_the_first_process_of_a_command_speaks_and_the_others_have_logs(two_processes):
    _, root = two_processes
    events = [json.loads(line) for line in (root / "typed.0").read_text().splitlines()]
    assert [Path(event["path"]).name for event in events if event["event"] == "saved"] == _records(root / "typed")
    assert [event["event"] for event in events][-3:] == ["sheet", "gallery", "done"]
    log = (root / "typed" / "logs" / "rank-1.log").read_text()
    assert "saved" not in log + (root / "typed.1").read_text()


@pytest.mark.slow
def test_the_command_runs_under_torchrun(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1")
    torchrun = (*torchrun, f"--master-port={_free_port()}")
    words = ("--parallel", "data=2", "--sheet", "--json", "--output", str(tmp_path))
    done = _osora(*SEVERAL, *words, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["path"] for event in events if event["event"] == "saved"] == [
        str(tmp_path / name) for name in _records(tmp_path)
    ]
    assert [event["event"] for event in events][-3:] == ["sheet", "gallery", "done"]
    assert len(_frames(tmp_path)) == 3


@pytest.mark.slow
def test_gpus_start_the_command_and_tell_an_error_once(folder, tmp_path):
    done = _osora("--gpus", "2", "--prompt", PROMPTS[0], "--output", str(tmp_path / "one.mp4"))
    assert done.returncode == 0, done.stderr
    assert list(_frames(tmp_path)) == ["one.mp4"]

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"xx")
    done = _osora("--gpus", "2", "--model", str(broken), "--prompt", PROMPTS[0], "--output", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "model.safetensors is damaged" in done.stderr
    assert "Traceback" not in done.stderr


FAILING = """
import os
if os.environ.get("RANK") == "1":
    import torch
    from opensora_core.sampling import drawing

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    drawing.Drawer.condition = fail
"""


@pytest.mark.slow
def test_a_process_that_others_wait_for_in_the_model_ends_them_with_its_message(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    path = os.pathsep.join([str(tmp_path), str(Path(sampling.__file__).parents[2])])
    start = time.monotonic()
    done = _osora("--gpus", "2", "--prompt", "a ball", "--output", str(tmp_path / "out"), PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    assert "out of memory on cpu" in done.stderr
    assert "what makes it smaller: " in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 200  # half a minute on an idle machine, and less than any limit


def test_the_command_refuses_before_it_starts_anything(tmp_path, capsys, monkeypatch):
    for words, message in [
        (("--gpus", "4", "--parallel", "cfg=2,sequence=4"), "cfg=2,sequence=4 is for 8 processes, and 4 processes run"),
        (("--parallel", "cfg=2"), "cfg=2 is for 2 processes, and 1 process runs"),
        (("--gpus", "2", "--prompt-file", "-"), "from one stdin"),
    ]:
        output = ("--output", str(tmp_path / "none"), "--prompt", "a ball")
        assert app.run(["sample", "--device", "cpu", *words, *output]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_dry_run_shows_what_would_be_started(tmp_path, capsys, monkeypatch):
    words = [
        "sample",
        "--device",
        "cpu",
        "--gpus",
        "2",
        "--dry-run",
        "--prompt",
        "a ball",
        "-o",
        str(tmp_path / "x.mp4"),
    ]
    monkeypatch.setattr(sys, "argv", ["osora", *words])
    assert app.run(words) == 0
    told = capsys.readouterr()
    assert "torch.distributed.run" in told.out
    assert f"--output {tmp_path / 'x.mp4'}" in told.out
    assert "2 processes share the work: data=1 x cfg=1 x sequence=2" in told.err
    assert list(tmp_path.iterdir()) == []
