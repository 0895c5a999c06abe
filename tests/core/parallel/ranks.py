"""Running a function of a test module on several processes that meet over gloo."""

from opensora_core.parallel.local import on_ranks

__all__ = ["on_ranks"]
