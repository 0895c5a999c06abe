"""Which language a caption is in, by its script and its commonest words.

It knows some languages and is honest about the others: a text of few words, or of none that it knows, is in no language
that it could name, and nobody is to be left out for that.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from opensora_core.errors import ConfigError, nearest

_SCRIPTS = {
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "ARABIC": "ar",
    "HEBREW": "he",
    "GREEK": "el",
    "THAI": "th",
    "DEVANAGARI": "hi",
}
_WORDS = {
    "en": "the a an and of in is are with on to at that it its as by from this there his her their while into they",
    "de": "der die das und ein eine einen einem einer ist sind mit auf den dem im von zu nicht sich es wird über sie",
    "fr": "le la les un une des et est sont dans avec sur du de qui au aux pour il elle se une par son sa ses en",
    "es": "el la los las un una unos y es son en con de del que se al por su sus está están para sobre lo",
    "it": "il lo la gli le un una uno e è sono in con di del della che si al alla per su sul nel nella da",
    "pt": "o a os as um uma e é são em com de do da que se ao à por seu sua no na nos nas está estão para",
    "nl": "de het een en is zijn in met op van te dat die er aan door voor zich hij zij naar bij over",
    "sv": "den det en ett och är i med på av att som till för sig han hon de från över",
    "pl": "w na i z się jest są do nie to że od po przez który która ich jego jej",
    "tr": "bir ve bu ile da de için olan üzerinde var çok gibi daha kadar",
    "ru": "и в на с по не что он она это как за из от у к его её они",
    "uk": "і в на з що не до та він вона це як від у їх його є",
}
_LISTS = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_CYRILLIC = ("ru", "uk")
KNOWN = tuple(sorted({*_WORDS, *_SCRIPTS.values(), "zh"}))
"""The languages that are told apart."""

_FEWEST_WORDS = 4
_LEAST_SHARE = 0.12  # of a text's words that are among the commonest of its language


def check_language(code: str) -> str:
    """A language that can be asked for; empty asks for none.

    Raises:
        ConfigError: it is not known here.
    """
    if code and code not in KNOWN:
        raise ConfigError(f"caption.language = {code!r} is not one that is told apart", nearest(code, KNOWN))
    return code


def language_of(text: str) -> str:
    """The language of a text, such as `en`, or "" where that cannot be told."""
    letters = [char for char in text if char.isalpha()]
    scripts = Counter(unicodedata.name(char, "?").partition(" ")[0] for char in letters)
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > len(letters) * 0.1:
        return "ja"
    script, count = scripts.most_common(1)[0] if letters else ("", 0)
    if count < len(letters) * 0.6:
        return ""
    if script in ("LATIN", "CYRILLIC"):
        return _by_words(text, is_cyrillic=script == "CYRILLIC")
    return "zh" if script == "CJK" else _SCRIPTS.get(script, "")


def _by_words(text: str, *, is_cyrillic: bool) -> str:
    words = re.findall(r"\w+", text.lower())
    candidates = [name for name in _LISTS if (name in _CYRILLIC) == is_cyrillic]
    counts = {name: sum(word in _LISTS[name] for word in words) for name in candidates}
    best, second, *_ = sorted(counts, key=lambda name: -counts[name])
    is_clear = len(words) >= _FEWEST_WORDS and counts[best] > max(counts[second], _LEAST_SHARE * len(words))
    return best if is_clear else ""
