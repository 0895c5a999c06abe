"""Published weights: what there is, where it lies on this machine, and how to get what is missing."""

from __future__ import annotations

from opensora_core.assets.fetch import Progress
from opensora_core.assets.gather import WeightsPlan, WeightsReady, WeightsRequest, fetch_weights, plan_weights
from opensora_core.assets.holdings import Holding, WeightsListed, holdings, known_words, needed_words
from opensora_core.assets.search import Located, find, locate, weights_folder
from opensora_core.assets.table import ASSETS, BUNDLED, Asset, Kind
from opensora_core.assets.verify import WeightsVerified, verify_weights

__all__ = [
    "ASSETS",
    "BUNDLED",
    "Asset",
    "Holding",
    "Kind",
    "Located",
    "Progress",
    "WeightsListed",
    "WeightsPlan",
    "WeightsReady",
    "WeightsRequest",
    "WeightsVerified",
    "fetch_weights",
    "find",
    "holdings",
    "known_words",
    "locate",
    "needed_words",
    "plan_weights",
    "verify_weights",
    "weights_folder",
]
