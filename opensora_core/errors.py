"""Every error that a user can cause, drawn as a tree.

    OsoraError                 1   anything that has a message for the user and a hint for what to do next
    ├── UsageError             2   the request itself cannot be carried out as written
    │   ├── ConfigError        2   an unknown setting, a value of the wrong kind, settings that contradict each other
    │   └── InputError         2   a prompt, a file or a size that cannot be used
    ├── WeightsError           1   weights that are missing or cannot be had
    │   └── CheckpointError    1   weights that are there, but torn, malicious or of another architecture
    ├── DeviceError            1   a device that was asked for and is not there
    ├── ResourceError          1   out of memory, out of disk space, no permission
    ├── TrainingError          1   a run that cannot go on, such as one whose loss is not a number
    └── Stopped          130, 143   work that was asked to stop, and did so with nothing lost

The number is the exit code of the command that ends with the error. A bug of our own is never an `OsoraError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OsoraError(Exception):
    """An error with a message that carries the values and a hint that names the next command."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(OsoraError):
    """The request cannot be carried out as written."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting that is unknown, of the wrong kind, or in conflict with another."""


class InputError(UsageError):
    """A prompt, file or size that cannot be used."""


class WeightsError(OsoraError):
    """Weights that are missing or cannot be had."""


class CheckpointError(WeightsError):
    """Weights that are torn, malicious, or belong to another architecture."""


class DeviceError(OsoraError):
    """A device that was asked for and is not there."""


class ResourceError(OsoraError):
    """Out of memory or disk space, or no permission."""


class TrainingError(OsoraError):
    """A training run that cannot go on."""


class Stopped(OsoraError):  # noqa: N818 - it did what it was asked to
    """Work that was asked to stop by a signal: SIGINT (130) or SIGTERM (143)."""

    def __init__(self, message: str, hint: str = "", signal_number: int = 2) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint that offers the known names nearest to `word`, or all of them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    return "known: " + ", ".join(names)
