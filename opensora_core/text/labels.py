"""Classes as prompts, by name or by number."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import torch

from opensora_core.errors import CheckpointError, ConfigError, InputError, WeightsError, nearest
from opensora_core.tensors import Condition

CLASS_LISTS = {1000: "imagenet.txt", 101: "ucf101.txt"}
"""Number of classes -> the list beside this file that a model with so many was trained on: ImageNet-1k or UCF-101."""


class LabelEncoder:
    """Class names or numbers -> numbers.

    Names match whatever their case, blanks and punctuation: "golden retriever", "Golden_Retriever". A number is always
    understood, so models whose classes have no known names can be prompted as well.

    Args:
        names: for each class its name, or several of them with ", " between; may be empty.
        num_classes: how many classes the model has; 0 is as many as there are names.
        device: where the numbers are put.
    """

    def __init__(self, names: Sequence[str], *, num_classes: int = 0, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes or len(names)
        if self.num_classes < 1:
            raise ConfigError("a model of no classes cannot be prompted by class", "use --set text.kind=t5")
        if names and len(names) != self.num_classes:
            raise ConfigError(
                f"{len(names)} names of classes for a model of {self.num_classes}",
                "name the list that belongs to the model with --set text.weights=FILE",
            )
        self.device = device
        self._numbers: dict[str, list[int]] = {}
        self._names = [name for synonyms in names for name in synonyms.split(", ")]
        for number, synonyms in enumerate(names):
            for key in dict.fromkeys(_key(name) for name in (*synonyms.split(", "), synonyms)):
                self._numbers.setdefault(key, []).append(number)
        # a whole line is the class's own name, whatever else is called that as well: folders of classes have such names
        lines = Counter(_key(synonyms) for synonyms in names)
        for number, synonyms in enumerate(names):
            if lines[_key(synonyms)] == 1:
                self._numbers[_key(synonyms)] = [number]

    @classmethod
    def from_pretrained(
        cls, path: Path | None = None, *, num_classes: int = 0, device: torch.device | str = "cpu"
    ) -> LabelEncoder:
        """Read the names from a list or a checkpoint's settings; without one take those of `CLASS_LISTS`, if any.

        Args:
            path: a file with one name on a line; a JSON file with an `id2label` table; or a folder that has one in its
                `model_index.json` or `config.json`, as the diffusers layout of DiT does. None: a list by `num_classes`.
            num_classes: how many classes the model has; 0 is as many as there are names.
            device: where the numbers are put.

        Raises:
            WeightsError: there is no such path.
            CheckpointError: there are no names in it.
            ConfigError: not as many names as the model has classes.
        """
        if path is not None:
            return cls(_read_names(path), num_classes=num_classes, device=device)
        file = CLASS_LISTS.get(num_classes)
        names = resources.files(__package__).joinpath(file).read_text("utf-8").splitlines() if file else []
        return cls(names, num_classes=num_classes, device=device)

    @property
    def max_length(self) -> int:
        """A class is one token."""
        return 1

    def count_tokens(self, prompt: str) -> int:
        """A class is one token, however long its name."""
        return 1

    def encode(self, prompts: list[str]) -> Condition:
        """Names or numbers -> tokens (B,) int64.

        Raises:
            InputError: no such class; the nearest names are offered.
        """
        return Condition(
            torch.tensor([self._number(prompt) for prompt in prompts], dtype=torch.int64, device=self.device)
        )

    def _number(self, prompt: str) -> int:
        word = prompt.strip()
        if re.fullmatch(r"-?\d+", word):
            number = int(word)
            if not 0 <= number < self.num_classes:
                raise InputError(f"there is no class {number}", f"classes are numbered 0 to {self.num_classes - 1}")
            return number
        found = self._numbers.get(_key(word), [])
        if len(found) > 1:
            numbers = " and ".join(str(number) for number in found)
            raise InputError(f"'{_short(word)}' is the name of classes {numbers}", "give the number instead")
        if not found:
            hint = nearest(_short(word), self._names) if self._names else "the names of its classes are not known"
            if hint.startswith("known:"):
                hint = f"for example '{self._names[0]}'"
            raise InputError(
                f"there is no class '{_short(word)}'", f"{hint}; or give a number from 0 to {self.num_classes - 1}"
            )
        return found[0]


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _short(word: str) -> str:
    return word if len(word) <= 60 else word[:57] + "..."


def _read_names(path: Path) -> list[str]:
    if not path.exists():
        raise WeightsError(f"no list of classes at {path}", "name one with --set text.weights=FILE")
    files: Iterable[Path] = (path / "model_index.json", path / "config.json") if path.is_dir() else (path,)
    for file in files:
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            if file.suffix != ".json":
                return [line.strip() for line in text.splitlines() if line.strip()]
            table = json.loads(text).get("id2label")
            if table:
                return [str(table[str(number)]) for number in range(len(table))]
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the names of classes in {file} cannot be read: {error!r}",
                "id2label must map the numbers from 0 upwards to names",
            ) from None
    raise CheckpointError(f"there are no names of classes in {path}", "name a list with --set text.weights=FILE")
