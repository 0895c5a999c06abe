"""Settings: one dotted path each, checked types, and a round trip through files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opensora_core.config import (
    Config,
    flatten,
    iterate,
    parse_settings,
    read_settings,
    to_dict,
    to_toml,
    with_settings,
)
from opensora_core.errors import ConfigError, InputError
from opensora_core.presets import PRESETS, lineage, preset, resolve


@pytest.mark.parametrize(
    ("path", "word", "value"),
    [
        ("train.lr", "1e-4", 1e-4),
        ("train.max_steps", "20", 20),
        ("train.max_steps", 20.0, 20),
        ("model.patch_size", "2x2x2", (2, 2, 2)),
        ("model.patch_size", [1, 4, 4], (1, 4, 4)),
        ("runtime.compile", "yes", True),
        ("runtime.compile", "off", False),
        ("runtime.dtype", "bf16", "bf16"),
        ("model.weights", "some/path", "some/path"),
    ],
)
def test_words_become_the_setting_s_type(path: str, word: object, value: object) -> None:
    assert dict(iterate(with_settings(Config(), {path: word})))[path] == value


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("train.max_steps", "2.5"),
        ("train.max_steps", True),
        ("train.lr", "nan"),
        ("train.lr", "fast"),
        ("runtime.compile", "maybe"),
        ("runtime.dtype", "fp8"),
        ("model.patch_size", "2x2"),
        ("model.weights", 3),
    ],
)
def test_a_wrong_value_is_named_with_its_path(path: str, word: object) -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(Config(), {path: word})
    assert path in caught.value.message and repr(word) in caught.value.message
    assert caught.value.exit_code == 2


def test_an_unknown_path_offers_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(Config(), {"train.stepz": 1})
    assert "train.max_steps" in caught.value.hint


def test_settings_need_an_equals_sign() -> None:
    assert parse_settings(["train.lr=1e-4", "model.weights=a=b"]) == {"train.lr": "1e-4", "model.weights": "a=b"}
    with pytest.raises(ConfigError):
        parse_settings(["train.lr"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_both_file_formats(name: str, tmp_path: Path) -> None:
    config = preset(name)
    (tmp_path / "a.toml").write_text(to_toml(config, dict.fromkeys(dict(iterate(config)), "somewhere # odd")))
    (tmp_path / "a.json").write_text(json.dumps(to_dict(config)))
    for file in tmp_path.iterdir():
        assert with_settings(Config(), read_settings(file)) == config
    assert flatten(to_dict(config)).keys() == dict(iterate(config)).keys()


def test_a_preset_refines_its_ancestors() -> None:
    assert lineage("64x512x512") == ["16x256x256", "16x512x512", "64x512x512"]
    config = preset("64x512x512")
    assert (config.video.num_frames, config.video.height, config.model.space_scale) == (64, 512, 1.0)
    assert config.video.fps == 12  # as published: 24 frames per second, every second one
    assert preset("16x256x256").video.fps == 8


def test_later_sources_win_and_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[train]\nlr = 1e-3\nsteps = 7\n")
    config, origins = resolve(
        "tiny", file, {"train.max_steps": "8"}, {"sampling.seed": 3, "sampling.steps": None}, {"train.batch_size": 5}
    )
    assert (config.train.lr, config.train.max_steps, config.sampling.seed) == (1e-3, 8, 3)
    assert origins["train.lr"] == str(file)
    assert origins["train.max_steps"] == "--set"
    assert origins["sampling.seed"] == "flag"
    assert origins["sampling.steps"] == "preset tiny"
    assert origins["vae.tiling"] == "default"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"not = [toml", b"[1]"])
def test_a_broken_settings_file_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / ("run.json" if content == b"[1]" else "run.toml")
    file.write_bytes(content)
    with pytest.raises((ConfigError, InputError)) as caught:
        read_settings(file)
    assert str(file) in caught.value.message
