"""Boundaries from elsewhere: scene lists of PySceneDetect (CSV), scenes and predictions of TransNetV2 (text)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opensora_core.curation.boundaries.boundary import Boundary, Kind
from opensora_core.errors import InputError

_MOST_BYTES = 64 * 2**20
_THRESHOLD = 0.5  # of TransNetV2's predictions, as its own `predictions_to_scenes` has it


def read_boundaries(path: Path, seconds: NDArray[np.float64]) -> list[Boundary]:
    """Read the boundaries of one source.

    Three kinds of files are told apart by what is in them:

    - a CSV table with `Start Frame` among its headers, as `scenedetect list-scenes` writes it, with or without the line
      of cuts above it. Scenes begin at frames counted from 1; a row without such a number goes by `Start Time
      (seconds)`, counted from the first frame.
    - two whole numbers a line: first and last frame of each scene, counted from 0 (`*.scenes.txt` of TransNetV2). What
      lies between two scenes becomes a gradual transition.
    - one or two numbers with a point a line, one line for each frame of the source: the probability that a transition
      is there (`*.predictions.txt`). Runs above 0.5 are transitions.

    Args:
        path: the file.
        seconds: (N,) times of the frames of the source, which the boundaries get theirs from.

    Raises:
        InputError: the file cannot be read, is none of these, or names frames that the source does not have.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read the boundaries in {path}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise InputError(f"{path} is too large for a list of scenes")
    text = data.decode("utf-8-sig", errors="replace")
    if "start frame" in text.lower() or "start time" in text.lower():
        spans = _from_table(path, text, seconds)
    else:
        rows = _numbers(path, text)
        if any("." in cell or "e" in cell.lower() for row in rows for cell in row):
            spans = _from_predictions(path, rows, len(seconds))
        else:
            spans = _from_scenes(path, rows, len(seconds))
    return [span.boundary(path, seconds) for span in sorted(set(spans), key=lambda span: span.frame) if span.frame]


@dataclass(frozen=True, slots=True)
class _Span:
    frame: int
    start: int
    end: int
    score: float = 1.0

    def boundary(self, path: Path, seconds: NDArray[np.float64]) -> Boundary:
        """With its time.

        Raises:
            InputError: there is no such frame.
        """
        if not 0 <= self.start <= self.frame < len(seconds) or self.end > len(seconds):
            raise InputError(
                f"{path} names frame {self.frame}, and the source has {len(seconds)} that decode",
                "is the file of another video, or of another version of it?",
            )
        kind: Kind = "cut" if self.end - self.start == 0 else "dissolve"
        return Boundary(self.frame, float(seconds[self.frame]), kind, self.start, self.end, self.score)


def _from_table(path: Path, text: str, seconds: NDArray[np.float64]) -> list[_Span]:
    lines = text.splitlines()
    head = next(n for n, line in enumerate(lines) if "start frame" in line.lower() or "start time" in line.lower())
    spans = []
    for number, row in enumerate(csv.DictReader(io.StringIO("\n".join(lines[head:])), skipinitialspace=True), head + 2):
        cells = {str(name).strip().lower(): value for name, value in row.items() if isinstance(value, str)}
        try:
            if cells.get("start frame"):
                frame = int(cells["start frame"]) - 1
            else:
                time = float(cells["start time (seconds)"])
                frame = int(np.abs(seconds - seconds[0] - time).argmin())
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(f"line {number} of {path} has neither a start frame nor a start time: {row}") from error
        spans.append(_Span(frame, frame, frame))
    return spans


def _numbers(path: Path, text: str) -> list[list[str]]:
    rows = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) > 2 or not all(_is_number(cell) for cell in row):
            raise InputError(
                f"line {number} of {path} is no scene: {' '.join(row)[:60]!r}",
                "--boundaries takes a scene list of PySceneDetect (CSV), or scenes or predictions of TransNetV2",
            )
    if not rows or len({len(row) for row in rows}) > 1:
        raise InputError(f"{path} holds no list of scenes")
    return rows


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _from_scenes(path: Path, rows: Sequence[Sequence[str]], num_frames: int) -> list[_Span]:
    if len(rows[0]) != 2:
        raise InputError(f"{path} has one whole number a line", "scenes have two: their first and their last frame")
    scenes = [(int(first), int(last)) for first, last in rows]
    spans = []
    for (_, end), (begin, _) in pairwise(scenes):
        if begin <= end:
            raise InputError(f"{path} has a scene that begins at {begin}, before the one ahead of it ends at {end}")
        # TransNetV2 takes the last frame before a hard cut for the transition: one frame is no mixture
        gap = begin - end - 1
        spans.append(_Span(begin, begin, begin) if gap <= 1 else _Span((end + 1 + begin) // 2, end + 1, begin))
    if scenes[-1][1] >= num_frames:
        spans.append(_Span(scenes[-1][1], scenes[-1][1], scenes[-1][1] + 1))  # refused where the rest is
    return spans


def _from_predictions(path: Path, rows: Sequence[Sequence[str]], num_frames: int) -> list[_Span]:
    chance = np.array([float(row[0]) for row in rows], np.float32)
    if len(chance) != num_frames:
        raise InputError(
            f"{path} has predictions for {len(chance)} frames, and the source has {num_frames} that decode",
            "is the file of another video, or of another version of it?",
        )
    edges = np.flatnonzero(np.diff(np.pad((chance > _THRESHOLD).astype(np.int8), 1)))
    spans = []
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        score = float(chance[first:last].max())
        if last >= num_frames or first == 0:
            continue  # before the first shot, or after the last one
        # the last frame before a hard cut is what it marks
        spans.append(
            _Span(last, last, last, score) if last - first == 1 else _Span((first + last) // 2, first, last, score)
        )
    return spans
