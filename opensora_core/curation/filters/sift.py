"""The job: the clips of a manifest are measured and judged, and the manifest is left with those that pass."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_core.config import FilterConfig, to_dict, with_settings
from opensora_core.curation.events import (
    ClipRefused,
    Event,
    FilterDone,
    FilterPlan,
    FilterProgress,
)
from opensora_core.curation.filters.clip import Vector
from opensora_core.curation.filters.copies import (
    Index,
    bits_of,
    fingerprint,
    most_bits,
)
from opensora_core.curation.filters.look import Place
from opensora_core.curation.filters.report import write_report
from opensora_core.curation.filters.rows import Rows, manifest_of, output_of, read_rows, write_rows
from opensora_core.curation.filters.scoring import STATE, Log, Measured, Task, wanted_of
from opensora_core.curation.filters.table import FILTERS, Reason, check, judge, limits_of
from opensora_core.curation.records import MANIFEST_FILE, REJECTS_FILE, line
from opensora_core.errors import ConfigError, InputError
from opensora_core.files import write_bytes
from opensora_core.notice import Notice
from opensora_core.runs import only_writer

if TYPE_CHECKING:
    from opensora_core.data.manifest import Clip, Manifest

SETTINGS_FILE = "settings.json"
REPORT_FILE = "filters.html"
UNREADABLE = "unreadable"


@dataclass
class Judged:
    """What became of the clips.

    Attributes:
        scores: of each, copies among them.
        reasons: number of a refused clip -> why, one or more.
        broken: number of a clip that cannot be decoded -> why.
        copies: number of a copy -> number of the clip that it is a copy of.
    """

    scores: list[dict[str, float]]
    reasons: dict[int, list[Reason]] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)

    def told(self) -> dict[int, str]:
        """Number of each refused clip -> why, in words."""
        told = {number: "; ".join(map(str, reasons)) for number, reasons in self.reasons.items()}
        return {**told, **{number: f"{UNREADABLE}: {reason}" for number, reason in self.broken.items()}}


def apply(
    manifest: Path, settings: FilterConfig | None, output: Path | None = None, *, report: bool = False
) -> Iterator[Event]:
    """Measure the clips of a manifest, and leave those that pass in it.

    Clips that were measured before are not measured again, and those that were refused before are judged anew: with
    looser limits they come back, and with all limits off the manifest is what it was, with scores.

    Args:
        manifest: a file in any form that `data` reads, or a folder with a `manifest.jsonl`.
        settings: limits and models; None are those that the folder is filtered with already, or the defaults.
        output: the folder to write `manifest.jsonl`, `rejects.jsonl` and the scores to; None is that of the manifest.
        report: also write a page, `filters.html`.

    Yields:
        Notices, how far it is, every clip that is refused, and at the end what there is.

    Raises:
        ConfigError, UsageError: settings or a manifest that make no sense.
        InputError: the manifest has a row that cannot be used, or not a single clip passes.
        WeightsError: a model that is not there.
        ResourceError: the disk is full; what was measured is kept.
    """
    path = manifest_of(Path(manifest))
    folder = output_of(path, output)
    settings = settings or saved_settings(folder) or FilterConfig()
    check(settings)
    with only_writer(folder):
        yield from sift(path, settings, folder, report=report)


def sift(
    manifest: Path, settings: FilterConfig, output: Path, *, report: bool = False, rejects: Path | None = None
) -> Iterator[Event]:
    """Do what `apply` does, for somebody who holds the folder already; `rejects` as `read_rows` takes them."""
    began = time.monotonic()
    rows = read_rows(manifest, output, rejects)
    log = Log(output)
    tasks = tasks_of(rows.clips, settings)
    missing = log.missing(tasks)
    yield from log.measure(missing, settings)
    known = [log.get(task.name, task.identity) for task in tasks]
    judged = judge_all(rows.clips, known, settings)
    yield from _notices(rows.clips, judged, settings)
    write_bytes(output / STATE / SETTINGS_FILE, line(to_dict(settings)))
    write_rows(rows, _scored(rows, known, judged), judged.told())
    log.compact(task.name for task in tasks)
    for number, reason in sorted(judged.told().items()):
        names = tuple(item.setting for item in judged.reasons.get(number, ())) or (UNREADABLE,)
        yield ClipRefused(rows.clips[number].id, names, reason)
    page = None
    if report:
        page = output / REPORT_FILE
        write_report(page, rows.clips, judged.scores, judged.told(), settings, copies=judged.copies)
    done = _done(rows, judged, settings, page)
    if not done.num_kept:
        told = ", ".join(f"filter.{name}: {count}" for name, (count, _) in done.refused.items())
        raise InputError(
            f"not a single clip of {done.num_clips} passes: {told.replace('filter.unreadable', UNREADABLE)}",
            f"loosen a limit and repeat: nothing is measured again; see {output / REJECTS_FILE}",
        )
    yield FilterDone(**{**done.__dict__, "measured": len(missing), "seconds": time.monotonic() - began})


def examine(manifest: Path, settings: FilterConfig | None, output: Path | None = None) -> Iterator[Event]:
    """Tell what `apply` would do. Nothing is decoded or written.

    Raises:
        ConfigError, UsageError, InputError: as `apply`.
    """
    path = manifest_of(Path(manifest))
    folder = output_of(path, output)
    settings = settings or saved_settings(folder) or FilterConfig()
    check(settings)
    rows = read_rows(path, folder)
    missing = Log(folder).missing(tasks_of(rows.clips, settings))
    yield FilterPlan(path, folder, len(rows.clips), len(missing), limits_of(settings))


def saved_settings(output: Path) -> FilterConfig | None:
    """What a folder is filtered with; None if it is not."""
    with suppress(OSError, ValueError, ConfigError):
        told = json.loads((output / STATE / SETTINGS_FILE).read_text(encoding="utf-8"))
        known = to_dict(FilterConfig())
        return with_settings(FilterConfig(), {name: value for name, value in told.items() if name in known})
    return None


def unfilter(settings: FilterConfig) -> FilterConfig:
    """The same settings without a limit, so that every clip that can be decoded is kept."""
    return with_settings(settings, dict.fromkeys(limits_of(settings), 0.0))


def tasks_of(clips: Manifest, settings: FilterConfig) -> list[Task]:
    """What is to be measured of each clip."""
    return [task_of(clip, settings) for clip in clips]


def task_of(clip: Clip, settings: FilterConfig) -> Task:
    """What is to be measured of a clip."""
    try:
        facts = clip.path.stat()
        identity = f"{clip.sha256 or facts.st_mtime_ns} {facts.st_size}"
    except OSError:
        identity = "missing"
    place = Place(clip.path, clip.num_frames, clip.start_seconds, clip.end_seconds, clip.caption)
    return Task(clip.id, identity, place, wanted_of(settings, clip.caption))


def judge_all(clips: Manifest, known: Sequence[Measured], settings: FilterConfig) -> Judged:
    """Judge every clip by its scores, and those that pass by each other.

    Of copies the one with the largest picture is kept, and of equal ones the first.

    Raises:
        ConfigError: a limit whose score takes a model, which is not set, and clips that have no such score.
    """
    judged = Judged([])
    for number, (clip, found) in enumerate(zip(clips, known, strict=True)):
        own = {name: value for name, value in clip.scores.items() if name in FILTERS and name not in found.made}
        own = {name: value for name, value in own.items() if FILTERS[name].measure is not None}
        judged.scores.append({**own, **found.scores})
        if found.broken:
            judged.broken[number] = found.broken
        elif reasons := judge(judged.scores[number], settings):
            judged.reasons[number] = reasons
    _require_scores(judged, settings)
    if settings.min_copy_bits or settings.max_copy_similarity:
        _find_copies(clips, known, judged, settings)
    return judged


def _require_scores(judged: Judged, settings: FilterConfig) -> None:
    for name, item in FILTERS.items():
        setting = next((setting for setting in item.limits if getattr(settings, setting)), None)
        if setting is None or item.is_on(settings) or item.measure is None:
            continue
        lacking = sum(name not in scores for number, scores in enumerate(judged.scores) if number not in judged.broken)
        if lacking:
            raise ConfigError(
                f"filter.{setting} = {getattr(settings, setting):g}: {lacking} clips have no score '{name}', "
                f"which needs {item.needs}",
                "set what it needs, or leave the limit out",
            )


def _find_copies(clips: Manifest, known: Sequence[Measured], judged: Judged, settings: FilterConfig) -> None:
    by_bits = Index(most_bits(settings))
    by_vector = Index(bits_of(settings.max_copy_similarity))
    vectors: dict[int, Vector] = {}
    order = [
        (-(clip.width or 0) * (clip.height or 0), number)
        for number, clip in enumerate(clips)
        if number not in judged.reasons and number not in judged.broken
    ]
    for _, number in sorted(order):
        found, reasons = known[number], []
        if settings.min_copy_bits and found.code and (near := min(by_bits.near(found.code), default=None)):
            reasons.append(("copy_bits", near[0] / 5, near[1]))
        code = 0
        if settings.max_copy_similarity and found.vector is not None:
            vector, code = found.vector, fingerprint(found.vector)
            likely = ((float(vector @ vectors[other]), other) for _, other in by_vector.near(code))
            alike = max(likely, default=(0.0, 0), key=lambda item: (item[0], -item[1]))
            if alike[0] > settings.max_copy_similarity:
                reasons.append(("copy_similarity", alike[0], alike[1]))
        for name, value, other in reasons:
            setting = FILTERS[name].limits[0]
            judged.scores[number][name] = float(f"{value:.6g}")
            reason = Reason(name, value, setting, float(getattr(settings, setting)), clips[other].id)
            judged.reasons.setdefault(number, []).append(reason)
            judged.copies[number] = other
        if not reasons:
            if found.code:
                by_bits.add(found.code, number)
            if code and found.vector is not None:
                by_vector.add(code, number)
                vectors[number] = found.vector


def _notices(clips: Manifest, judged: Judged, settings: FilterConfig) -> Iterator[Notice]:
    if settings.min_similarity and settings.clip_model:
        silent = sum(not clip.caption for clip in clips)
        if silent:
            yield Notice(
                f"{silent} of {len(clips)} clips have no caption, so filter.min_similarity does not hold for them"
            )


def _scored(rows: Rows, known: Sequence[Measured], judged: Judged) -> Iterator[bytes]:
    """The rows with the scores that they have now; those of filters that were not asked stay."""
    for number, text in enumerate(rows.lines):
        row = rows.row(number)
        before = dict(row.get("scores") or {})
        gone = {name for name in FILTERS if FILTERS[name].measure is None} | known[number].made.keys()
        scores = {name: value for name, value in before.items() if name not in gone}
        ours = judged.scores[number]
        scores |= {name: ours[name] for name in FILTERS if name in ours}
        yield text if scores == before and list(scores) == list(before) else line({**row, "scores": scores}).strip()


def _done(rows: Rows, judged: Judged, settings: FilterConfig, page: Path | None) -> FilterDone:
    told = judged.told()
    counts: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    kept_seconds = 0.0
    for number, clip in enumerate(rows.clips):
        seconds = clip.duration_seconds or 0.0
        if number not in told:
            kept_seconds += seconds
            continue
        for name in [item.setting for item in judged.reasons.get(number, ())] or [UNREADABLE]:
            counts[name] += 1
            lengths[name] += seconds  # type: ignore[assignment]
    return FilterDone(
        manifest=rows.folder / MANIFEST_FILE,
        num_clips=len(rows.clips),
        num_kept=len(rows.clips) - len(told),
        kept_seconds=kept_seconds,
        refused={name: (counts[name], float(lengths[name])) for name in sorted(counts)},
        limits=limits_of(settings),
        measured=0,
        seconds=0.0,
        report=page,
    )


def measure_first(clips: Sequence[Mapping[str, Any]], settings: FilterConfig, output: Path) -> Iterator[FilterProgress]:
    """Measure clips that are to be in the manifest of a folder, before it is written.

    Args:
        clips: their rows, with paths relative to `output`.
        settings: models, and how closely to look.
        output: the folder.
    """
    from opensora_core.data.manifest import Manifest

    found = Manifest.of((_clip_of(row, output) for row in clips), folder=output.absolute())
    log = Log(output)
    yield from log.measure(log.missing(tasks_of(found, settings)), settings)


def _clip_of(row: Mapping[str, Any], output: Path) -> Clip:
    from opensora_core.data.manifest import Clip

    names = ("num_frames", "start_seconds", "end_seconds", "sha256", "caption")
    return Clip(output.absolute() / row["path"], **{name: row[name] for name in names if name in row})
