"""The job: what it writes, that it adds up, and that it is the same however often it was stopped."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensora_core.config import SplitConfig
from opensora_core.curation import Request, SourceSplit, SplitDone, SplitPlan, SplitProgress, examine, split
from opensora_core.curation.plan import VERSION
from opensora_core.curation.records import Record, Records
from opensora_core.curation.sources import identified
from opensora_core.curation.work import Job, Result, Task, split_source
from opensora_core.data import read_manifest, write_clips
from opensora_core.errors import ConfigError, InputError, ResourceError, UsageError
from opensora_core.media import probe
from opensora_core.runs import only_writer

from .scenes_on_disk import write_scenes

CONFIG = SplitConfig(workers=1, codec_preset="ultrafast", min_seconds=0.5, max_seconds=2.0)
TABLES = ("manifest.jsonl", "sources.jsonl", "rejects.jsonl")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_scenes(folder / "a" / "walk.mp4", [30, 8, 70])
    write_scenes(folder / "b" / "walk.mp4", [40, 25], seed=2)
    (folder / "b" / "torn.mp4").write_bytes((folder / "a" / "walk.mp4").read_bytes()[:600])
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def run(config: SplitConfig, *inputs: Path, output: Path, **options: Any) -> list[Any]:
    return list(split(config, Request(inputs, output, **options)))


def tree(folder: Path) -> dict[str, str]:
    """Sums of everything that a user sees."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.startswith(".lock")
    }


@pytest.fixture(scope="module")
def done(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    output = tmp_path_factory.mktemp("done") / "out"
    return output, run(CONFIG, videos, output=output, preview=True)


def test_clips_are_what_the_manifest_says(videos: Path, done: tuple[Path, list[Any]]) -> None:
    output, _ = done
    clips = read_manifest(output)
    assert not clips.notes
    assert [clip.num_frames for clip in clips] == [30, 35, 35, 40, 25]
    for clip in clips:
        assert hashlib.sha256(clip.path.read_bytes()).hexdigest() == clip.sha256
        found = probe(clip.path)
        assert (found.num_frames, found.width, found.height) == (clip.num_frames, clip.width, clip.height)
        assert clip.scores["source_end_frame"] - clip.scores["source_start_frame"] == clip.num_frames
        assert clip.source in (str(videos / "a" / "walk.mp4"), str(videos / "b" / "walk.mp4"))
        assert clip.start_seconds is None, "the range is of the source, not of the clip's own file"
    assert [clip.scores["start_score"] > 0 for clip in clips] == [False, True, False, False, True]
    assert len({clip.path.parent for clip in clips}) == 2, "files of the same name have clips of their own"


def test_the_manifest_is_as_the_house_writes_it(done: tuple[Path, list[Any]], tmp_path: Path) -> None:
    output, _ = done
    again = output / "again.jsonl"
    write_clips(read_manifest(output), again)
    assert again.read_bytes() == (output / "manifest.jsonl").read_bytes()
    again.unlink()


def test_every_frame_of_every_source_is_accounted_for(videos: Path, done: tuple[Path, list[Any]]) -> None:
    output, _ = done
    spans: dict[str, list[tuple[int, int]]] = {}
    for clip in read_manifest(output):
        place = int(clip.scores["source_start_frame"]), int(clip.scores["source_end_frame"])
        spans.setdefault(clip.source, []).append(place)
    rejects = rows(output / "rejects.jsonl")
    for row in rejects:
        if row["what"] == "frames":
            spans[row["source"]].append((row["start_frame"], row["end_frame"]))
    sources = {row["source"]: row for row in rows(output / "sources.jsonl")}
    assert list(sources) == sorted(sources) and len(sources) == 3
    for source, parts in spans.items():
        covered = [frame for first, last in sorted(parts) for frame in range(first, last)]
        assert covered == list(range(sources[source]["num_frames"]))
    torn = str(videos / "b" / "torn.mp4")
    assert sources[torn]["status"] == "rejected" and sources[torn]["reason"]
    assert [(row["source"], row["what"]) for row in rejects if row["source"] == torn] == [(torn, "source")]
    assert [row["reason"] for row in rejects if row["what"] == "frames"] == ["too short"]
    walk = sources[str(videos / "a" / "walk.mp4")]
    assert [item["frame"] for item in walk["boundaries"]] == [30, 38]
    assert walk["boundaries"][0].keys() == {"frame", "seconds", "kind", "start_frame", "end_frame", "score"}
    assert walk["probe"]["codec"] == "h264" and walk["probe"]["num_frames"] == walk["num_frames"] == 108


def test_it_tells_how_far_it_is_and_what_came_of_it(done: tuple[Path, list[Any]]) -> None:
    _, events = done
    progress = [event for event in events if isinstance(event, SplitProgress)]
    assert progress and all(event.done_seconds <= event.total_seconds for event in progress)
    assert {event.status for event in events if isinstance(event, SourceSplit)} == {"ok", "rejected"}
    end = events[-1]
    assert isinstance(end, SplitDone) and end.num_clips == 5 and end.sources == {"ok": 2, "rejected": 1}
    assert end.left_out == {"too short": (1, pytest.approx(8 / 25))}


def test_a_second_run_has_nothing_to_do(videos: Path, done: tuple[Path, list[Any]]) -> None:
    output, _ = done
    before = tree(output)
    events = run(CONFIG, videos, output=output, preview=True)
    assert not [event for event in events if isinstance(event, SourceSplit)]
    assert events[-1].skipped == 3 and tree(output) == before


def test_other_settings_are_refused_unless_it_is_redone(
    videos: Path, done: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    output = shutil.copytree(done[0], tmp_path / "out")
    with pytest.raises(UsageError, match=r"max_seconds was 2.0 and is 1.0"):
        run(replace(CONFIG, max_seconds=1.0), videos, output=output)
    run(replace(CONFIG, max_seconds=1.0), videos / "b" / "walk.mp4", output=output, redo=True)
    assert sorted(row["num_frames"] for row in rows(output / "manifest.jsonl"))[:3] == [20, 20, 25]
    run(replace(CONFIG, workers=2, decode_threads=2), videos, output=shutil.copytree(done[0], tmp_path / "same"))


def test_a_folder_of_somebody_else_is_left_alone(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match="no split made it"):
        run(CONFIG, videos, output=tmp_path)
    assert (tmp_path / "manifest.jsonl").read_text() == "mine\n"


def test_changed_moved_and_copied_files_are_known_by_their_content(tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    write_scenes(folder / "one.mp4", [30, 30])
    shutil.copy2(folder / "one.mp4", folder / "copy.mp4")
    run(CONFIG, folder, output=output)
    names = [row["path"] for row in rows(output / "manifest.jsonl")]
    assert len(set(names)) == 4, "copies have clips of their own"
    (folder / "one.mp4").rename(folder / "renamed.mp4")
    events = run(CONFIG, folder, output=output)
    assert not [event for event in events if isinstance(event, SourceSplit)], "a file that moved is not done again"
    assert [row["path"] for row in rows(output / "manifest.jsonl")] == names
    assert {Path(row["source"]).name for row in rows(output / "manifest.jsonl")} == {"copy.mp4", "renamed.mp4"}
    write_scenes(folder / "copy.mp4", [45], seed=3)
    run(CONFIG, folder, output=output)
    assert [row["num_frames"] for row in rows(output / "manifest.jsonl")] == [45, 30, 30]
    kept = {path.parent.name for path in output.glob("clips/*/*")}
    assert len(kept) == 2, "nothing is left of what the file was before"


@pytest.mark.parametrize("shards", [2])
def test_shards_together_are_the_whole_to_the_byte(
    videos: Path, done: tuple[Path, list[Any]], tmp_path: Path, shards: int
) -> None:
    output = tmp_path / "out"
    jobs = [
        subprocess.Popen(command(videos, output, "--shard", f"{number}/{shards}"), stderr=subprocess.PIPE)
        for number in range(shards)
    ]
    assert [job.wait(120) for job in jobs] == [0] * shards, [job.stderr.read() for job in jobs if job.stderr]
    run(CONFIG, videos, output=output, preview=True)
    assert tree(output) == tree(done[0])


def command(videos: Path, output: Path, *words: str) -> list[str]:
    settings = ["--workers", "1", "--codec-preset", "ultrafast", "--min-seconds", "0.5", "--max-seconds", "2"]
    return [sys.executable, "-m", "opensora_cli", "split", str(videos), "-o", str(output), *settings, *words]


def test_ctrl_c_ends_with_130_and_leaves_nothing_half_done(videos: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    write_scenes(folder / "long.mp4", [2500] * 2)
    write_scenes(folder / "a.mp4", [30])
    job = subprocess.Popen(command(folder, output, "--json"), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert job.stdout is not None
    for line in job.stdout:
        if json.loads(line)["event"] == "source_split":  # then the other one is in work
            break
    time.sleep(0.5)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    began = time.monotonic()
    rest = job.stdout.read()
    assert job.wait(30) == 130 and time.monotonic() - began < 5
    assert json.loads(rest.splitlines()[-1])["event"] == "error"
    assert not list(output.rglob("*.part"))
    assert [row["status"] for row in rows(output / "sources.jsonl")] == ["ok"]
    assert {path.parent.name for path in output.glob("clips/*/*")} == {
        Path(row["path"]).parent.name for row in rows(output / "manifest.jsonl")
    }


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_it_is_the_same_to_the_byte(
    videos: Path, done: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    for attempt in range(3):
        output = tmp_path / f"out-{attempt}"
        for _ in range(4):
            job = subprocess.Popen(command(videos, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(random.uniform(0.3, 4))
            job.kill()
            job.wait()
        subprocess.run(command(videos, output, "--preview"), check=True, capture_output=True)
        assert tree(output) == tree(done[0])


def settled_task(path: Path) -> Task:
    source = identified(path)
    return Task(source, source.name(by_path=False), "sum")


def in_this_process(config: SplitConfig, path: Path, output: Path, **options: Any) -> Result:
    told: list[Any] = []
    Records(output).prepare({"version": VERSION}, redo=True)
    job = Job(config, output, "limits", with_scores=options.get("with_scores", False))
    return split_source(job, replace(settled_task(path), boundaries=options.get("boundaries")), told.append)


def test_ranges_stay_in_their_sources_without_a_cut(videos: Path, tmp_path: Path) -> None:
    source = videos / "a" / "walk.mp4"
    run(replace(CONFIG, cut="none"), source, output=tmp_path / "out")
    clips = read_manifest(tmp_path / "out")
    assert [clip.path for clip in clips] == [source] * 3
    for clip in clips:
        found = probe(clip.path, start_seconds=clip.start_seconds, end_seconds=clip.end_seconds)
        assert found.num_frames == clip.num_frames
        assert clip.fps is not None and found.fps == pytest.approx(clip.fps)
    write_clips(clips, tmp_path / "out" / "again.jsonl")
    assert (tmp_path / "out" / "again.jsonl").read_bytes() == (tmp_path / "out" / "manifest.jsonl").read_bytes()
    assert not (tmp_path / "out" / "clips").exists()


@pytest.mark.parametrize("how", ["copy", "smart"])
def test_copied_clips_say_what_is_really_in_them(videos: Path, tmp_path: Path, how: Any) -> None:
    config = replace(CONFIG, cut=how)
    made = in_this_process(config, videos / "a" / "walk.mp4", tmp_path)
    assert made.source["status"] == "ok" and made.clips
    spans = [(row["scores"]["source_start_frame"], row["scores"]["source_end_frame"]) for row in made.clips]
    spans += [(row["start_frame"], row["end_frame"]) for row in made.rejects]
    assert [frame for first, last in sorted(spans) for frame in range(int(first), int(last))] == list(range(108))
    for row in made.clips:
        assert probe(tmp_path / row["path"]).num_frames == row["num_frames"]


def test_a_single_clip_is_missed_with_its_reasons(tmp_path: Path) -> None:
    write_scenes(tmp_path / "short.mp4", [5])
    with pytest.raises(InputError, match="not a single clip came of it: too short"):
        run(CONFIG, tmp_path / "short.mp4", output=tmp_path / "out")
    assert rows(tmp_path / "out" / "rejects.jsonl")[0]["reason"] == "too short"


def test_a_dry_run_writes_nothing(videos: Path, tmp_path: Path) -> None:
    (plan,) = examine(CONFIG, Request([videos], tmp_path / "out"))
    assert isinstance(plan, SplitPlan)
    assert [(Path(item.source).name, item.num_clips) for item in plan.sources] == [
        ("walk.mp4", 3),
        ("torn.mp4", None),
        ("walk.mp4", 2),
    ]
    assert plan.sources[1].reason and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"detector": "contend"}, "unknown detector"),
        ({"detector_options": "threshold"}, "not NAME=NUMBER"),
        ({"min_seconds": 9.0}, "more than split.max_seconds"),
        ({"codec": "libx265x"}, "unknown encoder"),
        ({"cut": "copy", "fps": 8.0}, "encodes every frame"),
        ({"cut": "none", "crop_black_bars": True}, "encodes every frame"),
        ({"stall_seconds": 0.0}, "not above 0"),
        ({"trim": -1}, "below 0"),
        ({"fast": True, "detector": "content"}, "for the detector auto"),
    ],
)
def test_settings_that_make_no_sense_are_refused_first(
    changes: dict[str, Any], words: str, videos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(replace(CONFIG, **changes), videos, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_clear_error_and_what_is_finished_stays(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    commits = 0
    real = Records.commit

    def commit(self: Records, *arguments: Any) -> None:
        nonlocal commits
        commits += 1
        if commits == 2:
            raise ResourceError("no space left for x: free 0 bytes", "free some space")
        real(self, *arguments)

    monkeypatch.setattr(Records, "commit", commit)
    with pytest.raises(ResourceError, match="no space left"):
        run(CONFIG, videos / "a", videos / "b" / "walk.mp4", output=output)
    monkeypatch.undo()
    assert len(rows(output / "sources.jsonl")) == 1
    assert {path.parent.name for path in output.glob("clips/*/*")} == {
        Path(row["path"]).parent.name for row in rows(output / "manifest.jsonl")
    }


def test_tables_hold_what_was_committed_while_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path)
    records.prepare({}, redo=False)

    def commit(name: str) -> None:
        records.commit(Record(name, f"/{name}", "", "", "", "ok"), {"source": f"/{name}"}, [], [])

    commit("a")
    real, late = Records.read, iter(["b"])

    def read(self: Records) -> dict[str, Record]:
        found = real(self)
        for name in late:  # another shard commits when the records have been read already
            commit(name)
        return found

    monkeypatch.setattr(Records, "read", read)
    records.write_tables()
    assert [row["source"] for row in rows(tmp_path / "sources.jsonl")] == ["/a", "/b"]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "folder"])
def test_scores_of_every_frame_can_be_had(videos: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / ("scores" if suffix == "folder" else f"scores.{suffix}")
    run(replace(CONFIG, cut="none"), videos / "b" / "walk.mp4", output=tmp_path / "out", stats=path)
    if suffix == "parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path).to_pydict()
        frames, score = table["frame"], table["score"]
    else:
        (file,) = path.glob("*.csv") if suffix == "folder" else [path]
        head, *lines = (line.split(",") for line in file.read_text().splitlines())
        assert head[:4] == ["source", "frame", "seconds", "keyframe"]
        frames = [int(line[1]) for line in lines]
        score = [float(line[head.index("score")]) for line in lines]
    assert frames == list(range(65)) and int(np.argmax(score)) == 40


def test_scenes_from_elsewhere_are_taken_as_they_are(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "scenes.txt").write_text("0 19\n30 64\n")
    source = videos / "b" / "walk.mp4"
    run(replace(CONFIG, cut="none"), source, output=tmp_path / "out", boundaries=tmp_path / "scenes.txt")
    spans = [(row["scores"]["source_start_frame"], row["num_frames"]) for row in rows(tmp_path / "out/manifest.jsonl")]
    assert spans == [(0, 20), (30, 35)]
    (tmp_path / "scenes.txt").write_text("0 29\n30 64\n")  # which is not what was finished
    run(replace(CONFIG, cut="none"), source, output=tmp_path / "out", boundaries=tmp_path / "scenes.txt")
    assert [row["num_frames"] for row in rows(tmp_path / "out" / "manifest.jsonl")] == [30, 35]


def test_a_folder_of_scenes_has_a_file_for_each_source(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "walk.mp4.scenes.txt").write_text("0 64\n")
    config = replace(CONFIG, cut="none", max_seconds=0.0)
    run(config, videos / "b" / "walk.mp4", output=tmp_path / "out", boundaries=tmp_path)
    assert [row["num_frames"] for row in rows(tmp_path / "out" / "manifest.jsonl")] == [65]
    with pytest.raises(InputError, match=r"has no scenes of torn.mp4"):
        run(config, videos / "b", output=tmp_path / "out", boundaries=tmp_path, redo=True)
    with pytest.raises(UsageError, match="the scenes of one video"):
        run(config, videos, output=tmp_path / "other", boundaries=tmp_path / "walk.mp4.scenes.txt")


def test_a_detector_of_the_library_takes_its_options(videos: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, detector="content", detector_options="threshold=250", cut="none", max_seconds=0.0)
    run(config, videos / "b" / "walk.mp4", output=tmp_path / "out")
    assert [row["num_frames"] for row in rows(tmp_path / "out" / "manifest.jsonl")] == [65], "nothing is that unlike"
    with pytest.raises(ConfigError, match="treshold"):
        run(replace(config, detector_options="treshold=3"), videos / "b", output=tmp_path / "none")


def test_a_worker_that_is_killed_costs_its_source_until_the_next_run(videos: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    write_scenes(folder / "a.mp4", [30])
    write_scenes(folder / "long.mp4", [1500])
    events = split(CONFIG, Request([folder], output))
    for event in events:
        if isinstance(event, SplitProgress) and any("long" in state.source for state in event.workers):
            (worker,) = multiprocessing.active_children()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            break
    list(events)
    assert [(row["status"], row["reason"]) for row in rows(output / "sources.jsonl")] == [
        ("ok", ""),
        ("failed", "its process was killed by SIGKILL"),
    ]
    assert [row["source"] for row in rows(output / "rejects.jsonl")] == [str(folder / "long.mp4")]
    run(CONFIG, folder, output=output)
    assert [row["status"] for row in rows(output / "sources.jsonl")] == ["ok", "ok"]


def test_a_folder_in_use_is_refused(videos: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path / "out"), pytest.raises(UsageError, match="in use by process"):
        run(CONFIG, videos, output=tmp_path / "out")
