"""Where shots begin: one streaming pass over a video, and detectors that decide on what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from opensora_core.curation.boundaries.auto import detect_auto
from opensora_core.curation.boundaries.boundary import Boundary, Detection, Detector, Kind
from opensora_core.curation.boundaries.files import read_boundaries
from opensora_core.curation.boundaries.library import detector as _of_library
from opensora_core.errors import ConfigError, nearest
from opensora_core.media.glance import LONG
from opensora_core.media.read import Limits

__all__ = ["DETECTORS", "Boundary", "Detection", "Detector", "Kind", "detect", "read_boundaries"]

DETECTORS: dict[str, Detector] = {
    "auto": detect_auto,
    "content": _of_library("content"),
    "adaptive": _of_library("adaptive"),
    "threshold": _of_library("threshold"),
    "histogram": _of_library("histogram"),
    "hash": _of_library("hash"),
}
"""Ours, and those of PySceneDetect with the options of their classes."""


def detect(
    path: Path,
    detector: str = "auto",
    *,
    options: Mapping[str, float] = {},
    fast: bool = False,
    threads: int = 1,
    limits: Limits = LONG,
    on_progress: Callable[[float], None] | None = None,
) -> Detection:
    """Find the shot boundaries of a video.

    Args:
        path: the video.
        detector: one of `DETECTORS`.
        options: of the detector.
        fast: decode only keyframes, and the stretches that they and the sizes of the packets make look suspicious;
            for `auto` alone. Most gradual transitions are missed.
        threads: of the decoder.
        limits: what the file may cost.
        on_progress: is told the share of the video that is done, 0..1, from time to time.

    Raises:
        InputError: the file is no video, nothing in it can be decoded, or it costs more than `limits`.
        ConfigError: no such detector, or no such option.
    """
    if detector not in DETECTORS:
        raise ConfigError(f"there is no detector '{detector}'", nearest(detector, DETECTORS))
    return DETECTORS[detector](path, options, fast=fast, threads=threads, limits=limits, on_progress=on_progress)
