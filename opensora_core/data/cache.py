"""What the frozen encoders made of clips and captions, kept on disk so that training needs neither of them.

Content-addressed: a key is a hash of all that the encoder's answer depends on, so a stale entry is never found. Entries
lie in shards, files of safetensors that are whole or absent; the index is what their headers say.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from opensora_core.data.keys import VERSION, FileHashes
from opensora_core.errors import CheckpointError, ConfigError, OsoraError
from opensora_core.files import write_bytes
from opensora_core.tensors import Condition

_MARK = "osora-cache"
_DTYPES = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool}
_NAMES = {torch.float16: "fp16", torch.float32: "fp32"}
_OPEN_HEADERS = 64


# ---------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class CacheSize:
    """How much a cache holds on disk."""

    num_latents: int
    num_captions: int
    latents_bytes: int
    captions_bytes: int


class Cache:
    """A folder with the posteriors of clips (`latents/`), the conditions of captions (`captions/`), and file hashes.

    Several processes may fill a folder at once: no file is ever changed, and entries that were made twice do no harm.
    Each sees what was there when it opened the folder, and its own. It pickles and forks: no file stays open.

    Used as a context manager it flushes at the end, on an error as well, so that nothing that was encoded is lost.

    Attributes:
        hashes: the sums of clips and weights.

    Args:
        folder: made when the first shard is written.
        dtype: of what is stored, float16 or float32; shards of the other one are passed over.
        shard_bytes: a shard is written when it has so many bytes,
        shard_entries: or so many entries. What was not yet written is all that a killed process loses.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float16,
        shard_bytes: int = 64 * 2**20,
        shard_entries: int = 512,
    ) -> None:
        self.folder = folder
        self.hashes = FileHashes(folder / "hashes.jsonl")
        self._latents = _Shards(folder / "latents", ("mean", "std"), dtype, shard_bytes, shard_entries)
        self._captions = _Shards(folder / "captions", ("tokens", "mask"), dtype, shard_bytes, shard_entries)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which shards were passed over at opening, and why; their entries are missing."""
        return (*self._latents.notes, *self._captions.notes)

    @property
    def size(self) -> CacheSize:
        """What is on disk, as of opening and flushing."""
        latents, captions = self._latents, self._captions
        return CacheSize(len(latents.index), len(captions.index), latents.num_bytes, captions.num_bytes)

    def has_latents(self, key: str) -> bool:
        """Whether there are latents of this `clip_key`."""
        return self._latents.has(key)

    def has_caption(self, key: str) -> bool:
        """Whether there is a condition of this `caption_key`."""
        return self._captions.has(key)

    def put_latents(self, key: str, mean: Tensor, std: Tensor) -> None:
        """Store the posterior of one clip, mean and deviation (1, C, T', h, w); written with its shard.

        Raises:
            ConfigError: values that are not finite, or not in float16.
            ResourceError: a shard was full, and the disk refuses it.
        """
        assert len(mean) == 1 and mean.shape == std.shape, f"{tuple(mean.shape)} and {tuple(std.shape)}"
        self._latents.put(key, {"mean": mean[0], "std": std[0]})

    def put_caption(self, key: str, condition: Condition) -> None:
        """Store the condition of one caption; what its mask hides is left out.

        Raises:
            ConfigError: values that are not finite, or not in float16.
            ResourceError: a shard was full, and the disk refuses it.
        """
        assert len(condition) == 1 and condition.size is None, "one caption, and a size belongs to a clip"
        tokens = condition.tokens[0]
        if condition.mask is None:
            self._captions.put(key, {"tokens": tokens})
        else:
            self._captions.put(key, {"tokens": tokens[condition.mask[0]], "mask": condition.mask[0]})

    def latents(self, key: str) -> tuple[Tensor, Tensor]:
        """Mean and deviation of one clip, each (1, C, T', h, w), in the cache's dtype.

        Raises:
            CheckpointError: there is no such entry, or its shard is damaged.
        """
        entry = self._latents.get(key)
        return entry["mean"][None], entry["std"][None]

    def caption(self, key: str) -> Condition:
        """The condition of one caption as its encoder gave it, in the cache's dtype, with zeros where the mask hides.

        Raises:
            CheckpointError: there is no such entry, or its shard is damaged.
        """
        entry = self._captions.get(key)
        if "mask" not in entry:
            return Condition(entry["tokens"][None])
        mask, kept = entry["mask"], entry["tokens"]
        tokens = kept.new_zeros(len(mask), *kept.shape[1:])
        tokens[mask] = kept
        return Condition(tokens[None], mask[None])

    def flush(self) -> None:
        """Write what waits for its shard to be full.

        Raises:
            ResourceError: the disk refuses it; it goes on waiting, and what was written before stays.
        """
        self._latents.flush()
        self._captions.flush()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shards in (self._latents, self._captions):
            try:
                shards.flush()
            except OsoraError as refused:
                if error is None:
                    raise
                error.add_note(f"what was encoded last could not be kept: {refused}")


# ---------------------------------------------------------------------- shards


@dataclass(frozen=True)
class _Header:
    """What a shard says of its tensors: by name dtype, shape and place, and a CRC-32 of each."""

    tensors: dict[str, dict[str, Any]]
    data: int
    sums: str
    num_bytes: int

    @classmethod
    def read(cls, path: Path, dtype: torch.dtype) -> _Header:
        """Read and check the header; raises OSError, ValueError, KeyError, TypeError or AttributeError."""
        with path.open("rb") as file:
            num_bytes = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= num_bytes - 8:
                raise ValueError("it is torn")
            tensors = json.loads(file.read(length))
        mark, version, stored, *sums = str(tensors.pop("__metadata__")[_MARK]).split(" ")
        if mark != _MARK or version != str(VERSION):
            raise ValueError("another release wrote it")
        if stored != _NAMES[dtype]:
            raise ValueError(f"it holds {stored}, not {_NAMES[dtype]}")
        if num_bytes != 8 + length + max(place["data_offsets"][1] for place in tensors.values()):
            raise ValueError("it is torn")
        return cls(tensors, 8 + length, "".join(sums), num_bytes)

    def checked(self) -> dict[str, tuple[dict[str, Any], int]]:
        """The tensors by name with the sums that their bytes must have."""
        return {
            name: (self.tensors[name], int(self.sums[8 * number : 8 * number + 8], 16))
            for number, name in enumerate(sorted(self.tensors))
        }


class _Shards:
    """Entries of one kind: a few tensors under a key, on disk or waiting to be written.

    Bytes are read by their place, not mapped: a shard that is cut short under a map would kill the process.
    """

    def __init__(
        self, folder: Path, names: tuple[str, ...], dtype: torch.dtype, shard_bytes: int, shard_entries: int
    ) -> None:
        assert dtype in _NAMES, f"a cache of {dtype}"
        self.folder, self.names, self.dtype = folder, names, dtype
        self.shard_bytes, self.shard_entries = shard_bytes, shard_entries
        self.notes: list[str] = []
        self.paths: list[Path] = []
        self.num_bytes = 0
        self.index: dict[bytes, int] = {}  # the digest of a key, and which of `paths` has it
        self.waiting: dict[str, dict[str, Tensor]] = {}
        self.waiting_bytes = 0
        self._headers: OrderedDict[int, tuple[int, dict[str, tuple[dict[str, Any], int]]]] = OrderedDict()
        for path in sorted(folder.glob("*.safetensors")):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            header = _Header.read(path, self.dtype)
            keys = {bytes.fromhex(name.partition(".")[0]) for name in header.tensors}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error if isinstance(error, ValueError | OSError) else "it is no shard of a cache"
            self.notes.append(f"{path} is passed over, what it held is missing: {reason}")
            return
        self._add(path, keys, header.num_bytes)

    def _add(self, path: Path, keys: set[bytes], num_bytes: int) -> None:
        self.index |= dict.fromkeys(keys, len(self.paths))
        self.paths.append(path)
        self.num_bytes += num_bytes

    def has(self, key: str) -> bool:
        return key in self.waiting or bytes.fromhex(key) in self.index

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        entry = {name: self._stored(tensor) for name, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in entry.values())
        if self.waiting_bytes + size > self.shard_bytes:
            self.flush()
        self.waiting_bytes += size - sum(tensor.nbytes for tensor in self.waiting.get(key, {}).values())
        self.waiting[key] = entry
        if self.waiting_bytes >= self.shard_bytes or len(self.waiting) >= self.shard_entries:
            self.flush()

    def _stored(self, tensor: Tensor) -> Tensor:
        """A copy in the dtype of the cache that keeps no larger batch alive; labels and masks stay as they are."""
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if not stored.isfinite().all():
            if tensor.isfinite().all():
                raise ConfigError(
                    f"an encoder's values of up to {tensor.abs().max().item():.3g} do not fit into float16",
                    "keep them in float32: --set data.cache_dtype=fp32",
                )
            raise ConfigError(
                "an encoder gave values that are not finite", "compute in float32: --set runtime.dtype=fp32"
            )
        return stored

    def flush(self) -> None:
        if not self.waiting:
            return
        tensors = {f"{key}.{name}": tensor for key, entry in self.waiting.items() for name, tensor in entry.items()}
        sums = "".join(f"{zlib.crc32(tensors[name].numpy().tobytes()):08x}" for name in sorted(tensors))
        content = save(tensors, {_MARK: f"{_MARK} {VERSION} {_NAMES[self.dtype]} {sums}"})
        # named by its header, which has the keys and the sums: a file that another process writes under the same name
        # has the same content
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        path = self.folder / f"{hashlib.sha256(header).hexdigest()[:16]}.safetensors"
        write_bytes(path, content)
        self._add(path, {bytes.fromhex(key) for key in self.waiting}, len(content))
        self.waiting, self.waiting_bytes = {}, 0

    def get(self, key: str) -> dict[str, Tensor]:
        if key in self.waiting:
            return self.waiting[key]
        number = self.index.get(bytes.fromhex(key))
        if number is None:
            raise CheckpointError(f"there is no {key[:16]} in {self.folder}", "run the same again to fill the cache")
        path = self.paths[number]
        try:
            data, tensors = self._header(number)
            with path.open("rb") as file:
                return {
                    name: _read(file, data, *tensors[f"{key}.{name}"])
                    for name in self.names
                    if f"{key}.{name}" in tensors
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged, {key[:16]} cannot be read: {error}", f"delete {path}: it is then encoded again"
            ) from error

    def _header(self, number: int) -> tuple[int, dict[str, tuple[dict[str, Any], int]]]:
        found = self._headers.pop(number, None)
        if found is None:
            header = _Header.read(self.paths[number], self.dtype)
            found = header.data, header.checked()
        self._headers[number] = found
        if len(self._headers) > _OPEN_HEADERS:
            self._headers.popitem(last=False)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_headers": OrderedDict()}


def _read(file: BufferedReader, data: int, place: dict[str, Any], expected: int) -> Tensor:
    """Read one tensor; raises what `_Header.read` raises."""
    (begin, end), shape, dtype = place["data_offsets"], place["shape"], _DTYPES[place["dtype"]]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError("its header contradicts itself")
    content = bytearray(end - begin)
    file.seek(data + begin)
    if file.readinto(content) != len(content) or zlib.crc32(content) != expected:
        raise ValueError("its bytes are not those that were written")
    return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)
