"""Files to batches: which frames of a video, what becomes of their pixels, and in which order samples come."""

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
