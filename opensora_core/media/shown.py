"""From what a decoder hands out to what a screen shows: turned upright, square pixels, RGB, the size that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
from av.buffer import Buffer
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from opensora_core.errors import InputError
from opensora_core.media.pixels import Frames

# bicubic filters widen with the reduction, so that nothing aliases; the rest makes results the same on every machine
_SCALING = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
# AVColorSpace -> the matrices that swscale knows
_SPACES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


def covering(
    size: tuple[int, int], wanted: tuple[int, int] | None, path: Path, max_pixels: int
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The size that a frame is resized to so that it covers the wanted one, and the middle that is kept.

    Args:
        size: height and width of the frame as shown.
        wanted: height and width of the result; None keeps the frame as it is.
        path: names the file in the error.
        max_pixels: that the resized frame may have; a frame of one row grows beyond all bounds otherwise.

    Returns:
        (height, width) to resize to, and (top, left, height, width) of what is cut out of it.
    """
    rows, columns = size
    if wanted is None:
        covered, box = size, (0, 0, rows, columns)
    else:
        height, width = wanted
        scale = max(height / rows, width / columns)
        covered = max(round(rows * scale), height), max(round(columns * scale), width)
        box = ((covered[0] - height) // 2, (covered[1] - width) // 2, height, width)
    if covered[0] * covered[1] > max_pixels:
        raise InputError(
            f"{path} has frames of {columns} x {rows} that would be resized to {covered[1]} x {covered[0]}, "
            f"more than max_pixels={max_pixels}"
        )
    return covered, box


def fit(image: Image.Image, wanted: tuple[int, int] | None, path: Path, max_pixels: int) -> Frames:
    """Resize an image to cover the wanted height and width, and cut out the middle: (H, W, 3)."""
    covered, (top, left, height, width) = covering((image.height, image.width), wanted, path, max_pixels)
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would clip all but the lowest eight
        image = Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    if covered != (image.height, image.width):
        image = image.resize((covered[1], covered[0]), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(image)[top : top + height, left : left + width]


class Screen:
    """Shows the frames of one stream."""

    def __init__(self, path: Path, stream: VideoStream, wanted: tuple[int, int] | None, max_pixels: int) -> None:
        self._path = path
        self._wanted = wanted
        self._max_pixels = max_pixels
        # the container's word counts more than the codec's; nonsense counts as square
        ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1
        self._pixel_aspect = float(ratio) if ratio > 0 else 1.0
        self._scaler = VideoReformatter()  # keeps its tables from frame to frame
        self._rotation: int | None = None  # of the frame that the placement was looked up for
        self._placement = (False, False, False)

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """Height and width as shown: upright, with square pixels.

        Raises:
            InputError: more than `max_pixels`.
        """
        height, width = frame.height, max(round(frame.width * self._pixel_aspect), 1)
        if height * width > self._max_pixels:
            raise InputError(
                f"{self._path} has frames that are shown as {width} x {height}, more than max_pixels={self._max_pixels}"
            )
        return (width, height) if self.place(frame)[0] else (height, width)

    def place(self, frame: VideoFrame) -> tuple[bool, bool, bool]:
        """How a frame is to be turned: see `placement`."""
        if frame.rotation != self._rotation:
            self._rotation, self._placement = frame.rotation, placement(frame)
        return self._placement

    def show(self, frame: VideoFrame) -> Frames:
        """The frame as (H, W, 3) RGB, by one pass of the scaler over what the decoder made.

        The result looks into the scaler's memory: copy it. Without a colour space of its own a frame of 720 lines or
        more is BT.709, a smaller one BT.601.
        """
        covered, (top, left, height, width) = covering(self.size(frame), self._wanted, self._path, self._max_pixels)
        turned, mirrored, upside_down = self.place(frame)
        rows, columns = covered[::-1] if turned else covered
        guess = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
        full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
        picture = self._scaler.reformat(
            frame,
            width=columns,
            height=rows,
            format="rgb24",
            src_colorspace=_SPACES.get(frame.colorspace, guess),
            src_color_range=ColorRange.JPEG if full or frame.format.is_rgb else ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.JPEG,
            interpolation=_SCALING,
            threads=1,
        )
        plane = picture.planes[0]
        pixels: Frames = np.ndarray(
            (rows, columns, 3), np.uint8, buffer=memoryview(plane), strides=(plane.line_size, 3, 1)
        )
        if turned:
            pixels = pixels.swapaxes(0, 1)
        pixels = pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
        return pixels[top : top + height, left : left + width]


def placement(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Whether rows become columns, and whether the result is then mirrored and turned upside down.

    Cameras write a matrix of 9 numbers, of which (x, y) -> (a x + c y, b x + d y) are the first two rows. Angles other
    than quarter turns are rounded to one, as players do.
    """
    # a frame whose side data was asked for is freed by the garbage collector only, megabytes late: ask a tiny copy
    copy = frame.reformat(width=16, height=16, format="gray", interpolation=Interpolation.POINT, threads=1)
    matrix = cast(Mapping[Type, Buffer], copy.side_data).get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0
