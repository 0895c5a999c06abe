"""Where and with what a measurement was made."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import torch

from opensora_core import __version__, components
from opensora_core.config import Config


def describe(config: Config) -> dict[str, Any]:
    """The machine, the versions and the settings that a number stands on."""
    device = components.resolve_device(config.runtime.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{device}: {name}",
        "cores": os.cpu_count(),
        "versions": {"osora": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "model": config.model.weights,
        "sampler": config.sampling.sampler,
        "steps": config.sampling.steps,
        "guidance": config.sampling.guidance,
        "seed": config.sampling.seed,
    }
