"""Text on the screen, by a detector that the user has."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from opensora_core.config import FilterConfig
from opensora_core.curation.filters.look import Filter, Look
from opensora_core.errors import CheckpointError, UsageError, WeightsError
from opensora_core.media.pixels import Frames

_STRIDE = 32  # pixels that a side of what a detector takes is a multiple of
_SURE = 0.5
_EAST_MEAN, _DB_MEAN = (123.68, 116.78, 103.94), (122.67891434, 116.66876762, 104.00698793)
_DB_UNCLIP = 2.0
_HINT = "EAST: frozen_east_text_detection.pb; DB: an .onnx of OpenCV's zoo; or --set filter.text_model=easyocr"

Maps = NDArray[np.float32]
Detector = Callable[[Frames], list[Any]]
"""A picture (H, W, 3) RGB with sides that are multiples of 32 -> polygons (K, 2) in its pixels."""


def measure(look: Look, settings: FilterConfig) -> float | None:
    """Largest share of a picture that is covered by boxes of text."""
    detect = detector(settings.text_model)
    return max(_share(detect, look.pictures[place]) for place in look.firsts[::2])


def _share(detect: Detector, picture: Frames) -> float:
    height, width = (max(round(side / _STRIDE), 1) * _STRIDE for side in picture.shape[:2])
    resized = np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    covered = np.zeros((height, width), np.uint8)
    for polygon in detect(resized):  # they overlap, and what two cover counts once
        cv2.fillPoly(covered, [np.asarray(polygon, np.float32).round().astype(np.int32)], (1,))
    return float(covered.mean())


@lru_cache(1)
def detector(model: str) -> Detector:
    """The detector of a model.

    Args:
        model: the path of a network for OpenCV, EAST (two outputs) or DB (one), or `easyocr`.

    Raises:
        UsageError: easyocr is not installed.
        WeightsError: there is no such file.
        CheckpointError: OpenCV cannot read it.
    """
    if model == "easyocr":
        return _easyocr()
    path = Path(model)
    if not path.is_file() or path.suffix not in (".pb", ".onnx"):
        raise WeightsError(f"filter.text_model = {model!r} is no .pb or .onnx file", _HINT)
    try:
        net: Any = cv2.dnn.readNet(str(path))
        names = list(net.getUnconnectedOutLayersNames())
    except cv2.error as error:
        raise CheckpointError(f"OpenCV cannot read {path}: {' '.join(str(error).split())}", _HINT) from error
    is_east = len(names) == 2

    def detect(picture: Frames) -> list[Any]:
        # EAST was trained on RGB, OpenCV's DB on BGR
        scale, mean = (1.0, _EAST_MEAN) if is_east else (1 / 255, _DB_MEAN)
        try:
            net.setInput(cv2.dnn.blobFromImage(picture, scale, mean=mean, swapRB=not is_east))
            maps = [np.asarray(output, np.float32) for output in net.forward(names)]
        except cv2.error as error:
            raise CheckpointError(f"OpenCV cannot run {path}: {' '.join(str(error).split())}", _HINT) from error
        if is_east:
            return east_boxes(*sorted((output[0] for output in maps), key=len))
        return db_boxes(maps[0].reshape(maps[0].shape[-2:]))

    return detect


def east_boxes(scores: Maps, geometry: Maps) -> list[Any]:
    """Boxes of EAST (Zhou et al. 2017, section 3.3).

    Args:
        scores: (1, h, w), how sure it is of text at every fourth pixel.
        geometry: (5, h, w), from there to the upper, right, lower and left side in pixels, and the angle.
    """
    rows, columns = np.nonzero(scores[0] > _SURE)
    top, right, bottom, left, angle = geometry[:, rows, columns]
    across, down = np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)
    place = 4.0 * np.stack([columns, rows], -1)
    corners = [place + x[:, None] * across + y[:, None] * down for y in (-top, bottom) for x in (-left, right)]
    return [[box[0], box[1], box[3], box[2]] for box in zip(*corners, strict=True)]


def db_boxes(sure: Maps) -> list[Any]:
    """Boxes of DB (Liao et al. 2020, section 3.4): what it is sure of, and around that what training had shrunk away.

    Args:
        sure: (H, W), how sure it is that a pixel is in the core of a text.
    """
    cores, _ = cv2.findContours((sure > 0.3).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    boxes = []
    for core in cores:
        middle, (width, height), angle = cv2.minAreaRect(core)
        inside = cv2.fillPoly(np.zeros(sure.shape, np.uint8), [core], (1,))
        if min(width, height) < 2 or float(sure[inside > 0].mean()) < _SURE:
            continue
        grown = 2 * _DB_UNCLIP * width * height / (2 * (width + height))
        boxes.append(cv2.boxPoints((middle, (width + grown, height + grown), angle)))
    return boxes


def _easyocr() -> Detector:
    try:
        easyocr: Any = import_module("easyocr")
    except ImportError:
        raise UsageError("filter.text_model = easyocr, which is not installed", "pip install easyocr") from None
    reader = easyocr.Reader(["en"], recognizer=False, verbose=False)

    def detect(picture: Frames) -> list[Any]:
        level, free = reader.detect(picture)
        boxes = [[(left, top), (right, top), (right, bottom), (left, bottom)] for left, right, top, bottom in level[0]]
        return [*boxes, *free[0]]

    return detect


TEXT = Filter(
    about="share of the picture that is covered by text",
    unit="of the picture",
    measure=measure,
    most="max_text",
    is_on=lambda settings: bool(settings.text_model),
    made_by=lambda settings: f"1 {settings.text_model} {settings.frames}",
    needs="a text detector: --set filter.text_model=PATH (EAST .pb or DB .onnx), or easyocr",
)
