"""Scores of clips: measured by processes of their own, and kept in a log, so that each is measured once.

    OUT/.filter/scores.jsonl    a line for each clip that was measured; the last one of a clip counts
    OUT/.filter/settings.json   what the folder is filtered with

A line is appended when a clip is done, so a run that is killed loses the clips in work and nothing else.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from opensora_core.config import FilterConfig
from opensora_core.curation.crew import Crew, Lost, Returned, Tell
from opensora_core.curation.events import FilterProgress
from opensora_core.curation.filters.clip import Vector, embedding
from opensora_core.curation.filters.copies import signature
from opensora_core.curation.filters.look import Place, look_at
from opensora_core.curation.filters.table import FILTERS, measured
from opensora_core.errors import InputError, OsoraError
from opensora_core.files import refusal, write_bytes

STATE = ".filter"
SCORES_FILE = "scores.jsonl"

_HASH, _EMBEDDING = "copies", "embedding"  # what is measured besides scores
_TELL_SECONDS = 0.5
_STALL_SECONDS = 300.0  # a model that is loaded or computes reads nothing meanwhile
_SYNC_SECONDS = 2.0
_DIGITS = 6  # of a score that are kept


@dataclass(frozen=True)
class Task:
    """A clip to be measured.

    Attributes:
        name: of the clip.
        identity: of its content.
        place: where it is.
        wanted: what is to be measured, with what that depends on.
    """

    name: str
    identity: str
    place: Place
    wanted: Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """What is known of a clip.

    Attributes:
        identity: of the content that was measured.
        scores: by filter. A filter may have been measured and have given none.
        made: what was measured, and with what.
        code: the hashes of its pictures; 0 if there is none.
        vector: CLIP's embedding, if there is one.
        broken: why it cannot be decoded; empty if it can.
        is_final: whether to believe that; a process that died is given another chance by the next run.
    """

    identity: str
    scores: Mapping[str, float] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)
    code: int = 0
    vector: Vector | None = field(default=None, compare=False)
    broken: str = ""
    is_final: bool = True


def wanted_of(settings: FilterConfig, caption: str | None) -> dict[str, str]:
    """What is measured with some settings, and what that depends on besides the clip."""
    wanted = {name: FILTERS[name].made_by(settings) for name in measured(settings)}
    if "similarity" in wanted:
        wanted["similarity"] += f" {crc32((caption or '').encode(errors='surrogatepass')):08x}"
    wanted[_HASH] = f"1 {settings.frames}"
    if settings.clip_model:
        wanted[_EMBEDDING] = f"1 {settings.clip_model} {settings.frames}"
    return wanted


def score(clip: Path | Place, settings: FilterConfig) -> dict[str, float]:
    """Measure one clip, here and now.

    Args:
        clip: a file, or a range of one with its words.
        settings: models, and how closely to look.

    Returns:
        Name of a filter -> its score. Those without a model, and those that a clip has nothing for, are absent.

    Raises:
        InputError: it cannot be decoded.
        WeightsError, UsageError: a model that is not there.
    """
    place = clip if isinstance(clip, Place) else Place(clip)
    return dict(_measure(Task("", "", place, wanted_of(settings, place.caption)), settings).scores)


def _measure(task: Task, settings: FilterConfig) -> Measured:
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # there is a process for each core
    try:
        look = look_at(task.place, settings)
        scores = {}
        for name in task.wanted:
            measure = FILTERS[name].measure if name in FILTERS else None
            if measure is not None and (value := measure(look, settings)) is not None:
                scores[name] = float(f"{value:.{_DIGITS}g}")
        return Measured(
            identity=task.identity,
            scores=scores,
            made=task.wanted,
            code=signature(look) if _HASH in task.wanted else 0,
            vector=embedding(look, settings) if _EMBEDDING in task.wanted else None,
        )
    finally:
        cv2.setNumThreads(threads)


def measure_task(settings: FilterConfig, task: Task, tell: Tell) -> Measured:
    """Measure a clip, in a process of its own; what is wrong with the clip is in the result."""
    if settings.clip_model:
        import torch

        torch.set_num_threads(1)  # the same bits whatever the machine has, and a process for each core
    try:
        return _measure(task, settings)
    except InputError as error:
        reason = error.message.replace(f"{task.place.path} ", "").replace(f": 'file:{task.place.path}'", "")
        return Measured(task.identity, made=task.wanted, broken=reason.replace("[Errno ", "[error "))
    except MemoryError:
        reason = f"needs more memory than filter.clip_bytes = {settings.clip_bytes}"
        return Measured(task.identity, broken=reason, is_final=False)
    except OsoraError:
        raise
    except Exception as error:  # a bug of ours, or of a decoder, costs this clip and no other
        reason = f"internal error, {type(error).__name__}: {' '.join(str(error).split())}"
        return Measured(task.identity, broken=reason, is_final=False)


class Log:
    """The scores that a folder has.

    Args:
        output: the folder.
    """

    def __init__(self, output: Path) -> None:
        self.path = output / STATE / SCORES_FILE
        self._known: dict[str, Measured] = {}
        self._num_lines = 0
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            for line in file:
                self._num_lines += 1
                with suppress(ValueError, KeyError, TypeError, AttributeError):  # torn: it is measured again
                    name, found = _parse(json.loads(line))
                    self._known[name] = found

    def __len__(self) -> int:
        return len(self._known)

    def get(self, name: str, identity: str) -> Measured:
        """What is known of a clip with this content."""
        found = self._known.get(name)
        return found if found is not None and found.identity == identity else Measured(identity)

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """What is left to be measured, each with what it lacks."""
        left = []
        for task in tasks:
            known = self.get(task.name, task.identity)
            if known.broken and known.is_final:
                continue
            lacks = {name: by for name, by in task.wanted.items() if known.made.get(name) != by}
            if lacks or not known.is_final:
                left.append(replace(task, wanted=lacks or task.wanted))
        return left

    def measure(self, tasks: Sequence[Task], settings: FilterConfig) -> Iterator[FilterProgress]:
        """Measure clips and write them down.

        Yields:
            How far it is.

        Raises:
            WeightsError, UsageError: a model that is not there.
            ResourceError: the disk is full.
        """
        if not tasks:
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        crew: Crew[FilterConfig, Task, Measured] = Crew(
            measure_task,
            settings,
            num_workers=min(settings.workers or cores, len(tasks)),
            stall_seconds=_STALL_SECONDS,
            task_seconds=settings.clip_seconds,
            task_bytes=settings.clip_bytes,
        )
        done, began, told = 0, time.monotonic(), 0.0
        words = crew.run(tasks)
        try:
            self._mend()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                synced = began
                for word in words:
                    if isinstance(word, Returned | Lost):
                        done += 1
                        found = word.result if isinstance(word, Returned) else None
                        if found is None:
                            assert isinstance(word, Lost)
                            found = Measured(word.task.identity, broken=word.reason, is_final=False)
                        self._put(file, word.task.name, found)
                    now = time.monotonic()
                    if now - synced >= _SYNC_SECONDS:
                        os.fsync(file.fileno())
                        synced = now
                    if now - told >= _TELL_SECONDS or done == len(tasks):
                        told = now
                        speed = done / (now - began) if now > began else 0.0
                        yield FilterProgress(done, len(tasks), speed, (len(tasks) - done) / speed if speed else None)
                os.fsync(file.fileno())
        except OSError as error:
            raise refusal(self.path, error) from error
        finally:
            words.close()  # type: ignore[attr-defined]

    def compact(self, names: Iterable[str]) -> None:
        """Leave out lines that later ones replace and clips that are no more, if these are most of it."""
        kept = [name for name in names if name in self._known]
        if self._num_lines > 2 * len(kept) + 16:
            lines = [_line(name, self._known[name]) for name in kept]
            write_bytes(self.path, b"".join(lines))
            self._num_lines = len(lines)

    def _put(self, file: Any, name: str, found: Measured) -> None:
        before = self.get(name, found.identity)
        if before.made and not found.broken:
            found = replace(
                found,
                scores={**before.scores, **found.scores},
                made={**before.made, **found.made},
                code=found.code if _HASH in found.made else before.code,
                vector=found.vector if _EMBEDDING in found.made else before.vector,
            )
        self._known[name] = found
        self._num_lines += 1
        line = memoryview(_line(name, found))
        while line:  # a raw write may take a part of it
            line = line[file.write(line) :]

    def _mend(self) -> None:
        """End a line that a killed run began."""
        with suppress(FileNotFoundError), self.path.open("rb+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def _line(name: str, found: Measured) -> bytes:
    row: dict[str, Any] = {"clip": name, "identity": found.identity, "scores": found.scores, "made": found.made}
    if found.code:
        row["code"] = f"{found.code:080x}"
    if found.vector is not None:
        row["vector"] = base64.b64encode(found.vector.astype("<f4").tobytes()).decode()
    if found.broken:
        row |= {"broken": found.broken, "is_final": found.is_final}
    return json.dumps(row).encode() + b"\n"


def _parse(row: Mapping[str, Any]) -> tuple[str, Measured]:
    vector = row.get("vector")
    scores = {str(name): float(value) for name, value in row["scores"].items()}
    return str(row["clip"]), Measured(
        identity=str(row["identity"]),
        scores=scores,
        made={str(name): str(by) for name, by in row["made"].items()},
        code=int(row.get("code", "0"), 16),
        vector=None if vector is None else np.frombuffer(base64.b64decode(vector), "<f4"),
        broken=str(row.get("broken", "")),
        is_final=bool(row.get("is_final", True)),
    )
