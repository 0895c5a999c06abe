"""Columns of a table: texts as one run of bytes, numbers as arrays. They grow by rows, skip some, and are then frozen.

Nothing in them is a Python object per row, so they are small, fork without being copied, and pickle as they lie.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_TEXT = b"\xff"
"""Stands for an absent text where that is not the same as an empty one: no text begins with this byte in UTF-8."""


class Texts:
    """A frozen column of texts.

    Args:
        blob: their UTF-8 without gaps; lone surrogates, which names of files and JSON may hold, are encoded as well.
        ends: where each one ends in it.
    """

    def __init__(self, blob: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self._blob, self._ends = blob, ends

    def __getitem__(self, row: int) -> str | None:
        start = self._ends.item(row - 1) if row else 0
        text = self._blob[start : self._ends.item(row)].tobytes()
        return None if text == NO_TEXT else text.decode("utf-8", "surrogatepass")

    def select(self, rows: NDArray[np.int64]) -> Texts:
        """The texts of some rows, given by numbers of 0 or more."""
        stops = self._ends[rows]
        starts = np.where(rows == 0, 0, self._ends[rows - 1])
        view, blob = self._blob.data, bytearray()
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            blob += view[start:stop]
        return Texts(_frozen(blob, np.uint8), np.cumsum(stops - starts))


class TextsInMaking:
    """A column of texts that grows.

    Args:
        absent: what rows that are skipped hold: nothing, or `NO_TEXT`.
    """

    def __init__(self, absent: bytes = b"") -> None:
        self._absent, self._blob, self._ends = absent, bytearray(), array("q")

    def put(self, row: int, text: str) -> None:
        """Set a row that comes after all the others."""
        if row != len(self._ends):
            self._fill(row)
        self._blob += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._blob))

    def _fill(self, row: int) -> None:
        if missing := row - len(self._ends):
            end, step = len(self._blob), len(self._absent)
            self._blob += self._absent * missing
            self._ends.extend(
                range(end + step, end + step * missing + 1, step) if step else array("q", [end]) * missing
            )

    def done(self, length: int) -> Texts:
        """The column, of so many rows."""
        self._fill(length)
        return Texts(_frozen(self._blob, np.uint8), _frozen(self._ends, np.int64))


class NumbersInMaking:
    """A column of numbers that grows: whole ones of 0 or more, or real ones."""

    def __init__(self, is_whole: bool) -> None:
        self._kind: type[np.generic] = np.int64 if is_whole else np.float64
        self._values: array[Any] = array("q" if is_whole else "d")
        self._absent: array[Any] = array(self._values.typecode, [-1 if is_whole else math.nan])

    def put(self, row: int, value: float) -> None:
        """Set a row that comes after all the others."""
        if row != len(self._values):
            self._fill(row)
        self._values.append(value)

    def _fill(self, row: int) -> None:
        if missing := row - len(self._values):
            self._values.extend(self._absent * missing)

    def done(self, length: int) -> NDArray[Any]:
        """The column, of so many rows; see `present`."""
        self._fill(length)
        return _frozen(self._values, self._kind)


def present(value: float) -> float | None:
    """None for what stands for an absent number: -1 among whole ones, NaN among real ones."""
    return None if value == -1 or value != value else value  # noqa: PLR0124 - a million times, and half as long


def _frozen(values: bytearray | array[Any], kind: type[np.generic]) -> NDArray[Any]:
    """A read-only view of memory that cannot grow any more."""
    view = np.frombuffer(values, kind)
    view.flags.writeable = False
    return view
