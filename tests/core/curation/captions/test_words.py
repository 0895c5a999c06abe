"""What is done with captions, and what is asked: cleaning, languages, the camera, prompts, frames."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from opensora_core.config import CaptionConfig
from opensora_core.curation.captions import camera
from opensora_core.curation.captions.clean import clean, sentences
from opensora_core.curation.captions.language import check_language, language_of
from opensora_core.curation.captions.prompt import PROMPT, ask, grid, introduced, places
from opensora_core.curation.captions.protocol import Words
from opensora_core.curation.captions.run import finished
from opensora_core.errors import ConfigError, InputError


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("The video shows a cat on a mat.", "A cat on a mat."),
        ("This short clip depicts a man. He runs.", "A man. He runs."),
        ("In the video, a dog barks.", "A dog barks."),
        ("The image is of a boat at sea.", "A boat at sea."),
        ("In this image, we can see a tree.", "A tree."),
        ("Sure! Here is a description of the clip: The video features two birds.", "Two birds."),
        ("Caption: a red car", "A red car"),
        ("A cat sits. It looks up. The light is so", "A cat sits. It looks up."),
        ("a cat that is half", "a cat that is half"),
        ("A cat sits. A cat sits. It purrs. a cat, sits!", "A cat sits. It purrs."),
        ("1. A cat.\n2. A dog.", "A cat. A dog."),
        ("Mr. Smith walks 3.5 miles. He stops.", "Mr. Smith walks 3.5 miles. He stops."),
        ("The clip board lies on a desk.", "The clip board lies on a desk."),
        ("The video camera stands on a tripod.", "The video camera stands on a tripod."),
        ("A man waves. Overall, the video conveys joy.", "A man waves."),
        ("猫が座っている。猫が座っている。", "猫が座っている。"),
        ("", ""),
    ],
)
def test_captions_are_cleaned(said: str, kept: str) -> None:
    assert clean(said) == kept
    assert clean(kept) == kept, "what is clean stays as it is"


def test_sentences_end_where_they_end() -> None:
    said = 'He says "Stop!" She goes... Dr. Who stays 3.5 days.'
    assert sentences(said) == ['He says "Stop!"', "She goes...", "Dr. Who stays 3.5 days."]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("A man walks along the street with his dog while the sun is setting.", "en"),
        ("Ein Mann geht mit seinem Hund die Straße entlang, und die Sonne ist am Untergehen.", "de"),
        ("Un homme marche dans la rue avec son chien et le soleil se couche sur la ville.", "fr"),
        ("Un hombre camina por la calle con su perro y el sol se pone en el mar.", "es"),
        ("Мужчина идёт по улице и не смотрит на дорогу.", "ru"),
        ("一个男人在街上遛狗。", "zh"),
        ("男の人が犬と歩いています。", "ja"),
        ("한 남자가 개와 함께 걷고 있다.", "ko"),
        ("red ball", ""),
        ("12345 !!", ""),
        ("", ""),
    ],
)
def test_a_language_is_known_or_left_open(text: str, language: str) -> None:
    assert language_of(text) == language


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ConfigError, match="'english'"):
        check_language("english")


def scene(right: float = 0, down: float = 0, scale: float = 1, count: int = 16) -> np.ndarray:
    """Frames of a textured plane that moves by so many pixels, or grows by such a factor, from one to the next."""
    import cv2

    rough = np.random.default_rng(1).integers(0, 255, (40, 60, 3), np.uint8)
    plane = cv2.resize(rough, (720, 480), interpolation=cv2.INTER_CUBIC)
    frames = []
    for number in range(count):
        growth = scale**number
        matrix = np.float32([[growth, 0, 128 - 360 * growth], [0, growth, 72 - 240 * growth]])
        matrix[:, 2] += (right * number, down * number)
        frames.append(cv2.warpAffine(plane, matrix, (256, 144), borderMode=cv2.BORDER_REFLECT))
    return np.stack(frames)


@pytest.mark.parametrize(
    ("motion", "said"),
    [
        ({}, "The camera is static."),
        ({"right": -4}, "The camera pans right."),
        ({"right": 4}, "The camera pans left."),
        ({"down": 4}, "The camera tilts up."),
        ({"down": -4}, "The camera tilts down."),
        ({"scale": 1.02}, "The camera zooms in."),
        ({"scale": 0.98}, "The camera zooms out."),
        ({"right": -5, "down": 3}, "The camera pans right and tilts up."),
    ],
)
def test_the_camera_is_read_from_the_flow(motion: dict[str, float], said: str) -> None:
    frames = scene(**motion)
    pairs = camera.pairs(len(frames), 24.0)
    assert camera.describe([camera.motion_between(frames[a], frames[b], (b - a) / 24) for a, b in pairs]) == said


@pytest.mark.parametrize("weather", ["clear", "rain"])
def test_an_object_that_moves_is_no_camera(weather: str) -> None:
    from opensora_core import world

    rng = np.random.default_rng(5)
    for _ in range(4):
        frames = world.render(dataclasses.replace(world.draw_scene(rng, "seen"), weather=weather), rng)
        pairs = camera.pairs(len(frames), 8.0)
        told = camera.describe([camera.motion_between(frames[a], frames[b], (b - a) / 8) for a, b in pairs])
        assert told in ("", "The camera is static.")


def test_of_an_empty_picture_nothing_is_said_about_the_camera() -> None:
    blank = np.full((144, 256, 3), 90, np.uint8)
    assert camera.motion_between(blank, blank, 0.1) is None
    assert camera.describe([None, None]) == ""
    assert camera.pairs(1, 24.0) == []


def test_the_camera_is_said_once() -> None:
    assert finished(Words("A cat"), "The camera pans left.", clean_up=False)[0] == "A cat. The camera pans left."
    assert finished(Words("The camera is still."), "The camera pans left.", clean_up=False)[0] == "The camera is still."
    assert finished(Words("  "), "", clean_up=False)[0] == ""


def test_frames_are_taken_where_they_are_asked_for() -> None:
    assert places(CaptionConfig()) == (0.2, 0.5, 0.8)
    assert places(CaptionConfig(frames=1)) == (0.5,)
    assert places(CaptionConfig(at="10% 0.9")) == (0.1, 0.9)
    assert places(CaptionConfig(), (0.1, 0.2)) == (0.1, 0.2)
    for wrong in ("0.5 0.2", "1.5", "x", "nan"):
        with pytest.raises(ConfigError):
            places(CaptionConfig(at=wrong))
    with pytest.raises(ConfigError, match=r"frames = 3.* names 2"):
        places(CaptionConfig(at="0.1 0.2", frames=3))


def test_a_grid_is_nearly_square_and_keeps_the_order() -> None:
    wide = [np.full((90, 160, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = grid(wide)
    assert sheet[0, 0, 0] == 10
    assert {10, 20, 30} <= set(np.unique(sheet).tolist())
    assert 0.5 < sheet.shape[1] / sheet.shape[0] < 2
    assert grid(wide[:1]).shape == (90, 160, 3)


def test_a_prompt_comes_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert ask(CaptionConfig()) == PROMPT
    assert "3 frames" in introduced(PROMPT, 3, grid=True)
    file = tmp_path / "p.txt"
    file.write_text("What is it?\n")
    assert ask(CaptionConfig(prompt=str(file))) == "What is it?"
    file.write_text("")
    with pytest.raises(InputError, match="0 characters"):
        ask(CaptionConfig(prompt=str(file)))
