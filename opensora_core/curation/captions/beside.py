"""Captions that are there already: beside the clips, or in the names of their folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opensora_core.config import Config
from opensora_core.curation.captions.protocol import Shown, Words

_MOST_BYTES = 2**20  # of a sidecar
_CAPITALS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_FIELDS = ("caption", "text", "description", "prompt", "title")


class _Found:
    """What captioners that look at no frames have in common."""

    about = ""
    at: tuple[float, ...] = ()
    batch_size = 64
    lanes = 1
    is_local = False

    def __init__(self, config: Config) -> None:
        self.facts = {"model": config.caption.model}

    def fetch(self, is_offline: bool) -> Iterator[tuple[str, int, int]]:
        """There is nothing to fetch."""
        return iter(())

    def load(self, device: str) -> None:
        """There is nothing to load."""

    def prepare(self, clips: Sequence[Shown]) -> Sequence[Shown]:
        """The clips themselves."""
        return clips

    def describe(self, prepared: Any, should_stop: Callable[[], bool]) -> list[Words]:
        """What is found for each clip."""
        return [self.find(shown.clip.path) for shown in prepared]

    def find(self, path: Path) -> Words:
        """The caption of a file."""
        raise NotImplementedError


class Labels(_Found):
    """The name of the folder that a clip lies in, as words: `ApplyEyeMakeup` is "Apply Eye Makeup"."""

    about = "the names of the folders that clips lie in"

    def find(self, path: Path) -> Words:
        """The words of the folder's name."""
        name = " ".join(_CAPITALS.sub(" ", path.parent.name).replace("_", " ").split())
        return Words(name) if name else Words("", f"{path} lies in no folder with a name")


class Sidecars(_Found):
    """The text of `NAME.txt`, or the caption of `NAME.json`, beside `NAME.mp4`."""

    about = "the .txt or .json files beside the clips"

    def find(self, path: Path) -> Words:
        """What is written beside a clip; `a.mp4.json` is looked at too, as downloaders write it."""
        for beside in (path.with_suffix(".txt"), path.with_suffix(".json"), path.with_name(f"{path.name}.json")):
            try:
                if not beside.is_file():  # a pipe would be waited for without end
                    continue
                with beside.open("rb") as file:
                    content = file.read(_MOST_BYTES + 1)
            except OSError as error:
                return Words("", f"cannot read {beside.name}: {error.strerror or error}")
            return _read(beside, content)
        return Words("", f"there is neither {path.stem}.txt nor {path.stem}.json beside it")


def _read(path: Path, content: bytes) -> Words:
    if len(content) > _MOST_BYTES:
        return Words("", f"{path.name} is larger than {_MOST_BYTES >> 20} MB")
    try:
        text = content.decode("utf-8-sig")
        if path.suffix == ".json":
            text = _caption_in(json.loads(text))
    except (ValueError, RecursionError) as error:
        return Words("", f"cannot read {path.name}: {error}")
    text = text.strip()
    return Words(text) if text else Words("", f"{path.name} holds no caption ({', '.join(_FIELDS)})")


def _caption_in(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return next((found for name in _FIELDS if isinstance(found := value.get(name), str) and found.strip()), "")
    return ""
