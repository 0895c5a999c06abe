"""The command that was typed, as each process gets it: without the flags of launching, and all in one folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

LAUNCH_FLAGS = {
    **{"--gpus": 1, "--nodes": 1, "--hostfile": 1, "--max-restarts": 1, "--submit": 0},
    **{"--dry-run": 0, "--write-manifest": 1},
}
"""Flags for whoever starts the processes, with the number of words that follow; the processes do not see them."""


def inner_words(words: Sequence[str], output: Path, valued: Collection[str] = ()) -> list[str]:
    """What each process is to run: the command that was typed, less the flags of launching, in one folder for all.

    Args:
        words: that followed `osora`.
        output: the run.
        valued: flags that a word follows, whatever that looks like: a prompt may begin with a dash.
    """
    return [*_without(words, {**LAUNCH_FLAGS, "--output": 1, "-o": 1}, valued), "--output", str(output)]


def again_words(words: Sequence[str], output: Path, valued: Collection[str] = (), *, recipe: bool = False) -> list[str]:
    """What each process runs after a failure: the same, from the newest checkpoint.

    Args:
        words: that followed `osora`.
        output: the run.
        valued: as for `inner_words`.
        recipe: it is one, which knows its own settings.
    """
    if recipe:
        return [words[0], "--resume", str(output), *(word for word in words if word in ("--json", "--debug"))]
    kept = _without(inner_words(words, output, valued), {"--output": 1, "--resume": -1}, valued)
    return [*kept, "--resume", str(output)]


def _without(words: Sequence[str], flags: Mapping[str, int], valued: Collection[str]) -> list[str]:
    """Words less some flags and the words that follow those; -1 is one word that may be missing."""
    kept: list[str] = []
    skip = 0
    is_value = False
    for index, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if is_value:
            is_value = False
            kept.append(word)
        elif word in valued and word not in flags:
            is_value = True
            kept.append(word)
        elif skip:
            skip -= 1
        elif name in flags:
            takes = flags[name]
            if takes < 0:
                takes = int(index + 1 < len(words) and not words[index + 1].startswith("-"))
            skip = 0 if equals else takes
        elif word[:2] not in flags or word.startswith("--"):  # of `-oruns/mine`
            kept.append(word)
    return kept
