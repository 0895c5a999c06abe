"""Files to batches: which frames of a video, what becomes of their pixels, and in which order samples come."""

from opensora_core.data.frames import evenly_spaced, published_crop, published_indices
from opensora_core.data.order import epoch_order
from opensora_core.data.transforms import fit_image, fit_video, normalise

__all__ = [
    "epoch_order",
    "evenly_spaced",
    "fit_image",
    "fit_video",
    "normalise",
    "published_crop",
    "published_indices",
]
