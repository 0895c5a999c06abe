"""HD-VG-130M: clips of YouTube videos, by the metadata that its authors give out for academic use.

Yang et al., "VideoFactory: Swap Attention in Spatiotemporal Diffusions for Text-to-Video Generation", 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from opensora_core.curation.download.events import DataRequest
from opensora_core.curation.download.item import Item
from opensora_core.curation.download.session import Session
from opensora_core.curation.download.source import Source
from opensora_core.curation.download.sources.links import items_of
from opensora_core.errors import InputError, UsageError


def _metadata(request: DataRequest) -> Path:
    if request.metadata is None:
        raise UsageError(
            "hd-vg-130m needs its metadata, which its authors give out for academic use",
            "osora download data hd-vg-130m --metadata PATH --output data/hd-vg",
        )
    if not request.metadata.is_file():
        raise InputError(f"there is no metadata {request.metadata}", "name a .jsonl or a .csv")
    return request.metadata


def _items(session: Session) -> Iterator[Item]:
    for item in items_of(_metadata(session.request), session, ids_are_youtube=True):
        licence = item.licence or "the video's own; metadata for academic use"
        yield dataclasses.replace(item, licence=licence)


SOURCE = Source(
    "clips of YouTube videos by the metadata of HD-VG-130M",
    _items,
    lambda request: f"fetch the sections that {_metadata(request)} lists by yt-dlp",
)
