"""What a caption goes through before it is tokenised.

`published` follows the rules that PixArt-alpha and Open-Sora 1.0 were trained with. They were made for captions scraped
from the web: they lower the case, and delete addresses, file names, product numbers and all Chinese characters. A model
wants to be prompted with text like that of its training, odd cases included ("epsilon" becomes "ilon"), so the rules
below are kept to the letter. `plain` only tidies: it keeps every script, and the case.
"""

from __future__ import annotations

import html
import re
import unicodedata
import warnings
from collections.abc import Callable
from urllib.parse import unquote_plus

import bs4
import ftfy

Step = Callable[[str], str]


def _delete(pattern: str) -> Step:
    return _replace(pattern, "")


def _space(pattern: str) -> Step:
    return _replace(pattern, " ")


def _replace(pattern: str, replacement: str) -> Step:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(replacement, text)


def _text_of_html(text: str) -> str:
    """The text between the tags. What no parser accepts, such as `<![`, stays as it is (upstream raises an error)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
        try:
            return bs4.BeautifulSoup(text, features="html.parser").text
        except (bs4.ParserRejectedMarkup, AssertionError, RecursionError):
            return text


def _split_joined_words(text: str) -> str:
    """this-is-my-cute-cat, this_is_my_cute_cat; but a few hyphens in a sentence are fine."""
    joints = re.compile("[-_]")
    return joints.sub(" ", text) if len(joints.findall(text)) > 3 else text


def _addresses(scheme: str) -> Step:
    """Delete the head of an address with this scheme, and hosts of a few domains with the path behind them.

    A run of host characters where no host begins at its first word has none at its later words either, as they would
    end alike; `rest` steps over such a run, so that a long one does not take quadratic time.
    """
    head = rf"{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])"
    host = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
    rest = rf"(?P<rest>(?:(?!\b{scheme}:)[a-zA-Z0-9.\-])+)"
    return _replace(rf"\b(?:{head}|{host}|{rest})", r"\g<rest>")


_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    r"\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

PUBLISHED: tuple[tuple[str, Step], ...] = (
    ("percent-encoding, with + for a space", unquote_plus),
    ("case and outer blanks", lambda text: text.strip().lower()),
    ("a placeholder for names in captions of people", _replace("<person>", "person")),
    ("addresses: the head of one with a scheme, or a host", _addresses("https?")),
    ("addresses that begin with www:", _addresses("www")),
    ("markup", _text_of_html),
    ("@names", _delete(r"@\w+\b")),
    ("Chinese characters, strokes and enclosed forms", _delete(r"[\u31c0-\u4dff\u4e00-\u9fff]+")),
    ("every kind of dash", _replace(f"[{_DASHES}]+", "-")),
    ("every kind of double quote", _replace("[`´«»“”¨]", '"')),
    ("every kind of apostrophe", _replace("[‘’]", "'")),
    ("remains of an escaped quote", _delete("&quot;?")),
    ("remains of an escaped ampersand", _delete("&amp")),
    ("numeric internet addresses", _space(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}")),
    ("a time of day at the end", _delete(r"\d:\d\d\s+$")),
    ("a line break that was written out", _space(r"\\n")),
    ("#1 to #999", _delete(r"#\d{1,3}\b")),
    ("#12345 and longer", _delete(r"#\d{5,}\b")),
    ("numbers of six digits and more", _delete(r"\b\d{6,}\b")),
    (
        "file names; the lookbehind changes no match, but keeps long words linear",
        _delete(rf"(?<!\S)\S+\.(?:{_FILE_TYPES})"),
    ),
    ("quotes in a row", _replace("[\"']{2,}", '"')),
    ("dots in a row", _space(r"\.{2,}")),
    ("symbols and brackets", _space(r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+")),
    ("a dot by itself", _space(r"\s+\.\s+")),
    ("words joined to one", _split_joined_words),
    ("text that was decoded wrongly", ftfy.fix_text),
    ("markup that was escaped, even twice", lambda text: html.unescape(html.unescape(text)).strip()),
    ("product numbers: jc6640", _delete(r"\b[a-zA-Z]{1,3}\d{3,15}\b")),
    ("product numbers: jc6640vc", _delete(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b")),
    ("product numbers: 6640vc231", _delete(r"\b\d+[a-zA-Z]+\d+\b")),
    ("words of shops: shipping", _delete(r"(?:worldwide\s+)?(?:free\s+)?shipping")),
    ("words of shops: download", _delete(r"(?:free\s)?download(?:\sfree)?")),
    ("words of shops: click", _delete(r"\bclick\b\s(?:for|on)\s\w+")),
    ("types of files, even at the head of a longer word", _delete(rf"\b(?:{_FILE_TYPES})(?:\simages?)?")),
    ("page numbers", _delete(r"\bpage\s+\d+\b")),
    ("letters and digits in turn: j2d1a2a", _space(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b")),
    ("dimensions: 12x34, with any of three crosses", _delete(r"\b\d+\.?\d*[xх×]\d+\.?\d*\b")),
    ("a blank before a colon", _replace(r"\b\s+:\s+", ": ")),
    ("no blank after a comma, dot or slash", _replace(r"(\D[,./])\b", r"\1 ")),
    ("blanks in a row", _space(r"\s+")),
    ("quotes around everything", _replace(r"^[\"']([\w\W]+)[\"']$", r"\1")),
    ("punctuation at the front", _delete(r"^['_,\-:;]")),
    ("punctuation at the end", _delete(r"['_,\-:+]$")),
    ("nothing but a dot and a word", _delete(r"^\.\S+$")),
    ("outer blanks", str.strip),
)
"""The published rules: why, and what is done. The order matters; later rules clean up after earlier ones."""


def clean_once_as_published(text: str) -> str:
    """Apply `PUBLISHED` once."""
    for _, step in PUBLISHED:
        text = step(text)
    return text


def clean_as_published(text: str) -> str:
    """Apply `PUBLISHED` twice, as the published models were trained: what was escaped is cleaned in the second pass."""
    return clean_once_as_published(clean_once_as_published(text))


def clean_plainly(text: str) -> str:
    """Compose characters (NFC) and fold blanks; every script and the case are kept."""
    return " ".join(unicodedata.normalize("NFC", text).split())


CLEANINGS: dict[str, Step] = {"published": clean_as_published, "plain": clean_plainly}
