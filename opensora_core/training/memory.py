"""What a training takes: bytes before it runs, floating-point operations, and what a GPU can do at best."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensora_core.config import TrainConfig
from opensora_core.lora import lora_state
from opensora_core.models import LatentTransformer
from opensora_core.models.captioned import CaptionedTransformer
from opensora_core.models.layers import CaptionEmbedder, CrossAttention, LabelEmbedder, SelfAttention
from opensora_core.tensors import Condition
from opensora_core.training.optim import is_matrix

# memory ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a denoiser takes in training, without encoders, data, and what the device's libraries keep.

    Attributes:
        weights: the model, in fp32.
        gradients: of what is trained.
        optimizer: its moments.
        average: the EMA of what is trained.
        autocast_copies: weights in the dtype of the arithmetic, which autocast keeps for a step.
        activations: what the forward pass keeps for the backward pass, at the model's share of recomputed blocks.
        activations_kept: the same if no block recomputes.
        activations_recomputed: the same if every block does.
        checkpoint: what a checkpoint takes on the disk.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    autocast_copies: int
    activations: int
    activations_kept: int
    activations_recomputed: int
    checkpoint: int

    @property
    def total(self) -> int:
        """The peak. Gradients come while activations go, so it is a little more than what is there at any time."""
        fixed = self.weights + self.gradients + self.optimizer + self.average
        return fixed + self.autocast_copies + self.activations


def estimate(
    model: LatentTransformer,
    train: TrainConfig,
    *,
    latent_shape: tuple[int, ...],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    caption_length: int | None = None,
) -> MemoryEstimate:
    """Tell what training takes, without the memory for it.

    Activations are measured, not guessed: a block of each kind in the model runs on the CPU with a few tokens, what
    autograd saves of them is counted, and multiplied by the tokens of the batch. That is for an attention that saves no
    N x N matrix, as all backends but `math`, and without `torch.compile`, which saves less.

    Args:
        model: as it is trained: frozen where it is, with its adapters, its share of recomputed blocks. Its weights are
            not read, so it may be on the meta device.
        train: names the optimizer.
        latent_shape: (C, T, h, w) of a sample.
        batch_size: samples that go through the model at once; of an accumulated batch, those of one part.
        dtype: of the arithmetic.
        caption_length: tokens L of a caption; None is the longest.

    Raises:
        InputError: a latent that the model cannot take.
    """
    tokens = math.prod(model.x_embedder.grid(torch.empty(1, *latent_shape, device="meta")))
    captions = _caption_length(model, caption_length)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    average = sum(4 * parameter.numel() for parameter in trained.values())
    optimizer = sum(_moments(name, parameter, train) for name, parameter in trained.items())

    around = _measure(model, [], dtype)
    kinds = [_kind(block) for block in model.blocks]
    measured = {kind: _measure(model, [model.blocks[kinds.index(kind)]], dtype) - around for kind in set(kinds)}
    full = [measured[kind].activations(tokens, captions) for kind in kinds]
    stream = tokens * model.hidden_size * 4  # what a block begins with; all that a recomputed one keeps

    def activations(recomputes: Callable[[int], bool]) -> int:
        recomputed = [number for number in range(len(full)) if recomputes(number)]
        kept = sum(full) - sum(full[number] - stream for number in recomputed)
        at_work = max((full[number] for number in recomputed), default=0)  # one block is whole again in the backward
        return round(batch_size * (around.activations(tokens, captions) + kept + at_work))

    adapter = sum(tensor.nbytes for tensor in lora_state(model).values())
    return MemoryEstimate(
        weights=weights,
        gradients=sum(parameter.nbytes for parameter in trained.values()),
        optimizer=optimizer,
        average=average,
        autocast_copies=round(around.constant + sum(measured[kind].constant for kind in kinds)),
        activations=activations(model.recomputes),
        activations_kept=activations(lambda _: False),
        activations_recomputed=activations(lambda _: True),
        checkpoint=optimizer + (adapter + 2 * average if adapter else weights + average),
    )


def _moments(name: str, parameter: Tensor, train: TrainConfig) -> int:
    """Bytes that the optimizer keeps of a parameter."""
    count = parameter.numel()
    if train.optimizer == "muon" and is_matrix(name, parameter):
        return 4 * count
    if train.optimizer == "adamw-8bit" and count >= 4096:
        return 2 * (count + 4 * math.ceil(count / 256))  # a byte per number, and a scale per block of 256
    return 8 * count


@dataclass(frozen=True)
class _Saved:
    """Bytes that autograd saves: constant + batch * (per_sample + per_token * N + per_caption_token * L)."""

    constant: float
    per_sample: float
    per_token: float
    per_caption_token: float

    def activations(self, tokens: int, captions: int) -> float:
        """Bytes of a sample."""
        return self.per_sample + self.per_token * tokens + self.per_caption_token * captions

    def __sub__(self, other: _Saved) -> _Saved:
        return _Saved(
            self.constant - other.constant,
            self.per_sample - other.per_sample,
            self.per_token - other.per_token,
            self.per_caption_token - other.per_caption_token,
        )


def _kind(block: nn.Module) -> tuple[object, ...]:
    """Equal for blocks that save the same."""
    over = tuple(module.over for module in block.modules() if isinstance(module, SelfAttention))
    weights = tuple((name, weight.shape, weight.requires_grad) for name, weight in block.named_parameters())
    return type(block), over, weights


def _measure(model: LatentTransformer, blocks: list[nn.Module], dtype: torch.dtype) -> _Saved:
    """Measure what a model of these blocks saves. Four sizes tell what grows with what."""
    tiny = _stand_in(model, blocks)
    base = _saved_bytes(tiny, dtype)
    per_token = (_saved_bytes(tiny, dtype, rows=4) - base) / (2 * 2 * 2)
    per_caption_token = (_saved_bytes(tiny, dtype, captions=16) - base) / 8
    sample = _saved_bytes(tiny, dtype, batch=2) - base
    per_sample = sample - per_token * (2 * 2 * 2) - per_caption_token * 8
    return _Saved(base - sample, per_sample, per_token, per_caption_token)


def _stand_in(model: LatentTransformer, blocks: list[nn.Module]) -> LatentTransformer:
    """A model with the same layers around other blocks, on the CPU, with zeros for weights."""
    shell = copy.copy(model)
    shell._modules = {**model._modules, "blocks": nn.ModuleList(blocks)}
    memo: dict[int, Tensor] = {}
    for parameter in shell.parameters():
        memo[id(parameter)] = nn.Parameter(torch.zeros(parameter.shape), requires_grad=parameter.requires_grad)
    for buffer in shell.buffers():
        memo[id(buffer)] = torch.zeros(buffer.shape)
    result = copy.deepcopy(shell, memo)
    result.recompute, result.attention = 0.0, "sdpa"
    for module in result.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.backend = "sdpa"
    if isinstance(result, CaptionedTransformer):
        result.block_of_frames = -1  # no block but one has them
    return result


def _saved_bytes(
    model: LatentTransformer, dtype: torch.dtype, *, batch: int = 1, rows: int = 2, captions: int = 8
) -> int:
    """Bytes that autograd saves of a forward pass over two frames of `rows` x 2 patches, weights left out."""
    frames, *patch = model.x_embedder.patch_size
    size = (2 * frames, rows * patch[0], 2 * patch[1])
    latents = torch.zeros(batch, model.x_embedder.proj.in_channels, *size, requires_grad=True)  # every block has one
    condition = _empty_condition(model, batch, captions)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    half = dtype is not torch.float32
    context = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()  # fp16 has the same bytes
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        out = model(latents, torch.zeros(batch), condition)
    result = sum(storage.nbytes() for storage in saved.values())
    del out  # kept until here, so that no storage takes the place of another
    return result


def _empty_condition(model: LatentTransformer, batch: int, captions: int) -> Condition:
    embedder = model.y_embedder
    if isinstance(embedder, LabelEmbedder):
        return Condition(torch.zeros(batch, dtype=torch.int64))
    length = captions if isinstance(model, CaptionedTransformer) else 1
    mask = torch.ones(batch, length, dtype=torch.bool) if isinstance(model, CaptionedTransformer) else None
    tokens = torch.zeros(batch, length, embedder.y_proj.fc1.in_features)
    return Condition(tokens, mask, torch.ones(batch, 2))


def _caption_length(model: LatentTransformer, length: int | None) -> int:
    """Caption tokens that a model reads of a sample."""
    if not isinstance(model.y_embedder, CaptionEmbedder):
        return 0
    longest = len(model.y_embedder.y_embedding)
    return longest if length is None else min(length, longest)


# operations -----------------------------------------------------------------------------------------------------------


def training_flops(model: LatentTransformer, latent_shape: tuple[int, ...], caption_length: int | None = None) -> int:
    """Floating-point operations of training on one sample: three times the forward pass, recomputation left out."""
    return 3 * forward_flops(model, latent_shape, caption_length)


def forward_flops(model: LatentTransformer, latent_shape: tuple[int, ...], caption_length: int | None = None) -> int:
    """Floating-point operations of one sample's forward pass: its matrix products, where n terms make 2 n operations.

    A linear layer takes 2 * rows * in * out, attention 4 * N * keys * D. What is done per number is left out.

    Args:
        model: on any device.
        latent_shape: (C, T, h, w).
        caption_length: tokens L of a caption; None is the longest.

    Raises:
        InputError: a latent that the model cannot take.
    """
    frames, rows, columns = model.x_embedder.grid(torch.empty(1, *latent_shape, device="meta"))
    tokens, places = frames * rows * columns, rows * columns
    captions = _caption_length(model, caption_length)
    keys = {"space": places, "time": frames, "all": tokens}
    total = 2 * tokens * model.x_embedder.proj.weight.numel()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            total += 2 * _rows(name, tokens, captions) * module.weight.numel()
        elif isinstance(module, SelfAttention):
            total += 4 * tokens * keys[module.over] * model.hidden_size
        elif isinstance(module, CrossAttention):
            total += 4 * tokens * captions * model.hidden_size
    return total


_ROWS = {"t_embedder": 1, "t_block": 1, "adaLN_modulation": 1, "ar_embedder": 1, "csize_embedder": 2}


def _rows(layer: str, tokens: int, captions: int) -> int:
    """How many rows of a sample a linear layer is applied to."""
    parts = layer.split(".")
    if "kv_linear" in parts or "y_embedder" in parts:
        return captions
    return next((_ROWS[part] for part in parts if part in _ROWS), tokens)


_PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What a device can do per second in bf16 or fp16: its maker's number for dense products, summed in fp32.

    Returns:
        None where that is not known: other devices, a CPU, fp32.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The peak of a device that calls itself `name`; the longest name in the table that fits counts."""
    words = f" {name.replace('-', ' ')} "
    fitting = [known for known in _PEAKS if f" {known} " in words and " Laptop " not in words]
    return _PEAKS[max(fitting, key=len)] if fitting else None
