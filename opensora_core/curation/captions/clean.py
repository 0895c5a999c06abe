"""Captions as training wants them: no talk about the video, no half sentences, nothing said twice."""

from __future__ import annotations

import re

_THING = r"(?:video|clip|footage|scene|image|picture|photo|photograph|frame|sequence|shot|animation)s?"
_VERB = (
    r"(?:show(?:s|ing|cases|casing)?|depict(?:s|ing)?|feature(?:s|ing)?|capture(?:s|ing)?|present(?:s|ing)?|"
    r"display(?:s|ing)?|portray(?:s|ing)?|illustrate(?:s|ing)?|contain(?:s|ing)?|consist(?:s)? of|"
    r"begin(?:s)? with|start(?:s)? with|open(?:s)? with|is of|is about)"
)
_WE = r"(?:we (?:can )?see|you (?:can )?see|there (?:is|are)|one can see|it (?:shows|depicts|appears to show))"
_OPENINGS = (
    re.compile(
        r"^(?:sure|certainly|of course|here(?: is|'s) (?:a|the) (?:description|caption)[^:.!]*?)\s*[:!,.]\s*", re.I
    ),
    re.compile(r"^(?:caption|description|answer|assistant|summary)\s*:\s*", re.I),
    re.compile(
        rf"^(?:in )?(?:the|this|these|a)(?: \w+)?(?: (?:first|short|video|series of))* {_THING}"
        rf"(?: (?:of|from|in) (?:the|this|a) {_THING})?,? {_VERB} ?(?:that|how)?\s*",
        re.I,
    ),
    re.compile(rf"^(?:in|throughout|over the course of) (?:the|this|a)(?: \w+)? {_THING},? (?:{_WE} )?", re.I),
)
_FILLER = re.compile(rf"^(?:overall|in summary|in conclusion),? (?:the|this) {_THING}[^.]*[.!?]$", re.I)
_LABEL = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+", re.M)
_SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)]*(?=\s|$)|[。！？]+|$)", re.S)
_END = re.compile(r"[.!?。！？…][\"'”’)]*$")
_ABBREVIATION = re.compile(r"(?:^|\s)(?:Mr|Mrs|Ms|Dr|St|vs|e\.g|i\.e|No)\.$")


def clean(text: str) -> str:
    """Take off openings such as "The video shows", a half sentence at the end, and sentences that were said before.

    A caption that is nothing but half a sentence keeps it: some words are better than none.
    """
    text = _LABEL.sub("", text.strip().strip("\"'“”"))
    text = " ".join(text.split())
    for opening in (*_OPENINGS, *_OPENINGS):  # one may hide behind another
        shorter = opening.sub("", text)
        if shorter != text and shorter:
            text = shorter[0].upper() + shorter[1:]
    kept: list[str] = []
    seen: set[str] = set()
    for sentence in sentences(text):
        heard = " ".join(re.findall(r"\w+", sentence.lower()))
        if heard not in seen and heard and not (kept and _FILLER.match(sentence)):
            kept.append(sentence)
            seen.add(heard)
    if len(kept) > 1 and not _END.search(kept[-1]):
        kept.pop()
    return " ".join(kept)


def sentences(text: str) -> list[str]:
    """Split at full stops that are followed by a space or the end, and not after `Mr.` and its like."""
    found: list[str] = []
    open_ended = False
    for part in _SENTENCE.findall(text):
        if not (part := part.strip()):
            continue
        if open_ended:
            found[-1] += f" {part}"
        else:
            found.append(part)
        open_ended = _ABBREVIATION.search(found[-1]) is not None
    return found
