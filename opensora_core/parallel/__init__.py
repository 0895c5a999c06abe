"""Many processes as one: the only room that talks to `torch.distributed`.

Models are single-device code; what is in here is put around them from outside, and their state-dict keys stay.
"""

from __future__ import annotations

from opensora_core.parallel.agreement import collected, gathered, patient, shared
from opensora_core.parallel.collectives import Cut, Traffic, counted, exchange, gather, own
from opensora_core.parallel.decoding import decode_by_frames, place_in_group
from opensora_core.parallel.guidance import in_halves
from opensora_core.parallel.heads import attend_by_heads
from opensora_core.parallel.mesh import AXES, Axis, Mesh, joined, launched, local_rank, place, processes_here
from opensora_core.parallel.ring import attend_by_ring
from opensora_core.parallel.sequence import sequence_parallel

__all__ = [
    "AXES",
    "Axis",
    "Cut",
    "Mesh",
    "Traffic",
    "attend_by_heads",
    "attend_by_ring",
    "collected",
    "counted",
    "decode_by_frames",
    "exchange",
    "gather",
    "gathered",
    "in_halves",
    "joined",
    "launched",
    "local_rank",
    "own",
    "patient",
    "place",
    "place_in_group",
    "processes_here",
    "sequence_parallel",
    "shared",
]
