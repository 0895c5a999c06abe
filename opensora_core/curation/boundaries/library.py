"""PySceneDetect's own detectors, fed with our frames and their true times: any container, exact frame numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opensora_core.curation.boundaries.boundary import Boundary, Detection, Detector, Kind, detection
from opensora_core.errors import ConfigError, InputError, nearest
from opensora_core.media.glance import Glance
from opensora_core.media.read import Limits

_WIDTH = 256  # to which PySceneDetect reduces pictures itself
_CLOCK = 1_000_000

# class, and what kind of transition it looks for
_CLASSES: dict[str, tuple[str, Kind]] = {
    "content": ("ContentDetector", "cut"),
    "adaptive": ("AdaptiveDetector", "cut"),
    "threshold": ("ThresholdDetector", "fade"),
    "histogram": ("HistogramDetector", "cut"),
    "hash": ("HashDetector", "cut"),
}


def detector(name: str) -> Detector:
    """The detector of PySceneDetect of that name; options are those of its class that are numbers."""

    def detect(
        path: Path,
        options: Mapping[str, float],
        *,
        fast: bool = False,
        threads: int = 1,
        limits: Limits,
        on_progress: Callable[[float], None] | None = None,
    ) -> Detection:
        if fast:
            raise ConfigError(f"the detector '{name}' looks at every frame", "--detector auto --fast")
        glance = Glance(path, limits, threads, picture_width=_WIDTH, on_progress=on_progress)
        return _detect(name, glance, options)

    return detect


def _detect(name: str, glance: Glance, options: Mapping[str, float]) -> Detection:
    judge = _build(name, options)
    from scenedetect import FrameTimecode
    from scenedetect.common import Timecode

    metrics = _Metrics()
    # with such a book to write into, those that compare colours compute edges as well, which they do not decide on
    judge.stats_manager = None if name in ("content", "adaptive") else metrics
    seconds: list[NDArray[np.float64]] = []
    keys: list[NDArray[np.bool_]] = []
    cuts: list[Any] = []
    values: list[float] = []
    start, last, rate = 0.0, None, Fraction(25)
    for chunk in glance:
        if not seconds:
            start, rate = float(chunk.seconds[0]), Fraction(glance.fps).limit_denominator(1001)
        seconds.append(chunk.seconds)
        keys.append(chunk.is_keyframe)
        assert chunk.pictures is not None
        for time, picture in zip(chunk.seconds.tolist(), chunk.pictures, strict=True):
            last = FrameTimecode(Timecode(round((time - start) * _CLOCK), Fraction(1, _CLOCK)), rate)
            cuts += judge.process_frame(last, picture)
            values.append(metrics.value if judge.stats_manager is metrics else float(judge._frame_score or 0))
    cuts += judge.post_process(last)
    times, score = np.concatenate(seconds), np.array(values, np.float32)
    # where a detector answers with a time between frames, the nearest frame is meant
    frames = sorted({int(np.abs(times - (start + cut.seconds)).argmin()) for cut in cuts} - {0})
    kind = _CLASSES[name][1]
    boundaries = tuple(
        Boundary(frame, float(times[frame]), kind, frame, frame, float(score[frame])) for frame in frames
    )
    return detection(glance, times, np.concatenate(keys), boundaries, {"score": score})


class _Metrics:
    """Stands where PySceneDetect would keep all numbers of all frames: keeps the latest."""

    def __init__(self) -> None:
        self.value = 0.0

    def set_metrics(self, timecode: object, metrics: Mapping[str, float]) -> None:
        """Note the number of a frame."""
        self.value = float(next(iter(metrics.values())))

    def metrics_exist(self, timecode: object, names: object) -> bool:
        """Nothing was computed before."""
        return False


def _build(name: str, options: Mapping[str, float]) -> Any:
    """The detector with its options; those that are whole numbers in PySceneDetect have to be whole."""
    try:
        from scenedetect import detectors
    except ImportError as error:
        raise InputError(
            f"the detector '{name}' is one of PySceneDetect, which is not installed",
            "pip install scenedetect-headless, or --detector auto",
        ) from error
    build = getattr(detectors, _CLASSES[name][0])
    known = {
        key: type(parameter.default)
        for key, parameter in inspect.signature(build).parameters.items()
        if isinstance(parameter.default, int | float)
    }
    given: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"the detector '{name}' has no option '{key}'", nearest(key, known))
        # a length may be a number of frames or of seconds
        whole = known[key] is not float and float(value).is_integer()
        given[key] = known[key](value) if whole else float(value)
    try:
        return build(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the detector '{name}' does not take {dict(options)}: {error}") from error
