"""What every long work may tell besides how far it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """Something that the user should know, and that does not stop the run."""

    message: str
