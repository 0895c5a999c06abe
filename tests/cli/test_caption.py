"""`osora caption`: from words to settings, and its results on a screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opensora_cli.app import run


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    (tmp_path / "a.json").write_text('{"caption": "The video shows a cat."}')
    (tmp_path / "m.jsonl").write_text('{"path": "a.mp4"}\n{"path": "b.mp4"}\n')
    return tmp_path / "m.jsonl"


def test_what_came_of_it_is_shown(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["caption", str(clips), "--model", "sidecars", "--clean"]) == 0
    shown = capsys.readouterr()
    assert "described" in shown.out
    assert "captions.jsonl" in shown.out
    assert "rejected: b.mp4: there is neither b.txt nor b.json" in shown.err
    assert json.loads((clips.parent / "captions.jsonl").read_text())["caption"] == "A cat."


def test_a_dry_run_says_what_would_be_done(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "openai:x", "--base-url", "http://localhost:1/v1", "--dry-run"]
    assert run(["caption", str(clips), *words]) == 0
    shown = capsys.readouterr().out
    assert "x at http://localhost:1/v1" in shown
    assert "prompt: These are 3 frames" in shown
    assert not (clips.parent / "captions.jsonl").exists()


def test_every_event_is_an_object(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["caption", str(clips), "--model", "sidecars", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events][-1] == "caption_done"
    assert events[-1]["captioned"] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "labels", "--frames", "2"], "--frames says nothing to --model labels"),
        (["--model", "openai:x", "--gpus", "2"], "--gpus says nothing"),
        (["--model", "tiny", "--base-url", "http://x"], "--base-url says nothing"),
        (["--model", "sidecars", "--language", "english"], "'english' is not one"),
        (["--model", "labels", "--output", "x.csv"], "written as JSON lines"),
        (["--set", "caption.frame=2"], "unknown setting 'caption.frame'"),
    ],
)
def test_what_says_nothing_is_refused(
    clips: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["caption", str(clips), *words]) == 2
    assert told in capsys.readouterr().err
