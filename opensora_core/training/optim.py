"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opensora_core.config import TrainConfig

Optimizer = torch.optim.Optimizer


def build_optimizers(module: nn.Module, train: TrainConfig) -> list[Optimizer]:
    """Build the optimizers of a module's trainable parameters.

    AdamW takes everything, or, under `optimizer = "muon"`, everything that is not a matrix inside a block: Muon
    (https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of matrices that map features to features,
    which is wrong for tables, embeddings and the layers at both ends.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and "blocks." in name and name.endswith(".weight")
            (matrices if hidden and train.optimizer == "muon" else others).append(parameter)
    optimizers: list[Optimizer] = []
    if others:
        options: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": train.weight_decay}
        optimizers.append(torch.optim.AdamW(others, lr=train.lr, **options))
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=train.muon_lr, weight_decay=train.weight_decay))
    return optimizers


def lr_factor(step: int, train: TrainConfig) -> float:
    """The share of the peak learning rate at a step (0-based): linear warm-up, plateau, linear decay to zero."""
    factor = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    decay_steps = round(train.max_steps * train.decay_fraction)
    if decay_steps:
        factor = min(factor, (train.max_steps - step) / decay_steps)
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
