"""The job: sources in, clips and their manifest out, in a folder that any number of runs may complete."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from opensora_core.config import FilterConfig, SplitConfig
from opensora_core.curation import filters
from opensora_core.curation.crew import Again, Crew, Lost, Returned, Said, Tell, Word
from opensora_core.curation.crew_ray import RayCrew
from opensora_core.curation.events import (
    Event,
    FilterDone,
    FilterProgress,
    PlannedSource,
    SourceSplit,
    SplitDone,
    SplitPlan,
    SplitProgress,
    WorkerState,
)
from opensora_core.curation.plan import Plan, Request, check, settings_of, sources_of
from opensora_core.curation.preview import write_page
from opensora_core.curation.records import CLIPS_FOLDER, MANIFEST_FILE, PREVIEW_FILE, REJECTS_FILE, Record, Records
from opensora_core.curation.scenes import TOO_SHORT
from opensora_core.curation.stats import write_stats
from opensora_core.curation.work import (
    Header,
    Job,
    Moved,
    Result,
    Task,
    given_up,
    look,
    split_source,
)
from opensora_core.errors import InputError, ResourceError
from opensora_core.notice import Notice
from opensora_core.runs import only_writer

R = TypeVar("R")

_LOOK_SECONDS = 60.0
_GUESS_BYTES_PER_SECOND = 500_000.0  # before any source has been opened
_TELL_SECONDS = 0.5
_UNFILTERED = ".unfiltered-"  # before the names of tables that have all clips


def split(config: SplitConfig, request: Request) -> Iterator[Event]:
    """Split videos into clips.

    What an earlier run of the same settings finished is not done again. A run may be stopped in whatever way; the next
    one completes the same folder, byte for byte.

    Args:
        config: the settings.
        request: inputs, output, and what else is wanted.

    Yields:
        Notices, how far it is, every source as it is finished, and at the end what there is.

    Raises:
        ConfigError, UsageError: settings that contradict each other, or those of the output.
        InputError: an input that does not exist, or not a single clip of all sources.
        ResourceError: the disk is full; what is finished is kept.
    """
    began = time.monotonic()
    check(config, request)
    sources, notices = sources_of(request)
    yield from map(Notice, notices)
    records = Records(request.output)
    with ExitStack() as stack:
        if request.shard is None:  # shards of a job share the folder, each with sources of its own
            stack.enter_context(only_writer(request.output))
        records.prepare(settings_of(config), redo=request.redo)
        plan = Plan(config, request, records, sources)
        limits = _limits(request)
        if plan.forget() and request.shard is None:
            if limits is None or filters.saved_settings(request.output) is None:
                records.write_tables()
            else:  # what is no more is left out, and what was refused stays so
                with suppress(InputError):
                    yield from (event for event in _filter(plan, limits) if isinstance(event, FilterProgress))
        if request.shard is None:
            records.remove_orphans(records.read().keys())
        run = _Run(plan, began, is_filtered=limits is not None)
        yield from run.go()
        sifted = None
        if limits is not None:
            sifted = yield from _filter(plan, limits)
        yield from _finish(plan, run, sifted)


def examine(config: SplitConfig, request: Request) -> Iterator[Event]:
    """Look at the sources without decoding them, and tell what `split` would do. Nothing is written.

    Raises:
        ConfigError, UsageError, InputError: as `split`.
    """
    check(config, request)
    sources, notices = sources_of(request)
    records = Records(request.output)
    records.require(settings_of(config), redo=request.redo)
    plan = Plan(config, request, records, sources)
    planned = [PlannedSource(str(item.path), None, 0, 0, 0.0, "", None, item.reason) for item, _ in plan.unusable]
    for word in _crew(plan, look, _LOOK_SECONDS, writes=False).run(plan.tasks):
        if isinstance(word, Lost):
            planned.append(PlannedSource(str(word.task.source.path), None, 0, 0, 0.0, "", None, word.reason))
        elif isinstance(word, Returned):
            planned.append(_planned(config, word.task, word.result))
    planned.sort(key=lambda item: os.fsencode(item.source))
    making = _making(config)
    if (limits := _limits(request)) is not None:
        told = ", ".join(f"{name} = {value:g}" for name, value in filters.limits_of(limits).items())
        making = f"{making}, then filtered: {told or 'no limits'}"
    yield SplitPlan(request.output, tuple(planned), len(plan.skipped), making, tuple(notices))


def _crew(
    plan: Plan, function: Callable[[Job, Task, Tell], R], task_seconds: float, *, writes: bool
) -> Crew[Job, Task, R] | RayCrew[Job, Task, R]:
    """Who does the tasks of a plan; `writes` clips or only looks at sources."""
    config = plan.config
    if config.engine == "ray":
        return RayCrew(
            function,
            plan.job,
            num_workers=config.workers,
            stall_seconds=config.stall_seconds,
            task_seconds=task_seconds,
            task_bytes=config.source_bytes,
            address=config.ray_address,
            cpus=config.decode_threads,
            needs=_files_of,
            folder=plan.request.output if writes else None,
        )
    return Crew(
        function,
        plan.job,
        num_workers=min(plan.num_workers, len(plan.tasks)),
        stall_seconds=config.stall_seconds,
        task_seconds=task_seconds,
        task_bytes=config.source_bytes,
    )


def _files_of(task: Task) -> list[Path]:
    return [task.source.path] if task.boundaries is None else [task.source.path, task.boundaries]


class _Run:
    """Works through the tasks of a plan."""

    def __init__(self, plan: Plan, began: float, *, is_filtered: bool = False) -> None:
        self.plan = plan
        self._is_filtered = is_filtered
        self.began = began
        self.done_seconds = 0.0
        self.num_done = 0
        self._known_seconds = 0.0
        self._known_bytes = 0
        self._left_bytes = sum(task.source.size_bytes for task in plan.tasks)
        self._states: dict[int, WorkerState] = {}
        self._lengths: dict[int, float] = {}  # of what each process has in work

    def go(self) -> Iterator[Event]:
        """Split, and commit what is whole. However it ends, nothing half done is left, and the tables are written.

        The tables of a folder that is filtered are left to who filters: no clip is listed before it is judged.
        """
        plan, config = self.plan, self.plan.config
        crew = _crew(plan, split_source, config.source_seconds, writes=True)
        try:
            for source, name in plan.unusable:
                task = Task(source, name)
                yield self._commit(task, given_up(plan.job, task, "rejected", source.reason))
            told = 0.0
            started = time.monotonic()
            words = crew.run(plan.tasks)
            try:
                for word in words:
                    yield from self._follow(word)
                    if (now := time.monotonic()) - told >= _TELL_SECONDS:
                        told = now
                        yield self._progress(now - started)
            finally:
                unfinished = crew.in_work()
                words.close()  # type: ignore[attr-defined]
                for task in unfinished:
                    shutil.rmtree(plan.request.output / CLIPS_FOLDER / task.name, ignore_errors=True)
        except BaseException:
            with suppress(ResourceError):  # the disk may be full; the next run writes them
                if plan.request.shard is None:
                    plan.records.remove_orphans(plan.records.read().keys())
                if not self._is_filtered:
                    plan.records.write_tables()
            raise
        if not self._is_filtered:  # else the clips are measured first
            plan.records.write_tables()

    def _follow(self, word: Word[Task, Result]) -> Iterator[Event]:
        if isinstance(word, Said):
            self._hear(word)
        elif isinstance(word, Returned):
            yield self._end(word.worker, word.task, word.result)
        elif isinstance(word, Lost):
            yield self._end(word.worker, word.task, given_up(self.plan.job, word.task, "failed", word.reason))
        elif isinstance(word, Again):
            self._forget(word)
            yield Notice(f"{word.task.source.path} begins anew: {word.reason}")

    def _hear(self, word: Said[Task]) -> None:
        if isinstance(word.word, Header):
            task = word.task
            length = word.word.duration_seconds or task.source.size_bytes / _GUESS_BYTES_PER_SECOND
            self._lengths[word.worker] = length
            self._known_seconds += length
            self._known_bytes += task.source.size_bytes
            self._left_bytes -= task.source.size_bytes
            self._states[word.worker] = WorkerState(str(task.source.path), "detecting", 0.0)
        elif isinstance(word.word, Moved):
            moved = word.word
            self._states[word.worker] = WorkerState(str(word.task.source.path), moved.phase, moved.fraction)

    def _forget(self, word: Again[Task]) -> None:
        self._states.pop(word.worker, None)
        if word.worker in self._lengths:
            self._known_seconds -= self._lengths.pop(word.worker)
            self._known_bytes -= word.task.source.size_bytes
            self._left_bytes += word.task.source.size_bytes

    def _end(self, worker: int, task: Task, result: Result) -> SourceSplit:
        self._states.pop(worker, None)
        if worker not in self._lengths:  # it was not even opened
            self._left_bytes -= task.source.size_bytes
        claimed = self._lengths.pop(worker, 0.0)
        self._known_seconds += result.seconds - claimed
        self.done_seconds += result.seconds
        return self._commit(task, result)

    def _commit(self, task: Task, result: Result) -> SourceSplit:
        if not result.clips:
            shutil.rmtree(self.plan.request.output / CLIPS_FOLDER / task.name, ignore_errors=True)
        self.plan.records.commit(result.record, result.source, result.clips, result.rejects)
        self.num_done += 1
        row = result.source
        return SourceSplit(
            source=row["source"],
            status=row["status"],
            reason=row["reason"],
            num_frames=row["num_frames"],
            num_boundaries=len(row["boundaries"]),
            num_clips=row["num_clips"],
            seconds=result.seconds,
        )

    def _progress(self, elapsed: float) -> SplitProgress:
        rate = self._known_seconds / self._known_bytes if self._known_bytes else 1 / _GUESS_BYTES_PER_SECOND
        total = self._known_seconds + self._left_bytes * rate
        parts = (state.fraction * self._lengths.get(worker, 0.0) for worker, state in self._states.items())
        done = self.done_seconds + sum(parts)
        speed = done / elapsed if elapsed > 0 else 0.0
        idle = WorkerState()
        count = max(self._states, default=-1) + 1
        return SplitProgress(
            done_seconds=done,
            total_seconds=max(total, done),
            speed=speed,
            seconds_left=max(total - done, 0.0) / speed if speed > 0 else None,
            done=self.num_done,
            total=len(self.plan.tasks) + len(self.plan.unusable),
            workers=tuple(self._states.get(number, idle) for number in range(count)),
        )


def _limits(request: Request) -> FilterConfig | None:
    """What the folder is filtered with: what is asked for, or what it was filtered with before."""
    if request.filter is not None or request.shard is not None:
        return request.filter
    return filters.saved_settings(request.output)


def _filter(plan: Plan, limits: FilterConfig) -> Generator[Event, None, FilterDone]:
    """Measure the clips, write the tables, and leave out of them what is beyond a limit."""
    request, records = plan.request, plan.records
    names = sorted(records.read())
    measured = 0
    for progress in filters.measure_first(
        [clip for name in names for clip in records.rows(name)[1]], limits, request.output
    ):
        measured = progress.done
        yield progress
    manifest, rejects = (request.output / f"{_UNFILTERED}{name}" for name in (MANIFEST_FILE, REJECTS_FILE))
    try:
        records.write_tables(_UNFILTERED)
        if not manifest.stat().st_size:
            records.write_tables()
            return FilterDone(request.output / MANIFEST_FILE, 0, 0, 0.0, {}, {}, 0, 0.0)
        done = None
        for event in filters.sift(manifest, limits, request.output, report=request.report, rejects=rejects):
            if isinstance(event, FilterDone):
                event = done = replace(event, measured=event.measured + measured)  # noqa: PLW2901
            yield event
        assert done is not None
        return done
    finally:
        for path in (manifest, rejects):
            path.unlink(missing_ok=True)


def _finish(plan: Plan, run: _Run, sifted: FilterDone | None = None) -> Iterator[Event]:
    """Write what was asked for besides the clips, and tell what there is."""
    request, records = plan.request, plan.records
    ordered = sorted(records.read().values(), key=lambda item: (os.fsencode(item.source), item.name))
    statuses: Counter[str] = Counter(item.status for item in ordered)
    num_clips, clip_seconds, source_seconds = 0, 0.0, 0.0
    left_out: dict[str, tuple[int, float]] = {}
    reasons: Counter[str] = Counter()
    for record in ordered:
        row, clips, rejects = records.rows(record.name)
        num_clips += len(clips)
        clip_seconds += sum(clip["duration_seconds"] for clip in clips)
        source_seconds += row.get("end_seconds", 0.0) - row.get("start_seconds", 0.0)
        for reject in rejects:
            is_range = reject["what"] == "frames"
            if not is_range:
                reasons[reject["reason"]] += 1
                continue
            count, seconds = left_out.get(reject["reason"], (0, 0.0))
            left_out[reject["reason"]] = count + 1, seconds + reject["end_seconds"] - reject["start_seconds"]
    if request.stats is not None:
        kept = [(item.source, item.name, records.beside(item.name, ".npz")) for item in ordered]
        write_stats(request.stats, kept)
        yield Notice(f"scores of every frame are in {request.stats}")
    page = None
    if request.preview:
        page = request.output / PREVIEW_FILE
        facts = f"{num_clips} clips of {clip_seconds:.0f} s from {len(ordered)} sources of {source_seconds:.0f} s"
        write_page(page, ((*records.rows(item.name), _sheet(records, item)) for item in ordered), facts)
    if sifted is not None:
        num_clips, clip_seconds = sifted.num_kept, sifted.kept_seconds
        left_out |= {f"filter.{name}": lost for name, lost in sifted.refused.items()}
    if not num_clips and request.shard is None:
        lost = Counter(reasons)
        lost.update({reason: count for reason, (count, _) in left_out.items()})
        told = "; ".join(reason for reason, _ in lost.most_common(3)) or "there are no frames"
        hint = f"--min-seconds is {plan.config.min_seconds:g}" if TOO_SHORT in left_out else "all reasons are in"
        raise InputError(f"not a single clip came of it: {told}", f"{hint}; see {request.output / REJECTS_FILE}")
    elapsed = time.monotonic() - run.began
    yield SplitDone(
        output=request.output,
        sources=dict(sorted(statuses.items())),
        skipped=len(plan.skipped),
        num_clips=num_clips,
        clip_seconds=clip_seconds,
        source_seconds=source_seconds,
        left_out=dict(sorted(left_out.items())),
        seconds=elapsed,
        speed=run.done_seconds / elapsed if elapsed > 0 else 0.0,
        manifest=request.output / MANIFEST_FILE,
        preview=page,
    )


def _sheet(records: Records, record: Record) -> str:
    try:
        return records.beside(record.name, ".svg").read_text(encoding="utf-8")
    except OSError:  # a source that could not be decoded has none
        return ""


def _planned(config: SplitConfig, task: Task, header: Header | str) -> PlannedSource:
    source = str(task.source.path)
    if isinstance(header, str):
        return PlannedSource(source, None, 0, 0, 0.0, "", None, header)
    seconds = header.duration_seconds
    clips = None
    if seconds is not None:
        clips = math.ceil(seconds / (config.max_seconds or seconds)) if seconds >= config.min_seconds else 0
    return PlannedSource(source, seconds, header.width, header.height, header.fps, header.codec, clips)


def _making(config: SplitConfig) -> str:
    """What would be made, in words."""
    length = f"{config.min_seconds:g} s or more"
    if config.max_seconds:
        length = f"{config.min_seconds:g} to {config.max_seconds:g} s"
    how = {
        "exact": f"encoded with {config.codec} ({config.codec_preset}, crf {config.crf})",
        "smart": "copied, and encoded at their ends",
        "copy": "copied from the first keyframe on",
        "none": "left in their sources, as ranges",
    }[config.cut]
    size = f", short side {config.short_side} at most" if config.cut == "exact" and config.short_side else ""
    rate = f", {config.fps:g} fps" if config.fps else ""
    sound = "" if config.cut == "none" else ", with sound" if config.audio else ", without sound"
    return f"clips of {length} by detector '{config.detector}', {how}{size}{rate}{sound}"
