"""The filters, and what they say of a clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opensora_core.config import FilterConfig
from opensora_core.curation.filters.bars import BARS
from opensora_core.curation.filters.clip import AESTHETIC, SIMILARITY
from opensora_core.curation.filters.copies import COPY_BITS, COPY_SIMILARITY
from opensora_core.curation.filters.exposure import BRIGHT, DARK
from opensora_core.curation.filters.look import Filter
from opensora_core.curation.filters.motion import MOTION
from opensora_core.curation.filters.sharpness import SHARPNESS
from opensora_core.curation.filters.still import STILL
from opensora_core.curation.filters.text import TEXT
from opensora_core.errors import ConfigError

FILTERS: dict[str, Filter] = {
    "motion": MOTION,
    "still": STILL,
    "sharpness": SHARPNESS,
    "dark": DARK,
    "bright": BRIGHT,
    "bars": BARS,
    "text": TEXT,
    "aesthetic": AESTHETIC,
    "similarity": SIMILARITY,
    "copy_bits": COPY_BITS,
    "copy_similarity": COPY_SIMILARITY,
}
"""Name of a score -> what it is. A newcomer is a file and a line; scores stand in the manifest under these names."""

_SHARES = ("max_still", "max_dark", "max_bright", "max_bars", "max_text")
_MOST_COPY_BITS, _LEAST_COPY_SIMILARITY = 15.0, 0.9  # up to where the index needs not look at everything


@dataclass(frozen=True)
class Reason:
    """Why a clip is refused.

    Attributes:
        name: of the score.
        value: of the score.
        setting: the limit that it does not keep, such as `min_motion`.
        limit: its value.
        other: the clip that it is a copy of, if it is one.
    """

    name: str
    value: float
    setting: str
    limit: float
    other: str = ""

    def __str__(self) -> str:
        """For example: motion 0.12 pixels per frame of a picture 256 wide is below filter.min_motion = 0.3."""
        side = "below" if self.setting == FILTERS[self.name].least else "above"
        told = (
            f"{self.name} {self.value:.3g} {FILTERS[self.name].unit} is {side} filter.{self.setting} = {self.limit:g}"
        )
        return f"{told}: a copy of {self.other}" if self.other else told


@dataclass(frozen=True)
class Verdict:
    """What one limit says of a clip.

    Attributes:
        name: of the score.
        about: what it measures.
        unit: of value and limit.
        value: None if the clip has no such score.
        setting: the limit.
        limit: its value; 0 is none.
        is_kept: whether the clip passes.
        note: why there is no score.
    """

    name: str
    about: str
    unit: str
    value: float | None
    setting: str
    limit: float
    is_kept: bool
    note: str = ""


def measured(settings: FilterConfig) -> list[str]:
    """Names of the scores that a clip gets by being looked at."""
    return [name for name, item in FILTERS.items() if item.measure is not None and item.is_on(settings)]


def limits_of(settings: FilterConfig) -> dict[str, float]:
    """The limits that are on: setting -> value."""
    names = [name for item in FILTERS.values() for name in item.limits]
    return {name: float(getattr(settings, name)) for name in names if getattr(settings, name)}


def check(settings: FilterConfig) -> None:
    """Refuse settings that make no sense.

    Raises:
        ConfigError: a limit out of its range, or a model that needs another.
    """
    for name in limits_of(settings):
        if getattr(settings, name) < 0 and name != "min_similarity":
            raise ConfigError(f"filter.{name} = {getattr(settings, name):g} is below 0", "0 turns a limit off")
    for name in _SHARES:
        if getattr(settings, name) > 1:
            raise ConfigError(f"filter.{name} = {getattr(settings, name):g} is a share, which is 1 at most")
    if settings.max_motion and settings.min_motion > settings.max_motion:
        raise ConfigError(
            f"filter.min_motion = {settings.min_motion:g} is more than filter.max_motion = {settings.max_motion:g}",
            "no clip could pass",
        )
    if settings.min_copy_bits > _MOST_COPY_BITS:
        raise ConfigError(
            f"filter.min_copy_bits = {settings.min_copy_bits:g} is more than {_MOST_COPY_BITS:g}",
            "pictures that have nothing in common differ in 32 bits of 64; copies in fewer than 4",
        )
    if settings.max_copy_similarity and not _LEAST_COPY_SIMILARITY <= settings.max_copy_similarity <= 1:
        raise ConfigError(
            f"filter.max_copy_similarity = {settings.max_copy_similarity:g} is not in {_LEAST_COPY_SIMILARITY:g}..1",
            "copies are near 1",
        )
    if settings.max_copy_similarity and not settings.clip_model:
        raise ConfigError(
            f"filter.max_copy_similarity = {settings.max_copy_similarity:g} needs {COPY_SIMILARITY.needs}"
        )
    if settings.aesthetic_weights and not settings.clip_model:
        raise ConfigError("filter.aesthetic_weights is for the embeddings of a CLIP", "--set filter.clip_model=FOLDER")
    for name in ("frames", "clip_seconds", "clip_bytes"):
        if getattr(settings, name) <= 0:
            raise ConfigError(f"filter.{name} = {getattr(settings, name):g} is not above 0")
    if settings.workers < 0:
        raise ConfigError(f"filter.workers = {settings.workers} is below 0")


def judge(scores: Mapping[str, float], settings: FilterConfig) -> list[Reason]:
    """Why a clip with these scores is refused; nothing if it is not. A score that it does not have refuses nothing."""
    return [
        Reason(verdict.name, verdict.value, verdict.setting, verdict.limit)
        for verdict in verdicts(scores, settings)
        if not verdict.is_kept and verdict.value is not None
    ]


def verdicts(scores: Mapping[str, float], settings: FilterConfig) -> list[Verdict]:
    """What every limit, on or off, says of a clip."""
    found = []
    for name, item in FILTERS.items():
        value = scores.get(name)
        note = "" if value is not None or item.is_on(settings) or not item.needs else f"needs {item.needs}"
        for setting in item.limits:
            limit = float(getattr(settings, setting))
            is_kept = value is None or not limit or (value >= limit if setting == item.least else value <= limit)
            found.append(Verdict(name, item.about, item.unit, value, setting, limit, is_kept, note))
    return found
