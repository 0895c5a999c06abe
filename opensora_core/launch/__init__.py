"""Starting the processes of a run and seeing them to their end; nothing in here knows what they compute.

`plan` says what is to be started, as command lines; `Supervisor` starts it, starts it again after a failure, and tells
how it ended; `records` is what each process leaves for that.
"""

from __future__ import annotations

from opensora_core.launch.plan import Command, LaunchPlan, Wish, plan, require_tool, submit
from opensora_core.launch.records import LOGS, Record
from opensora_core.launch.supervisor import Ended, Restarting, Started, Supervisor, end_with_parent
from opensora_core.launch.words import again_words, inner_words

__all__ = [
    "LOGS",
    "Command",
    "Ended",
    "LaunchPlan",
    "Record",
    "Restarting",
    "Started",
    "Supervisor",
    "Wish",
    "again_words",
    "end_with_parent",
    "inner_words",
    "plan",
    "require_tool",
    "submit",
]
