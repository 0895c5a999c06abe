"""Many processes as one: the only room that talks to `torch.distributed`.

Models are single-device code; what is in here is put around them from outside, and their state-dict keys stay.
"""

from __future__ import annotations

from opensora_core.parallel.mesh import AXES, Axis, Mesh, joined, launched, local_rank, place

__all__ = ["AXES", "Axis", "Mesh", "joined", "launched", "local_rank", "place"]
