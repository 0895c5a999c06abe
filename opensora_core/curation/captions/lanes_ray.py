"""Lanes on a Ray cluster: each is an actor that has the captioner and a device of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_core.config import Config
from opensora_core.curation.captions.lanes import Belt, Described, Ready, Stopping, Word, without_frames
from opensora_core.curation.captions.protocol import Captioner, Shown, Words
from opensora_core.curation.cluster import Actor, require_same, told
from opensora_core.curation.crew_ray import MOST_TRIES
from opensora_core.errors import ConfigError, DeviceError, OsoraError, ResourceError

_POLL_SECONDS = 0.1
_AHEAD = 2  # batches in an actor: one is prepared while the other is described
_MOST_FALSE_STARTS = 3


def devices_of(library: Any, config: Config) -> list[str]:
    """A device for each lane: all GPUs of the cluster count, whichever machine they are in.

    Raises:
        DeviceError: the cluster has not so many.
        ConfigError: a GPU by its number, which is Ray's to choose.
    """
    wanted, count = config.runtime.device, config.caption.gpus
    found = int(library.cluster_resources().get("GPU", 0))
    if wanted.startswith("cuda:"):
        raise ConfigError(f"--device {wanted} is of one machine, and Ray chooses for itself", "--device cuda")
    if not wanted.startswith("cuda") and (wanted != "auto" or not found):
        return [("cpu" if wanted == "auto" else wanted)] * count
    if found < count:
        raise DeviceError(f"the Ray cluster has {found} GPUs, not {count}", f"--gpus {found}" if found else "")
    return ["cuda:0"] * count  # the only one that an actor sees


class _Describer(Actor):  # pragma: no cover - another process
    """Describes batches, two at a time so that one is prepared meanwhile."""

    def __init__(self, folder: str, captioner: Captioner) -> None:
        super().__init__(folder)
        self._captioner = captioner
        self._describing = threading.Lock()

    def load(self, device: str) -> tuple[Any, ...]:
        try:
            self._captioner.load(device)
        except OsoraError as error:
            return ("broken", type(error), error.message, error.hint)
        return ("ready",)

    def describe(self, batch: list[Shown]) -> tuple[Any, ...]:
        try:
            prepared = self._captioner.prepare(batch)
            with self._describing:
                began = time.monotonic()
                words = self._captioner.describe(prepared, lambda: False)
                return ("described", words, time.monotonic() - began)
        except OsoraError as error:
            return ("broken", type(error), error.message, error.hint)


@dataclass
class _Batch:
    clips: list[Shown]
    tries: int = 0


class RayLane:
    """One lane; `drive` is to be called on a thread of its own.

    Args:
        library: Ray, connected.
        captioner: made, and not loaded.
        device: as the actor sees it.
    """

    def __init__(self, library: Any, captioner: Captioner, device: str) -> None:
        self._ray, self._captioner, self._device = library, captioner, device
        self._actor: Any = None

    def drive(self, batches: Belt[list[Shown]], words: Belt[Word], stop: threading.Event) -> None:
        """Describe all batches. One whose actor or node is lost is tried again, and fails after `MOST_TRIES` of them.

        Raises:
            OsoraError: the captioner cannot be had, or goes no further.
        """
        waiting: deque[_Batch] = deque()
        flying: dict[Any, _Batch] = {}
        room, is_fed = threading.Semaphore(_AHEAD), threading.Event()

        def feed() -> None:
            with suppress(Stopping):
                for clips in batches:
                    while not room.acquire(timeout=_POLL_SECONDS):
                        if stop.is_set():
                            return
                    waiting.append(_Batch(clips))
                is_fed.set()

        try:
            if not self._start(stop):
                return
            words.put(Ready())
            threading.Thread(target=feed, daemon=True).start()
            while not stop.is_set() and not (is_fed.is_set() and not waiting and not flying):
                while waiting and _may_fly(waiting[0], flying.values()):
                    batch = waiting.popleft()
                    flying[self._actor.describe.remote(batch.clips)] = batch
                if not flying:
                    time.sleep(_POLL_SECONDS)
                    continue
                done, _ = self._ray.wait(list(flying), num_returns=1, timeout=_POLL_SECONDS)
                for ref in done:
                    try:
                        kind, *content = self._ray.get(ref)
                    except self._ray.exceptions.RayTaskError:
                        raise
                    except self._ray.exceptions.RayError as error:
                        again, given_up = _tried(flying.values())
                        flying.clear()
                        for batch in given_up:
                            room.release()
                            words.put(_failed(batch, told(error)))
                        waiting.extendleft(reversed(again))
                        if not self._start(stop):
                            return
                        continue
                    if kind == "broken":
                        error_type, *told_words = content
                        raise error_type(*told_words)
                    room.release()
                    words.put(Described([without_frames(shown) for shown in flying.pop(ref).clips], *content))
        finally:
            self._kill()

    def _start(self, stop: threading.Event) -> bool:
        """Have an actor that has loaded the captioner; False if that is no longer wanted."""
        reason = ""
        for _ in range(_MOST_FALSE_STARTS):
            self._kill()
            # no CPU of Ray's, of which readers may have taken all
            resources = {"num_cpus": 0, "num_gpus": 1 if self._device.startswith("cuda") else 0}
            kind = self._ray.remote(**resources, max_restarts=0, max_concurrency=_AHEAD, scheduling_strategy="SPREAD")(
                _Describer
            )
            self._actor = kind.remote(str(Path.cwd()), self._captioner)
            try:
                if (greeting := self._answer(self._actor.begin.remote(""), stop)) is None:
                    return False
                require_same(*greeting)
                if (loaded := self._answer(self._actor.load.remote(self._device), stop)) is None:
                    return False
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError as error:
                reason = told(error)
                continue
            if loaded[0] == "broken":
                raise loaded[1](*loaded[2:])
            return True
        raise ResourceError(
            f"the worker of Ray that describes does not start: {reason}",
            "captions so far are kept: run it again, with a smaller --batch-size if memory ran out",
        )

    def _answer(self, ref: Any, stop: threading.Event) -> Any:
        while not stop.is_set():
            done, _ = self._ray.wait([ref], timeout=_POLL_SECONDS)
            if done:
                return self._ray.get(ref)
        return None

    def _kill(self) -> None:
        if self._actor is not None:
            with suppress(Exception):  # it may be gone, and Ray with it
                self._ray.kill(self._actor)
            self._actor = None


def _may_fly(batch: _Batch, others: Collection[_Batch]) -> bool:
    """Whether a batch may be sent now: one that was lost before goes alone, so that no other is lost with it again."""
    return not others or not (batch.tries or any(other.tries for other in others))


def _tried(batches: Iterable[_Batch]) -> tuple[list[_Batch], list[_Batch]]:
    """Batches that are worth another try, and those that are not, after what had them was lost."""
    again: list[_Batch] = []
    given_up: list[_Batch] = []
    for batch in batches:
        batch.tries += 1
        (again if batch.tries < MOST_TRIES else given_up).append(batch)
    return again, given_up


def _failed(batch: _Batch, reason: str) -> Described:
    words: Sequence[Words] = [
        Words("", f"its worker of Ray was lost {batch.tries} times: {reason}", failed=True) for _ in batch.clips
    ]
    return Described([without_frames(shown) for shown in batch.clips], words, 0.0)
