"""PyTorch's own stack: DDP where everybody keeps all of the state, FSDP2 where each keeps a part.

    replicate   DDP: weights, gradients and optimizer on every process; products in bf16 by autocast
    zero2       FSDP2, weights gathered once per step: gradients, optimizer and master weights are parts
    zero3       FSDP2, weights gathered block by block, and again for the backward pass
    hybrid      zero3 within a machine, copies between machines

Under FSDP2 the fp32 parts are the master weights; what is gathered is in the dtype of the arithmetic, and gradients are
summed in fp32. One process needs none of it: its state lies as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import debug
from torch.nn.parallel import DistributedDataParallel

from opensora_core.config import ParallelConfig, TrainConfig
from opensora_core.errors import CheckpointError, ConfigError
from opensora_core.muon import Muon
from opensora_core.parallel.engines.matrices import dealt, exchanged
from opensora_core.parallel.engines.protocol import Optimizer
from opensora_core.parallel.engines.state import load_optimizer, optimizer_tensors
from opensora_core.parallel.mesh import Mesh
from opensora_core.parallel.shards import Stored, whole


class TorchEngine:
    """See `Engine`.

    Args:
        mesh: of the run. Gradients are the mean over all its processes, whatever their axes.
        parallel: `sharding`.
        train: `optimizer`.
        dtype: of the arithmetic.
        scale_loss: keep gradients within what fp16 holds; steps that overflow are left out, as is usual there.

    Raises:
        ConfigError: an optimizer that does not know parts.
    """

    def __init__(
        self, mesh: Mesh, parallel: ParallelConfig, train: TrainConfig, *, dtype: torch.dtype, scale_loss: bool
    ) -> None:
        self.mesh, self.sharding, self.dtype = mesh, parallel.sharding, dtype
        if self._in_parts and train.optimizer == "adamw-8bit":
            raise ConfigError(
                f"train.optimizer=adamw-8bit does not know parts of a weight, as parallel.sharding={self.sharding} "
                "leaves them",
                "--set parallel.sharding=replicate, or --set train.optimizer=adamw",
            )
        self.optimizers: list[Optimizer] = []
        self.scaler = torch.amp.GradScaler(mesh.device.type, enabled=scale_loss)

    @property
    def _in_parts(self) -> bool:
        return self.mesh.size > 1 and self.sharding != "replicate"

    @property
    def skips_overflows(self) -> bool:
        """Whether the loss is scaled, and the scale can still fall."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def prepare(
        self, module: nn.Module, root: nn.Module, build: Callable[[nn.Module], list[Optimizer]]
    ) -> Callable[..., Any]:
        """Spread a module's state; see `Engine`."""
        called = root
        if self._in_parts:
            self._shard(root)
        elif self.mesh.size > 1:
            called = self._copies(root)
        self.module, self.root = module, root
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizers = build(module)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon) and self.mesh.size > 1:
                optimizer.spread = exchanged() if self._in_parts else dealt(self.mesh.whole)
        return called

    def _copies(self, root: nn.Module) -> nn.Module:
        index = [self.mesh.device] if self.mesh.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a name that releases before 2.13 know alone
            return DistributedDataParallel(
                root, device_ids=index, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def _shard(self, root: nn.Module) -> None:
        _forget_meshes()
        mesh = self.mesh
        owners = mesh.shard.size * mesh.cfg.size * mesh.sequence.size
        grid = init_device_mesh(mesh.device.type, (mesh.size // owners, owners), mesh_dim_names=("copies", "owners"))
        # the model decides what is rounded: a timestep never is
        low = None if self.dtype is torch.float32 else self.dtype
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        again = self.sharding != "zero2"
        for unit in units(root):
            fully_shard(unit, mesh=grid, reshard_after_forward=again, mp_policy=policy)
        fully_shard(root, mesh=grid, reshard_after_forward=False, mp_policy=policy)

    def backward(self, loss: Tensor) -> None:
        """Add a part's gradients, in the mean over all processes."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients by the norm of all of them."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        return whole(nn.utils.clip_grad_norm_(self.trained, max_norm)).float()

    def update(self) -> None:
        """Take the step."""
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def settle(self) -> None:
        """Drop gathered weights, which a forward pass without a backward one leaves, and which are old now."""
        for part in self.root.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The optimizers' moments."""
        return {"optimizer": optimizer_tensors(self.module, self.optimizers)[0]}

    def numbers(self) -> dict[str, Any]:
        """The optimizers' settings, and the scale of the loss."""
        _, rest = optimizer_tensors(self.module, self.optimizers)
        return {"optimizer": rest, "scaler": self.scaler.state_dict()}

    def save(self, folder: Path) -> None:
        """Nothing: all of it is in tensors and numbers."""

    def load(self, stored: Stored, numbers: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of any number of processes and any sharding.

        Raises:
            CheckpointError: the state of another engine, of other optimizers, or of other parameters.
        """
        if "optimizer" not in numbers:
            raise CheckpointError("it was written by another engine", "--engine colossalai, or --init RUN")
        parameters = dict(self.module.named_parameters())
        tensors: dict[str, Tensor] = {}
        for path in stored.names("optimizer"):
            parameter = parameters.get(path.rpartition("/")[0])
            if parameter is not None and stored.shape("optimizer", path) == tuple(parameter.shape):
                tensors[path] = stored.spread("optimizer", path, parameter)
            else:
                tensors[path] = stored.tensor("optimizer", path)
        load_optimizer(self.module, self.optimizers, tensors, numbers["optimizer"])
        self.scaler.load_state_dict(dict(numbers["scaler"]))


def _forget_meshes() -> None:
    """Let DTensor forget what it derived for meshes of an earlier run of this process.

    It finds them by their shape, and would hand out tensors whose groups are gone.
    """
    forget: Callable[[], None] = getattr(debug, "_clear_sharding_prop_cache", lambda: None)
    forget()


def units(root: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: the members of every list of blocks, but of none within a block."""
    for child in root.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from units(child)
