"""Saving and loading the state of a run: everything in safetensors or JSON, whole or absent, and finite.

Every process writes what it holds, see `opensora_core.parallel.shards`; the manifest of sums, written last, makes a
checkpoint of it. What lies where is told by `opensora_core.runs`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from opensora_core.errors import ResourceError, TrainingError
from opensora_core.files import MANIFEST, refusal, replacing_folder, require_space, sha256, write_bytes
from opensora_core.parallel import Mesh
from opensora_core.parallel.agreement import agreed, first, gathered
from opensora_core.parallel.shards import Groups, describe, local, own_pieces, write_index, write_pieces
from opensora_core.runs import CONFIG_FILE, checkpoints, newest_whole

STATE_FILE = "state.json"
WEIGHTS, AVERAGE = "weights", "ema"

_PATIENCE_SECONDS = 60.0  # that a run which fails waits for a checkpoint to be written

Also = Callable[[Path], None]
"""Writes more into a checkpoint before it is sealed."""


class Saver:
    """Writes the checkpoints of a run, on all its processes together.

    Args:
        folder: of the checkpoints, seen by all.
        mesh: of the run.
        settings: the resolved settings of the run, kept with every checkpoint.
        asynchronous: only copy what is to be saved while the run waits, and write it while it goes on.
    """

    def __init__(
        self, folder: Path, mesh: Mesh, settings: dict[str, Any] | None = None, *, asynchronous: bool = False
    ) -> None:
        self.folder, self.mesh, self.settings, self.asynchronous = folder, mesh, settings, asynchronous
        self._under_way: _Writing | None = None

    def save(
        self,
        step: int,
        groups: Groups,
        state: Mapping[str, Any],
        also: Also | None = None,
        foreign: Also | None = None,
    ) -> Path | None:
        """Write a checkpoint, or begin to.

        Args:
            step: how many steps were done.
            groups: tensors; shards are written by who owns them.
            state: the rest, the same on every process.
            also: called on the first process, before the manifest is written.
            foreign: called on every process, for what is in an engine's own format.

        Returns:
            The checkpoint; None if it is still being written: `finished` and `wait` tell of it.

        Raises:
            TrainingError: a weight is not finite; nothing is written.
            ResourceError: no space or no permission; what was there before stays, and nothing half-written does.
        """
        self.wait()
        pieces = own_pieces(groups, self.mesh.rank, self.mesh.size)
        target = self.folder / f"step-{step}"
        with agreed(self.mesh.whole):
            _require_finite(pieces, step)
        described = gathered(self.mesh.whole, describe(groups, pieces, self.mesh.rank))
        if self.asynchronous:
            pieces = {group: {name: _copied(t) for name, t in tensors.items()} for group, tensors in pieces.items()}
        writing = _Writing(self.mesh, target)
        with agreed(self.mesh.whole):
            writing.open(sum(tensor.nbytes for group in pieces.values() for tensor in group.values()))
        if foreign is not None:
            with writing.undone_by_errors(), agreed(self.mesh.whole):
                foreign(writing.part)

        content = json.dumps({"step": step, **state}).encode()

        def finish(part: Path) -> None:
            if self.settings is not None:
                write_bytes(part / CONFIG_FILE, (json.dumps(self.settings, indent=1) + "\n").encode())
            if also is not None:
                also(part)
            if self.mesh.size > 1:
                write_index(part, described)
            write_bytes(part / STATE_FILE, content)

        if self.asynchronous:
            writing.begin(pieces, finish)
            self._under_way = writing
            return None
        writing.write(pieces, finish)
        return target

    def finished(self) -> Path | None:
        """The checkpoint that is whole since the last call, on the first process; None elsewhere, or if there is none.

        Raises:
            As `save`, for one that was begun.
        """
        writing = self._under_way
        if writing is None or not writing.is_over or not self.mesh.is_first or writing.error is not None:
            return None
        self._under_way = None
        return writing.target

    def wait(self) -> Path | None:
        """Wait for what is being written, together; returns it, on the first process.

        Raises:
            As `save`, for one that was begun.
        """
        if self.mesh.size == 1 and self._under_way is None:
            return None
        writing, self._under_way = self._under_way, None
        with agreed(self.mesh.whole):
            if writing is not None:
                writing.join()
        return writing.target if writing is not None and self.mesh.is_first else None

    def leave(self) -> None:
        """Let what is being written become whole though the run ends by an error; the others do the same."""
        if self._under_way is not None:
            with suppress(Exception):
                self._under_way.join(_PATIENCE_SECONDS)


class _Writing:
    """A checkpoint that is being written by all processes into a folder that takes its name in the end.

    The processes meet in the folder: each leaves a note when it is done, with the sums of its files or with what went
    wrong, so that nobody's collectives are in the way while the run goes on.
    """

    POLL_SECONDS = 0.02

    def __init__(self, mesh: Mesh, target: Path) -> None:
        self.mesh, self.target = mesh, target
        self.part = target.with_name(f".{target.name}.part")
        self.error: Exception | None = None
        self._folder = ExitStack()
        self._thread: threading.Thread | None = None

    def open(self, num_bytes: int) -> None:
        """Make the folder, on the first process."""
        require_space(self.target, num_bytes)
        if self.mesh.is_first:
            self.part = self._folder.enter_context(replacing_folder(self.target))

    def undone_by_errors(self) -> ExitStack:
        """A context that removes the folder if what is inside fails, and else leaves it open."""
        guard = ExitStack()
        guard.push(lambda kind, error, trace: self._folder.__exit__(kind, error, trace) if kind else None)
        return guard

    def write(self, pieces: Groups, finish: Also) -> None:
        """Write all of it, and wait for all."""
        sums: dict[str, str] = {}
        with self.undone_by_errors():
            with agreed(self.mesh.whole):
                sums = self._pieces(pieces)
            found = gathered(self.mesh.whole, sums)
            with agreed(self.mesh.whole):
                if self.mesh.is_first:
                    self._seal(found, finish)

    def begin(self, pieces: Groups, finish: Also) -> None:
        """Write all of it in a thread."""
        self._thread = threading.Thread(target=self._in_background, args=(pieces, finish), daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the thread of this process has ended."""
        return self._thread is not None and not self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the thread, and raise what it met."""
        if self._thread is not None:
            self._thread.join(seconds)
        if self.error is not None:
            raise self.error

    def _pieces(self, pieces: Groups) -> dict[str, str]:
        try:
            return write_pieces(self.part, pieces, self.mesh.rank if self.mesh.size > 1 else None)
        except OSError as error:
            raise refusal(self.target, error) from error
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # it wraps the system's errors into one of its own
            if number is None:
                raise
            raise refusal(self.target, OSError(int(number[1]), os.strerror(int(number[1])))) from error

    def _seal(self, sums: list[dict[str, str]], finish: Also) -> None:
        finish(self.part)
        known = {name: value for one in sums for name, value in one.items()}
        files = sorted(path for path in self.part.rglob("*") if path.is_file())
        names = [path.relative_to(self.part).as_posix() for path in files]
        content = {name: known.get(name) or sha256(path) for name, path in zip(names, files, strict=True)}
        write_bytes(self.part / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
        self._folder.close()

    def _in_background(self, pieces: Groups, finish: Also) -> None:
        note = self.part / f".done-{self.mesh.rank}"
        try:
            sums = self._pieces(pieces)
            if not self.mesh.is_first:
                write_bytes(note, json.dumps({"sums": sums}).encode())
                return
            found = [sums, *(self._note_of(rank) for rank in range(1, self.mesh.size))]
            self._seal(found, finish)
        except Exception as error:
            self.error = error
            if self.mesh.is_first:
                self._folder.__exit__(type(error), error, error.__traceback__)
            elif self.part.exists():
                with suppress(ResourceError):
                    write_bytes(note, json.dumps({"error": str(error)}).encode())

    def _note_of(self, rank: int) -> dict[str, str]:
        note = self.part / f".done-{rank}"
        while not note.exists():
            threading.Event().wait(self.POLL_SECONDS)
        content: dict[str, Any] = json.loads(note.read_text())
        note.unlink()
        if "error" in content:
            raise TrainingError(f"process {rank} could not write its part of {self.target}: {content['error']}")
        sums: dict[str, str] = content["sums"]
        return sums


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _require_finite(pieces: Groups, step: int) -> None:
    for group in (WEIGHTS, AVERAGE):
        for key, tensor in pieces.get(group, {}).items():
            if tensor.is_floating_point() and not torch.isfinite(local(tensor)).all():
                raise TrainingError(
                    f"{key} is not finite after step {step}, so nothing is saved",
                    "resume with a lower rate: --resume --set train.lr=...",
                )


def drop_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path, mesh: Mesh) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest whole checkpoint below `folder`, its state, and which newer ones were passed over, and why.

    Raises:
        CheckpointError: there are checkpoints, and not one of them is whole.
    """

    def look() -> tuple[Path | None, dict[str, Any], list[str]]:
        path, damaged = newest_whole(folder)
        return path, ({} if path is None else json.loads((path / STATE_FILE).read_text())), damaged

    return first(mesh, look)
