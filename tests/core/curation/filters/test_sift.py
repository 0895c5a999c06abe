"""Manifests: what is left out, what comes back, and that nothing is lost on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensora_core.config import FilterConfig, SplitConfig
from opensora_core.curation import Request, split
from opensora_core.curation.events import ClipExplained, ClipRefused, FilterDone, FilterPlan, FilterProgress
from opensora_core.curation.filters import apply, examine, rows, saved_settings, why
from opensora_core.data import read_manifest
from opensora_core.errors import ConfigError, InputError, UsageError
from opensora_core.runs import only_writer

from .drawn import letterboxed, moving, still, write

OFF = FilterConfig(max_still=0, max_dark=0, max_bright=0, workers=1)
STRICT = FilterConfig(min_motion=0.5, max_bars=0.2, min_copy_bits=4, workers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of six clips, of which one passes everything: measured once, and copied by those who change it."""
    folder = tmp_path_factory.mktemp("made")
    clips = folder / "clips"
    write(clips / "0.mp4", still())
    write(clips / "1.mp4", moving(2), crf=30, size=(72, 128))
    write(clips / "2.mp4", moving(2))
    write(clips / "3.mp4", letterboxed(moving(2, seed=1)))
    (clips / "4.mp4").write_bytes((clips / "2.mp4").read_bytes()[:400])
    write(clips / "5.mp4", moving(2, seed=2), codec="mpeg4")
    text = ""
    for number in range(6):
        size = (128, 72) if number == 1 else (256, 144)
        row = {"path": f"clips/{number}.mp4", "num_frames": 16, "width": size[0], "height": size[1], "licence": "CC0"}
        text += json.dumps({**row, "duration_seconds": 0.64, "scores": {"start_score": 1.5}}) + "\n"
    (folder / "manifest.jsonl").write_text(text)
    (folder / "rejects.jsonl").write_text('{"source": "x.mp4", "what": "source", "reason": "an empty file"}\n')
    run(folder, OFF)
    return folder


def run(folder: Path, settings: FilterConfig | None, **options: Any) -> list[Any]:
    return list(apply(folder, settings, **options))


def table(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_bytes().splitlines()]


def kept(folder: Path) -> list[str]:
    return [Path(row["path"]).stem for row in table(folder / "manifest.jsonl")]


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def test_clips_beyond_a_limit_leave_the_manifest_with_a_reason(folder: Path) -> None:
    events = run(folder, STRICT)
    assert kept(folder) == ["2", "5"]
    reasons = {
        Path(row["path"]).stem: row["reason"] for row in table(folder / "rejects.jsonl") if row["what"] == "clip"
    }
    assert reasons.keys() == {"0", "1", "3", "4"}
    assert "below filter.min_motion = 0.5" in reasons["0"] and "above filter.max_still = 0.98" in reasons["0"]
    assert reasons["1"].endswith("a copy of clips/2.mp4") and "filter.max_bars" in reasons["3"]
    assert reasons["4"].startswith("unreadable: ")
    done = events[-1]
    assert isinstance(done, FilterDone)
    assert (done.num_clips, done.num_kept, done.measured) == (6, 2, 0)
    assert done.kept_seconds == pytest.approx(1.28) and done.refused["min_copy_bits"] == (1, 0.64)
    assert {event.clip for event in events if isinstance(event, ClipRefused)} == {
        f"clips/{n}.mp4" for n in (0, 1, 3, 4)
    }


def test_rows_keep_what_they_have_and_get_scores(folder: Path) -> None:
    run(folder, STRICT)
    (row, _), (foreign, *_) = table(folder / "manifest.jsonl"), table(folder / "rejects.jsonl")
    assert row["licence"] == "CC0" and row["scores"]["start_score"] == 1.5 and row["scores"]["motion"] > 1
    assert foreign == {"source": "x.mp4", "what": "source", "reason": "an empty file"}
    assert read_manifest(folder)[0].scores == row["scores"]


def test_looser_limits_bring_clips_back_to_their_places(made: Path, folder: Path) -> None:
    before = (made / "manifest.jsonl").read_bytes()
    run(folder, STRICT)
    strict = (folder / "manifest.jsonl").read_bytes()
    run(folder, OFF)
    assert (folder / "manifest.jsonl").read_bytes() == before
    assert kept(folder) == ["0", "1", "2", "3", "5"]  # what cannot be decoded passes nothing
    run(folder, STRICT)
    run(folder, STRICT)
    assert (folder / "manifest.jsonl").read_bytes() == strict


def test_a_folder_stays_as_it_is_filtered(folder: Path) -> None:
    run(folder, STRICT)
    before = (folder / "manifest.jsonl").read_bytes()
    run(folder, None)
    assert saved_settings(folder) == STRICT and (folder / "manifest.jsonl").read_bytes() == before


def test_only_what_is_missing_is_measured(folder: Path) -> None:
    assert run(folder, OFF)[-1].measured == 0
    write(folder / "clips" / "5.mp4", moving(3, seed=3))
    with (folder / ".filter" / "scores.jsonl").open("ab") as log:
        log.write(b'{"clip": "clips/2.mp4", "ident')  # killed in the middle of a line
    assert run(folder, OFF)[-1].measured == 1
    assert run(folder, FilterConfig(motion="vectors", workers=1))[-1].measured == 5
    assert run(folder, FilterConfig(motion="vectors", workers=1))[-1].measured == 0


def test_scores_do_not_depend_on_the_number_of_workers(made: Path, folder: Path) -> None:
    shutil.rmtree(folder / ".filter")
    events = run(folder, FilterConfig(**{**OFF.__dict__, "workers": 2}))
    assert (folder / "manifest.jsonl").read_bytes() == (made / "manifest.jsonl").read_bytes()
    assert [event for event in events if isinstance(event, FilterProgress)][-1].done == 6


@pytest.mark.parametrize("step", [1, 2, 3])
def test_no_clip_is_lost_wherever_writing_stops(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    run(folder, FilterConfig(max_still=0, min_motion=0.5, workers=1))  # 0 is out, 3 is in
    replacing, count = rows.replacing, 0

    def stopping(path: Path) -> Any:
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return replacing(path)

    monkeypatch.setattr(rows, "replacing", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(folder, FilterConfig(max_bars=0.2, max_still=0, workers=1))  # 3 is out, 0 is in
    monkeypatch.undo()
    run(folder, OFF)
    assert kept(folder) == ["0", "1", "2", "3", "5"]


def test_captions_that_came_later_stay(folder: Path) -> None:
    run(folder, STRICT)
    changed = [{**row, "caption": f"a texture {row['path']}"} for row in table(folder / "manifest.jsonl")]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    run(folder, OFF)
    assert [clip.caption is not None for clip in read_manifest(folder)] == [False, False, True, False, True]


def test_a_manifest_elsewhere_is_left_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"path,text\n{made}/clips/2.mp4,a\n{made}/clips/0.mp4,b\n")
    with pytest.raises(UsageError, match=r"list\.csv is not replaced"):
        run(tmp_path / "list.csv", STRICT)
    for _ in range(2):
        events = list(apply(tmp_path / "list.csv", STRICT, tmp_path / "out"))
        assert kept(tmp_path / "out") == ["2"] and events[-1].num_clips == 2
    assert (tmp_path / "list.csv").is_file()
    with pytest.raises(UsageError, match="no filter made it"):
        list(apply(tmp_path / "list.csv", STRICT, _foreign(tmp_path)))


def _foreign(tmp_path: Path) -> Path:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "manifest.jsonl").write_text('{"path": "a.mp4"}\n')
    return tmp_path / "theirs"


def test_nothing_left_is_an_error_that_says_why(folder: Path) -> None:
    with pytest.raises(InputError, match=r"not a single clip of 6 passes: .*filter\.min_motion: 5"):
        run(folder, FilterConfig(min_motion=100, workers=1))
    run(folder, OFF)
    assert len(kept(folder)) == 5


def test_a_limit_without_its_model_says_what_it_needs(folder: Path) -> None:
    before = (folder / "manifest.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"filter\.min_aesthetic = 4.*clip_model"):
        run(folder, FilterConfig(min_aesthetic=4, workers=1))
    assert (folder / "manifest.jsonl").read_bytes() == before


def test_scores_of_others_can_be_judged_too(folder: Path) -> None:
    told = [
        {**row, "scores": {**row["scores"], "aesthetic": 3.0 + n}}
        for n, row in enumerate(table(folder / "manifest.jsonl"))
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    run(folder, FilterConfig(**{**OFF.__dict__, "min_aesthetic": 5.5}))
    assert kept(folder) == ["3", "5"]


def test_a_folder_is_filtered_by_one_process_at_a_time(folder: Path) -> None:
    with only_writer(folder), pytest.raises(UsageError, match="in use"):
        run(folder, OFF)


def test_a_dry_run_tells_and_writes_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_later = FilterConfig(motion="vectors", min_motion=0.3)
    (plan,) = examine(folder, write_later)
    assert isinstance(plan, FilterPlan)
    assert (plan.num_clips, plan.num_missing, plan.limits["min_motion"]) == (6, 5, 0.3)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_why_explains_kept_and_refused_clips(folder: Path) -> None:
    run(folder, STRICT)
    (told,) = why(folder, "0.mp4", None)
    assert isinstance(told, ClipExplained)
    assert told.clip == "clips/0.mp4" and not told.is_kept and "filter.min_motion = 0.5" in told.reason
    (told,) = why(folder, "clips/2.mp4", STRICT)
    assert told.is_kept and not told.reason
    (told,) = why(folder, "clips/4.mp4", STRICT)
    assert told.reason.startswith("unreadable")
    (told,) = why(None, str(folder / "clips" / "0.mp4"), FilterConfig())
    assert "filter.max_still" in told.reason
    with pytest.raises(UsageError, match="has no clip 9"):
        list(why(folder, "9.mp4", None))


def test_the_report_shows_spread_limits_and_clips(folder: Path) -> None:
    events = run(folder, STRICT, report=True)
    page = (folder / "filters.html").read_text()
    assert events[-1].report == folder / "filters.html"
    assert page.count("<svg") >= 6 and "min_motion = 0.5" in page and "data:image/jpeg;base64," in page
    assert "a copy of clips/2.mp4" in page and "http" not in page.replace("http-equiv", "")


# while splitting -------------------------------------------------------------------------------------------------

SPLIT = SplitConfig(workers=1, codec_preset="ultrafast", min_seconds=0.5, max_seconds=1.0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write(folder / "moving.mp4", moving(2, num_frames=25))
    write(folder / "still.mp4", still(25))
    return folder


@pytest.fixture(scope="module")
def splitted(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    output = tmp_path_factory.mktemp("split") / "out"
    return output, list(split(SPLIT, Request([videos], output, filter=FilterConfig(min_motion=0.5, workers=1))))


def test_splitting_filters(splitted: tuple[Path, list[Any]]) -> None:
    output, events = splitted
    (row,) = table(output / "manifest.jsonl")
    assert "moving" in row["path"] and row["scores"]["motion"] > 1 and "source_start_frame" in row["scores"]
    (reject,) = table(output / "rejects.jsonl")
    assert reject["what"] == "clip" and reject["source"].endswith("still.mp4") and (output / reject["path"]).is_file()
    assert events[-1].num_clips == 1 and events[-1].left_out["filter.min_motion"] == (1, 1.0)
    assert next(event for event in events if isinstance(event, FilterDone)).measured == 2


def test_a_split_that_goes_on_keeps_its_filter(videos: Path, splitted: tuple[Path, list[Any]], tmp_path: Path) -> None:
    output = Path(shutil.copytree(splitted[0], tmp_path / "out"))
    before = {name: (output / name).read_bytes() for name in ("manifest.jsonl", "rejects.jsonl")}
    list(split(SPLIT, Request([videos], output)))
    assert {name: (output / name).read_bytes() for name in before} == before
    list(split(SPLIT, Request([videos], output, filter=OFF)))
    assert len(table(output / "manifest.jsonl")) == 2 and not table(output / "rejects.jsonl")


def _listed(output: Path) -> list[str]:
    return [Path(row["source"]).name for row in table(output / "manifest.jsonl")]


def test_no_clip_is_listed_before_it_is_judged(
    videos: Path, splitted: tuple[Path, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, more = Path(shutil.copytree(splitted[0], tmp_path / "out")), tmp_path / "more"
    write(more / "also-still.mp4", still(24))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[apply.__module__], "judge_all", killed)
        with pytest.raises(KeyboardInterrupt):
            list(split(SPLIT, Request([videos, more], output)))
    assert _listed(output) == ["moving.mp4"]
    with pytest.raises(InputError, match="not a single clip"):
        list(split(SPLIT, Request([videos, more], output, filter=FilterConfig(min_motion=100, workers=1))))
    assert not list(output.glob(".unfiltered*"))
    list(split(SPLIT, Request([videos, more], output, filter=OFF)))
    assert _listed(output) == ["also-still.mp4", "moving.mp4", "still.mp4"]


def test_clips_of_a_source_that_changed_leave_a_filtered_folder_at_once(tmp_path: Path) -> None:
    videos, output = tmp_path / "videos", tmp_path / "out"
    for name, pictures in (("a.mp4", moving(2, num_frames=25)), ("b.mp4", moving(3, num_frames=25))):
        write(videos / name, pictures)
    write(videos / "c.mp4", still(25))
    list(split(SPLIT, Request([videos], output, filter=FilterConfig(min_motion=0.5, workers=1))))
    assert _listed(output) == ["a.mp4", "b.mp4"]
    write(videos / "a.mp4", moving(4, num_frames=24))
    events = split(SPLIT, Request([videos], output))
    for event in events:  # stopped as soon as anything is heard of the work
        if not isinstance(event, FilterProgress):
            break
    assert _listed(output) == ["b.mp4"]
    events.close()  # type: ignore[attr-defined]
    assert _listed(output) == ["b.mp4"]
    list(split(SPLIT, Request([videos], output)))
    assert _listed(output) == ["a.mp4", "b.mp4"]


def test_a_shard_is_not_filtered(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shard"):
        list(split(SPLIT, Request([videos], tmp_path / "out", shard=(0, 2), filter=OFF)))


SCRIPT = """
import sys
from pathlib import Path
from opensora_core.config import FilterConfig
from opensora_core.curation.filters import apply
if __name__ == "__main__":
    for event in apply(Path(sys.argv[1]), FilterConfig(min_motion=0.5, max_still=0, workers=1)):
        print(event, flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(made: Path, tmp_path: Path) -> None:
    plain, folder = (Path(shutil.copytree(made, tmp_path / name)) for name in ("plain", "killed"))
    for place in (plain, folder):
        shutil.rmtree(place / ".filter")
    run(plain, FilterConfig(min_motion=0.5, max_still=0, workers=1))
    (tmp_path / "script.py").write_text(SCRIPT)
    log = folder / ".filter" / "scores.jsonl"
    root = Path(__file__).parents[4]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(folder)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    _wait(lambda: log.exists() and log.stat().st_size > 0, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    count = len(log.read_bytes().splitlines())
    events = run(folder, FilterConfig(min_motion=0.5, max_still=0, workers=1))
    assert events[-1].measured <= 6 - count + 1
    for name in ("manifest.jsonl", "rejects.jsonl"):
        assert (folder / name).read_bytes() == (plain / name).read_bytes()


def _wait(is_there: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_there() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def test_what_a_saved_filter_does_not_know_is_passed_by(folder: Path) -> None:
    path = folder / ".filter" / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_tomorrow": 3}))
    assert saved_settings(folder) == OFF
