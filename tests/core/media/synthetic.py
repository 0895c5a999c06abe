"""Small videos whose every frame tells its own number, in whatever codec, container and order of coding."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from opensora_core.media.pixels import Frames

ROWS, COLUMNS = 3, 4
"""Blocks of a frame; each is a bit of its number."""


def picture(number: int, height: int = 72, width: int = 96) -> NDArray[np.uint8]:
    """A frame (H, W, 3) that shows its number in binary, dark and bright, under a texture that moves."""
    bits = np.array([number >> bit & 1 for bit in range(ROWS * COLUMNS)]).reshape(ROWS, COLUMNS)
    row = np.arange(height) * ROWS // height
    column = np.arange(width) * COLUMNS // width
    y, x = np.mgrid[0:height, 0:width]
    texture = 20 * np.sin((x + 2 * number) / 5) * np.cos((y - number) / 7)
    luma = 60 + 130 * bits[row][:, column] + texture
    return np.stack([luma, luma, luma], -1).astype(np.uint8)


def numbers(frames: Frames) -> list[int]:
    """The numbers that frames (T, H, W, 3) of any size show."""
    height, width = frames.shape[1:3]
    blocks = frames[:, : height // ROWS * ROWS, : width // COLUMNS * COLUMNS].mean(-1)
    means = blocks.reshape(len(frames), ROWS, height // ROWS, COLUMNS, width // COLUMNS).mean((2, 4))
    return [int(((mean.ravel() > 125) << np.arange(ROWS * COLUMNS)).sum()) for mean in means]


def write_numbered(
    path: Path,
    num_frames: int = 60,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    gop: int = 250,
    b_frames: int = 3,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (72, 96),
    fps: int = 25,
    milliseconds: Sequence[int] | None = None,
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    format: str | None = None,
) -> list[float]:
    """Write a video.

    Args:
        path: of the video.
        num_frames: how many, numbered from 0.
        codec: an encoder.
        options: of the encoder.
        gop: at most so many frames from one keyframe to the next.
        b_frames: at most so many in a row.
        pix_fmt: of the encoder.
        size: height and width as coded.
        fps: of frames at a constant rate.
        milliseconds: times of the frames, instead of a constant rate.
        rotation: degrees counterclockwise by which a player turns the picture.
        pixel_aspect: width of a pixel over its height.
        format: of the container, where the suffix does not say it.

    Returns:
        Times of the frames in seconds.
    """
    base = Fraction(1, 1000) if milliseconds is not None else Fraction(1, fps)
    ticks = list(milliseconds) if milliseconds is not None else list(range(num_frames))
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        context = stream.codec_context
        context.time_base, context.gop_size, context.max_b_frames, context.thread_count = base, gop, b_frames, 1
        if pixel_aspect is not None:
            context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = ticks[number], base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return [float(tick * base) for tick in ticks[:num_frames]]
