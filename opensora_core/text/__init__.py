"""Prompts -> `Condition`: text encoders behind one protocol."""

from __future__ import annotations

from opensora_core.text.protocol import TextEncoder

__all__ = ["TextEncoder"]
