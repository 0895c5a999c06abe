"""Reading files of weights, which strangers may have written: nothing in them is ever run.

A `.pth`, `.pt` or `.bin` is a pickle. It is read with `weights_only=True` and no other way, and the tensors in it
are then kept beside it as safetensors, which load at once and cannot hold code.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_core.errors import CheckpointError, ResourceError
from opensora_core.files import readable, replacing, require_space

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_FETCH_AGAIN = "delete it and fetch it again"
_SOURCE = "converted_from"
# where published files keep their tensors, in the order in which a file that has several is understood
_CONTAINERS = ("ema", "state_dict", "model_state_dict", "model", "module")
_FAVOURITES = ("model", "diffusion_pytorch_model", "pytorch_model")


@dataclass(frozen=True)
class Weights:
    """What a file or folder holds, and a note for the user if something about it is worth one."""

    state: dict[str, Any]
    note: str = ""


def read_weights(path: Path) -> Weights:
    """Read a file of weights, or a folder that holds one model, in shards or not.

    Raises:
        CheckpointError: no weights there, several models, or a file that is torn, malicious or something else.
    """
    file = _of_folder(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if file.suffix == ".safetensors":
        return Weights(_read_safetensors(file))
    if file.suffix in PICKLES:
        return _read_pickle(file, keep=True)
    raise CheckpointError(
        f"{file} is no file of weights: its name ends in '{file.suffix}'", f"known: .safetensors {' '.join(PICKLES)}"
    )


def _of_folder(folder: Path) -> Path:
    """The one file, or index of shards, that a folder is about; safetensors before pickles."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for suffix in (".safetensors.index.json", ".bin.index.json"):
        if index := [file for file in files if file.name.endswith(suffix)]:
            return index[0]
    for suffixes in ((".safetensors",), PICKLES):
        found = [file for file in files if file.suffix in suffixes]
        favourites = [file for name in _FAVOURITES for file in found if file.stem == name]
        if len(found) == 1 or favourites:
            return (favourites or found)[0]
        if found:
            names = ", ".join(file.name for file in found[:10])
            raise CheckpointError(f"{folder} holds several models: {names}", f"name one: {found[0]}")
    held = ", ".join(file.name for file in files[:10]) or "nothing"
    raise CheckpointError(f"{folder} holds no weights, but {held}", "name a file, or the folder that it is in")


def _read_shards(index: Path) -> Weights:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error}", _FETCH_AGAIN) from error
    state: dict[str, Any] = {}
    for name in names:
        shard = index.parent / name
        if shard.parent != index.parent or not shard.is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is not beside it", "fetch all shards")
        state.update(_read_safetensors(shard) if shard.suffix == ".safetensors" else _read_pickle(shard).state)
    return Weights(state)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = load_file(file)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise _unreadable(file, error) from error
    return state


def _read_pickle(file: Path, *, keep: bool = False) -> Weights:
    """Read a pickle, or what an earlier run kept of it; with `keep`, keep it beside."""
    copy = file.with_suffix(".safetensors")
    try:
        stat = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    source = f"{file.name} {stat.st_size} {stat.st_mtime_ns}"
    if keep and _kept_from(copy) == source:
        return Weights(_read_safetensors(copy))
    state = _tensors(_unpickle(file))
    if not keep:
        return Weights(state)
    if copy.exists() and not _kept_from(copy):
        return Weights(state)  # somebody else's file has the name
    return Weights(state, _keep(state, copy, source))


def _kept_from(copy: Path) -> str:
    """What a file of safetensors was made from; empty if not by us."""
    try:
        with safe_open(copy, framework="pt") as opened:
            return str((opened.metadata() or {}).get(_SOURCE, ""))
    except Exception:  # not there, or torn: then it is made again
        return ""


def _keep(state: dict[str, Tensor], copy: Path, source: str) -> str:
    """Write the copy if that is possible; returns why not otherwise."""
    try:
        require_space(copy, sum(tensor.nbytes for tensor in state.values()))
        with replacing(copy) as part:
            save_file(apart(state), part, {_SOURCE: source})
    except (ResourceError, SafetensorError) as error:
        return f"{copy.name} could not be kept beside the weights, so they are converted anew each time: {error}"
    return ""


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them; only those that do are copied."""
    result: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, tensor in state.items():
        storage = tensor.untyped_storage()
        shared = storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken
        taken.add(storage.data_ptr())
        result[key] = tensor.clone().contiguous() if shared else tensor.contiguous()
    return result


def _unpickle(file: Path) -> Mapping[str, Any]:
    _refuse_impostors(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # trainers like to keep their arguments
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                content = torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise _unreadable(file, error) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not weights by name")
    return content


def _refuse_impostors(file: Path) -> None:
    """Name what downloads that went wrong leave behind, and refuse archives that unpack to more than they are."""
    try:
        with file.open("rb") as opened:
            head = opened.read(64)
        if not head:
            raise CheckpointError(f"{file} is empty", _FETCH_AGAIN)
        if head.lstrip()[:1] == b"<":
            raise CheckpointError(f"{file} is a web page, not weights", _FETCH_AGAIN)
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file} is a pointer of git-lfs, not weights", "git lfs pull")
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                packed = sum(entry.compress_size for entry in archive.infolist())
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > packed:
                raise CheckpointError(
                    f"{file} is a compressed archive of {readable(unpacked)} in {readable(packed)}; torch writes none"
                )
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(file, error) from error


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, out of the container that a trainer may have put them in."""
    for container in _CONTAINERS:
        if isinstance(content.get(container), Mapping):
            return _tensors(content[container])
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    """Our words for what torch or safetensors say; not theirs, which recommend to run the file."""
    text = str(error)
    if foreign := re.search(r"unsupported (global|operand|class)[^\n]*", text, re.IGNORECASE):
        return CheckpointError(
            f"{file} is refused: it is not only weights, and might run code when read ({foreign[0].rstrip('.')})",
            "ask whoever made it for safetensors",
        )
    reason = next(iter(text.strip().splitlines()), type(error).__name__)
    return CheckpointError(f"{file} cannot be read, it is torn or no file of weights: {reason}", _FETCH_AGAIN)
