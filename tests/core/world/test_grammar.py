from __future__ import annotations

from collections import Counter
from dataclasses import asdict, fields

import numpy as np
import pytest

from opensora_core.world import (
    ATTRIBUTES,
    HELD_OUT,
    Scene,
    canonical_caption,
    caption,
    draw_scene,
    is_held_out,
    parse,
    vocabulary,
)

README_PROMPT = "a red ball rolling to the right over green grass"


def drawn(n: int, split: str = "train", seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, split) for _ in range(n)]  # type: ignore[arg-type]


def test_attributes_are_the_fields_of_a_scene() -> None:
    assert [field.name for field in fields(Scene)] == list(ATTRIBUTES)


def test_held_out_pairs_are_of_known_values_and_leave_each_value_its_partners() -> None:
    for (first, second), pairs in HELD_OUT.items():
        assert len(pairs) == len(set(pairs)) >= 5
        for a, b in pairs:
            assert a in ATTRIBUTES[first] and b in ATTRIBUTES[second]
        assert max(Counter(a for a, _ in pairs).values()) == 1, "a colour loses one shape and one motion at most"


def test_training_never_shows_a_held_out_pair() -> None:
    for scene in drawn(10_000):
        for (first, second), pairs in HELD_OUT.items():
            assert (getattr(scene, first), getattr(scene, second)) not in pairs


def test_held_out_scenes_always_have_a_held_out_pair_and_every_one_comes_up() -> None:
    scenes = drawn(2_000, "held-out")
    assert all(is_held_out(scene) for scene in scenes)
    for (first, second), pairs in HELD_OUT.items():
        assert set(pairs) <= {(getattr(scene, first), getattr(scene, second)) for scene in scenes}


@pytest.mark.parametrize("split", ["train", "seen"])
def test_every_value_is_frequent(split: str) -> None:
    scenes = drawn(4_000, split)
    for name, values in ATTRIBUTES.items():
        counts = Counter(getattr(scene, name) for scene in scenes)
        for value in values:
            assert counts[value] / len(scenes) > 0.6 / len(values), (name, value)


def test_clear_weather_prevails_in_training_and_only_there() -> None:
    share = {split: np.mean([scene.weather == "clear" for scene in drawn(3_000, split)]) for split in ("train", "seen")}
    assert abs(share["train"] - 0.5) < 0.04
    assert abs(share["seen"] - 1 / 3) < 0.04


def test_canonical_captions_say_everything() -> None:
    for scene in drawn(500, "seen") + drawn(200, "held-out"):
        assert parse(canonical_caption(scene)) == asdict(scene)


def test_captions_parse_back_to_the_scene() -> None:
    rng = np.random.default_rng(1)
    said: Counter[str] = Counter()
    scenes = drawn(6_000, "seen") + drawn(1_000, "held-out")
    for scene in scenes:
        text = caption(scene, rng)
        found = parse(text)
        assert {"color", "shape"} <= found.keys(), text
        assert found == {name: getattr(scene, name) for name in found}, text
        said.update(found.keys())
    expected = {"size": 0.6, "ground": 0.85, "sky": 0.77, "weather": 0.7, "motion": 0.96}
    assert {name: round(said[name] / len(scenes), 2) for name in expected} == pytest.approx(expected, abs=0.03)


def test_what_goes_without_saying_leans_to_the_ordinary() -> None:
    rng = np.random.default_rng(2)
    unsaid: dict[str, Counter[str]] = {name: Counter() for name in ("weather", "sky", "motion")}
    for scene in drawn(4_000):
        found = parse(caption(scene, rng))
        for name, counts in unsaid.items():
            if name not in found:
                counts[getattr(scene, name)] += 1
    assert unsaid["weather"]["clear"] / unsaid["weather"].total() > 0.8
    assert unsaid["sky"]["day"] / unsaid["sky"].total() > 0.5
    assert set(unsaid["motion"]) == {"still"}


def test_captions_vary_and_stay_short_enough_for_the_text_encoder() -> None:
    rng = np.random.default_rng(3)
    scene = Scene("red", "ball", "small", "right", "day", "grass", "clear")
    texts = [caption(scene, rng) for _ in range(3_000)]
    assert len(set(texts)) > 2_000
    assert max(len(text.split()) for text in texts) <= 30
    assert any(text.isupper() for text in texts)
    assert any(text.islower() for text in texts)
    assert any(". " in text for text in texts)


def test_the_prompt_of_the_readme_is_one_of_the_captions() -> None:
    assert parse(README_PROMPT) == {"color": "red", "shape": "ball", "motion": "right", "ground": "grass"}
    rng = np.random.default_rng(4)
    scene = Scene("red", "ball", "small", "right", "day", "grass", "clear")
    assert any(caption(scene, rng).lower().rstrip(".") == README_PROMPT for _ in range(60_000))


def test_captions_are_reproducible() -> None:
    scenes = drawn(50)
    again = [[caption(scene, np.random.default_rng((7, i))) for i, scene in enumerate(scenes)] for _ in range(2)]
    assert again[0] == again[1]
    assert scenes == drawn(50)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", {}),
        ("a train in the plain", {}),
        ("12 ⚽ §§", {}),
        ("A hug blue sqare", {"color": "blue", "shape": "cube"}),
        ("green ball on green grass", {"color": "green", "shape": "ball", "ground": "grass"}),
        ("a ball on blue water", {"shape": "ball", "ground": "sea"}),
        ("the ball goes from left to right", {"shape": "ball", "motion": "right"}),
        ("bouncing up and down", {"motion": "bouncing"}),
        ("a snowy night at the beach", {"weather": "snow", "sky": "night", "ground": "sand"}),
        ("snow falls on the snow", {"weather": "snow", "ground": "snow"}),
        ("a PINK cube, not moving, without rain or snow", {"color": "pink", "shape": "cube", "motion": "still"}),
        ("red then blue", {"color": "red"}),
    ],
)
def test_parse(prompt: str, said: dict[str, str]) -> None:
    found = parse(prompt)
    assert said.items() <= found.items()
    assert found.keys() - said.keys() <= {"weather"} and found.get("weather", "clear") == said.get("weather", "clear")


def test_the_vocabulary_holds_every_word_of_typical_captions() -> None:
    rng = np.random.default_rng(5)
    slips = 0
    for scene in drawn(1_000):
        words = caption(scene, rng).lower().replace(".", " ").replace(",", " ").replace("-", " ").split()
        slips += bool(set(words) - vocabulary())
    # what is outside is a slip of the finger, and those happen in one caption in twenty-five at most
    assert 0 < slips < 70
