"""Black bars around the picture of a video."""

from __future__ import annotations

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from opensora_core.media.shown import Screen

_DARK, _DARK_FULL = 24, 10  # levels up to which a bar is black, of luma in limited and in full range
_LEAST_BAR, _LEAST_PICTURE = 0.012, 0.2  # of the height or width
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


class Bars:
    """Finds rows and columns at the edges that are always black."""

    def __init__(self) -> None:
        self._rows: NDArray[np.uint8] | None = None  # the brightest that each ever was
        self._columns: NDArray[np.uint8] | None = None
        self._dark = _DARK
        self._place = (False, False, False)
        self._changed = False

    def shown(self, screen: Screen, frame: VideoFrame) -> None:
        """Learn how the frames are turned."""
        self._place = screen.place(frame)
        if frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj"):
            self._dark = _DARK_FULL

    def look(self, frame: VideoFrame) -> None:
        """Take a frame into account."""
        if frame.format.name in ("yuv420p", "yuvj420p", "yuv422p", "yuv444p", "nv12") and frame.planes[0].line_size > 0:
            plane = frame.planes[0]
            luma = np.frombuffer(memoryview(plane), np.uint8)[: plane.line_size * plane.height]
            luma = luma.reshape(plane.height, plane.line_size)[:, : plane.width]
        else:
            luma = frame.reformat(format="gray", threads=1).to_ndarray().astype(np.uint8, copy=False)
        rows, columns = luma[:, ::8].max(axis=1), luma[::8].max(axis=0)
        if self._rows is None or self._columns is None:
            self._rows, self._columns = rows, columns
        elif self._rows.shape != rows.shape or self._columns.shape != columns.shape:
            self._changed = True
        else:
            np.maximum(self._rows, rows, out=self._rows)
            np.maximum(self._columns, columns, out=self._columns)

    def crop(self, height: int, width: int) -> tuple[int, int, int, int] | None:
        """Top, left, height and width of what is inside, in a picture that is shown as (height, width)."""
        if self._rows is None or self._columns is None or self._changed:
            return None
        turned, mirrored, upside_down = self._place
        sides = (self._columns, self._rows) if turned else (self._rows, self._columns)
        spans = []
        for side, size, is_reversed in ((sides[0], height, upside_down), (sides[1], width, mirrored)):
            bright = np.flatnonzero(side[:: -1 if is_reversed else 1] > self._dark)
            if len(bright) < _LEAST_PICTURE * len(side):
                return None
            scale = size / len(side)
            first, last = round(int(bright[0]) * scale), round((int(bright[-1]) + 1) * scale)
            first, last = (
                edge if bar >= _LEAST_BAR * size else whole
                for edge, bar, whole in ((first, first, 0), (last, size - last, size))
            )
            spans.append((first, last - first))
        (top, inner_height), (left, inner_width) = spans
        if (inner_height, inner_width) == (height, width):
            return None
        return top, left, inner_height, inner_width
