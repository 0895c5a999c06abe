"""Writers, one per format: each puts frames and their settings into one file.

The settings travel as JSON in the format's comment field: ffprobe, exiftool and `read_video` show them. The same
frames and settings give the same bytes: no clock, no thread count and no file name gets into a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import ExifTags, Image, PngImagePlugin

from opensora_core.errors import InputError, nearest
from opensora_core.files import replacing
from opensora_core.media.encoding import REPEATABLE_X264
from opensora_core.media.pixels import Frames, tile

_X264 = {"crf": "12", "preset": "medium", "x264-params": REPEATABLE_X264}  # visually lossless
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_STRIP_COLUMNS = 8


class Writer(Protocol):
    """Writes (T, H, W, 3) uint8 frames and their settings to a path that may have any suffix."""

    def __call__(self, path: Path, frames: Frames, fps: float, metadata: Mapping[str, str]) -> None:
        """Write, into a path that is ours alone."""


def _mp4(path: Path, frames: Frames, fps: float, metadata: Mapping[str, str]) -> None:
    """H.264 with 4:2:0 chroma, the one flavour that every browser and phone plays.

    Chroma of half the size needs even sides: an odd side gets its last row or column twice, and a `crop` among the
    settings lets `read_video` cut it off again.
    """
    height, width = frames.shape[1:3]
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    crop = {"crop": f"{height}x{width}"} if padded.shape != frames.shape else {}
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = json.dumps({**metadata, **crop}, ensure_ascii=False)
        if "prompt" in metadata:
            container.metadata["title"] = metadata["prompt"]
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options=_X264)
        stream.height, stream.width, stream.pix_fmt = *padded.shape[1:3], "yuv420p"
        stream.thread_count = 1  # x264's choices depend on the number of threads
        context = stream.codec_context
        # BT.709 limited range, said aloud, so that no player has to guess
        context.colorspace = context.color_primaries = context.color_trc = 1
        context.color_range = 1
        for picture in padded:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_EXACT,
                threads=1,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _gif(path: Path, frames: Frames, fps: float, metadata: Mapping[str, str]) -> None:
    """One palette for all frames and no dither, so that what stands still does not shimmer."""
    # every pixel has its say in the palette, up to a size that median cut handles in a moment
    step = max(1, frames.size // (3 * 2**22))
    palette = Image.fromarray(np.concatenate(list(frames[::step]))).quantize(256, Image.Quantize.MEDIANCUT)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pictures[0].save(
        path,
        "GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=_durations(len(frames), fps, unit=10),
        loop=0,
        optimize=False,
        comment=json.dumps(dict(metadata)).encode(),
    )


def _webp(path: Path, frames: Frames, fps: float, metadata: Mapping[str, str]) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(dict(metadata))
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(
        path,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=_durations(len(frames), fps, unit=1),
        loop=0,
        quality=95,
        method=4,
        exif=exif,
    )


def _png(path: Path, frames: Frames, fps: float, metadata: Mapping[str, str]) -> None:
    """One frame as it is; more of them as a strip, eight to a row."""
    text = PngImagePlugin.PngInfo()
    for name, value in metadata.items():
        text.add_itxt(name, value)
    Image.fromarray(tile(frames, min(len(frames), _STRIP_COLUMNS))).save(path, "PNG", pnginfo=text)


WRITERS: dict[str, Writer] = {"mp4": _mp4, "gif": _gif, "webp": _webp, "png": _png}


def write_video(path: Path, frames: Frames, fps: float, metadata: Mapping[str, str] | None = None) -> None:
    """Write frames in the format that the suffix names; the file is whole or absent.

    Args:
        path: ends in .mp4, .gif, .webp or .png; several frames in a .png become one strip.
        frames: (T, H, W, 3) uint8.
        fps: frames per second.
        metadata: settings that the file carries.

    Raises:
        InputError: a suffix of another format.
        ResourceError: no space or no permission.
    """
    write = WRITERS[format_of(path)]
    with replacing(path) as part:
        write(part, frames, fps, metadata or {})


def format_of(path: Path, format: str | None = None) -> str:
    """The format of a file: what its suffix says, which `format` may confirm but not contradict.

    Raises:
        InputError: no format of that name, or the two disagree.
    """
    suffix = path.suffix.lower().removeprefix(".")
    if format is not None and format not in WRITERS:
        raise InputError(f"unknown format '{format}'", nearest(format, WRITERS))
    if suffix not in WRITERS:
        raise InputError(f"{path} has no suffix of a known format", "end it in ." + ", .".join(WRITERS))
    if format is not None and suffix != format:
        raise InputError(f"{path} is not a name for --format {format}", f"end it in .{format}, or drop --format")
    return suffix


def _durations(num_frames: int, fps: float, unit: int) -> list[int]:
    """Milliseconds per frame in multiples of `unit`, whose sums stay as near to the clock as the unit allows."""
    ticks = [round(frame * 1000 / fps / unit) for frame in range(num_frames + 1)]
    return [max(end - start, 1) * unit for start, end in pairwise(ticks)]
