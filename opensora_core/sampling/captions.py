"""What the text encoder makes of the prompts of a run."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_core import components, parallel
from opensora_core.config import Config
from opensora_core.parallel import Axis, Mesh
from opensora_core.parallel.text import shared_encoder
from opensora_core.sampling.events import Event, Loading, Notice
from opensora_core.sampling.loading import PARTS, free
from opensora_core.sampling.planning import Plan, shortened
from opensora_core.tensors import Condition
from opensora_core.text import TextEncoder


@dataclass(frozen=True)
class Captions:
    """The captions of a run, on the CPU; `empty` is (L, E), of the empty caption."""

    of: Mapping[str, Condition]
    empty: Tensor | None


def read_captions(config: Config, plan: Plan, mesh: Mesh) -> Generator[Event, None, Captions]:
    """Encode every prompt by itself, so that none depends on the others; the encoder is gone when this returns.

    Every process has an encoder and reads what its group draws; or, as `parallel.text` says, all read everything with
    one that they share, or the first one reads for all.
    """
    yield Loading(PARTS["text"])
    how = config.parallel.text
    prompts = list(dict.fromkeys(request.prompt for request in plan.requests))
    encoder = None
    if how == "shard":
        encoder = shared_encoder(lambda: components.build_text_encoder(config), how, mesh)
    elif how == "each" or mesh.is_first:
        encoder = components.build_text_encoder(config)
    if encoder is not None and mesh.is_first:
        yield from _cut(encoder, prompts)
    if how == "each":
        prompts = list(dict.fromkeys(request.prompt for request in plan.requests[mesh.data.rank :: mesh.data.size]))
    readers = mesh.whole if how == "broadcast" else Axis("alone")
    of = {prompt: _encoded(encoder, prompt, readers) for prompt in prompts}
    empty = None if config.text.kind == "class" else _encoded(encoder, "", readers).tokens[0]
    del encoder
    free()
    return Captions(of, empty)


@torch.no_grad()
def _encoded(encoder: TextEncoder | None, prompt: str, readers: Axis) -> Condition:
    """A prompt as the first of those who read it together encodes it."""
    own = None if encoder is None else encoder.encode([prompt]).to("cpu")
    condition = parallel.shared(readers, own)
    assert condition is not None
    return condition


def _cut(encoder: TextEncoder, prompts: Iterable[str]) -> Iterable[Notice]:
    for prompt in prompts:
        if (count := encoder.count_tokens(prompt)) > encoder.max_length:
            yield Notice(
                f"the prompt has {count} tokens, of which the model reads the first {encoder.max_length}: "
                f"'{shortened(prompt)}'"
            )
