"""`osora split`: from words to a request, and its events on a screen. The core is replaced by a recorder."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import opensora_core
from opensora_cli.app import run
from opensora_cli.console import Console, console
from opensora_cli.split import DETECTORS, RENDERERS, parse_shard
from opensora_core.config import Config, SplitConfig, with_settings
from opensora_core.curation import DETECTORS as CORE_DETECTORS
from opensora_core.curation import PlannedSource, Request, SourceSplit, SplitDone, SplitPlan, SplitProgress, WorkerState

DONE = SplitDone(
    output=Path("out"),
    sources={"ok": 2, "rejected": 1},
    skipped=1,
    num_clips=7,
    clip_seconds=33.0,
    source_seconds=40.0,
    left_out={"too short": (3, 2.5)},
    seconds=12.0,
    speed=3.3,
    manifest=Path("out/manifest.jsonl"),
    preview=Path("out/preview.html"),
)
PROGRESS = SplitProgress(
    10.0, 40.0, 2.0, 15.0, 1, 3, (WorkerState("/videos/walk.mp4", "cutting", 0.5), WorkerState(), WorkerState())
)


@dataclass
class Recorder:
    """Stands for `opensora_core.curation`."""

    config: SplitConfig = field(default_factory=SplitConfig)
    request: Request | None = None
    is_dry: bool = False
    Request = Request

    def split(self, config: SplitConfig, request: Request) -> Iterator[Any]:
        self.config, self.request = config, request
        yield PROGRESS
        yield SourceSplit("/videos/a\nb.mp4", "rejected", "an empty file", 0, 0, 0, 0.0)
        yield SourceSplit("/videos/walk.mp4", "ok", "", 100, 2, 3, 4.0)
        yield DONE

    def examine(self, config: SplitConfig, request: Request) -> Iterator[Any]:
        self.config, self.request, self.is_dry = config, request, True
        known = PlannedSource("/videos/walk.mp4", 10.0, 640, 360, 25.0, "h264", 2)
        broken = PlannedSource("/videos/torn.mp4", None, 0, 0, 0.0, "", None, "not a video")
        yield SplitPlan(Path("out"), (broken, known), 4, "clips of 1 to 5 s", ("1 hidden folders passed by",))


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "opensora_core.curation", recorder)  # type: ignore[arg-type]
    monkeypatch.setattr(opensora_core, "curation", recorder, raising=False)
    return recorder


def test_names_kept_here_are_those_of_the_core() -> None:
    assert set(DETECTORS) == set(CORE_DETECTORS)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--detector", "hash"], {"split.detector": "hash"}),
        (["--threshold", "27"], {"split.detector_options": "threshold=27.0"}),
        (["--fast"], {"split.fast": True}),
        (["--min-seconds", "2"], {"split.min_seconds": 2.0}),
        (["--max-seconds", "0"], {"split.max_seconds": 0.0}),
        (["--trim", "2"], {"split.trim": 2}),
        (["--fps", "8"], {"split.fps": 8.0}),
        (["--short-side", "256"], {"split.short_side": 256}),
        (["--crop-black-bars"], {"split.crop_black_bars": True}),
        (["--no-audio"], {"split.audio": False}),
        (["--cut", "smart"], {"split.cut": "smart"}),
        (["--codec", "libx265"], {"split.codec": "libx265"}),
        (["--codec-preset", "slow"], {"split.codec_preset": "slow"}),
        (["--crf", "23"], {"split.crf": 23}),
        (["--fast-decode"], {"split.fast_decode": True}),
        (["--workers", "3"], {"split.workers": 3}),
        (["--set", "split.stall_seconds=5"], {"split.stall_seconds": 5.0}),
        (["--threshold", "3", "--set", "split.detector_options=a=1"], {"split.detector_options": "a=1 threshold=3.0"}),
    ],
)
def test_flags_become_settings(core: Recorder, words: list[str], changes: dict[str, Any]) -> None:
    assert run(["split", "videos", *words]) == 0
    assert core.config == with_settings(Config(), changes).split


def test_words_become_a_request(core: Recorder) -> None:
    flags = ["-o", "out", "--boundaries", "b.csv", "--stats", "s.csv", "--preview", "--redo", "--shard", "1/4"]
    assert run(["split", "videos", "*.mkv", *flags]) == 0
    assert core.request == Request(
        ["videos", "*.mkv"], Path("out"), [], (1, 4), Path("b.csv"), Path("s.csv"), preview=True, redo=True
    )


@pytest.mark.parametrize("content", [b"a.mp4\nb c.mp4\n", b"a.mp4\0b c.mp4\0", b"a.mp4\r\nb c.mp4"])
def test_a_dash_reads_names_from_stdin(core: Recorder, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert run(["split", "-"]) == 0
    assert core.request is not None and core.request.inputs == []
    assert core.request.listed == ["a.mp4", "b c.mp4"]


def test_names_on_stdin_may_be_any_bytes(core: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"latin-\xe9.mp4\0new\nline.mp4\0")))
    assert run(["split", "-"]) == 0
    assert core.request is not None and core.request.listed == ["latin-\udce9.mp4", "new\nline.mp4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["videos", "--shard", "4"], "is not I/N"),
        (["videos", "--shard", "a/b"], "is not I/N"),
        (["videos", "--cut", "copy", "--short-side", "256"], "--short-side says nothing to --cut copy"),
        (["videos", "--cut", "none", "--crop-black-bars"], "--crop-black-bars says nothing to --cut none"),
        (["videos", "--cut", "copy", "--crf", "20"], "--crf says nothing to --cut copy"),
        (["videos", "--cut", "none", "--audio"], "--audio says nothing to --cut none"),
        (["videos", "--cut", "all"], "all"),
        ([], "nothing to split"),
    ],
)
def test_what_makes_no_sense_ends_with_2(
    core: Recorder, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(["split", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_list_is_refused(core: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\n")))
    assert run(["split", "-"]) == 2


def test_results_go_to_stdout_and_what_went_wrong_to_stderr(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["split", "videos"]) == 0
    out, err = capsys.readouterr()
    assert "rejected: /videos/a\\x0ab.mp4: an empty file" in err and "walk.mp4" not in err
    assert "33.0 s of 40.0 s" in out and "left out: too short" in out and "out/preview.html" in out


def test_a_dry_run_shows_sources_and_what_would_be_made(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["split", "videos", "--dry-run"]) == 0 and core.is_dry
    out, err = capsys.readouterr()
    assert "2 or more of h264" in out and "not a video" in out and "1 sources of 10.0 s; 4 more are finished" in out
    assert "hidden folders" in err


def test_json_is_one_object_per_event(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["split", "videos", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["event"] for row in rows] == ["split_progress", "source_split", "source_split", "split_done"]
    assert rows[0]["workers"][0] == {"source": "/videos/walk.mp4", "phase": "cutting", "fraction": 0.5}


def test_a_terminal_shows_a_bar_for_the_job_and_one_per_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    screen = Console()
    RENDERERS["SplitProgress"](screen, PROGRESS)
    assert screen.progress is not None
    tasks = [(task.description, task.percentage, task.fields["count"]) for task in screen.progress.tasks]
    screen.stop_progress()
    assert tasks[0] == ("1/3 sources, 2.0x realtime", 25.0, "10.0 s/40.0 s  15.0 s left")
    assert tasks[1:] == [("walk.mp4", 50.0, "cutting"), ("", 0.0, "waiting"), ("", 0.0, "waiting")]
    console.configure()


def test_shards_are_counted_from_0() -> None:
    assert parse_shard("0/4") == (0, 4)
