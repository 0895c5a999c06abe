"""Beyond the golden pairs: what the rules promise on any text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_core.text.cleaning import PUBLISHED, clean_as_published, clean_once_as_published, clean_plainly

PIECES = st.sampled_from(
    [
        *"aB x09.,:;-_'\"/\\#@&()<>=!\n",
        "http://",
        "www.",
        ".com",
        "<b>",
        "&amp;",
        "&quot",
        "<![",
        "猫",
        "カ",
        "—",
        "“",
        ".jpg",
    ]
)


@pytest.mark.parametrize(
    ("text", "expected"),  # as diffusers' PixArtAlphaPipeline._clean_caption has them, with one strip added (FACTS 7)
    [
        ("-http://a.b x", "a. b x"),  # a scheme in the middle of a run of host characters
        ("see foo.com@home", "see foo. com"),  # what is followed by an @ is no host
        ("a.com.b.com@x", ".b. com"),
        ("一只猫 and カタカナ", "and カタカナ"),
        ("an <![ unparsable tag", "an <! unparsable tag"),
        ("12x34 4×3 4х3", ""),
        ("one - two", "one - two"),
        ("a-b-c-d-e", "a b c d e"),
    ],
)
def test_odd_cases(text: str, expected: str) -> None:
    assert clean_once_as_published(text) == expected


def test_every_rule_says_what_it_is_for() -> None:
    reasons = [reason for reason, _ in PUBLISHED]
    assert len(set(reasons)) >= len(reasons) - 1 and all(reasons)


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=15).map("".join)))
def test_any_text_is_cleaned_without_blanks_at_its_ends(text: str) -> None:
    cleaned = clean_as_published(text)
    assert cleaned == cleaned.strip()
    assert not any("\u4e00" <= letter <= "\u9fff" for letter in cleaned)


@pytest.mark.parametrize("unit", ["a", "a-", "a.", "1.", "a1", "<b>", "&amp;", " .", "a cat. ", "x.co@", "'"])
def test_a_hundred_thousand_characters_take_no_longer_than_a_second(unit: str) -> None:
    started = time.process_time()
    clean_once_as_published(unit * (100_000 // len(unit)))
    assert time.process_time() - started < 3, "a rule has become quadratic"


def test_plain_keeps_scripts_and_case() -> None:
    text = "  一只猫\t在 Paris\n日本語カタカナ (Café) http://x.com #1 "
    assert clean_plainly(text) == "一只猫 在 Paris 日本語カタカナ (Café) http://x.com #1"
    assert clean_plainly("Cafe\u0301") == "Caf\u00e9", "composed"
    assert clean_plainly(" \n\u3000") == ""
