"""The optimizers' state by the names of the parameters, in a form that safetensors and JSON hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opensora_core.errors import CheckpointError

Optimizer = torch.optim.Optimizer

# what a TrainConfig, the module or the device decides anew in every run
_DERIVED = ("params", "lr", "weight_decay", "fused", "foreach")


def optimizer_tensors(module: nn.Module, optimizers: list[Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of optimizers in a form that safetensors and JSON hold.

    Returns:
        Tensors under `<parameter name>/<state key>`, a number as a tensor without dims; they are the optimizers' own,
        not copies. And the rest, by the optimizers' names: hyperparameters that no setting gives.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for optimizer in optimizers:
        numbers: set[str] = set()
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    numbers.add(key)
                tensors[f"{names[id(parameter)]}/{key}"] = _as_tensor(value)
        group = {name: value for name, value in optimizer.param_groups[0].items() if name not in _DERIVED}
        rest[type(optimizer).__name__] = json.loads(json.dumps({"group": group, "numbers": sorted(numbers)}))
    return tensors, rest


def _as_tensor(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def load_optimizer(
    module: nn.Module, optimizers: list[Optimizer], tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Continue from what `optimizer_tensors` gave; rates, weight decay and kernels stay those of the new run.

    Raises:
        CheckpointError: the state of other optimizers, or of other parameters.
    """
    kinds = {type(optimizer).__name__: optimizer for optimizer in optimizers}
    if kinds.keys() != rest.keys():
        raise CheckpointError(
            f"the checkpoint has the state of {' and '.join(rest)}, but the run trains with {' and '.join(kinds)}",
            "go on with the train.optimizer that the run began with",
        )
    parameters = dict(module.named_parameters())
    owners = {
        id(parameter): (kind, group.get("fused") or group.get("capturable"))
        for kind, optimizer in kinds.items()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for optimizer in optimizers:
        optimizer.state.clear()
        saved = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in rest[type(optimizer).__name__]["group"].items()
        }
        for group in optimizer.param_groups:
            group.update({name: value for name, value in saved.items() if name in group})
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in owners:
            raise CheckpointError(
                f"the checkpoint has the optimizer's state of '{name}', which this run does not train"
            )
        kind, counts_on_device = owners[id(parameter)]
        value: Any
        if key in rest[kind]["numbers"]:
            value = tensor.item()
        elif tensor.ndim == 0 and not counts_on_device:
            value = tensor.to("cpu", copy=True)  # counting there does not make a GPU wait
        else:
            value = tensor.to(parameter.device, copy=True)
        if key in ("exp_avg", "momentum_buffer") and tensor.shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint's {key} of '{name}' is {tuple(tensor.shape)}, not {tuple(parameter.shape)}"
            )
        kinds[kind].state[parameter][key] = value
