"""`osora sample`: from words to settings, and from events to a screen. The core is replaced by a recorder."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import opensora_core
from opensora_cli.app import run
from opensora_cli.sample import read_prompts
from opensora_core import assets
from opensora_core.config import Config, read_settings, to_dict, with_settings
from opensora_core.errors import InputError
from opensora_core.presets import preset


@dataclass(frozen=True)
class Notice:
    message: str


@dataclass(frozen=True)
class Progress:
    prompt: str
    step: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True)
class Saved:
    path: Path
    prompt: str
    seed: int
    seconds: float


@dataclass(frozen=True)
class Sheet:
    path: Path


@dataclass(frozen=True)
class Done:
    num_files: int
    seconds: float


@dataclass(frozen=True)
class Request:
    prompt: str
    path: Path
    seed: int


@dataclass(frozen=True)
class Part:
    kind: str
    name: str
    path: Path | None
    size_bytes: int | None


@dataclass(frozen=True)
class Plan:
    requests: tuple[Request, ...]
    weights: tuple[Part, ...]
    notices: tuple[str, ...] = ("the prompt is odd",)


@dataclass
class Recorder:
    """Stands for `opensora_core.sampling`: keeps what it was asked for, and tells a story."""

    config: Config = field(default_factory=Config)
    prompts: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    closed: bool = False
    interrupted: bool = False

    def plan(
        self,
        config: Config,
        prompts: list[str],
        output: Path | None,
        format: str | None,
        overwrite: bool,
        *,
        processes: int,
    ) -> Plan:
        assert processes == 0
        self.config, self.prompts = config, prompts
        self.options = {"output": output, "format": format, "overwrite": overwrite}
        requests = [Request(text, Path(f"samples/{index}.mp4"), 42) for index, text in enumerate(prompts)]
        weights = Part("text", "t5-v1_1-xxl", None, 19_000_000_000), Part("model", "bundled", Path("/b"), 5_000_000)
        return Plan(tuple(requests), weights)

    def sample(self, config: Config, plan: Plan, *, sheet: bool = False) -> Iterator[Any]:
        assert config == self.config
        self.options["sheet"] = sheet
        try:
            yield Notice("the prompt is cut at 48 tokens")
            for step in (1, 2):
                yield Progress(self.prompts[0], step, 2, 0.5)
                if self.interrupted:
                    raise KeyboardInterrupt
            path = Path("samples/a-red-ball-42.mp4")
            yield Saved(path, self.prompts[0], 42, 1.5)
            yield Sheet(Path("samples/sheet.png"))
            yield Done(1, 75.0)
        finally:
            self.closed = True


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "opensora_core.sampling", recorder)  # type: ignore[arg-type]
    monkeypatch.setattr(opensora_core, "sampling", recorder, raising=False)
    return recorder


def _settings_of(words: list[str], core: Recorder) -> Config:
    assert run(["sample", "--prompt", "a red ball", *words]) == 0
    return core.config


# words -> settings ---------------------------------------------------------------------------------------------------


def test_the_model_that_ships_is_the_default(core: Recorder) -> None:
    assert _settings_of([], core) == preset("tiny")
    assert core.prompts == ["a red ball"]
    assert core.options == {"output": None, "format": None, "overwrite": False, "sheet": False}


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--steps", "7"], {"sampling.steps": 7}),
        (["--guidance", "1.5"], {"sampling.guidance": 1.5}),
        (["--sampler", "heun"], {"sampling.sampler": "heun"}),
        (["--seed", "3"], {"sampling.seed": 3}),
        (["--num-samples", "5"], {"sampling.num_samples": 5}),
        (["--batch-size", "2"], {"sampling.batch_size": 2}),
        (["--frames", "8"], {"video.num_frames": 8}),
        (["--size", "32x96"], {"video.height": 32, "video.width": 96}),
        (["--fps", "10"], {"video.source_fps": 30.0}),
        (["--fps", "10", "--set", "video.frame_interval=2"], {"video.source_fps": 20.0, "video.frame_interval": 2}),
        (["--lora", "runs/a"], {"model.lora": "runs/a"}),
        (["--lora", "a", "--set", "model.lora_scale=0.8"], {"model.lora": "a", "model.lora_scale": 0.8}),
        (["--device", "cpu"], {"runtime.device": "cpu"}),
        (["--dtype", "bf16"], {"runtime.dtype": "bf16"}),
        (["--compile"], {"runtime.compile": True}),
        (["--offload"], {"runtime.offload": True}),
        (["--offline"], {"runtime.offline": True}),
        (["--set", "vae.tiling=true", "--set", "vae.slicing=on"], {"vae.tiling": True, "vae.slicing": True}),
        (["--set", "sampling.steps=9", "--steps", "7"], {"sampling.steps": 7}),
    ],
)
def test_each_flag_changes_its_setting(words: list[str], changes: dict[str, Any], core: Recorder) -> None:
    assert _settings_of(words, core) == with_settings(preset("tiny"), changes)


def test_flags_that_are_no_settings(core: Recorder, tmp_path: Path) -> None:
    _settings_of(["--output", str(tmp_path), "--format", "gif", "--overwrite", "--sheet"], core)
    assert core.options == {"output": tmp_path, "format": "gif", "overwrite": True, "sheet": True}


@pytest.mark.parametrize("name", sorted(name for name, asset in assets.ASSETS.items() if asset.kind == "model"))
def test_a_published_model_brings_its_preset(name: str, core: Recorder) -> None:
    expected = with_settings(preset(assets.ASSETS[name].preset), {"model.weights": name})
    assert _settings_of(["--model", name], core) == expected


def test_a_model_of_ours_brings_its_settings(core: Recorder, tmp_path: Path) -> None:
    trained = with_settings(preset("tiny"), {"model.depth": 3, "sampling.steps": 11})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(trained)))
    expected = with_settings(trained, {"model.weights": str(tmp_path)})
    assert _settings_of(["--model", str(tmp_path)], core) == expected
    (tmp_path / "model.safetensors").touch()
    assert _settings_of(["--model", str(tmp_path / "model.safetensors")], core).model.depth == 3


def test_a_model_that_says_nothing_needs_a_preset(
    core: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel"}')
    assert run(["sample", "--prompt", "x", "--model", str(tmp_path)]) == 2
    assert "--preset" in capsys.readouterr().err
    assert _settings_of(["--model", str(tmp_path), "--preset", "pixart-1x512x512"], core).model.family == "pixart"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--preset", "tinny"], "'tiny'"),
        (["--model", "opensora-v1-hq-16x512"], "'opensora-v1-hq-16x512x512'"),
        (["--model", "sd-vae-ft-ema"], "autoencoder"),
        (["--model", "hf:somebody/something"], "--preset"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--set", "sampling.step=3"], "'sampling.steps'"),
        (["--set", "sampling.steps"], "no '='"),
        (["--set", "sampling.steps=many"], "not an integer"),
        (["--size", "256"], "HEIGHTxWIDTH"),
        (["--size", "0x256"], "HEIGHTxWIDTH"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_words_exit_2(words: list[str], expected: str, core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--prompt", "x", *words]) == 2
    assert expected in capsys.readouterr().err


def test_there_must_be_a_prompt(core: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample"]) == 2
    assert "--prompt 'a red ball" in capsys.readouterr().err
    empty = tmp_path / "prompts.txt"
    empty.write_text("# nothing yet\n\n")
    assert run(["sample", "--prompt-file", str(empty)]) == 2
    assert "prompts.txt" in capsys.readouterr().err


# --print-config ------------------------------------------------------------------------------------------------------


def test_printed_settings_can_be_read_back(core: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "64x512x512", "--steps", "7", "--set", "vae.tiling=true"]
    assert run(["sample", *words, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "steps = 7  # flag" in text
    assert "tiling = true  # --set" in text
    assert "num_frames = 64  # preset 64x512x512" in text
    file = tmp_path / "run.toml"
    file.write_text(text)
    expected = with_settings(preset("64x512x512"), {"sampling.steps": 7, "vae.tiling": True})
    assert with_settings(Config(), read_settings(file)) == expected
    assert _settings_of(["--config", str(file)], core) == expected


def test_printed_settings_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--print-config", "--json", "--seed", "9"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["sampling"]["seed"] == 9
    assert shown["origins"]["sampling.seed"] == "flag"


# prompt files --------------------------------------------------------------------------------------------------------


def test_prompt_files(tmp_path: Path, core: Recorder) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red ball\r\n\n  # a comment\n  雪の上の青い箱  \nNA\na # b\u2028c".encode())
    prompts = ["a red ball", "雪の上の青い箱", "NA", "a # b\u2028c"]
    assert read_prompts(file) == prompts
    assert run(["sample", "--prompt", "first", "--prompt-file", str(file)]) == 0
    assert core.prompts == ["first", *prompts]


def test_prompts_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert read_prompts(Path("-")) == ["one", "two"]


@pytest.mark.parametrize("content", ["a red ball".encode("utf-16"), b"caf\xe9"])
def test_a_prompt_file_in_another_encoding_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not UTF-8") as refused:
        read_prompts(file)
    assert "iconv" in refused.value.hint


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="directory"):
        read_prompts(tmp_path)


# events -> screen ----------------------------------------------------------------------------------------------------


def test_a_reader_sees_notices_and_a_table(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--prompt", "a red ball"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "note: the prompt is cut at 48 tokens\n"
    assert "1 file in 1:15" in shown.out
    assert "samples/a-red-ball-42.mp4" in shown.out
    assert "1.5 s" in shown.out
    assert "contact sheet: samples/sheet.png" in shown.out
    assert "a red ball" in shown.out


def test_a_program_reads_one_event_a_line(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--prompt", "a red ball \x1b[2J\u2028", "--json"]) == 0
    shown = capsys.readouterr()
    events = [json.loads(line) for line in shown.out.splitlines()]
    assert [event["event"] for event in events] == ["notice", "progress", "progress", "saved", "sheet", "done"]
    assert events[3] == {
        "event": "saved",
        "path": "samples/a-red-ball-42.mp4",
        "prompt": "a red ball \x1b[2J\u2028",
        "seed": 42,
        "seconds": 1.5,
    }
    assert shown.err == ""


def test_a_dry_run_shows_weights_and_files(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--prompt", "a red ball", "--prompt", "a cube", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "note: the prompt is odd" in shown.err
    for expected in ("t5-v1_1-xxl", "19.0 GB", "to be downloaded", "bundled", "samples/0.mp4", "samples/1.mp4"):
        assert expected in shown.out
    assert not core.closed, "nothing is drawn"


def test_a_dry_run_in_json(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--prompt", "a red ball", "--dry-run", "--json"]) == 0
    event = json.loads(capsys.readouterr().out)
    assert event["event"] == "plan"
    assert event["requests"] == [{"prompt": "a red ball", "path": "samples/0.mp4", "seed": 42}]
    assert [part["path"] for part in event["weights"]] == [None, "/b"]


def test_an_interrupted_run_cleans_up_before_it_says_so(core: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    core.interrupted = True
    assert run(["sample", "--prompt", "a red ball"]) == 130
    assert core.closed
    assert capsys.readouterr().err.endswith("error: interrupted\n")


def test_a_terminal_gets_a_progress_line(
    core: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert run(["sample", "--prompt", "a red ball"]) == 0
    shown = capsys.readouterr()
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.err)
    assert "a red ball" in drawn
    assert "2/2" in drawn
    assert "0.5 s left" in drawn
    assert "left" not in shown.out
