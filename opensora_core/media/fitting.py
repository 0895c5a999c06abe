"""From a decoder's frames to an encoder's: upright, square pixels, cropped, reduced, progressive, 8-bit 4:2:0.

Everything is one graph of FFmpeg's filters, as its command line would build it, with at most one pass of the scaler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from opensora_core.errors import InputError
from opensora_core.media.shown import Screen, placement

_FLAGS = "bicubic+accurate_rnd+bitexact"  # bicubic widens with the reduction, so that nothing aliases
_PROGRESSIVE = (0, 1)
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
# AVCOL_SPC_* -> the matrices that swscale knows
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt470", 6: "smpte170m", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
_BT709, _UNKNOWN, _BT601 = 1, 2, 6


@dataclass(frozen=True)
class Colors:
    """Tags of a clip, as FFmpeg numbers them. The range is always limited."""

    matrix: int
    primaries: int
    transfer: int


@dataclass(frozen=True)
class _Looks:
    """What of a frame decides on the graph."""

    width: int
    height: int
    pixel_format: str
    rotation: int
    matrix: int
    color_range: int


class Fitting:
    """Fits the frames of one piece: as many come out as go in, in their order.

    Without another size asked for, an odd side loses its last row or column, for 4:2:0 needs even ones; a resized one
    is rounded to even. YUV keeps its matrix, which is always named: an unnamed one is BT.709 from 720 lines on and
    BT.601 below, as `Screen` takes it. RGB becomes BT.709, full range limited. Interlaced frames become progressive
    ones (bwdif), one each, by what the decoder says of them.
    """

    def __init__(
        self,
        path: Path,
        stream: VideoStream,
        pixel_format: str,
        *,
        crop: tuple[int, int, int, int] | None,
        short_side: int | None,
        max_pixels: int,
    ) -> None:
        self._path = path
        self._crop = crop
        self._short_side = short_side
        self._pixel_format = pixel_format
        self._screen = Screen(path, stream, None, max_pixels)
        self._is_interlaced = stream.codec_context.field_order not in _PROGRESSIVE
        self._looks: _Looks | None = None
        self._graph: Graph | None = None
        self._held = 0
        self.size = (0, 0)  # (height, width) of what comes out, once a frame went in
        self.colors = Colors(_UNKNOWN, _UNKNOWN, _UNKNOWN)

    def feed(self, frame: VideoFrame) -> Iterator[VideoFrame]:
        """Frames that are ready once another is there.

        Raises:
            InputError: a crop that is not within the picture, or a picture of more than `max_pixels`.
        """
        looks = _Looks(
            frame.width, frame.height, frame.format.name, frame.rotation, frame.colorspace, frame.color_range
        )
        turned_interlaced = frame.interlaced_frame and not self._is_interlaced
        if looks != self._looks or turned_interlaced:
            yield from self.rest()
            self._is_interlaced |= frame.interlaced_frame
            self._looks = looks
            self._graph = self._build(frame)
        if self._graph is None:
            yield frame
            return
        self._graph.vpush(frame)
        self._held += 1
        yield from self._pull()

    def rest(self) -> Iterator[VideoFrame]:
        """Frames that waited for others."""
        if self._graph is not None and self._held:
            self._graph.vpush(None)
            yield from self._pull()
        self._graph, self._held = None, 0

    def _pull(self) -> Iterator[VideoFrame]:
        assert self._graph is not None
        while self._held:
            try:
                frame = self._graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                return
            self._held -= 1
            yield frame

    def _build(self, frame: VideoFrame) -> Graph | None:
        """The graph for frames like this one; None if they are right as they are."""
        rgb = frame.format.is_rgb
        # without a name it is as `Screen` takes it
        guess = _BT709 if frame.height >= 720 else _BT601
        matrix = _BT709 if rgb else frame.colorspace if frame.colorspace in _MATRICES else guess
        turned, mirrored, upside_down = placement(frame)
        left, top, width, height = self._kept(frame, turned, mirrored, upside_down)
        if self.size == (0, 0):
            self.size = self._wanted(frame, (height, width), turned)
            self.colors = Colors(matrix, frame.color_primaries, frame.color_trc)
        rows, columns = self.size[::-1] if turned else self.size
        if rows == height - height % 2 and columns == width - width % 2:
            height, width = rows, columns
        full = not rgb and (frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj"))
        steps: list[tuple[str, str]] = []
        if self._is_interlaced and frame.height > 3 and frame.width > 3:
            steps.append(("bwdif", "mode=send_frame:deint=interlaced"))
        if (left, top, width, height) != (0, 0, frame.width, frame.height):
            steps.append(("crop", f"{width}:{height}:{left}:{top}:exact=1"))
        if (height, width) != (rows, columns) or frame.format.name != self._pixel_format or full:
            ranges = f"in_range={'full' if full or rgb else 'limited'}:out_range=limited"
            source, target = _MATRICES[matrix], _MATRICES[self.colors.matrix]
            matrices = (
                f"in_color_matrix={source}:out_color_matrix={target}" if not rgb else f"out_color_matrix={target}"
            )
            steps.append(("scale", f"{columns}:{rows}:flags={_FLAGS}:{ranges}:{matrices}"))
            steps.append(("format", self._pixel_format))
        if turned:
            steps.append(("transpose", "cclock_flip"))
        if mirrored:
            steps.append(("hflip", ""))
        if upside_down:
            steps.append(("vflip", ""))
        if not steps:
            return None
        graph = Graph()
        graph.threads = 1
        # the names that the frames carry, for what follows the buffer is set up by them
        described = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000"
        described += f":pixel_aspect=1/1:colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
        nodes = [graph.add("buffer", described)]
        nodes += [graph.add(name, arguments or None) for name, arguments in steps]
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        return graph

    def _kept(self, frame: VideoFrame, turned: bool, mirrored: bool, upside_down: bool) -> tuple[int, int, int, int]:
        """Left, top, width and height of the crop in the frame as coded, on whole chroma samples and not beyond it."""
        if self._crop is None:
            return 0, 0, frame.width, frame.height
        rows, columns = self._screen.size(frame)
        top, left, height, width = self._crop
        if min(top, left) < 0 or min(height, width) < 2 or top + height > rows or left + width > columns:
            raise InputError(f"a crop of {self._crop} was asked for, and {self._path} is shown as {columns} x {rows}")
        down = (Fraction(top, rows), Fraction(top + height, rows))
        across = (Fraction(left, columns), Fraction(left + width, columns))
        if upside_down:
            down = (1 - down[1], 1 - down[0])
        if mirrored:
            across = (1 - across[1], 1 - across[0])
        if turned:
            down, across = across, down
        first_column, num_columns = _inward(across, frame.width)
        first_row, num_rows = _inward(down, frame.height)
        return first_column, first_row, num_columns, num_rows

    def _wanted(self, frame: VideoFrame, kept: tuple[int, int], turned: bool) -> tuple[int, int]:
        """Height and width of the result, for a crop of a height and width as coded."""
        rows, columns = self._screen.size(frame)
        coded = (frame.width, frame.height) if turned else (frame.height, frame.width)
        height, width = kept[::-1] if turned else kept
        square = coded == (rows, columns)
        shown = (height * rows / coded[0], width * columns / coded[1])
        scale = 1.0 if self._short_side is None else min(1.0, self._short_side / min(shown))
        if square and scale == 1.0:
            return max(height - height % 2, 2), max(width - width % 2, 2)
        return _even(shown[0] * scale), _even(shown[1] * scale)


def _inward(part: tuple[Fraction, Fraction], length: int) -> tuple[int, int]:
    """First and number of the samples of a part of a side, that begins and ends on even ones."""
    first = -(-part[0] * length // 2) * 2
    last = part[1] * length // 2 * 2 if part[1] < 1 else length
    return int(first), max(int(last - first), 1)


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))
