"""The rules of the house that no other tool holds: see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora_cli import completion
from opensora_core import assets

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("opensora_cli", "opensora_core", "tests") for path in (ROOT / folder).rglob("*.py")
)
CODE = [path for path in SOURCES if path.is_relative_to(ROOT / "opensora_cli") or "opensora_core" in path.parts]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_layers_are_kept() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_has_a_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {room for layer in layers for room in layer.replace("(", "").replace(")", "").split(" | ")}
    rooms = {path.stem for path in (ROOT / "opensora_core").glob("*.py") if path.stem != "__init__"}
    rooms |= {path.parent.name for path in (ROOT / "opensora_core").glob("*/__init__.py")}
    assert {f"opensora_core.{room}" for room in rooms} == named - {"opensora_cli"}


def test_names_say_what_is_inside() -> None:
    vague = {"utils", "util", "misc", "common", "helpers", "helper", "base", "manager"}
    found = [path for path in SOURCES if vague & set(re.split(r"[_.]", path.stem) + list(path.relative_to(ROOT).parts))]
    assert not found


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_weights_cannot_execute_code(path: Path) -> None:
    for name, call in _calls(path):
        arguments = {word.arg: ast.unparse(word.value) for word in call.keywords}
        place = f"{path}:{call.lineno}"
        assert arguments.get("trust_remote_code", "False") == "False", place
        assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"), place
        if name == "torch.load":
            assert arguments.get("weights_only") == "True", place


def test_completions_are_fresh(tmp_path: Path) -> None:
    for path in completion.write(tmp_path):
        kept = ROOT / "completions" / path.name
        assert kept.exists() and kept.read_text() == path.read_text(), f"{kept} is stale: run 'make completions'"


def _documented() -> Iterator[tuple[str, list[str]]]:
    """Every `osora ...` of the code blocks, as (place, words), with continued lines joined."""
    for document in DOCUMENTS:
        for block in re.findall(r"^```\w*\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if "osora " in line:
                    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
                    lexer.whitespace_split = True
                    for is_break, words in itertools.groupby(lexer, lambda word: word in ("&&", "||", ";", "|")):
                        command = [] if is_break else list(words)
                        if command[:1] == ["osora"]:
                            yield f"{document.name}: {line.strip()}", command[1:]


def test_documents_show_commands_that_exist() -> None:
    known = {verb.name: {word for flag in verb.flags for word in flag.words} for verb in completion.verbs()}
    shown = list(_documented())
    for place, words in shown:
        verb = next((word for word in words if not word.startswith("-")), "")
        assert verb in known, f"{place}: there is no such command"
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert flags <= known[verb] | known[""], f"{place}: no such flag {flags - known[verb] - known['']}"
    assert any(words[:1] == ["sample"] for _, words in shown), "the README shows how to sample"


@pytest.mark.parametrize("suite", ["world", "split"])
def test_documented_numbers_are_measured_ones(suite: str) -> None:
    report = json.loads((ROOT / "docs" / "benchmarks" / f"{suite}.json").read_text())
    measured = {(item["case"], item["metric"]): item["value"] for item in report["measurements"]}
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| ([\d.]+)", (ROOT / "docs" / "benchmarks.md").read_text(), re.MULTILINE
    )
    cases = {case for case, _ in measured}
    shown = {(case, metric.strip()): value for case, metric, value in rows if case in cases}
    assert shown.keys() == measured.keys()
    for key, value in shown.items():
        digits = len(value.partition(".")[2])
        assert value == f"{measured[key]:.{digits}f}", key


def test_every_published_weight_is_documented() -> None:
    text = (ROOT / "docs" / "weights.md").read_text()
    missing = [name for name in assets.ASSETS if f"| `{name}` |" not in text]
    assert not missing
