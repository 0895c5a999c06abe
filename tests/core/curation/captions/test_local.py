"""Captions by models of transformers: small ones of the real classes, with random weights."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora_core.config import Config, with_settings
from opensora_core.curation.captions import build_captioner, local, processor
from opensora_core.curation.captions.folder import OWN_FILE
from opensora_core.curation.captions.local import Local, _Draw
from opensora_core.curation.captions.protocol import Shown
from opensora_core.data import Clip
from opensora_core.errors import CheckpointError, ConfigError, UsageError, WeightsError

from .small import build, build_qwen

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "llava", "llava")


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "next", "next")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text("what?")
    return file


def config_for(model: Path | str, **changes: Any) -> Config:
    settings = {"caption.model": str(model), "caption.max_tokens": 6, "runtime.device": "cpu"}
    return with_settings(Config(), settings | {f"caption.{name}": value for name, value in changes.items()})


def shown(number: int, count: int = 3) -> Shown:
    frames = np.random.default_rng(number).integers(0, 255, (count, 40, 60, 3), np.uint8)
    return Shown(number, Clip(Path(f"/clips/{number}.mp4")), list(frames))


def say(captioner: Any, clips: list[Shown]) -> list[Any]:
    said: list[Any] = captioner.describe(captioner.prepare(clips), lambda: False)
    return said


def loaded(model: Path, **changes: Any) -> Local:
    captioner = build_captioner(config_for(model, **changes))
    assert isinstance(captioner, Local)
    captioner.load("cpu")
    return captioner


@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen"])
@pytest.mark.parametrize("layout", ["separate", "grid"])
def test_a_batch_is_described_as_its_clips_alone(
    kind: str, layout: str, prompt: Path, request: pytest.FixtureRequest
) -> None:
    captioner = loaded(request.getfixturevalue(kind), layout=layout, prompt=str(prompt))
    clips = [shown(number) for number in range(3)]
    together = say(captioner, clips)
    assert [words.text for words in together] == [say(captioner, [clip])[0].text for clip in clips]
    assert all(words.tokens_in > 20 and 0 < words.tokens_out <= 6 for words in together)


def test_layout_auto_suits_the_model(llava: Path, qwen: Path) -> None:
    assert build_captioner(config_for(llava)).facts["layout"] == "grid"
    assert build_captioner(config_for(qwen)).facts["layout"] == "separate"


def test_a_draw_depends_on_the_clip_and_not_on_its_batch(llava: Path, prompt: Path) -> None:
    captioner = loaded(llava, temperature=1.0, prompt=str(prompt))
    clips = [shown(number) for number in range(3)]
    together = [words.text for words in say(captioner, clips)]
    assert together == [say(captioner, [clip])[0].text for clip in clips]
    assert len(set(together)) == 3


def test_draws_have_the_probabilities_of_the_model() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(2000, 1) * 2
    draw = _Draw([str(number) for number in range(2000)], 1, 2.0)
    shares = np.bincount(draw(None, logits).argmax(1).numpy(), minlength=3) / 2000
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


def test_a_batch_beyond_the_memory_is_halved(llava: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = loaded(llava, prompt=str(prompt))
    whole, sizes = captioner._generate, []

    def scarce(prepared: Any, should_stop: Any) -> Any:
        sizes.append(len(prepared.clips))
        if len(prepared.clips) > 1 or prepared.clips[0].index == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(prepared, should_stop)

    monkeypatch.setattr(captioner, "_generate", scarce)
    said = say(captioner, [shown(number) for number in range(4)])
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert [words.failed for words in said] == [False, False, True, False]


def test_it_stops_within_a_word(llava: Path, prompt: Path) -> None:
    captioner = loaded(llava, prompt=str(prompt), max_tokens=2000)
    (words,) = captioner.describe(captioner.prepare([shown(0)]), lambda: True)
    assert words.tokens_out == 0
    asked: list[int] = []

    def soon() -> bool:
        asked.append(1)
        return len(asked) > 2

    captioner.describe(captioner.prepare([shown(0)]), soon)
    assert len(asked) == 3, "no layer is begun after it"


def test_a_folder_says_how_it_wants_to_be_asked(llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "own")
    own = {"frames": 2, "at": [0.1, 0.9], "prompt": "describe", "max_tokens": 4}
    (folder / OWN_FILE).write_text(json.dumps(own))
    captioner = build_captioner(with_settings(config_for(folder), {"caption.max_tokens": 0}))
    assert captioner.at == (0.1, 0.9)
    assert captioner.facts["prompt"] == "describe"
    assert (captioner.facts["layout"], captioner.facts["max_tokens"]) == ("separate", "4")
    assert build_captioner(config_for(folder, at="0.5")).at == (0.5,), "what is asked for goes first"
    for wrong in ('{"at": ["x"]}', '{"frames": Infinity}', '{"frames": 1000000000}', '{"prompt": 3}', "["):
        (folder / OWN_FILE).write_text(wrong)
        with pytest.raises(CheckpointError, match=r"osora\.json cannot be read"):
            build_captioner(config_for(folder))


def test_a_clip_that_the_processor_refuses_costs_only_itself(
    llava: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = loaded(llava, prompt=str(prompt), layout="separate")
    real = captioner._processor

    def picky(images: Any, **rest: Any) -> Any:
        if any(image.width > 10 * image.height for image in images):
            raise ValueError("absolute aspect ratio must be smaller than 10")
        return real(images=images, **rest)

    picky.tokenizer, picky.chat_template = real.tokenizer, real.chat_template  # type: ignore[attr-defined]
    picky.apply_chat_template = real.apply_chat_template  # type: ignore[attr-defined]
    monkeypatch.setattr(captioner, "_processor", picky)
    narrow = Shown(3, Clip(Path("/clips/3.mp4")), [np.zeros((4, 60, 3), np.uint8)] * 3)
    said = say(captioner, [shown(0), narrow, shown(2)])
    assert [words.failed for words in said] == [False, True, False]
    assert "aspect ratio" in said[1].reason


def test_a_prompt_that_does_not_fit_the_model_is_told_as_such(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("<image> <image> what?")
    (words,) = say(loaded(llava, prompt=str(tmp_path / "p.txt")), [shown(0)])
    assert words.failed
    assert words.reason


def test_a_captioner_can_be_sent_to_another_process(llava: Path) -> None:
    assert pickle.loads(pickle.dumps(build_captioner(config_for(llava)))).at == (0.2, 0.5, 0.8)


def test_tiny_is_tiny_wherever_it_is_installed() -> None:
    assert build_captioner(config_for("tiny")).facts["model"] == "tiny"


def test_tiny_says_plainly_where_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BUNDLED_CAPTIONER", tmp_path / "nothing")
    with pytest.raises(WeightsError, match="no bundled captioner"):
        build_captioner(config_for("tiny"))


def test_what_is_no_captioner_is_refused(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no captioner in"):
        build_captioner(config_for(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "auto_map": {}}')
    with pytest.raises(CheckpointError, match=r"type bert, which does not .* never run"):
        build_captioner(config_for(tmp_path))
    with pytest.raises(UsageError) as refused:
        build_captioner(config_for("llava-hf/llava-1.5"))
    assert "hf:llava-hf/llava-1.5" in refused.value.hint
    with pytest.raises(UsageError) as refused:
        build_captioner(config_for("tinyy"))
    assert "'tiny'" in refused.value.hint
    with pytest.raises(ConfigError, match="negative"):
        build_captioner(config_for(llava, temperature=-1.0))
    (tmp_path / "config.json").write_text('{"model_type": "git"}')
    with pytest.raises(UsageError, match="takes one picture, not 3"):
        build_captioner(config_for(tmp_path, layout="separate"))


def test_torn_weights_are_refused(llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "torn")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        loaded(folder)


def test_missing_weights_are_refused(llava: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llava, tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "multi_modal_projector" in name)]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not fit: 1 are missing, such as .*multi_modal_projector"):
        loaded(folder)


def test_what_torchvision_is_needed_for_is_said(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.importlib.util, "find_spec", lambda name: None)
    folder = shutil.copytree(llava, tmp_path / "onevision")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["processor_class"] = "LlavaOnevisionProcessor"
    (folder / "processor_config.json").write_text(json.dumps(settings))
    if not HAS_TORCHVISION:
        with pytest.raises(CheckpointError, match="torchvision, which is not installed"):
            processor.load_processor(folder, "llava_onevision")
    release, _, built = torch.__version__.partition("+")
    assert f"torchvision torch=={release}" in processor.how_to_install(), "another torch is not to take its place"
    assert not built or f"/whl/{built} " in processor.how_to_install()
    with pytest.raises(UsageError, match="bitsandbytes, which is not installed"):
        build_captioner(config_for(llava, quantise="4bit"))


@pytest.mark.slow
def test_weights_are_kept_in_fewer_bits(llava: Path, prompt: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    captioner = loaded(llava, quantise="8bit", prompt=str(prompt))
    kinds = {type(module).__name__ for module in captioner._model.modules()}
    assert "Linear8bitLt" in kinds
    assert say(captioner, [shown(0)])[0].tokens_out > 0
