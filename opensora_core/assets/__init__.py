"""Published weights: what there is, where it lies on this machine, and how to get what is missing."""

from __future__ import annotations

from opensora_core.assets.fetch import Progress
from opensora_core.assets.search import Located, find, locate, weights_folder
from opensora_core.assets.table import ASSETS, BUNDLED, Asset, Kind

__all__ = ["ASSETS", "BUNDLED", "Asset", "Kind", "Located", "Progress", "find", "locate", "weights_folder"]
