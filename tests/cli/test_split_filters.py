"""`osora split` and its filters: words become limits, and events a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opensora_cli.app import run
from opensora_cli.split import _filter_of
from opensora_core.config import Config, FilterConfig
from opensora_core.curation.filters import limits_of, saved_settings
from tests.core.curation.filters.drawn import moving, still, write


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    names = [write(folder / "a.mp4", moving(2)).name, write(folder / "b.mp4", still()).name]
    (folder / "manifest.jsonl").write_text(
        "".join(json.dumps({"path": name, "num_frames": 16}) + "\n" for name in names)
    )
    assert run(["split", str(folder), "--only-filter", "--set", "filter.workers=1"]) == 0
    return folder


def kept(folder: Path) -> list[str]:
    return [json.loads(text)["path"] for text in (folder / "manifest.jsonl").read_text().splitlines()]


def test_a_setting_of_a_filter_asks_for_it() -> None:
    given = {"filter.min_motion": "--set"}
    assert _filter_of(None, Config(), {"filter.min_motion": "default"}, report=False) is None
    assert _filter_of(None, Config(), given, report=False) == FilterConfig()
    assert _filter_of(True, Config(), {}, report=False) == _filter_of(None, Config(), {}, report=True) == FilterConfig()
    off = _filter_of(False, Config(), given, report=False)
    assert off is not None and not limits_of(off)


def test_clips_leave_and_come_back(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kept(clips) == ["a.mp4"]
    assert run(["split", str(clips), "--only-filter", "--no-filter"]) == 0
    assert kept(clips) == ["a.mp4", "b.mp4"]
    assert run(["split", str(clips), "--only-filter", "--set", "filter.min_motion=0.5", "--report"]) == 0
    assert kept(clips) == ["a.mp4"] and saved_settings(clips) == FilterConfig(min_motion=0.5)
    shown = capsys.readouterr().out
    assert "filter.min_motion" in shown and "0 of them measured" in " ".join(shown.split()) and "filters.html" in shown


def test_why_prints_every_limit(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["split", str(clips), "--why", "b.mp4"]) == 0
    shown = capsys.readouterr().out
    assert "filter.max_still = 0.98" in shown and "REFUSED" in shown and "refused: " in shown
    assert run(["split", "--why", str(clips / "a.mp4"), "--json"]) == 0
    event = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert event["event"] == "clip_explained" and event["is_kept"]
    assert {"name", "value", "setting", "limit", "is_kept"} <= event["verdicts"][0].keys()


def test_a_dry_run_says_what_it_would_measure(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["split", str(clips / "manifest.jsonl"), "--only-filter", "--dry-run", "--json"]) == 0
    event = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (event["event"], event["num_clips"], event["num_missing"]) == ("filter_plan", 2, 0)
    before = saved_settings(clips)
    assert before is not None and run(["split", str(clips), "--only-filter", "--workers", "2"]) == 0
    after = saved_settings(clips)
    assert after is not None and (after.workers, after.min_motion) == (2, before.min_motion)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only-filter"], "a single manifest is filtered, and there are 0"),
        (["{clips}", "{clips}", "--only-filter"], "there are 2"),
        (["nowhere", "--only-filter"], "there is no manifest nowhere"),
        (["{clips}", "--why", "c.mp4"], "has no clip c.mp4"),
        (["{clips}", "--only-filter", "--set", "filter.min_motion=-1"], "below 0"),
        (["{clips}", "--only-filter", "--preview"], "--preview says nothing to --only-filter"),
        (["{clips}", "--only-filter", "--crf", "20"], "--crf says nothing to --only-filter"),
        (["{clips}", "--why", "a.mp4", "--report"], "--report says nothing to --why"),
        (["{clips}", "--filter", "--shard", "0/2"], "a shard does not know the clips of the others"),
    ],
)
def test_what_makes_no_sense_is_refused(
    clips: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["split", *(word.format(clips=clips) for word in words)]) == 2
    assert told in capsys.readouterr().err
