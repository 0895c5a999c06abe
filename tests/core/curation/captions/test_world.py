"""The captioner that ships: it reads clips of the world, and can be trained again."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora_core import world
from opensora_core.assets.search import BUNDLED_FOLDER
from opensora_core.curation.captions import tiny
from opensora_core.curation.captions import world as captioner
from opensora_core.curation.captions.lessons import FRAMES
from opensora_core.errors import InputError
from opensora_core.media import write_video

SHIPPED = BUNDLED_FOLDER / "captioner"
MAX_BYTES = 4_000_000

shipped = pytest.mark.skipif(not SHIPPED.is_dir(), reason="this installation has no captioner: none is good enough yet")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return tiny.load(SHIPPED)


@shipped
def test_it_is_small_and_everyone_may_read_it() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert all(path.stat().st_mode & stat.S_IROTH for path in files) or os.name == "nt"


@shipped
def test_its_settings_are_those_it_was_trained_with() -> None:
    settings = json.loads((SHIPPED / tiny.SETTINGS_FILE).read_text())
    assert settings["frames"] == len(settings["at"]) == len(FRAMES)
    last = world.NUM_FRAMES - 1
    assert [round(at * last) for at in settings["at"]] == list(FRAMES)
    assert settings["prompt"] == tiny.PROMPT and settings["max_tokens"] == tiny.MAX_TOKENS


@shipped
def test_it_says_what_fresh_clips_show(loaded: tuple[Any, Any]) -> None:
    rng = np.random.default_rng(24)
    scenes = [world.draw_scene(rng, "held-out" if index % 2 else "seen") for index in range(24)]
    told = tiny.describe(*loaded, [world.render(scene, rng) for scene in scenes])
    for result in captioner.score("fresh", scenes, told):
        assert result.share >= (0.75 if result.attribute == "everything" else 0.9), (result, told)


@shipped
def test_a_caption_does_not_depend_on_its_batch(loaded: tuple[Any, Any]) -> None:
    rng = np.random.default_rng(25)
    clips = [world.render(world.draw_scene(rng, "seen"), rng) for _ in range(3)]
    assert tiny.describe(*loaded, clips) == [tiny.describe(*loaded, [clip])[0] for clip in clips]


@shipped
def test_larger_and_longer_clips_are_read_too(loaded: tuple[Any, Any]) -> None:
    rng = np.random.default_rng(26)
    scenes = [world.draw_scene(rng, "seen") for _ in range(6)]
    clips = [np.repeat(world.render(scene, rng).repeat(2, axis=1).repeat(2, axis=2), 2, axis=0) for scene in scenes]
    told = tiny.describe(*loaded, clips)
    assert np.mean([result.share for result in captioner.score("large", scenes, told)]) >= 0.9, told


@shipped
@pytest.mark.slow
@pytest.mark.parametrize("split", ["seen", "held-out"])
def test_files_are_read_as_the_page_says(split: str) -> None:
    results = [result for result in captioner.measure(SHIPPED, clips=120) if result.split == split]
    assert {result.attribute for result in results} == {*world.ATTRIBUTES, "everything"}
    for result in results:
        assert result.share >= (0.85 if result.attribute == "everything" else 0.95), result


@shipped
def test_videos_are_compared_with_the_verifier(tmp_path: Path) -> None:
    rng = np.random.default_rng(27)
    for number in range(4):
        clip = world.render(world.draw_scene(rng, "seen"), rng)
        write_video(tmp_path / f"{number}.mp4", clip, world.FPS)
    write_video(tmp_path / "empty.mp4", np.zeros((16, 64, 64, 3), np.uint8), world.FPS)
    results = list(captioner.compare(SHIPPED, tmp_path))
    assert {result.num_clips for result in results} == {4}, "a video without an object has no scene"
    assert np.mean([result.share for result in results]) >= 0.9, results
    with pytest.raises(InputError, match=r"no \.mp4"):
        next(captioner.compare(SHIPPED, tmp_path / "nothing"))


def test_the_first_steps_teach_something(tmp_path: Path) -> None:
    events = list(captioner.train(tmp_path / "captioner", steps=20, batch_size=4, seed=1, workers=0, report_every=4))
    for stage in ("eyes", "words"):
        losses = [event.loss for event in events if event.stage == stage]
        assert losses[-1] < losses[0], losses
    assert events[-1].step == 20 and events[-1].stage == "both"
    model, processor = tiny.load(tmp_path / "captioner")
    assert model.dtype == torch.float32, "half precision is for the size of the package"
    assert len(tiny.describe(model, processor, [np.zeros((5, 64, 64, 3), np.uint8)])) == 1


def test_the_same_seed_gives_the_same_captioner(tmp_path: Path) -> None:
    for name in ("one", "two"):
        list(captioner.train(tmp_path / name, steps=4, batch_size=2, seed=3, workers=0))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_every_word_of_every_caption_is_known() -> None:
    _, processor = tiny.build()
    rng = np.random.default_rng(0)
    for _ in range(50):
        caption = world.canonical_caption(world.draw_scene(rng, "seen"))
        ids = processor.tokenizer(caption).input_ids
        assert processor.tokenizer.decode(ids) == caption


def test_a_folder_without_a_captioner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no captioner"):
        next(captioner.measure(tmp_path))
