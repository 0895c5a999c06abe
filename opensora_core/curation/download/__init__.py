"""From a name, a list of links or a hub repository to local videos with a manifest."""

from __future__ import annotations

from opensora_core.curation.download.events import DataDone, DataPlan, DataRequest, Event, ItemFailed
from opensora_core.curation.download.run import download_data, examine_data
from opensora_core.curation.download.sources import SOURCES

__all__ = [
    "SOURCES",
    "DataDone",
    "DataPlan",
    "DataRequest",
    "Event",
    "ItemFailed",
    "download_data",
    "examine_data",
]
