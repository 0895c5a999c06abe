"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opensora_core.config import TrainConfig
from opensora_core.errors import ConfigError
from opensora_core.muon import Muon

Optimizer = torch.optim.Optimizer

_TABLES = ("scale_shift_table", "y_embedding")
_FUSED = {"cpu", "cuda", "mps", "xpu"}  # where torch has one kernel for the whole of AdamW's step


def build_optimizers(module: nn.Module, train: TrainConfig) -> list[Optimizer]:
    """Build the optimizers of a module's trainable parameters, on the device where they are.

    AdamW (in 8 bits or not) takes everything, or, under `optimizer = "muon"`, everything that is not a matrix inside a
    block: Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of matrices that map features
    to features, which is wrong for tables, embeddings and the layers at both ends.

    Biases, norms, tables and embeddings do not decay.

    Raises:
        ConfigError: an optimizer that is not installed, or that the device of the parameters does not have.
    """
    tables = {id(table) for table in _embeddings(module)}
    matrices: list[nn.Parameter] = []
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if train.optimizer == "muon" and is_matrix(name, parameter):
            matrices.append(parameter)
        elif parameter.ndim < 2 or name.endswith(_TABLES) or id(parameter) in tables:
            others.append(parameter)
        else:
            decaying.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decaying, train.weight_decay), (others, 0.0))
        if parameters
    ]
    optimizers: list[Optimizer] = []
    if groups:
        optimizers.append(_adamw(groups, train))
    if matrices:
        optimizers.append(Muon(matrices, lr=train.muon_lr, weight_decay=train.weight_decay))
    return optimizers


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for a parameter: a matrix inside a block."""
    return parameter.ndim == 2 and "blocks." in name and name.endswith(".weight")


def _embeddings(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            yield part.weight


def _adamw(groups: list[dict[str, Any]], train: TrainConfig) -> Optimizer:
    options: dict[str, Any] = {"lr": train.lr, "betas": (0.9, 0.999), "eps": 1e-8}
    if train.optimizer == "adamw-8bit":
        return _adamw_8bit(groups, options)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, fused=devices <= _FUSED, **options)


def _adamw_8bit(groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    """AdamW with its moments in 8 bits, block by block (arXiv 2110.02861); tensors below 4096 numbers keep fp32."""
    remedy = "pip install bitsandbytes, or --set train.optimizer=adamw"
    device = groups[0]["params"][0].device.type
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"train.optimizer=adamw-8bit does not run on '{device}'", "--set train.optimizer=adamw")
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(f"train.optimizer=adamw-8bit needs bitsandbytes: {error}", remedy) from error
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(groups, **options)
    try:
        probe = nn.Parameter(torch.zeros(4096, device=groups[0]["params"][0].device))
        probe.grad = torch.zeros_like(probe)
        bitsandbytes.optim.AdamW8bit([probe]).step()
    except Exception as error:  # a library that lacks this machine's kernels tells so in many ways
        raise ConfigError(f"train.optimizer=adamw-8bit does not run on '{device}' here: {error}", remedy) from error
    return optimizer


# the learning rate ----------------------------------------------------------------------------------------------------


def lr_factor(step: int, train: TrainConfig) -> float:
    """The share of the peak learning rate at a step (0-based): linear warm-up, plateau, decay to zero.

    The decay is a straight line or half a cosine, over the last `train.decay_fraction` of the run.
    """
    factor = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    decay_steps = round(train.max_steps * train.decay_fraction)
    if decay_steps:
        left = min(1.0, (train.max_steps - step) / decay_steps)
        factor = min(factor, left if train.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)
    return factor


def set_lr(optimizers: list[Optimizer], step: int, train: TrainConfig) -> float:
    """Set the rates of a step; returns AdamW's, or Muon's where there is no other, for the report."""
    factor = lr_factor(step, train)
    rates = []
    for optimizer in optimizers:
        rates.append(factor * (train.muon_lr if isinstance(optimizer, torch.optim.Muon) else train.lr))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
    return rates[0]
