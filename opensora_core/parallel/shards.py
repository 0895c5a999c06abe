"""Checkpoints that every process writes its own part of, and that any number of processes reads.

    one process         weights.safetensors  ema.safetensors  optimizer.safetensors
    several             weights.0.safetensors  weights.1.safetensors  ...  shards.json

`shards.json` says of every tensor which rows (of its first dim) lie in which file. A reader takes the rows that it
needs, whoever wrote them, so a run goes on at any other number of processes and under any other sharding. Nothing is
gathered, and nothing is a pickle.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora_core.errors import CheckpointError
from opensora_core.files import sha256, write_bytes
from opensora_core.runs import SHARDS_FILE
from opensora_core.weights import apart

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by what they are ("weights", "ema", "optimizer") and by name."""

Piece = tuple[str, int, int]
"""A file, and the first row and the row after the last that it holds of a tensor."""


def is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor lies on several processes.

    What such tensors are made by takes half a second to import, and without it there are none.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, not a copy; of a tensor that is no shard, all of it."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process that holds a part of it has to ask at once."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Which rows of a tensor this process holds: the first one, and the one after the last."""
    start, stop = 0, tensor.shape[0] if tensor.ndim else 1
    if is_shard(tensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_shard():
                assert placement.is_shard(0) and (start, stop) == (0, tensor.shape[0]), "sharded by rows, once"
                each = -(-tensor.shape[0] // tensor.device_mesh.size(dim))
                start = min(each * tensor.device_mesh.get_local_rank(dim), tensor.shape[0])
                stop = min(start + each, tensor.shape[0])
    return start, stop


def like(tensor: Tensor, content: Tensor) -> Tensor:
    """Rows that this process holds, as a tensor that is spread as another one is."""
    if is_shard(tensor):
        return type(tensor).from_local(
            content, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return content


# writing --------------------------------------------------------------------------------------------------------------


def own_pieces(groups: Groups, rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    """What one of `size` processes is to write: its shards, and its share of what all of them hold.

    Copies of shards are written by the first who has them; what everybody has is dealt out by bytes.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for group, tensors in groups.items():
        found[group] = {}
        burden = [0] * size
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
            if is_shard(tensor):
                start, stop = rows_of(tensor)
                if _writes(tensor) and stop > start:
                    found[group][name] = tensor.to_local()
                continue
            lightest = burden.index(min(burden))
            burden[lightest] += tensor.nbytes + 1
            if lightest == rank:
                found[group][name] = tensor
    return found


def _writes(tensor: DTensor) -> bool:
    """Whether this process is the first that holds its part of a tensor."""
    mesh = tensor.device_mesh
    return all(placement.is_shard() or mesh.get_local_rank(dim) == 0 for dim, placement in enumerate(tensor.placements))


def describe(groups: Groups, pieces: Mapping[str, Mapping[str, Tensor]], rank: int) -> dict[str, Any]:
    """What `shards.json` says of the pieces that one process writes; `merge` joins those of all."""
    described: dict[str, Any] = {}
    for group, tensors in pieces.items():
        described[group] = {
            name: {"shape": list(groups[group][name].shape), "pieces": [[file_of(group, rank), *rows]]}
            for name in tensors
            for rows in [rows_of(groups[group][name])]
        }
    return described


def merge(described: list[dict[str, Any]]) -> dict[str, Any]:
    """`shards.json` of the descriptions of all processes."""
    merged: dict[str, Any] = {}
    for one in described:
        for group, tensors in one.items():
            found = merged.setdefault(group, {})
            for name, entry in tensors.items():
                found.setdefault(name, {"shape": entry["shape"], "pieces": []})["pieces"] += entry["pieces"]
    return merged


def file_of(group: str, rank: int | None = None) -> str:
    """The file that a process writes a group into; None is the only process."""
    return f"{group}.safetensors" if rank is None else f"{group}.{rank}.safetensors"


def write_pieces(folder: Path, pieces: Mapping[str, Mapping[str, Tensor]], rank: int | None) -> dict[str, str]:
    """Write what one process writes; returns the SHA-256 of each file."""
    sums = {}
    for group, tensors in pieces.items():
        path = folder / file_of(group, rank)
        save_file(apart({name: tensor.detach().cpu() for name, tensor in tensors.items()}), path)
        path.chmod(0o644)  # safetensors writes for its owner's eyes only
        sums[path.name] = sha256(path)
    return sums


def write_index(folder: Path, described: list[dict[str, Any]]) -> None:
    """Write `shards.json`, of the descriptions of all processes."""
    write_bytes(folder / SHARDS_FILE, json.dumps(merge(described)).encode())


# reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Stored:
    """The tensors of a checkpoint, whose sums have been checked, by rows; of one process or of several.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: it holds no tensors, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._index: dict[str, dict[str, _Entry]] = {}
        if (folder / SHARDS_FILE).is_file():
            self._read_index(folder / SHARDS_FILE)

    def names(self, group: str) -> set[str]:
        """The tensors of a group; none where it is not there."""
        return set(self._entries(group))

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._entries(group)[name].shape

    def tensor(self, group: str, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        shape = self.shape(group, name)
        return self.rows(group, name, 0, shape[0] if shape else 1)

    def rows(self, group: str, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, on the CPU; a number is one row."""
        entry = self._entries(group)[name]
        if not entry.shape:
            return self._open(entry.pieces[0][0]).get_tensor(name)  # type: ignore[no-any-return]
        found = []
        at = start
        for file, first, last in sorted(entry.pieces, key=lambda piece: piece[1]):
            if first <= at < min(last, stop):
                end = min(last, stop)
                found.append(self._open(file).get_slice(name)[at - first : end - first])
                at = end
        if at < stop:
            raise CheckpointError(f"{self.folder} lacks rows {at} to {stop} of {group} {name}")
        if not found:  # this process has no row of it
            file = entry.pieces[0][0]
            return self._open(file).get_slice(name)[0:0]  # type: ignore[no-any-return]
        return found[0] if len(found) == 1 else torch.cat(found)

    def spread(self, group: str, name: str, tensor: Tensor) -> Tensor:
        """A tensor that lies as another one of its shape does: the rows of this process, on that one's device."""
        start, stop = rows_of(tensor)
        return like(tensor, self.rows(group, name, start, stop).to(tensor.device))

    @torch.no_grad()
    def fill(self, group: str, own: Mapping[str, Tensor]) -> None:
        """Copy a group into the tensors that it was made of, or shards of them.

        Raises:
            CheckpointError: other names or shapes.
        """
        known = self.names(group)
        for kind, names in (("lacks", own.keys() - known), ("has", known - own.keys())):
            if names:
                shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
                raise CheckpointError(f"it {kind} {shown}, which the run has {'not' if kind == 'has' else 'to have'}")
        for name, tensor in own.items():
            if self.shape(group, name) != tuple(tensor.shape):
                raise CheckpointError(f"{name} is {self.shape(group, name)} in it, not {tuple(tensor.shape)}")
        for name, tensor in own.items():
            local(tensor).copy_(self.rows(group, name, *rows_of(tensor)))

    def read(self, group: str) -> dict[str, Tensor]:
        """A whole group."""
        return {name: self.tensor(group, name) for name in self._entries(group)}

    def _entries(self, group: str) -> dict[str, _Entry]:
        if group not in self._index:
            file = file_of(group)
            entries = {}
            if (self.folder / file).is_file():
                for name in (opened := self._open(file)).keys():  # noqa: SIM118 - it is no dict
                    shape = tuple(opened.get_slice(name).get_shape())
                    entries[name] = _Entry(shape, ((file, 0, shape[0] if shape else 1),))
            self._index[group] = entries
        return self._index[group]

    def _read_index(self, path: Path) -> None:
        try:
            for group, tensors in json.loads(path.read_text(encoding="utf-8")).items():
                self._index[group] = {
                    name: _Entry(tuple(entry["shape"]), tuple(_pieces(entry["pieces"])))
                    for name, entry in tensors.items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no index of shards: {error!r}") from error

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            if path.parent != self.folder:
                raise CheckpointError(f"{self.folder / SHARDS_FILE} names {file}, which is not beside it")
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        return self._files[file]


def _pieces(rows: list[Any]) -> Iterator[Piece]:
    for file, start, stop in rows:
        yield str(file), int(start), int(stop)
