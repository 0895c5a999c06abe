"""Golden cases of the training room: the average of the weights, and three steps of the published loop."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora_core.config import TrainConfig
from opensora_core.diffusion import IDDPM
from opensora_core.tensors import Condition
from opensora_core.training.ema import EMA
from opensora_core.training.events import TrainProgress
from opensora_core.training.loop import Task, fit
from tests.core.training.saved import latest
from tests.golden.case import Case
from tests.golden.model_cases import TABLES, build_upstream, condition


class _Tree(nn.Module):
    """A module whose parameters and buffers have the names of a case."""

    def __init__(self, tensors: dict[str, Tensor], frozen: set[str], buffers: set[str]) -> None:
        super().__init__()
        for name, value in tensors.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if name in buffers:
                owner.register_buffer(leaf, value.clone())
            else:
                owner.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=name not in frozen))


def _under(case: Case, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in case.io.items() if key.startswith(prefix)}


def ema(case: Case) -> None:
    """One update with the published decay, then one with none."""
    start, model = _under(case, "ema0."), _under(case, "model.")
    # pos_embed is a constant, which upstream skips by its name and ours by not being trained
    frozen = {"pos_embed", *re.findall(r"here ([\w.]+\w)", case.config["note"])}
    buffers = {name for name in start if name.split(".")[-1] == "buf"}
    module = _Tree(start, frozen, buffers)
    average = EMA(module, decay=0.9999)
    assert average.shadow.keys() == start.keys() - frozen - buffers
    module.load_state_dict(model)
    for decay, expected in ((0.9999, "ema1."), (0.0, "ema2.")):
        average.decay = decay
        average.update()
        for name in start:
            case.close(average.shadow.get(name, start[name]), f"{expected}{name}")


class _Recorded(Task):
    """The recorded batches, timesteps and noises in place of drawn ones."""

    name = "model"

    def __init__(self, case: Case) -> None:
        self.case = case
        self.module = self.model = build_upstream(case)
        self.objective = IDDPM()

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Condition]:
        recorded = self.case.io
        names = (f"step{step}.{name}" for name in ("x", "t", "noise"))
        x, t, noise = (recorded[name] for name in names)
        return x, t, noise, condition(self.case, f"step{step}.y")

    def losses(
        self, batch: tuple[Tensor, Tensor, Tensor, Condition], generator: torch.Generator, parts: int
    ) -> Iterator[dict[str, Tensor]]:
        x, t, noise, captions = batch
        losses = self.objective.losses(self.model, x, t, noise, captions)
        yield {name: value.mean() for name, value in losses.items()}


def _compared(name: str, value: Tensor) -> Tensor:
    """Without the key biases: their gradient is exactly zero, so that Adam moves them by round-off alone."""
    width = len(value) // (3 if "qkv" in name else 2)
    if name.endswith("qkv.bias"):
        return torch.cat([value[:width], value[2 * width :]])
    return value[width:] if name.endswith("kv_linear.bias") else value


def train(case: Case) -> None:
    """The real loop over the recorded steps: losses, gradient norms, weights and their average."""
    config, history = case.config, case.config["history"]
    assert config["betas"] == [0.9, 0.999] and config["eps"] == 1e-8, "other moments are not a setting of ours"
    settings = TrainConfig(
        max_steps=len(history),
        batch_size=len(case.io["step0.x"]),
        optimizer="adamw",
        lr=config["lr"],
        weight_decay=config["weight_decay"],
        grad_clip=config["grad_clip"],
        ema_decay=config["ema_decay"],
        log_every=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        events = list(fit(_Recorded(case), settings, Path(folder), num_workers=0))
        saved, damaged = latest(Path(folder))
    assert saved is not None and not damaged
    reports = [event for event in events if isinstance(event, TrainProgress)]
    assert [report.step for report in reports] == list(range(1, len(history) + 1))
    for report, expected in zip(reports, history, strict=True):
        for name in ("loss", "mse", "vb", "grad_norm"):
            wanted = torch.tensor(expected[name], dtype=torch.float32).mean()
            case.close(torch.tensor(report.metrics[name]), wanted, f"{name} of step {report.step}")
    for prefix, tensors in (("final.", saved.weights), ("ema.", {**saved.weights, **saved.average})):
        for name, expected_tensor in _under(case, prefix).items():
            if name not in TABLES:
                actual = _compared(name, tensors[name])
                case.close(actual, _compared(name, expected_tensor), f"{prefix}{name}")


HANDLERS: dict[str, Callable[[Case], None]] = {
    "utils.train_utils.update_ema": ema,
    "scripts/train.py loop": train,
}
