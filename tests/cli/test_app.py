"""What holds for every verb: help, errors, exit codes, and that nothing slow is imported on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import typer

from opensora_cli import app as room
from opensora_cli import completion
from opensora_cli.app import app, run
from opensora_core import __version__
from opensora_core.errors import OsoraError, ResourceError, UsageError, WeightsError

VERBS = ["", *(str(command.name) for command in app.registered_commands)]

# what a fresh interpreter has imported, and the CPU time it has spent, after one command
PROBE = """
import json, os, sys
from opensora_cli.app import app, run
code = run(sys.argv[1:])
heavy = sorted({"torch", "transformers", "diffusers", "av", "numpy"} & set(sys.modules))
print(json.dumps({"code": code, "heavy": heavy, "seconds": sum(os.times()[:2])}), file=sys.stderr)
"""


@pytest.mark.parametrize("verb", VERBS)
def test_help_answers_at_once(verb: str) -> None:
    words = [verb, "--help"] if verb else ["--help"]
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=True)
    report = json.loads(done.stderr)
    assert "--help" in done.stdout
    assert report["code"] == 0
    assert report["heavy"] == []
    assert report["seconds"] < 1.0, "the target is 0.5 s of CPU; twice that is left to slow machines"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"osora {__version__}\n"


def test_help_needs_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    shown = capsys.readouterr()
    assert "sample" in shown.out
    assert "error" not in shown.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["smaple"], "'sample'"),
        (["sample", "--promt", "x"], "--prompt"),
        (["sample", "--dtype", "fp8"], "bf16"),
        (["sample", "--steps", "many"], "--steps"),
    ],
)
def test_a_slip_of_the_finger_is_answered_with_the_nearest(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    shown = capsys.readouterr()
    assert expected in shown.err
    assert "hint: 'osora" in shown.err
    assert shown.out == ""
    assert "Traceback" not in shown.err


def _fails_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the whole command line be a verb that ends with an error."""
    failing = typer.Typer()

    @failing.command()
    def verb(json: bool = False, debug: bool = False) -> None:
        raise error

    monkeypatch.setattr(room, "app", failing)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OsoraError("it broke", "mend it"), 1),
        (UsageError("it broke", "mend it"), 2),
        (WeightsError("it broke", "mend it"), 1),
        (ResourceError("it broke", "mend it"), 1),
    ],
)
def test_an_error_is_told_with_its_hint(
    error: OsoraError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fails_with(error, monkeypatch)
    assert run([]) == code
    assert capsys.readouterr().err == "error: it broke\n hint: mend it\n"


def test_an_error_in_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _fails_with(UsageError("it broke", "mend it"), monkeypatch)
    assert run(["--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"event": "error", "message": "it broke", "hint": "mend it", "exit_code": 2}
    assert shown.err == ""


def test_a_word_that_is_no_flag_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--json", "--promt", "x"]) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_shows_its_traceback_only_on_demand(
    debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fails_with(ZeroDivisionError("a bug"), monkeypatch)
    assert run(["--debug"] if debug else []) == 1
    shown = capsys.readouterr().err
    assert "internal error, ZeroDivisionError: a bug" in shown
    assert ("Traceback" in shown) == debug


def test_control_characters_of_a_message_reach_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fails_with(UsageError("prompt '\x1b[2Jgone\udcff'"), monkeypatch)
    assert run([]) == 2
    assert capsys.readouterr().err == "error: prompt '\\x1b[2Jgone\\xdcff'\n"


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _fails_with(KeyboardInterrupt(), monkeypatch)
    assert run([]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_termination_cleans_up_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []
    terminated = typer.Typer()

    @terminated.command()
    def verb() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(room, "app", terminated)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run([]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cleaned
    assert capsys.readouterr().err == "error: terminated\n"


def test_a_reader_that_leaves_early() -> None:
    command = f"{sys.executable} -m opensora_cli sample --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_every_verb_offers_the_flags_that_all_share() -> None:
    for verb in completion.verbs():
        if verb.name:
            words = {word for flag in verb.flags for word in flag.words}
            assert {"--json", "--debug", "--set", "--config"} <= words, verb.name
            assert verb.name in ("split", "download") or "--device" in words, verb.name  # what encodes has --codec
            assert verb.about, verb.name


def test_every_flag_says_what_it_does() -> None:
    for verb in completion.verbs():
        for flag in verb.flags:
            assert flag.about, flag.words
