"""Pictures and videos on disk: read, write, and lay out side by side. The only room that imports `av`.

Videos are uint8 arrays (T, H, W, 3), RGB; `to_uint8` makes one of what a VAE decodes.
"""

from __future__ import annotations

from opensora_core.media.clips import Probe, probe, read_frames
from opensora_core.media.gallery import write_gallery
from opensora_core.media.pixels import to_uint8
from opensora_core.media.read import Limits, Video, read_video
from opensora_core.media.sheet import write_contact_sheet
from opensora_core.media.write import WRITERS, format_of, write_video

__all__ = [
    "WRITERS",
    "Limits",
    "Probe",
    "Video",
    "format_of",
    "probe",
    "read_frames",
    "read_video",
    "to_uint8",
    "write_contact_sheet",
    "write_gallery",
    "write_video",
]
