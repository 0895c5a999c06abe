"""What is ColossalAI's own: whether it is there, its plugins, and what it does without being asked, undone."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opensora_core.config import ParallelConfig
from opensora_core.errors import ConfigError
from opensora_core.parallel.engines.protocol import Optimizer

INSTALL = "pip install 'osora[colossalai]' && pip install --no-deps colossalai==0.5.0"
"""How ColossalAI comes beside this torch; its own pins would bring a torch of 2024, and no release has others."""

DEFAULT_PLUGIN = "zero2"

# what the library calls by names that torch has given up since
_OLD_NAMES = ("`broadcast_buffers`", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor`")


def require_installed() -> None:
    """Tell how to install the library, where it is missing; imports nothing.

    Raises:
        ConfigError: it is missing.
    """
    if importlib.util.find_spec("colossalai") is None:
        raise ConfigError("--engine colossalai needs ColossalAI, which is not installed", INSTALL)


def require(device: torch.device, plugin: str, sharding: str, optimizer: str, scale_loss: bool) -> None:
    """Refuse what the library, or this way of using it, cannot do.

    Args:
        device: of the run.
        plugin: `parallel.plugin`, or the default.
        sharding: `parallel.sharding`.
        optimizer: `train.optimizer`.
        scale_loss: whether the arithmetic is in fp16.

    Raises:
        ConfigError: settings that do not go with it.
    """
    if plugin == "gemini":
        zero3 = "--engine torch --set parallel.sharding=zero3, which shards the weights as well"
        if device.type != "cuda":
            raise ConfigError(f"parallel.plugin=gemini needs CUDA, and this is '{device.type}'", zero3)
        raise ConfigError("parallel.plugin=gemini leaves no weights to average or to save between steps", zero3)
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"--engine colossalai runs on cuda and cpu, and this is '{device.type}'", "--engine torch")
    if sharding != ParallelConfig.sharding:
        raise ConfigError(
            f"parallel.sharding={sharding} is for --engine torch; ColossalAI shards by its plugin",
            "--set parallel.plugin=zero2",
        )
    if scale_loss:
        raise ConfigError("--engine colossalai computes in fp32 or bf16 here, not in fp16", "--dtype bf16")
    if plugin != "ddp" and optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer={optimizer} needs whole matrices or states, and parallel.plugin={plugin} cuts them",
            "--set parallel.plugin=ddp, or --set train.optimizer=adamw",
        )


def import_quietly() -> None:
    """Import the library without its advice and announcements, and with the user's settings left as they are."""
    variable = "CUDA_DEVICE_MAX_CONNECTIONS"
    chosen = os.environ.get(variable)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from colossalai.booster import Booster  # noqa: F401
            from colossalai.logging import get_dist_logger
    except ImportError as error:
        raise ConfigError(f"--engine colossalai cannot import ColossalAI: {error}", INSTALL) from error
    if chosen is not None:
        os.environ[variable] = chosen
    logger = get_dist_logger()._logger
    logger.handlers.clear()  # its own writes to where results go
    logger.propagate = True
    logger.setLevel(logging.ERROR)
    for message in _OLD_NAMES:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)


def meet_oneself(device: torch.device) -> None:
    """Make a group of this process alone, which the library does not do without; it lasts as long as the process."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined] # it is there, and documented
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def setting_up(device: torch.device) -> AbstractContextManager[None]:
    """What plugins have to be set up in."""
    if device.type != "cpu":
        return nullcontext()
    from opensora_core.parallel.engines.colossal_cpu import on_cpu

    return on_cpu()


def plugin(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The library's plugin; see `colossalai.py` for what each does.

    Args:
        name: ddp, zero1, zero2 or hybrid.
        dtype: of the arithmetic.
        device: whose streams may overlap communication and arithmetic.
    """
    from colossalai.booster.plugin import LowLevelZeroPlugin, TorchDDPPlugin

    overlap = device.type == "cuda"
    if name == "ddp":
        return TorchDDPPlugin(broadcast_buffers=False)
    if name in ("zero1", "zero2"):
        return LowLevelZeroPlugin(
            stage=int(name[-1]),
            precision="fp32",
            master_weights=False,  # they are the weights
            cast_inputs=False,
            overlap_communication=overlap,
        )
    precision = "fp32" if dtype is torch.float32 else "bf16"
    return _hybrid(
        tp_size=1,
        pp_size=1,
        precision=precision,
        zero_stage=0 if precision == "fp32" else 1,  # it refuses fp32 and ZeRO together
        communication_dtype=torch.float32,
        overlap_communication=overlap,
        broadcast_buffers=False,
    )


def boosted_by(chosen: Any, root: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    """A module and its optimizer in a plugin's wrapping."""
    from colossalai.booster import Booster

    wrapped, spread, *_ = Booster(plugin=chosen).boost(root, optimizer)
    wrapped.convert_fn = None  # it would round timesteps to bf16; autocast rounds what is to be rounded
    return wrapped, spread


def with_kernels(optimizer: Optimizer, device: torch.device) -> Optimizer:
    """HybridAdam in place of AdamW, where its kernel builds; without CUDA's libraries it does not."""
    if type(optimizer) is not torch.optim.AdamW or device.type != "cuda":
        return optimizer
    from colossalai.nn.optimizer import HybridAdam

    known = ("params", "lr", "betas", "eps", "weight_decay")
    try:
        faster: Optimizer = HybridAdam([{name: group[name] for name in known} for group in optimizer.param_groups])
    except Exception as error:  # compilers fail in many ways
        logging.getLogger(__name__).info("AdamW in place of HybridAdam, whose kernel does not build: %s", error)
        return optimizer
    return faster


def _hybrid(**options: Any) -> Any:
    """The hybrid plugin, for models that it does not know."""
    from colossalai.booster.plugin import HybridParallelPlugin
    from colossalai.shardformer.policies.base_policy import Policy

    class AsItIs(Policy):  # type: ignore[misc] # the library has no types
        def config_sanity_check(self) -> None:
            pass

        def preprocess(self) -> nn.Module:
            return self.model  # type: ignore[no-any-return]

        def postprocess(self) -> nn.Module:
            return self.model  # type: ignore[no-any-return]

        def module_policy(self) -> dict[str, Any]:
            return {}

    class Plugin(HybridParallelPlugin):  # type: ignore[misc]
        def __del__(self) -> None:
            """Leave the groups to whoever destroys all of them, which may be before or after this."""

    return Plugin(custom_policy=AsItIs(), **options)
