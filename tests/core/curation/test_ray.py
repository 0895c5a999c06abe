"""Splitting and captioning on a cluster of two workers of Ray: the same bytes, and nothing lost with a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opensora_core.config import Config, with_settings
from opensora_core.curation import Request, SourceSplit, SplitPlan, examine
from opensora_core.curation.captions import CaptionRejected, CaptionRequest, caption
from opensora_core.curation.captions.lanes import Described, Lanes
from opensora_core.curation.captions.lanes_ray import RayLane
from opensora_core.curation.captions.protocol import Shown, Words
from opensora_core.curation.cluster import connected
from opensora_core.curation.crew import Again, Lost, Returned, Said, Tell
from opensora_core.curation.crew_ray import MOST_TRIES, RayCrew
from opensora_core.data.manifest import Clip
from opensora_core.errors import ConfigError, ResourceError, UsageError

from .scenes_on_disk import write_scenes
from .test_split import CONFIG, TABLES, rows, run, tree

RAY = replace(CONFIG, engine="ray", workers=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray")
    with connected("", 2) as library:
        yield library


def work(job: str, task: str, tell: Tell) -> str:
    """Tasks that lose their process, their leader, or both the first time."""
    word, _, place = task.partition(" ")
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hang":
        time.sleep(60)
    if word == "fell":  # what leads this process
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if word == "once" and not Path(place).exists():
        Path(place).touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if word == "wait" and not Path(place).exists():
        tell("begun")
        time.sleep(60)
    if word == "wait":
        return "done"
    if word == "full":
        raise ResourceError("no space left", "free some")
    tell("begun")
    return f"{job} {task}"


def crew(
    *, needs: Any = lambda task: [], folder: Path | None = None, workers: int = 2, address: str = ""
) -> RayCrew[str, str, str]:
    return RayCrew(
        work,
        "did",
        num_workers=workers,
        stall_seconds=3 if not address else 60,
        task_seconds=30,
        task_bytes=200 * 2**20,
        address=address,
        cpus=1,
        needs=needs,
        folder=folder,
    )


@pytest.mark.slow
def test_a_worker_that_is_lost_is_a_second_try_and_a_process_that_dies_a_reason(
    cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = list(crew(folder=tmp_path).run(["a", "die", f"once {tmp_path / 'mark'}", "hang", "fell", "b"]))
    returned = sorted(word.result for word in words if isinstance(word, Returned))
    assert returned == ["did a", "did b", f"did once {tmp_path / 'mark'}"]
    lost = {word.task: word.reason for word in words if isinstance(word, Lost)}
    assert lost.pop("fell").startswith(f"its worker of Ray was lost {MOST_TRIES} times: ")
    assert lost == {
        "die": "its process was killed by SIGKILL",
        "hang": "hung: nothing was read for stall_seconds=3",
    }
    assert [word.task.split()[0] for word in words if isinstance(word, Again)].count("once") == 1
    assert {word.word for word in words if isinstance(word, Said)} == {"begun"}
    assert [path.name for path in tmp_path.iterdir()] == ["mark"], "no token is left"
    assert not capfd.readouterr().out, "what Ray has to say of deaths would be among our own words"


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_files_ends_the_run_and_says_so(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "video.mp4").write_bytes(b"1")
    elsewhere = crew(needs=lambda task: [Path(task)]), crew(folder=Path())  # both of the folder that they are made in
    monkeypatch.chdir(here)
    for team in elsewhere:
        with pytest.raises(ResourceError, match="does not see"):
            list(team.run(["video.mp4"]))
    words = list(crew(needs=lambda task: [here / task]).run(["gone.mp4"]))
    assert [word.result for word in words if isinstance(word, Returned)] == ["did gone.mp4"], (
        "the task may say it itself"
    )


def test_a_full_disk_ends_all_of_it(cluster: Any) -> None:
    with pytest.raises(ResourceError, match="no space left"):
        list(crew().run(["full", "b"]))


def test_clips_and_tables_are_those_of_the_local_crew_to_the_byte(cluster: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_scenes(folder / "walk.mp4", [30, 8, 70])
    write_scenes(folder / "other.mp4", [40, 25], seed=2)
    (folder / "torn.mp4").write_bytes((folder / "walk.mp4").read_bytes()[:600])
    (plan,) = examine(RAY, Request([folder], tmp_path / "ray"))
    assert isinstance(plan, SplitPlan) and [bool(item.reason) for item in plan.sources] == [False, True, False]
    local = run(CONFIG, folder, output=tmp_path / "local", preview=True)
    spread = run(RAY, folder, output=tmp_path / "ray", preview=True)
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
    for events in (local, spread):
        events[:] = sorted((e for e in events if isinstance(e, SourceSplit)), key=lambda event: event.source)
    assert spread == local
    again = run(RAY, folder, output=tmp_path / "local", preview=True)
    assert again[-1].skipped == 3, "what the one finished the other takes as finished"


@pytest.mark.slow
def test_a_run_that_is_interrupted_leaves_nothing_running_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    folder, output = tmp_path / "in", tmp_path / "out"
    write_scenes(folder / "a.mp4", [30])
    write_scenes(folder / "long.mp4", [2500] * 2)
    words = ["split", str(folder), "-o", str(output), "--engine", "ray", "--codec-preset", "ultrafast", "--json"]
    words += ["--workers", "2", "--max-seconds", "2", "--min-seconds", "0.5"]
    job = subprocess.Popen(
        [sys.executable, "-m", "opensora_cli", *words], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert job.stdout is not None
    for line in job.stdout:
        if '"source_split"' in line:  # then the other one is in work
            break
    started = psutil.Process(job.pid).children(recursive=True)
    assert len(started) > 4
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to all of Ray, too
    job.stdout.read()
    assert job.wait(30) == 130
    _, alive = psutil.wait_procs(started, 10)
    assert not alive
    assert [row["status"] for row in rows(output / "sources.jsonl")] == ["ok"]
    assert not list(output.rglob("*.part")) and not list(output.glob(".ray-*"))
    assert len(list(output.glob("clips/*"))) == 1
    run(CONFIG, folder, output=output)
    run(CONFIG, folder, output=tmp_path / "whole")
    assert all((output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in TABLES)


def test_what_ray_has_no_use_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="says nothing to engine local"):
        run(replace(CONFIG, ray_address="auto"), tmp_path, output=tmp_path / "out")
    monkeypatch.setitem(sys.modules, "ray", None)
    write_scenes(tmp_path / "a.mp4", [30])
    with pytest.raises(UsageError) as caught:
        run(RAY, tmp_path / "a.mp4", output=tmp_path / "out")
    assert "osora[ray]" in caught.value.hint


def test_an_address_without_a_cluster_is_one_clear_error() -> None:
    pytest.importorskip("ray")
    code = "from opensora_core.curation.cluster import connected\nwith connected({!r}): pass"
    for address, words in (("ray://127.0.0.1:9", "that of a client"), ("127.0.0.1:9", "no Ray cluster at 127.0.0.1:9")):
        done = subprocess.run([sys.executable, "-c", code.format(address)], check=False, capture_output=True, text=True)
        assert words in done.stderr.splitlines()[-1]


def captions_of(engine: str, folder: Path, output: Path, **changes: Any) -> tuple[bytes, list[Any]]:
    settings = {"model": "tiny", "engine": engine, "workers": 1, "batch_size": 1} | changes
    config = with_settings(Config(), {f"caption.{name}": value for name, value in settings.items()})
    config = with_settings(config, {"runtime.device": "cpu"})
    events = list(caption(config, CaptionRequest(folder, output)))
    return output.read_bytes(), events


@pytest.mark.slow
def test_captions_are_those_of_the_local_lanes(cluster: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(3):
        write_scenes(folder / f"{number}.mp4", [12], seed=number)
    (folder / "torn.mp4").write_bytes((folder / "0.mp4").read_bytes()[:900])
    local, events = captions_of("local", folder, tmp_path / "local.jsonl")
    spread, others = captions_of("ray", folder, tmp_path / "ray.jsonl")
    assert spread == local and local.count(b"caption") == 3
    rejected = [[event for event in told if isinstance(event, CaptionRejected)] for told in (events, others)]
    assert rejected[0] == rejected[1] and len(rejected[0]) == 1


class Falling:
    """A captioner that loses its process, always or the first time."""

    def __init__(self, mark: Path | None) -> None:
        self.mark = mark

    about, at, batch_size, lanes, is_local, facts = "falling", (), 1, 1, True, {"model": "falling"}

    def fetch(self, is_offline: bool) -> Iterator[tuple[str, int, int]]:
        yield from ()

    def load(self, device: str) -> None:
        assert device == "cpu"

    def prepare(self, clips: Any) -> Any:
        return clips

    def describe(self, prepared: Any, should_stop: Any) -> list[Words]:
        if prepared[0].index == 1 and (self.mark is None or not self.mark.exists()):
            if self.mark is not None:
                self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [Words(f"clip {shown.index}") for shown in prepared]


@pytest.mark.parametrize("falls", ["once", "always"])
def test_a_lane_that_is_lost_is_a_second_try_and_then_a_reason(cluster: Any, tmp_path: Path, falls: str) -> None:
    clip = Clip(path=tmp_path / "a.mp4")
    clips = [Shown(index, clip) for index in range(3)]
    falling = Falling(tmp_path / "mark" if falls == "once" else None)
    heard: dict[int, Words] = {}
    with closing(Lanes(falling, ["cpu"], clips, lambda device: RayLane(cluster, falling, device))) as lanes:
        lanes.start()
        while len(heard) < len(clips):
            for word in lanes.listen(1):
                if isinstance(word, Described):
                    heard[word.clips[0].index] = word.words[0]
    assert heard[0].text == "clip 0"
    if falls == "once":
        assert [heard[number].text for number in (1, 2)] == ["clip 1", "clip 2"]
    else:
        assert heard[1].failed and "was lost 2 times" in heard[1].reason


def lose_a_node(mark: Path) -> list[Any]:
    """A cluster that runs already, whose only machine is lost with a task in work after another one has joined it."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    first = nodes.add_node(num_cpus=1)
    words = []
    try:
        team = crew(workers=1, address=nodes.address)
        for word in team.run([f"wait {mark}", "b"]):
            if isinstance(word, Said) and not mark.exists():
                nodes.add_node(num_cpus=1)
                nodes.remove_node(first, allow_graceful=False)
                mark.touch()
            words.append(word)
    finally:
        nodes.shutdown()
    return words


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_dies_costs_its_task_a_second_try(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    code = (
        "from pathlib import Path\nfrom tests.core.curation.test_ray import lose_a_node\n"
        f"for word in lose_a_node(Path({str(tmp_path / 'mark')!r})): print(type(word).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.split() if line in ("Said", "Again", "Returned", "Lost")]
    assert told == ["Said", "Again", "Returned", "Said", "Returned"]
