from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from opensora_core.errors import CheckpointError, ConfigError, InputError, WeightsError
from opensora_core.text import load_text_encoder
from opensora_core.text.labels import CLASS_LISTS, LabelEncoder


def number(encoder: LabelEncoder, prompt: str) -> int:
    return int(encoder.encode([prompt]).tokens)


@pytest.fixture(scope="module")
def imagenet() -> LabelEncoder:
    return LabelEncoder.from_pretrained(num_classes=1000)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tench", 0),
        ("golden retriever", 207),
        ("Golden_Retriever", 207),
        ("Egyptian cat", 285),
        ("lesser panda", 387),
        ("red panda", 387),
        ("abacus", 398),
        ("sports car", 817),
        ("yurt", 915),
        ("volcano", 980),
        ("daisy", 985),
        ("toilet paper", 999),
        ("maillot, tank suit", 639),
        ("517", 517),
        (" 7 ", 7),
    ],
)
def test_names_of_imagenet(imagenet: LabelEncoder, name: str, expected: int) -> None:
    assert number(imagenet, name) == expected


def test_imagenet_has_a_thousand_classes_and_its_things_are_in_order(imagenet: LabelEncoder) -> None:
    lines = (Path(__file__).parents[3] / "opensora_core/text/imagenet.txt").read_text().splitlines()
    assert len(lines) == imagenet.num_classes == 1000
    # WordNet lists the artefacts, 398 to 915, by the alphabet: a name too many or too few would not go unseen
    things = ["".join(filter(str.isalpha, line.split(",")[0].lower())) for line in lines[398:916]]
    assert things == sorted(things)


def test_ucf101() -> None:
    encoder = LabelEncoder.from_pretrained(num_classes=101)
    names = (Path(__file__).parents[3] / "opensora_core/text/ucf101.txt").read_text().splitlines()
    assert names == sorted(set(names)) and len(names) == 101
    spelled = ["ApplyEyeMakeup", "apply eye makeup", "clean-and-jerk", "YoYo"]
    assert encoder.encode(spelled).tokens.tolist() == [0, 0, 20, 100]


def test_a_name_of_two_classes_asks_for_the_number(imagenet: LabelEncoder) -> None:
    with pytest.raises(InputError, match="134 and 517") as caught:
        imagenet.encode(["crane"])
    assert "number" in caught.value.hint


def test_an_unknown_name_offers_the_nearest(imagenet: LabelEncoder) -> None:
    with pytest.raises(InputError, match="golden retreiver") as caught:
        imagenet.encode(["golden retreiver"])
    assert "'golden retriever'" in caught.value.hint
    for prompt in ("", "qqqqqq", "q" * 100_000):
        with pytest.raises(InputError) as caught:
            imagenet.encode([prompt])
        assert len(caught.value.message) + len(caught.value.hint) < 300
        assert "0 to 999" in caught.value.hint


@pytest.mark.parametrize("prompt", ["1000", "-1", "99999999999999999999"])
def test_a_number_out_of_range_says_the_range(imagenet: LabelEncoder, prompt: str) -> None:
    with pytest.raises(InputError, match=prompt) as caught:
        imagenet.encode([prompt])
    assert "0 to 999" in caught.value.hint


def test_classes_without_names_go_by_number() -> None:
    encoder = LabelEncoder.from_pretrained(num_classes=12)
    assert number(encoder, "11") == 11
    with pytest.raises(InputError) as caught:
        encoder.encode(["cat"])
    assert "not known" in caught.value.hint and "0 to 11" in caught.value.hint


def test_names_from_a_list_or_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\nbig dog\n\nbird\n")
    table = {"id2label": {"0": "cat, house cat", "1": "big dog", "2": "bird"}}
    for name in ("model_index.json", "config.json", "labels.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(json.dumps(table))
    for path in ("names.txt", "model_index", "config", "labels/labels.json"):
        encoder = load_text_encoder("class", tmp_path / path, num_classes=3)
        assert encoder.encode(["Big Dog", "bird", "0", "cat"]).tokens.tolist() == [1, 2, 0, 0]


def test_lists_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="missing"):
        load_text_encoder("class", tmp_path / "missing", num_classes=3)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_text_encoder("class", tmp_path, num_classes=3)
    for text in ('{"id2label": {"1": "cat"}}', '{"id2label": ', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_text_encoder("class", tmp_path, num_classes=3)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(ConfigError, match=r"2 names .* 3"):
        load_text_encoder("class", tmp_path / "names.txt", num_classes=3)
    with pytest.raises(ConfigError, match="no classes"):
        load_text_encoder("class", None)


def test_every_line_of_a_list_names_its_class() -> None:
    for file in CLASS_LISTS.values():
        names = resources.files("opensora_core.text").joinpath(file).read_text("utf-8").splitlines()
        assert LabelEncoder(names).encode(names).tokens.tolist() == list(range(len(names)))
