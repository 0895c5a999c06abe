"""What a source of data is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from opensora_core.config import DownloadConfig
from opensora_core.curation.download.events import DataRequest
from opensora_core.curation.download.item import Item
from opensora_core.curation.download.session import Session


def _nobody(config: DownloadConfig, request: DataRequest) -> list[str]:
    return []


@dataclass(frozen=True)
class Source:
    """Where data comes from.

    Attributes:
        about: it, in a line.
        items: what it has; made in a thread of its own, which may ask the network and fetch archives. Raises an
            `InputError` where the request cannot be carried out.
        doing: what would be done, in words.
        is_offline: whether `items` can be counted without the network.
        trusted: addresses that the user named himself, whose servers may be in a private network.
    """

    about: str
    items: Callable[[Session], Iterator[Item]]
    doing: Callable[[DataRequest], str]
    is_offline: Callable[[DataRequest], bool] = lambda request: True
    trusted: Callable[[DownloadConfig, DataRequest], list[str]] = _nobody
