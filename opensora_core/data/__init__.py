"""Files to batches: which frames of a video, what becomes of their pixels, and in which order samples come.

What is imported from here brings torch only if it needs it: a manifest is read without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opensora_core.data.buckets import Bucket, Pace, choose_bucket, parse_buckets
    from opensora_core.data.cache import Cache
    from opensora_core.data.dataset import Batches, CachedClips, Choice, ClipBatch, ClipReader, Reject
    from opensora_core.data.frames import at_rate, evenly_spaced, published_crop, published_indices
    from opensora_core.data.manifest import Clip, Manifest, ManifestBuilder, read_manifest, write_clips
    from opensora_core.data.order import BatchOrder, Slot, epoch_order
    from opensora_core.data.transforms import fit_image, fit_video, normalise

__all__ = [
    "BatchOrder",
    "Batches",
    "Bucket",
    "Cache",
    "CachedClips",
    "Choice",
    "Clip",
    "ClipBatch",
    "ClipReader",
    "Manifest",
    "ManifestBuilder",
    "Pace",
    "Reject",
    "Slot",
    "at_rate",
    "choose_bucket",
    "epoch_order",
    "evenly_spaced",
    "fit_image",
    "fit_video",
    "normalise",
    "parse_buckets",
    "published_crop",
    "published_indices",
    "read_manifest",
    "write_clips",
]

_HOMES = {
    "buckets": ("Bucket", "Pace", "choose_bucket", "parse_buckets"),
    "cache": ("Cache",),
    "dataset": ("Batches", "CachedClips", "Choice", "ClipBatch", "ClipReader", "Reject"),
    "frames": ("at_rate", "evenly_spaced", "published_crop", "published_indices"),
    "manifest": ("Clip", "Manifest", "ManifestBuilder", "read_manifest", "write_clips"),
    "order": ("BatchOrder", "Slot", "epoch_order"),
    "transforms": ("fit_image", "fit_video", "normalise"),
}
"""Module of this room -> the names that it offers."""


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for the first time."""
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
