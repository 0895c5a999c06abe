"""Moved to `agreement`; here until `training/filling.py` asks there."""

from __future__ import annotations

from opensora_core.parallel.agreement import patient

__all__ = ["patient"]
