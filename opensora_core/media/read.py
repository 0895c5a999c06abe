"""Read videos and animations back, with the settings that `write` put into them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream
from PIL import ExifTags, Image

from opensora_core.errors import InputError
from opensora_core.files import readable
from opensora_core.media.pixels import Frames

# a file may name other files or addresses (playlists, ffconcat): only containers that hold their own pictures are read
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,yuv4mpegpipe,mxf,nut,ivf,h264,hevc"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}


@dataclass(frozen=True)
class Limits:
    """What a single file may cost. Every refusal names the limit that it ran into."""

    max_pixels: int = 8192 * 4320  # of one frame
    max_frames: int = 200_000  # that are looked at in one call, whether wanted or passed over
    max_bytes: int = 2**31  # of the frames that one call returns
    max_seconds: float = 600.0  # of wall time for one call, so that no file can stall a loader for good


class Budget:
    """What a call may still cost."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.limits = limits
        self._end = time.monotonic() + limits.max_seconds

    def check(self, num_frames: int) -> None:
        """Refuse to look at more than `max_frames` frames, or longer than `max_seconds`.

        Raises:
            InputError: names the limit.
        """
        if num_frames > self.limits.max_frames:
            over = f"has more than max_frames={self.limits.max_frames} frames to look at"
        elif time.monotonic() > self._end:
            over = f"took longer than max_seconds={self.limits.max_seconds:g}"
        else:
            return
        raise InputError(f"{self.path} {over}", "cut it into clips first, or raise the limit")


@dataclass(frozen=True)
class Video:
    """Frames (T, H, W, 3) uint8, their rate, and the settings that the file carries."""

    frames: Frames
    fps: float
    metadata: dict[str, str]


def read_video(path: Path, max_bytes: int = 2**30) -> Video:
    """Read all frames of a video, an animation or a picture.

    Args:
        path: the file.
        max_bytes: the size that the decoded frames may have.

    Raises:
        InputError: the file is missing, is no video, is torn, or is larger than `max_bytes` once decoded.
    """
    require_file(path)
    try:
        read = _read_pictures if path.suffix.lower() in (".gif", ".webp", ".png") else _read_container
        return read(path, max_bytes)
    except (av.FFmpegError, OSError, SyntaxError, ValueError, IndexError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path} as a video: {error}") from error


def require_file(path: Path) -> None:
    """Check that a path is a regular file: a folder, a FIFO or a device would hang or surprise a decoder.

    Raises:
        InputError: it is not.
    """
    try:
        regular = path.is_file()
    except OSError:  # such as a name that is too long
        regular = False
    if not regular:
        raise InputError(f"no such video file: {path}")


@contextmanager
def opened(path: Path, max_pixels: int = Limits.max_pixels) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a container and its first video stream that is not a cover picture; close it whatever happens.

    Only containers that hold their own pictures are opened, and only from disk. Streams beside the video are not read.

    Raises:
        InputError: no regular file, no container that we read, no video in it, or frames of more than `max_pixels`.
        av.FFmpegError: what the decoder has against the file later on.
    """
    require_file(path)
    try:
        # "file:" keeps a name such as "concat:a|b" a name
        container = av.open(f"file:{path}", options=_OPTIONS, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as a video: {error}") from error
    with container:
        pictures = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not pictures:
            raise InputError(f"{path} has no video stream")
        stream = pictures[0]
        if stream.codec_context is None:
            raise InputError(f"{path} is in a video format that has no decoder here")
        if stream.width * stream.height > max_pixels:
            raise InputError(
                f"{path} has frames of {stream.width} x {stream.height}, more than max_pixels={max_pixels}",
                "scale it down first, or raise the limit",
            )
        # against frames that outgrow what the header says; with room, for codecs round sides up to whole blocks
        stream.codec_context.options = {"max_pixels": str(max_pixels * 5 // 4 + 2**16)}
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        yield container, stream


def _read_container(path: Path, max_bytes: int) -> Video:
    with opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        size = stream.height * stream.width * 3
        frames: list[Frames] = []
        for frame in container.decode(stream):
            if size * (len(frames) + 1) > max_bytes:
                raise InputError(f"{path} is larger than {readable(max_bytes)} once decoded", "cut it into clips first")
            frames.append(frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False))
        fps, metadata = float(stream.average_rate or 0), _parse(container.metadata.get("comment", ""))
    if not frames:
        raise InputError(f"{path} holds no frame that can be decoded")
    video = np.stack(frames)
    if "crop" in metadata:  # ours: cut the row or column off that made an odd side even
        height, width = map(int, metadata.pop("crop").split("x"))
        video = video[:, :height, :width]
    return Video(video, fps, metadata)


def _read_pictures(path: Path, max_bytes: int) -> Video:
    with Image.open(path, formats=("GIF", "WEBP", "PNG")) as image:
        num_frames: int = getattr(image, "n_frames", 1)
        if num_frames * image.width * image.height * 3 > max_bytes:
            raise InputError(f"{path} is larger than {readable(max_bytes)} once decoded")
        frames, milliseconds = [], 0.0
        for index in range(num_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            milliseconds += float(image.info.get("duration", 0))
        if image.format == "PNG":
            metadata = {str(name): value for name, value in image.info.items() if isinstance(value, str)}
        elif image.format == "WEBP":
            metadata = _parse(image.getexif().get(ExifTags.Base.ImageDescription, ""))
        else:
            metadata = _parse(image.info.get("comment", b"").decode(errors="replace"))
    return Video(np.stack(frames), 1000 * num_frames / milliseconds if milliseconds else 1.0, metadata)


def _parse(comment: str) -> dict[str, str]:
    try:
        settings = json.loads(comment)
    except ValueError:
        return {}
    return {str(name): str(value) for name, value in settings.items()} if isinstance(settings, dict) else {}
