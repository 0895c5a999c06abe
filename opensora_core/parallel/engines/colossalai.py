"""ColossalAI's Booster as an engine: its plugins spread gradients and optimizer, the rest is as with torch's own.

    ddp       copies of everything
    zero1     every process keeps its part of the optimizer's state
    zero2     and of the gradients
    hybrid    in fp32 as ddp; in bf16 as zero1, with weights and gradients in bf16 and its part of fp32 master weights
    gemini    refused: see docs/colossalai.md

All but hybrid keep the weights in fp32 on every process, so that a run has the numbers that it has elsewhere. The
library is imported when an engine is made, and by nobody else: it takes seconds, and is not there by default.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora_core.config import ParallelConfig, TrainConfig
from opensora_core.errors import CheckpointError, ResourceError
from opensora_core.files import refusal, require_space
from opensora_core.muon import Muon
from opensora_core.parallel.engines.colossal_library import (
    DEFAULT_PLUGIN,
    boosted_by,
    import_quietly,
    meet_oneself,
    plugin,
    require,
    setting_up,
    with_kernels,
)
from opensora_core.parallel.engines.matrices import dealt
from opensora_core.parallel.engines.protocol import Optimizer
from opensora_core.parallel.mesh import Mesh
from opensora_core.parallel.shards import Stored

_OPTIMIZER = "optimizer-{}.bin"
_MASTERS = "masters.safetensors"


class ColossalEngine:
    """Training through ColossalAI's Booster; see `Engine`.

    Gradients are the mean over all processes of the mesh, which is what its data and sequence axes ask for together.

    Args:
        mesh: of the run.
        parallel: `plugin`.
        train: `optimizer`.
        dtype: of the arithmetic.
        scale_loss: refused.

    Raises:
        ConfigError: the library is not installed, or it cannot do what is asked for.
    """

    name = "colossalai"
    skips_overflows = False

    def __init__(
        self, mesh: Mesh, parallel: ParallelConfig, train: TrainConfig, *, dtype: torch.dtype, scale_loss: bool
    ) -> None:
        self.mesh, self.plugin, self.dtype = mesh, parallel.plugin or DEFAULT_PLUGIN, dtype
        require(mesh.device, self.plugin, parallel.sharding, train.optimizer, scale_loss)
        import_quietly()
        self.optimizers: list[Optimizer] = []
        self.module: nn.Module = nn.Identity()
        self._zero: list[Any] = []  # the optimizers that are spread
        self._decays: list[tuple[float, list[Tensor]]] = []
        self._boosted: list[Any] = []  # all of them, in the library's wrapping
        self._written = False
        if not dist.is_initialized():
            meet_oneself(mesh.device)

    # setting up -------------------------------------------------------------------------------------------------------

    def prepare(
        self, module: nn.Module, root: nn.Module, build: Callable[[nn.Module], list[Optimizer]]
    ) -> Callable[..., Any]:
        """See `Engine`; parameters stay whole, and under hybrid those that are trained become bf16."""
        untouched = [(tensor, tensor.data) for tensor in (*_frozen(root), *root.buffers())]
        self.module = module
        built = build(module)
        decays = self._merged(built[0])
        built = [with_kernels(optimizer, self.mesh.device) for optimizer in built]
        self._order = _digest(module, built)
        with setting_up(self.mesh.device):
            boosted, first = boosted_by(plugin(self.plugin, self.dtype, self.mesh.device), root, built[0])
            # of all plugins only ddp takes more than one, and leaves them as they are
            self._boosted = [first, *(type(first)(other) for other in built[1:])]
        for tensor, data in untouched:
            tensor.data = data.to(self.mesh.device)
        self._zero = [wrapped for wrapped in self._boosted if hasattr(wrapped, "pg_to_grad_store")]
        self.optimizers = [wrapped.optim for wrapped in self._boosted]
        parts = self._zero[0].get_working_to_master_map() if self._zero else {}
        self._decays = [(decay, [parts.get(id(tensor), tensor) for tensor in tensors]) for decay, tensors in decays]
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon) and self.mesh.size > 1:
                optimizer.spread = dealt(self.mesh.whole)
        return boosted  # type: ignore[no-any-return]

    def _merged(self, optimizer: Optimizer) -> list[tuple[float, list[Tensor]]]:
        """Make one group of those that differ in their decay; returns decays with their parameters, for `update`.

        ZeRO sends its bucket off whenever the next gradient is of another group, and weights and biases take turns.
        """
        groups = optimizer.param_groups
        if self.plugin == "ddp" or type(optimizer) is not torch.optim.AdamW:
            return []
        decays = [(group["weight_decay"], group["params"]) for group in groups if group["weight_decay"]]
        groups[0].update(params=[parameter for group in groups for parameter in group["params"]], weight_decay=0.0)
        del groups[1:]
        return decays

    # a step -----------------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._boosted[0].backward(loss)

    def clip(self, max_norm: float) -> Tensor:
        """See `Engine`."""
        if not self._zero:
            parameters = [
                p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
            ]
            return nn.utils.clip_grad_norm_(parameters, max_norm).float()
        (zero,) = self._zero
        norms = [
            type(zero)._compute_grad_norm(zero, store.torch_pg, store.get_working_grads_by_group_id(group))
            for group in range(zero.num_param_groups)
            for store in zero.pg_to_grad_store.values()
        ]
        # its step clips, and would go through all gradients for their norm once more
        found = iter(norms)
        zero._compute_grad_norm = lambda *_, **__: next(found)
        zero._clip_grad_norm = max_norm
        return torch.tensor(math.hypot(*norms), dtype=torch.float32, device=self.mesh.device)

    @torch.no_grad()
    def update(self) -> None:
        """See `Engine`."""
        self._renew()
        rate = self.optimizers[0].param_groups[0]["lr"]
        for decay, tensors in self._decays:  # as AdamW does, before its step
            torch._foreach_mul_(tensors, 1 - rate * decay)
        for wrapped in self._boosted:
            wrapped.step()
            wrapped.zero_grad()

    def settle(self) -> None:
        """See `Engine`; what was written is looked at when it matters, as it is often taken back."""
        self._written = True

    @torch.no_grad()
    def _renew(self) -> None:
        """Let master weights follow weights that were written to, and keep those whose weights are as they were."""
        if not self._written:
            return
        self._written = False
        for _, parameter, master in self._masters():
            weight = self._part_of(parameter.detach())
            master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.to(master.dtype)))

    # the state --------------------------------------------------------------------------------------------------------

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Nothing: the library writes the optimizer itself."""
        return {}

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint has to have in common with a run that goes on from it."""
        return {
            "engine": self.name,
            "optimizers": [type(optimizer).__name__ for optimizer in self.optimizers],
            "weights": "bf16 with fp32 masters" if self._masters() else "fp32",
            "parameters": self._order,
        }

    def save(self, folder: Path) -> None:
        """Write what `Booster.save_optimizer` would, and master weights, whole and in fp32, where there are some.

        The library would write weights that were rounded to bf16, and go on from those. All collectives come before
        the first byte is written, so that a full disk is an error and no deadlock.

        Raises:
            ResourceError: no space or no permission.
        """
        self._renew()
        states = [
            wrapped.state_dict(only_on_master=True) if wrapped in self._zero else optimizer.state_dict()
            for wrapped, optimizer in zip(self._boosted, self.optimizers, strict=True)
        ]
        masters = {name: self._whole(parameter, master) for name, parameter, master in self._masters()}
        if not self.mesh.is_first:
            return
        own = folder / self.name
        own.mkdir(exist_ok=True)
        moments = [tensor for state in states for each in state["state"].values() for tensor in each.values()]
        everything = [tensor for tensor in (*moments, *masters.values()) if isinstance(tensor, Tensor)]
        require_space(own, sum(tensor.nbytes for tensor in everything))
        for number, state in enumerate(states):
            _write(own / _OPTIMIZER.format(number), partial(_save, state))
        if masters:
            _write(own / _MASTERS, partial(save_file, masters))

    @torch.no_grad()
    def load(self, stored: Stored, numbers: Mapping[str, Any]) -> None:
        """See `Engine`; plugin and number of processes may be others than they were.

        Raises:
            CheckpointError: of another engine or kind of optimizer, of other parameters, or of other kinds of weights.
        """
        for what, mine in self.numbers().items():
            if numbers.get(what) != mine:
                raise CheckpointError(
                    f"the checkpoint's {what} is {numbers.get(what, 'of another engine')}, and the run's is {mine}",
                    "go on with the settings that the run began with, or start another from it: --init RUN",
                )
        own = stored.folder / self.name
        for number, optimizer in enumerate(self.optimizers):
            path = own / _OPTIMIZER.format(number)
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
                parts = {index: self._parts_of(each) for index, each in state.items()}
                # rates, decay and kernels are the new run's
                optimizer.load_state_dict({"state": parts, "param_groups": optimizer.state_dict()["param_groups"]})
            except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"{path} cannot be loaded: {error}") from error
        if masters := self._masters():
            with safe_open(own / _MASTERS, framework="pt") as file:
                for name, parameter, master in masters:
                    whole = file.get_tensor(name)
                    master.copy_(self._part_of(whole))
                    parameter.copy_(whole)

    def _parts_of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What this process keeps of an optimizer's state of one parameter, copied."""
        return {
            key: (self._part_of(value) if self._zero and value.ndim else value).clone()
            if isinstance(value, Tensor)
            else value
            for key, value in state.items()
        }

    def _masters(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Names, parameters, and this process's parts of their master weights; empty where they are the same."""
        if not self._zero or not self._zero[0]._master_weights:
            return []
        known = self._zero[0].get_working_to_master_map()
        return [(name, p, known[id(p)]) for name, p in self.module.named_parameters() if id(p) in known]

    def _part_of(self, tensor: Tensor) -> Tensor:
        """This process's part of a parameter, flat, with zeros at the end of the last part."""
        padding = -tensor.numel() % self.mesh.size
        return nn.functional.pad(tensor.flatten(), (0, padding)).chunk(self.mesh.size)[self.mesh.rank]

    def _whole(self, parameter: nn.Parameter, master: Tensor) -> Tensor:
        """Master weights from everybody's parts, on the first process's CPU; nothing elsewhere."""
        parts = master.new_empty(self.mesh.size * master.numel())
        dist.all_gather_into_tensor(parts, master.detach())
        return parts[: parameter.numel()].view(parameter.shape).cpu() if self.mesh.is_first else parts.new_empty(0)


def _save(content: Any, path: Path) -> None:
    with path.open("wb") as file:  # by its name alone the error of the system would be lost
        torch.save(content, file)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # libraries wrap the system's errors into their own
        system = error if isinstance(error, OSError) else error.__context__
        if isinstance(system, OSError):
            raise refusal(path, system) from error
        raise ResourceError(f"cannot write {path}: {error}", "free some space, or choose another disk") from error
    path.chmod(0o644)  # safetensors writes for its owner's eyes only


def _frozen(root: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in root.parameters() if not parameter.requires_grad]


def _digest(module: nn.Module, optimizers: list[Optimizer]) -> str:
    """A digest of which parameters are trained, and in which order: the library knows them by their numbers."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    told = [
        [
            (names[id(parameter)], tuple(parameter.shape))
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        for optimizer in optimizers
    ]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
