"""Golden cases of the encoder room."""

from __future__ import annotations

from collections.abc import Callable

from tests.golden.case import Case

HANDLERS: dict[str, Callable[[Case], None]] = {}
