"""A text encoder that the processes of a machine share: a T5-XXL is larger than the model that it serves.

each        every process has all of it
shard       FSDP2: each keeps a part of every block, and gathers a block when it is its turn
broadcast   one process has it, encodes what all ask for, and sends it round
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.distributed.device_mesh import init_device_mesh

from opensora_core.errors import ConfigError
from opensora_core.parallel.agreement import gathered, shared
from opensora_core.parallel.mesh import Axis, Mesh, processes_here
from opensora_core.tensors import Condition
from opensora_core.text import TextEncoder


def shared_encoder(
    build: Callable[[], TextEncoder], how: Literal["each", "shard", "broadcast"], mesh: Mesh
) -> TextEncoder:
    """A text encoder for every process of a mesh.

    Where it is shared, all processes of a machine have to encode equally often, each its own prompts.

    Args:
        build: makes it, on this process's device.
        how: see above.
        mesh: of the run.

    Raises:
        ConfigError: an encoder that has nothing to share.
        As `build`.
    """
    here = processes_here()
    if how == "each" or mesh.size == 1 or here == 1:
        return build()
    grid = init_device_mesh(mesh.device.type, (mesh.size // here, here), mesh_dim_names=("machines", "machine"))
    machine = grid["machine"]
    if how == "broadcast":
        axis = Axis("machine", here, machine.get_local_rank(), machine.get_group())
        return _Broadcast(build() if axis.rank == 0 else None, axis)
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    from opensora_core.parallel.engines.torch import units

    encoder = build()
    model = getattr(encoder, "model", None)
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"parallel.text=shard: a {type(encoder).__name__} has no weights to share", "--set parallel.text=each"
        )
    for unit in units(model):
        fully_shard(unit, mesh=machine, reshard_after_forward=True)
    fully_shard(model, mesh=machine, reshard_after_forward=True)
    return encoder


class _Broadcast:
    """Asks the process of the machine that has the encoder; that one answers all."""

    def __init__(self, encoder: TextEncoder | None, axis: Axis) -> None:
        self.encoder, self.axis = encoder, axis
        self.max_length: int = shared(axis, encoder.max_length if encoder is not None else 0)

    def encode(self, prompts: list[str]) -> Condition:
        """See `TextEncoder`; everybody calls it at once."""
        asked = gathered(self.axis, prompts)
        answer: Condition | Exception | None = None
        if self.encoder is not None:
            try:
                answer = self.encoder.encode([prompt for each in asked for prompt in each]).to("cpu")
            except Exception as error:
                answer = error
        answer = shared(self.axis, answer)
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        start = sum(len(each) for each in asked[: self.axis.rank])
        return answer[start : start + len(prompts)]

    def count_tokens(self, prompt: str) -> int:
        """See `TextEncoder`; everybody calls it at once."""
        asked = gathered(self.axis, prompt)
        counted = None if self.encoder is None else [self.encoder.count_tokens(each) for each in asked]
        found = shared(self.axis, counted)
        assert found is not None
        return found[self.axis.rank]
