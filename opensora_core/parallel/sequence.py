"""Sequence parallelism: the processes of an axis share the frames of a sample, and compute what one would.

    latents      everybody has all of them, and so the embedded tokens (B, T, S, D) with the positions of the whole grid
    blocks       each process walks its own frames (B, t, S, D) through them
      space      attends within frames: nothing is sent. So do captions and the MLP
      time       attends along frames: its input exchanges frames for patches, (B, T, s, D), and its output back;
                 two exchanges of width D per block, however many heads there are
      all        attends over both: exchanges heads (`heads.py`), or sends keys round where they are too few (`ring.py`)
    last layer   each its own frames; then everybody gathers all of the prediction

(DeepSpeed-Ulysses, arXiv 2309.14509, and DSP, arXiv 2403.10266.) T need not divide: shares differ by a frame, and a
process may have none, in which case its tensors are empty and it still takes part in every exchange.

A parameter's gradient is that of the process' own share, times the size of the axis: the mean over the axis is the
whole gradient, as it is over processes that see other samples, so that whoever averages over both is right.

The model is not rebuilt: hooks and replaced methods of its instance do all this, its weights and keys stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from opensora_core.errors import ConfigError
from opensora_core.models import LatentTransformer
from opensora_core.models.layers import SelfAttention
from opensora_core.parallel.collectives import Cut, exchange, gather, own
from opensora_core.parallel.heads import attend_by_heads
from opensora_core.parallel.mesh import Axis
from opensora_core.parallel.ring import attend_by_ring

_Function = TypeVar("_Function", bound=Callable[..., Any])

_FRAMES, _PATCHES = 1, 2
# the backends whose numbers the ring, which has a formula of its own, stands for
_PLAIN = ("auto", "sdpa", "math")


@dataclass
class _Grid:
    """The whole grid of tokens that is at work: T frames of S patches; a block's own tokens may tell neither."""

    frames: int = 0
    patches: int = 0


def sequence_parallel(model: LatentTransformer, axis: Axis) -> Callable[[], None]:
    """Let the processes of an axis share the frames of every sample that goes through a model.

    Every process calls the model with the same latents, timesteps and condition, and gets the whole prediction. It may
    be sharded, given adapters or told to recompute its activations, before or after; and its blocks may be compiled, if
    they have not run yet.

    Args:
        model: a model of `MODELS`; changed in place.
        axis: who shares frames; an axis of one changes nothing.

    Returns:
        A function that makes the model what it was.

    Raises:
        ConfigError: fewer heads than processes in a model of full attention, whose backend the ring does not know.
    """
    if axis.size == 1:
        return lambda: None
    assert "own_frames" not in vars(model), "the frames of this model are shared already"
    attentions = [module for module in model.modules() if isinstance(module, SelfAttention)]
    for attention in attentions:
        _check(attention, axis)

    grid = _Grid()
    undo: list[Callable[[], None]] = []

    def frames_of(whole: int) -> Cut:
        return Cut.even(_FRAMES, whole, axis)

    def own_frames(_: LatentTransformer, x: Tensor) -> Tensor:
        if x.dim() == 4:
            grid.frames, grid.patches = x.shape[1:3]
            return own(x, frames_of(grid.frames), axis)
        return own(x, Cut.even(0, len(x), axis), axis)

    def walk(self: LatentTransformer, number: int, x: Tensor, *arguments: Any) -> Tensor:
        # the grid travels with the arguments: a block that recomputes may do so after the model has seen another one
        return type(self).walk(self, number, x, *arguments, (grid.frames, grid.patches))

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        *rest, (grid.frames, grid.patches) = arguments
        return tuple(rest)

    @_not_traced
    def leave(_: nn.Module, __: tuple[Any, ...], prediction: Tensor) -> Tensor:
        return gather(prediction, frames_of(grid.frames), axis)

    @_not_traced
    def to_patches(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor, ...]:
        x = _in_the_precision_of_layers(arguments[0])
        return exchange([x], frames_of(grid.frames), Cut.even(_PATCHES, grid.patches, axis), axis)

    @_not_traced
    def to_frames(_: nn.Module, __: tuple[Tensor], x: Tensor) -> Tensor:
        return exchange([x], Cut.even(_PATCHES, grid.patches, axis), frames_of(grid.frames), axis)[0]

    @_not_traced
    def attend(self: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = frames_of(grid.frames).scaled(grid.patches)
        if self.num_heads < axis.size:
            return attend_by_ring(q, k, v, tokens, axis)
        whole: Callable[..., Tensor] = MethodType(type(self).attend, self)
        return attend_by_heads(whole, q, k, v, tokens=tokens, axis=axis)

    def replace(module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        # a bound method, which a deep copy of the module binds to itself
        vars(module)[name] = MethodType(method, module)
        undo.append(lambda: delattr(module, name))

    replace(model, "own_frames", own_frames)
    replace(model, "walk", walk)
    for block in model.blocks:
        undo.append(block.register_forward_pre_hook(enter).remove)
    final: Any = model.final_layer
    undo.append(final.register_forward_hook(leave).remove)
    for attention in attentions:
        if attention.over == "time":
            undo.append(attention.register_forward_pre_hook(to_patches).remove)
            undo.append(attention.register_forward_hook(to_frames).remove)
        elif attention.over == "all":
            replace(attention, "attend", attend)

    def as_it_was() -> None:
        while undo:
            undo.pop()()

    return as_it_was


def _check(attention: SelfAttention, axis: Axis) -> None:
    if attention.over == "all" and attention.num_heads < axis.size and attention.backend not in _PLAIN:
        raise ConfigError(
            f"{axis.size} processes that share {attention.num_heads} heads send keys round, which attention backend "
            f"'{attention.backend}' cannot",
            f"`--set model.attention=auto`, or `--set parallel.sequence={attention.num_heads}`",
        )


def _in_the_precision_of_layers(x: Tensor) -> Tensor:
    """What the linear layer that reads x would make of it under autocast, so that no more than that is sent."""
    kind = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _not_traced(function: _Function) -> _Function:
    """Let a compiler step around a function: what it compiles ends before the exchange, and begins anew after it.

    Called when frames are shared and not before: it imports the compiler, which takes as long as torch itself.
    """
    return cast(_Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
