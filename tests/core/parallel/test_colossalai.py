"""ColossalAI as an engine: the losses of torch's own, exact resuming, and a word about what it cannot do."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_core.config import Config, ParallelConfig, TrainConfig, with_settings
from opensora_core.errors import CheckpointError, ConfigError
from opensora_core.lora import add_lora
from opensora_core.models import freeze
from opensora_core.parallel import Axis, Mesh, joined, sequence_parallel
from opensora_core.parallel.engines import Engine, build_engine, check_engine
from opensora_core.parallel.engines.colossal_library import INSTALL
from opensora_core.parallel.local import on_ranks
from opensora_core.parallel.shards import Stored
from opensora_core.training import train
from opensora_core.training.ema import EMA
from opensora_core.training.optim import build_optimizers
from tests.core.exported import export_tiny
from tests.core.models.examples import condition, latents, stir, tiny
from tests.core.training.clips import clips_config, make_clips

HERE = importlib.util.find_spec("colossalai") is not None
needs_colossalai = pytest.mark.skipif(not HERE, reason=f"ColossalAI is not installed: {INSTALL}")

TRAIN = TrainConfig(lr=1e-3)
BATCH, STEPS, SAVED = 4, 8, 4
CLOSE = 1e-6
"""How far apart losses may be, relative: sums of the same numbers in another order."""
ROUNDED = 5e-3
"""And where hybrid keeps weights and gradients in bf16, which has 8 bits, beside torch's arithmetic in bf16."""


class Run:
    """A tiny STDiT in training on this process's slice of batches that are functions of the step."""

    def __init__(
        self, mesh: Mesh, plugin: str = "", dtype: torch.dtype = torch.float32, kind: str = "all", **changes: Any
    ) -> None:
        model = stir(tiny("stdit", depth=2, recompute=float(kind == "recompute"))).train()
        if kind == "lora":
            add_lora(model, 4)
        elif kind == "temporal-only":
            freeze(model, "not_temporal")
        elif kind == "sequence":
            sequence_parallel(model, mesh.sequence)
        self.mesh, self.dtype, self.model = mesh, dtype, model
        parallel = (
            ParallelConfig(engine="colossalai", plugin=plugin) if plugin else ParallelConfig(sharding="replicate")
        )
        self.train = with_settings(TRAIN, changes)
        self.engine: Engine = build_engine(mesh, parallel, self.train, dtype=dtype)
        self.called = self.engine.prepare(model, model, lambda module: build_optimizers(module, self.train))
        self.ema = EMA(model, 0.9)

    def step(self, number: int, parts: int = 1) -> tuple[float, float]:
        """Loss of the whole batch, and norm of its gradients."""
        generator = torch.Generator().manual_seed(number)
        x, noise = (torch.randn(latents(3, 4, 6, batch=BATCH).shape, generator=generator) for _ in range(2))
        each = BATCH // self.mesh.data.size
        mine = torch.arange(each * self.mesh.data.rank, each * (self.mesh.data.rank + 1))
        total = torch.zeros(())
        for rows in mine.chunk(parts):
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32):
                out = self.called(x[rows], torch.full((len(rows),), 497.0), condition("stdit", BATCH)[rows])
            loss = (out[:, : x.shape[1]].float() - noise[rows]).square().mean() * (len(rows) / each)
            self.engine.backward(loss)
            total += loss.detach()
        norm = self.engine.clip(1.0)
        for optimizer in self.engine.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.train.lr * (1 - number / 20)
        self.engine.update()
        self.ema.update()
        if self.mesh.size > 1:
            torch.distributed.all_reduce(total)
        return total.item() / self.mesh.size, norm.item()

    def steps(self, start: int = 0, stop: int = STEPS, parts: int = 1) -> list[tuple[float, float]]:
        return [self.step(number, parts) for number in range(start, stop)]

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def save(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        folder.mkdir(parents=True, exist_ok=True)
        self.engine.save(folder)
        if self.mesh.size > 1:
            torch.distributed.barrier()
        return self.weights(), self.engine.numbers()

    def load(self, folder: Path, weights: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        self.model.load_state_dict(weights)
        self.engine.load(Stored(folder), numbers)
        self.engine.settle()


def distance(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """The largest relative difference of losses."""
    return max(abs(x / y - 1) for (x, _), (y, _) in zip(a, b, strict=True))


# what two processes find ----------------------------------------------------------------------------------------------


def _plugins(folder: str, runs: list[tuple[Config, Path, bool]]) -> dict[str, Any]:
    """Train under every plugin, beside torch's own engine, and tell what each came to."""
    for config, output, resume in runs:
        for _ in train(config, output=output, resume=resume):
            pass
    found: dict[str, Any] = {}
    with joined(torch.device("cpu")) as mesh:
        for dtype in (torch.float32, torch.bfloat16):
            own = Run(mesh, dtype=dtype)
            expected, average = own.steps(), own.ema.shadow
            for plugin in ("ddp", "zero1", "zero2", "hybrid") if dtype is torch.float32 else ("zero2", "hybrid"):
                run = Run(mesh, plugin, dtype)
                losses = run.steps(0, SAVED)
                at = Path(folder) / f"{plugin}-{dtype}"
                weights, numbers = run.save(at)
                losses += run.steps(SAVED)
                again = Run(mesh, plugin, dtype)
                again.steps(0, 1)  # what is loaded has to replace all of this
                again.load(at, weights, numbers)
                resumed = again.steps(SAVED)
                found[f"{plugin} {dtype}"] = {
                    "losses": distance(losses, expected),
                    "norms": max(
                        abs(mine / theirs - 1) for (_, mine), (_, theirs) in zip(losses, expected, strict=True)
                    ),
                    "average": float((_flat(run.ema.shadow) - _flat(average)).norm() / _flat(average).norm()),
                    "resumed": resumed == losses[SAVED:] and _equal(run.weights(), again.weights()),
                    "in parts": distance(Run(mesh, plugin, dtype).steps(0, 3, parts=2), losses[:3]),
                    "dtypes": {str(parameter.dtype) for parameter in run.model.parameters()},
                    "files": sorted(path.relative_to(at).as_posix() for path in at.rglob("*") if path.is_file()),
                }
                if mesh.is_first:
                    torch.save((losses[SAVED:], numbers, weights), at / "last.pt")
        found["looked at"] = _looked_at(mesh, "hybrid")
        for kind in ("lora", "temporal-only"):
            found[kind] = _partly_trained(mesh, kind)
        found["recompute"] = distance(*(Run(mesh, "zero2", kind=kind).steps(0, 3) for kind in ("recompute", "all")))
        found["exchanged"] = _exchanged(mesh, Path(folder))
        found["muon"] = distance(*(Run(mesh, plugin, optimizer="muon").steps(0, 3) for plugin in ("ddp", "")))
        found["nan"] = _not_finite(mesh)
        found["another"] = _refused(mesh, Path(folder))
        alone = Run(Mesh(mesh.device)).steps(0, 3)
        shared = dataclasses.replace(mesh, data=Axis("data"), sequence=dataclasses.replace(mesh.whole, name="sequence"))
        found["sequence"] = distance(Run(shared, "zero2", kind="sequence").steps(0, 3), alone)
    return found


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _looked_at(mesh: Mesh, plugin: str) -> bool:
    """Whether a run goes on as it would have, after its average was looked at; and goes on from what was put in."""
    runs = [Run(mesh, plugin, torch.bfloat16) for _ in range(3)]
    for run in runs:
        run.steps(0, 2)
    with runs[1].ema.applied():
        runs[1].engine.settle()
    runs[1].engine.settle()
    runs[2].ema.apply()
    runs[2].engine.settle()
    plain, looked, moved = (run.steps(2, 4) for run in runs)
    return plain == looked and _equal(runs[0].weights(), runs[1].weights()) and plain[1:] != moved[1:]


def _partly_trained(mesh: Mesh, kind: str) -> dict[str, Any]:
    # matrices that decay and others that do not are two groups, whose gradients ZeRO keeps apart
    own, run = (Run(mesh, plugin, kind=kind, weight_decay=0.01) for plugin in ("", "zero2"))
    before = run.weights()
    apart = distance(run.steps(0, 3), own.steps(0, 3))
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    return {
        "losses": apart,
        "trained": trained,
        "moved": {n for n, v in run.weights().items() if not v.equal(before[n])},
    }


def _exchanged(mesh: Mesh, folder: Path) -> float:
    """How far from it other plugins get that go on from a checkpoint of zero2."""
    at = folder / "zero2-torch.float32"
    expected, numbers, weights = torch.load(at / "last.pt", weights_only=True)
    apart = []
    for plugin in ("ddp", "zero1", "hybrid"):
        run = Run(mesh, plugin)
        run.load(at, weights, numbers)
        apart.append(distance(run.steps(SAVED, SAVED + 2), expected[:2]))
    return max(apart)


def _not_finite(mesh: Mesh) -> list[bool]:
    """Whether a gradient of the other process is noticed by all before the step, by plugin."""
    found = []
    for plugin in ("ddp", "zero1", "zero2"):
        run = Run(mesh, plugin)
        out = run.called(latents(3, 4, 6), torch.zeros(2), condition("stdit"))
        run.engine.backward(out.sum() * (float("nan") if mesh.rank == 1 else 1.0))
        found.append(not torch.isfinite(run.engine.clip(1.0)).item())
    return found


def _refused(mesh: Mesh, folder: Path) -> list[str]:
    """What is said about checkpoints of others."""
    said = []
    run = Run(mesh, "zero2")
    own = run.engine.numbers()
    for numbers in ({}, {**own, "optimizers": ["HybridAdam"]}, {**own, "parameters": "others"}):
        with pytest.raises(CheckpointError) as caught:
            run.engine.load(Stored(folder / "zero2-torch.float32"), numbers)
        said.append(caught.value.message)
    return said


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("colossalai")
    export_tiny(folder / "model")
    make_clips(folder / "clips")
    base = with_settings(
        clips_config(folder / "model", folder / "clips"),
        {"train.init": str(folder / "model"), "train.batch_size": 4, "train.max_steps": 6, "train.optimizer": "adamw"}
        | {"train.accumulate": 2, "train.checkpoint_every": 3, "train.keep_checkpoints": 9, "train.log_every": 1},
    )
    colossal = with_settings(base, {"parallel.engine": "colossalai"})
    cut = with_settings(colossal, {"train.max_steps": 3})
    runs = [(base, folder / "torch", False), (colossal, folder / "whole", False)]
    runs += [(cut, folder / "cut", False), (colossal, folder / "cut", True)]
    return on_ranks(2, _plugins, str(folder), runs, seconds=280)[0], folder


def rows(run: Path) -> list[tuple[float, float]]:
    """Loss and norm of every step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in lines if row["part"] == "model"]


@needs_colossalai
def test_whole_runs_of_both_engines_have_the_same_losses_and_resume_exactly(two: tuple[dict[str, Any], Path]) -> None:
    folder = two[1]
    whole = rows(folder / "whole")
    assert len(whole) == 6 and distance(whole, rows(folder / "torch")) < 1e-5
    assert rows(folder / "cut") == whole
    ends = [Stored(folder / run / "checkpoints" / "step-6") for run in ("whole", "cut")]
    for group in ("weights", "ema"):
        assert _equal(*(end.read(group) for end in ends))


@needs_colossalai
@pytest.mark.parametrize("plugin", ["ddp", "zero1", "zero2", "hybrid"])
def test_a_plugin_trains_to_the_losses_of_torch(two: tuple[dict[str, Any], Path], plugin: str) -> None:
    found = two[0][f"{plugin} torch.float32"]
    assert found["losses"] < CLOSE and found["norms"] < CLOSE and found["in parts"] < CLOSE
    assert found["average"] < 1e-5 and found["dtypes"] == {"torch.float32"}


@needs_colossalai
def test_arithmetic_in_bf16_rounds_weights_under_hybrid_alone(two: tuple[dict[str, Any], Path]) -> None:
    zero, hybrid = two[0]["zero2 torch.bfloat16"], two[0]["hybrid torch.bfloat16"]
    assert zero["losses"] < 1e-3 and zero["dtypes"] == {"torch.float32"}
    assert hybrid["losses"] < ROUNDED and hybrid["dtypes"] == {"torch.bfloat16"}
    assert "colossalai/masters.safetensors" in hybrid["files"]


@needs_colossalai
@pytest.mark.parametrize("plugin", ["ddp", "zero1", "zero2", "hybrid", "zero2 in bf16", "hybrid in bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one(two: tuple[dict[str, Any], Path], plugin: str) -> None:
    name, _, dtype = plugin.partition(" in ")
    found = two[0][f"{name} {'torch.bfloat16' if dtype else 'torch.float32'}"]
    assert found["resumed"]
    assert "colossalai/optimizer-0.bin" in found["files"]


@needs_colossalai
def test_looking_at_the_average_leaves_master_weights_alone(two: tuple[dict[str, Any], Path]) -> None:
    assert two[0]["looked at"]


@needs_colossalai
@pytest.mark.parametrize("kind", ["lora", "temporal-only"])
def test_what_is_frozen_stays(two: tuple[dict[str, Any], Path], kind: str) -> None:
    found = two[0][kind]
    assert found["losses"] < CLOSE and found["moved"] == found["trained"]


@needs_colossalai
def test_frames_may_be_shared_and_muon_has_whole_matrices_under_ddp(two: tuple[dict[str, Any], Path]) -> None:
    assert two[0]["sequence"] < 1e-5 and two[0]["muon"] < CLOSE and two[0]["recompute"] < CLOSE


@needs_colossalai
def test_plugins_go_on_from_one_anothers_checkpoints(two: tuple[dict[str, Any], Path]) -> None:
    assert two[0]["exchanged"] < CLOSE


@needs_colossalai
def test_a_gradient_that_is_no_number_is_noticed_by_all_before_the_step(two: tuple[dict[str, Any], Path]) -> None:
    assert all(two[0]["nan"])


@needs_colossalai
def test_checkpoints_of_others_are_refused(two: tuple[dict[str, Any], Path]) -> None:
    engine, optimizer, parameters = two[0]["another"]
    assert "of another engine" in engine and "HybridAdam" in optimizer and "others" in parameters


ALONE = """
import resource, signal, sys, torch
from pathlib import Path
from opensora_core.errors import ResourceError
from opensora_core.parallel import Mesh
from tests.core.parallel.test_colossalai import Run
torch.set_num_threads(1)
folder = Path(sys.argv[1])
found = {}
for plugin, dtype in (("zero2", torch.float32), ("hybrid", torch.bfloat16)):
    run = Run(Mesh(torch.device("cpu")), plugin, dtype)
    _, numbers, weights = torch.load(folder / f"{plugin}-{dtype}" / "last.pt")
    run.load(folder / f"{plugin}-{dtype}", weights, numbers)
    same = all(torch.equal(value, weights[name]) for name, value in run.weights().items())
    found[plugin] = same, run.steps(4)
    run.save(folder / f"{plugin} alone")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # what a full disk says
try:
    run.save(folder / "full")
except ResourceError as error:
    found["full"] = error.message
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
torch.save(found, folder / "alone.pt")
"""


@needs_colossalai
@pytest.mark.slow
def test_one_process_goes_on_from_two_and_says_nothing(two: tuple[dict[str, Any], Path]) -> None:
    folder = two[1]
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    alone = torch.load(folder / "alone.pt")
    for plugin, dtype, close in (("zero2", torch.float32, CLOSE), ("hybrid", torch.bfloat16, ROUNDED)):
        same, losses = alone[plugin]
        expected, *_ = torch.load(folder / f"{plugin}-{dtype}" / "last.pt")
        assert same and distance(losses, expected) < close
    assert "no space left" in alone["full"]


# what it says ---------------------------------------------------------------------------------------------------------


def refusal(**settings: Any) -> ConfigError:
    """What is said about settings, on a CPU."""
    parallel = with_settings(ParallelConfig(engine="colossalai"), settings.pop("parallel", {}))
    train = with_settings(TrainConfig(), settings.pop("train", {}))
    with pytest.raises(ConfigError) as caught:
        build_engine(Mesh(torch.device("cpu")), parallel, train, **{"dtype": torch.float32, **settings})
    return caught.value


def test_without_colossalai_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if HERE:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal().hint == INSTALL
    with pytest.raises(ConfigError, match="not installed"):
        check_engine(ParallelConfig(engine="colossalai"))
    assert "colossalai" not in sys.modules


def test_a_plugin_means_nothing_to_torch() -> None:
    assert "colossalai" in refusal(parallel={"engine": "torch", "plugin": "zero1"}).message


@needs_colossalai
def test_what_it_cannot_do_is_refused() -> None:
    assert "needs CUDA" in refusal(parallel={"plugin": "gemini"}).message
    assert "sharding" in refusal(parallel={"sharding": "hybrid"}).message
    assert "fp16" in refusal(dtype=torch.float16, scale_loss=True).message
    assert "muon" in refusal(train={"optimizer": "muon"}).message
    assert "adamw-8bit" in refusal(train={"optimizer": "adamw-8bit"}, parallel={"plugin": "hybrid"}).message
