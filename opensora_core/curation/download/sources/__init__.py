"""Where data comes from. `SOURCES` is a table; a new source is a file and a line."""

from __future__ import annotations

from pathlib import Path

from opensora_core.curation.download.events import DataRequest
from opensora_core.curation.download.source import Source
from opensora_core.curation.download.sources import archives, hd_vg, hub, links, pexels, world
from opensora_core.errors import UsageError, nearest

SOURCES: dict[str, Source] = {
    "hd-vg-130m": hd_vg.SOURCE,
    "pexels": pexels.SOURCE,
    "inter4k": archives.INTER4K,
    "ucf101": archives.UCF101,
    "imagenet": archives.IMAGENET,
    "world": world.SOURCE,
    "hf:OWNER/DATASET": hub.SOURCE,
    "LIST.txt|.csv|.jsonl": links.SOURCE,
}
"""The word that names a source -> the source; the last two stand for words of their kind."""


def find_source(request: DataRequest) -> Source:
    """The source that a request names.

    Raises:
        UsageError: there is none of this name.
    """
    word = request.source
    if word in SOURCES and "|" not in word:
        return SOURCES[word]
    if word.startswith("hf:"):
        return hub.SOURCE
    if Path(word).suffix.lower() in links.SUFFIXES or Path(word).is_file():
        return links.SOURCE
    raise UsageError(f"there is no source of data '{word}'", nearest(word, SOURCES))
