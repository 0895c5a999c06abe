"""What is cut out of a source, how it is encoded, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Piece:
    """Frames [start_frame, end_frame) of a source, numbered from 0 in the order of showing of those that decode."""

    path: Path  # of the clip
    start_frame: int
    end_frame: int
    start_seconds: float  # of the first frame, as the source's timestamps count
    end_seconds: float  # of the first frame that is no more in it; at the end of a source, where its last frame ends


@dataclass(frozen=True, slots=True)
class Encoding:
    """How frames are encoded anew. Copied packets stay as they are, so `copy` uses nothing of it but `audio`."""

    codec: str = "libx264"  # of `encoding.ENCODERS`; "auto" takes the first hardware encoder that really opens
    preset: str = "veryfast"  # x264's names, also for other encoders
    crf: int = 18  # or the nearest that another encoder has
    fps: float | None = None  # a constant rate, each frame the nearest in time; None keeps the times of the source
    short_side: int | None = 512  # never enlarges
    crop: tuple[int, int, int, int] | None = None  # top, left, height, width in pixels as shown, before resizing
    audio: bool = True
    fast_decode: bool = False  # files that decode faster and are larger


@dataclass(frozen=True, slots=True)
class Cut:
    """A clip on disk, as it decodes. Frames and seconds are those of the source that are really in it."""

    path: Path  # of the piece; a suffix that the container needs may have taken the place of its own
    start_frame: int
    end_frame: int
    start_seconds: float
    end_seconds: float
    num_frames: int  # decoded back from the file
    width: int  # as shown
    height: int
    fps: float  # from the times of the first and the last frame
    num_copied: int  # frames whose packets are the source's
    sha256: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A piece of which no clip came."""

    path: Path
    reason: str
