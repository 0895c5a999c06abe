"""Small pictures of frames, sampled straight from the planes that the decoder has them in."""

from __future__ import annotations

import re

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

ROWS, COLUMNS = 36, 64

_PLANAR = re.compile(r"(?:yuv[aj]?4\d\dp|gray)(?:(9|10|12|14|16)le)?")
_PAIRED = {"nv12": 0, "nv16": 0, "nv21": 1, "p010le": 0, "p016le": 0, "p210le": 0}  # -> which chroma comes first


class Sketch:
    """Takes samples from the planes of frames. The places are looked up once for each size and format."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._places: list[tuple[int, NDArray[np.intp]]] = []  # of luma, and of both chroma: plane and places in it
        self._shift: int | None = None  # to 8 bits, of samples of two bytes
        self._scaler = VideoReformatter()

    def draw(self, frame: VideoFrame, luma: NDArray[np.uint8], chroma: NDArray[np.uint8]) -> None:
        """Fill luma (36, 64) and chroma (2, 18, 32)."""
        planes = frame.planes
        key = (frame.format.name, frame.width, frame.height, *(plane.line_size for plane in planes))
        if key != self._key:
            self._key = key
            self._look_up(frame)
        if not self._places:
            self._scale(frame, luma, chroma)
            return
        parts = (luma, chroma[0], chroma[1])
        for (plane, places), part in zip(self._places, parts, strict=False):
            if self._shift is None:
                np.frombuffer(memoryview(planes[plane]), np.uint8).take(places, out=part, mode="clip")
            else:
                part[:] = np.frombuffer(memoryview(planes[plane]), np.uint16).take(places, mode="clip") >> self._shift
        if len(self._places) == 1:
            chroma[:] = 128

    def _look_up(self, frame: VideoFrame) -> None:
        name, planes = frame.format.name, frame.planes
        self._places, self._shift = [], None
        planar = _PLANAR.fullmatch(name)
        if (planar is None and name not in _PAIRED) or any(plane.line_size <= 0 for plane in planes):
            return
        if name.startswith("p"):
            self._shift = 8
        elif planar is not None and planar[1]:
            self._shift = int(planar[1]) - 8
        width = 1 if self._shift is None else 2

        def places(plane: int, rows: int, columns: int, step: int = 1, offset: int = 0) -> tuple[int, NDArray[np.intp]]:
            part = planes[plane]
            y = (np.arange(rows) * 2 + 1) * part.height // (2 * rows)
            x = (np.arange(columns) * 2 + 1) * part.width // (2 * columns)
            if part.height >= 2 * rows:
                y &= -2  # the upper field, where there are two
            return plane, (y[:, None] * (part.line_size // width) + x * step + offset).astype(np.intp)

        self._places = [places(0, ROWS, COLUMNS)]
        if name in _PAIRED:
            first = _PAIRED[name]
            self._places += [places(1, ROWS // 2, COLUMNS // 2, 2, offset) for offset in (first, 1 - first)]
        elif not name.startswith("gray"):
            self._places += [places(plane, ROWS // 2, COLUMNS // 2) for plane in (1, 2)]

    def _scale(self, frame: VideoFrame, luma: NDArray[np.uint8], chroma: NDArray[np.uint8]) -> None:
        small = self._scaler.reformat(
            frame, width=COLUMNS, height=ROWS, format="yuv444p", interpolation=Interpolation.POINT, threads=1
        ).to_ndarray()
        luma[:] = small[0]
        chroma[:] = small[1:, ::2, ::2]
