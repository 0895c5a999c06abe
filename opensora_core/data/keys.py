"""The keys of the cache: hashes of all that an encoder's answer depends on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensora_core.errors import InputError, WeightsError
from opensora_core.files import append_line, sha256

VERSION = 1
"""Part of every key: raise it when clips are read, fitted or encoded in another way than before."""

_ENCODER_FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".model", ".txt"}
_SETTLED_NS = 2_000_000_000


def clip_key(
    content: str,
    *,
    start_seconds: float | None,
    end_seconds: float | None,
    indices: Sequence[int],
    flip: bool,
    height: int,
    width: int,
    resize: str,
    vae: str,
) -> str:
    """The key of a sample's latents.

    Args:
        content: SHA-256 of the clip's file, of `FileHashes`.
        start_seconds: where the clip begins in its file; None at the beginning.
        end_seconds: where it ends; None at the end.
        indices: of the frames that were chosen, from the clip's first.
        flip: mirrored or not.
        height: of the sample, in pixels.
        width: of the sample, in pixels.
        resize: how the frames were brought to that size.
        vae: its `fingerprint`.
    """
    start, end = (None if seconds is None else float(seconds) for seconds in (start_seconds, end_seconds))
    frames = [int(index) for index in indices]
    return _digest("clip", content, start, end, frames, bool(flip), int(height), int(width), resize, vae)


def caption_key(caption: str, encoder: str) -> str:
    """The key of a caption's condition; `encoder` is the `fingerprint` of the text encoder."""
    return _digest("caption", caption, encoder)


def fingerprint(
    path: Path | None, hashes: FileHashes | None = None, *, parts: Sequence[str] = (), **settings: Any
) -> str:
    """Hash an encoder: its weights, configuration and tokenizer by content, wherever they lie, and its settings.

    Args:
        path: a file, or a folder with all that is below it; None for an encoder without files.
        hashes: remembers the hashes of large files.
        parts: where the folder is a diffusers pipeline, those of its folders that make up the encoder.
        settings: all else that its answer depends on, as plain values: kind, scaling factor, posterior sampled or not,
            tiling, dtype; length and cleaning of captions.

    Raises:
        WeightsError: no such files.
        InputError: a file cannot be read.
    """
    found: list[tuple[str, Path]] = []
    if path is not None and path.is_dir():
        of_pipeline = [
            path / part for part in parts if (path / "model_index.json").is_file() and (path / part).is_dir()
        ]
        for file in (file for root in of_pipeline or [path] for file in root.rglob("*")):
            name = file.relative_to(path)
            if file.suffix in _ENCODER_FILES and not any(part.startswith(".") for part in name.parts):
                found.append((name.as_posix(), file))
    elif path is not None:
        found.append(("", path))
    found = [(name, file) for name, file in found if file.is_file()]
    if path is not None and not found:
        raise WeightsError(f"no weights at {path}", "name a file or a folder of weights")
    hashes = hashes or FileHashes(None)
    return _digest("encoder", sorted((name, hashes.of(file)) for name, file in found), settings)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *values], sort_keys=True, allow_nan=False).encode()).hexdigest()


class FileHashes:
    """SHA-256 sums of files, remembered by (path, size, time of change) so that no file is read twice.

    Args:
        memory: a file that lines are appended to, which several processes may do at once; None remembers nothing.
    """

    def __init__(self, memory: Path | None) -> None:
        self.memory = memory
        self._known: dict[str, tuple[int, int, str]] | None = None

    def of(self, path: Path, known: str = "") -> str:
        """The sum of a file; `known` is taken for it if given, as by a manifest.

        Raises:
            InputError: the file cannot be read.
            ResourceError: the memory cannot be written.
        """
        if known:
            return known
        name = str(path.absolute())
        try:
            stat = path.stat()
            size, changed, found = self._remembered().get(name, (-1, -1, ""))
            if (size, changed) == (stat.st_size, stat.st_mtime_ns):
                return found
            found = sha256(path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        # a file changed just now may change again within the resolution of its time, and would look the same
        if self.memory is not None and time.time_ns() - stat.st_mtime_ns > _SETTLED_NS:
            self._remembered()[name] = (stat.st_size, stat.st_mtime_ns, found)
            append_line(self.memory, json.dumps([name, stat.st_size, stat.st_mtime_ns, found]))
        return found

    def _remembered(self) -> dict[str, tuple[int, int, str]]:
        if self._known is None:
            self._known = {}
            if self.memory is not None and self.memory.is_file():
                with self.memory.open("rb") as lines:
                    for line in lines:
                        try:
                            name, size, changed, found = json.loads(line)
                            self._known[name] = (int(size), int(changed), str(found))
                        except (ValueError, TypeError):  # torn by a kill: then that file is hashed again
                            continue
        return self._known

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": None}
