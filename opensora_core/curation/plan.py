"""What is asked for, whether it makes sense, and what of it is done already."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_core.config import FilterConfig, SplitConfig
from opensora_core.curation.boundaries import DETECTORS
from opensora_core.curation.filters import check as check_filter
from opensora_core.curation.records import Record, Records, sum_of
from opensora_core.curation.sources import Source, find_sources
from opensora_core.curation.stats import check_stats
from opensora_core.curation.work import Job, Task, encoding_of, parse_options
from opensora_core.errors import ConfigError, InputError, UsageError, nearest
from opensora_core.files import sha256
from opensora_core.media.encoding import settled

VERSION = 2
"""Of what a source becomes with the same settings. A higher one makes finished sources be done again."""

_FINISHED = ("ok", "damaged")
_LIMITS = ("stall_seconds", "source_seconds", "source_bytes", "source_frames", "source_pixels")
_COSTS = ("engine", "ray_address", "workers", "decode_threads", *_LIMITS)
"""Settings that say where a source is split and what it may cost. They change nothing in the clips of one that stays
within them."""

_BOUNDARY_NAMES = (
    *("{name}.scenes.txt", "{stem}.scenes.txt", "{name}.predictions.txt", "{stem}.predictions.txt"),
    *("{stem}-Scenes.csv", "{name}-Scenes.csv", "{name}.csv", "{stem}.csv", "{name}.txt", "{stem}.txt"),
)


@dataclass(frozen=True)
class Request:
    """What is asked for, besides the settings.

    Attributes:
        inputs: files, folders, globs and manifests.
        output: the folder that is written.
        listed: more files, as from a list; a missing one is rejected, where a missing input ends the run.
        shard: (number from 0, of how many): split only that part of the sources. The others may run at the same time.
        boundaries: scenes from elsewhere: a file for a single source, or a folder with a file for each.
        stats: where to write the scores of every frame; see `stats.write_stats`.
        preview: write a page with a picture of each source.
        redo: split again what is finished.
        filter: measure the clips and leave out those beyond its limits. None: a folder that is filtered stays so, with
            the limits that it has.
        report: write a page about the scores.
    """

    inputs: Sequence[str | Path]
    output: Path
    listed: Sequence[str | Path] = ()
    shard: tuple[int, int] | None = None
    boundaries: Path | None = None
    stats: Path | None = None
    preview: bool = False
    redo: bool = False
    filter: FilterConfig | None = None
    report: bool = False


def check(config: SplitConfig, request: Request) -> None:
    """Refuse what cannot be carried out, before anything is opened.

    Raises:
        ConfigError: a setting by itself, or two that contradict each other.
        UsageError: what is asked for beside them.
        DeviceError: a hardware encoder that is not there.
    """
    _check_settings(config)
    if config.cut in ("exact", "smart"):
        settled(encoding_of(config))
    if request.shard is not None and not 0 <= request.shard[0] < request.shard[1]:
        raise UsageError(f"there is no shard {request.shard[0]} of {request.shard[1]}", "--shard 0/4 to --shard 3/4")
    if request.boundaries is not None and not request.boundaries.exists():
        raise InputError(f"there is no file or folder {request.boundaries}", "--boundaries takes scenes from elsewhere")
    if request.stats is not None:
        check_stats(request.stats)
    if request.filter is not None:
        check_filter(request.filter)
        if request.shard is not None:
            raise UsageError(
                "a shard does not know the clips of the others, so it is not filtered",
                f"when all are done: osora split {request.output} --only-filter",
            )
    elif request.report:
        raise UsageError("a report is about clips that are filtered", "--filter --report")


def _check_settings(config: SplitConfig) -> None:
    if config.detector not in DETECTORS:
        raise ConfigError(f"unknown detector '{config.detector}'", nearest(config.detector, DETECTORS))
    if config.fast and config.detector != "auto":
        raise ConfigError(f"split.fast is for the detector auto, not for {config.detector}", "--detector auto")
    parse_options(config.detector_options)
    for name in ("min_seconds", "max_seconds", "trim", "fps", "short_side", "workers"):
        if getattr(config, name) < 0:
            raise ConfigError(f"split.{name} = {getattr(config, name)} is below 0")
    for name in ("decode_threads", *_LIMITS):
        if getattr(config, name) <= 0:
            raise ConfigError(f"split.{name} = {getattr(config, name)} is not above 0")
    if config.ray_address and config.engine != "ray":
        raise ConfigError(
            f"split.ray_address = {config.ray_address} says nothing to engine {config.engine}", "--engine ray"
        )
    if config.max_seconds and config.min_seconds > config.max_seconds:
        raise ConfigError(
            f"split.min_seconds = {config.min_seconds:g} is more than split.max_seconds = {config.max_seconds:g}",
            "no clip could be that long",
        )
    for name in ("fps", "crop_black_bars"):
        if getattr(config, name) and config.cut != "exact":
            raise ConfigError(
                f"split.{name} encodes every frame, which split.cut = {config.cut} does not", "--cut exact"
            )


def settings_of(config: SplitConfig) -> dict[str, Any]:
    """The settings that clips depend on."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _COSTS}


def sources_of(request: Request) -> tuple[list[Source], list[str]]:
    """All sources of the inputs, and what the user should know of them.

    Raises:
        InputError: there is none.
        UsageError: boundaries of one source, and several of these.
    """
    found = find_sources(request.inputs, listed=request.listed, output=request.output)
    if not found.sources:
        raise InputError(
            f"there is no video in {', '.join(map(str, request.inputs)) or 'the list'}"
            + (f" ({'; '.join(found.notices)})" if found.notices else ""),
            "name a video, a folder of videos, a glob, a manifest, or - for a list on stdin",
        )
    if request.boundaries is not None and request.boundaries.is_file() and len(found.sources) > 1:
        raise UsageError(
            f"{request.boundaries} holds the scenes of one video, and there are {len(found.sources)}",
            "name a folder with a file for each",
        )
    return found.sources, found.notices


class Plan:
    """What is to be done, and what is done already.

    Attributes:
        tasks: to be done, in the order of their paths.
        skipped: names of finished ones.
        unusable: sources that cannot be opened, and the names of their records.
    """

    def __init__(self, config: SplitConfig, request: Request, records: Records, sources: Sequence[Source]) -> None:
        self.config, self.request, self.records = config, request, records
        self.tasks: list[Task] = []
        self.skipped: list[str] = []
        self.unusable: list[tuple[Source, str]] = []
        self._moved: list[tuple[Record, str]] = []
        self._stale: set[str] = set()
        limits = sum_of({name: getattr(config, name) for name in _LIMITS})
        self.job = Job(config, request.output, limits, with_scores=request.stats is not None)
        self._settings = {"version": VERSION, **settings_of(config)}
        self._sum = sum_of(self._settings)
        self._known = records.read()
        own = [item for item in sources if request.shard is None or item.shard(request.shard[1]) == request.shard[0]]
        names = self._names(own)
        by_source: dict[str, list[str]] = {}
        for record in self._known.values():
            by_source.setdefault(record.source, []).append(record.name)
        for source, name in zip(own, names, strict=True):
            # of what the file was before, nothing is left
            self._stale.update(other for other in by_source.get(str(source.path), ()) if other != name)
            if source.reason:
                self.unusable.append((source, name))
            else:
                self._sort_in(source, name)

    @property
    def num_workers(self) -> int:
        """Processes to use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.config.workers or cores

    def forget(self) -> bool:
        """Take back the records of what is stale or done again, and follow files that have moved; whether any was."""
        for name in sorted(self._stale):
            self.records.remove(name)
        again = [task.name for task in self.tasks if task.name in self._known]
        for name in again:
            self.records.forget(name)
        for record, source in self._moved:
            self.records.rename(record, source)
        return bool(self._stale or again or self._moved)

    def _names(self, sources: Sequence[Source]) -> list[str]:
        """A name for each source. Of several with the same content, the names of all but one depend on the path."""
        known = [record for record in self._known.values() if record.identity]
        own = {(record.identity, record.source): record.name for record in known}
        gone: dict[str, list[Record]] = {}
        for record in known:
            if not os.path.lexists(record.source):
                gone.setdefault(record.identity, []).append(record)
        taken = {record.name for record in known}
        names = []
        for source in sources:
            name = own.get((source.identity, str(source.path)))
            if name is None and gone.get(source.identity):  # the file has moved to here
                record = gone[source.identity].pop()
                self._moved.append((record, str(source.path)))
                name = record.name
            if name is None:
                name = source.name(by_path=source.name(by_path=False) in taken)
            taken.add(name)
            names.append(name)
        return names

    def _sort_in(self, source: Source, name: str) -> None:
        task = self._task(source, name)
        record = self._known.get(name)
        is_finished = (
            record is not None
            and record.settings == task.settings
            and (record.status in _FINISHED or (record.status == "rejected" and record.limits == self.job.limits))
            and (not self.job.with_scores or record.status == "rejected" or self.records.beside(name, ".npz").is_file())
            and not self.request.redo
        )
        if is_finished:
            self.skipped.append(name)
        else:
            self.tasks.append(task)

    def _task(self, source: Source, name: str) -> Task:
        boundaries = self._boundaries(source)
        if boundaries is None:
            return Task(source, name, self._sum)
        return Task(source, name, sum_of({**self._settings, "boundaries": sha256(boundaries)}), boundaries)

    def _boundaries(self, source: Source) -> Path | None:
        given = self.request.boundaries
        if given is None or given.is_file():
            return given
        names = [name.format(name=source.path.name, stem=source.path.stem) for name in _BOUNDARY_NAMES]
        found = next((given / name for name in names if (given / name).is_file()), None)
        if found is None:
            raise InputError(f"{given} has no scenes of {source.path.name}", f"looked for {', '.join(names[:4])}, ...")
        return found
