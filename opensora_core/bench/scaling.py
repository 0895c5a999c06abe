"""What many processes gain: measured with a few of them on this machine, and told beforehand for a cluster."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from opensora_core.bench.cluster import Cluster, Forecast, Load, forecast, load_cluster
from opensora_core.bench.measurement import Event, Measurement
from opensora_core.bench.ranks import measure_ranks
from opensora_core.config import Config
from opensora_core.models import LatentTransformer
from opensora_core.models.layers import SelfAttention
from opensora_core.sampling import Notice
from opensora_core.training.corpus import latent_shape
from opensora_core.training.denoiser import sketch, tokens_and_flops
from opensora_core.training.memory import estimate, forward_flops

_GIB = 2**30
_EXCHANGES = {"space": 0, "time": 2, "all": 4}  # of a forward pass, by what an attention is over


def measure(config: Config, *, quick: bool = False, plan: str = "") -> Iterator[Event]:
    """Measure processes that share frames or samples on this machine, or plan for a cluster.

    Args:
        config: the settings; of a plan, `train.batch_size` are the samples of each group of processes that share
            frames.
        quick: fewer steps.
        plan: a cluster by name or TOML file; empty measures.

    Raises:
        ConfigError, InputError: see `load_cluster` and `forecast`.
    """
    if not plan:
        yield from measure_ranks(quick=quick)
        return
    cluster = load_cluster(plan)
    load = load_of(config)
    yield Notice(_assumptions(cluster, load))
    for gpus in cluster.gpus:
        yield from _rows(forecast(cluster, load, gpus), cluster)


def load_of(config: Config) -> Load:
    """What a step of these settings asks for, without the memory for it."""
    model, train, latent = sketch(config), config.train, latent_shape(config, config.video)
    tokens, _ = tokens_and_flops(model, latent)
    needed = estimate(model, train, latent_shape=latent, batch_size=1, dtype=torch.bfloat16)
    return Load(
        forward_flops=forward_flops(model, latent),
        recompute=train.recompute,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=len(model.blocks),
        exchanges=exchanges(model),
        exchanged_bytes=2.0 * tokens * model.hidden_size,
        activation_bytes=needed.activations,
        samples=train.batch_size,
        sequence=max(config.parallel.sequence, 1),
        sharding=config.parallel.sharding,
        steps_per_checkpoint=train.checkpoint_every,
    )


def exchanges(model: LatentTransformer) -> int:
    """All-to-alls of a forward pass whose frames are shared."""
    return sum(_EXCHANGES[module.over] for module in model.modules() if isinstance(module, SelfAttention))


def _assumptions(cluster: Cluster, load: Load) -> str:
    return (
        f"{cluster.name}: {cluster.efficiency:.0%} of {cluster.peak_flops / 1e12:.0f} TFLOP/s, "
        f"{cluster.link_bytes / 1e9:.0f} GB/s within machines of {cluster.gpus_per_node} and "
        f"{cluster.network_bytes / 1e9:.0f} GB/s between them, of which {cluster.achieved:.0%} are reached; "
        f"{load.samples} sample{'s' * (load.samples > 1)} for every {load.sequence} GPU{'s' * (load.sequence > 1)}, "
        f"{load.forward_flops / 1e12:.1f} TFLOP each and forward pass; parallel.sharding={load.sharding}; latents and "
        "captions from a cache; none of it measured"
    )


def _rows(told: Forecast, cluster: Cluster) -> Iterator[Event]:
    case = f"{told.gpus} GPUs"
    for metric, value, unit in (
        ("time of a step", told.step, "s"),
        ("arithmetic", told.compute, "s"),
        ("weights and gradients", told.weights, "s"),
        ("frames", told.frames, "s"),
        ("waiting for both", told.waiting, "s"),
        ("decoding a step's clips", told.data, "s"),
        ("a checkpoint", told.checkpoint, "s"),
        ("samples per second", told.samples_per_second, "1/s"),
        ("samples per second and GPU", told.samples_per_second / told.gpus, "1/s"),
        ("peak arithmetic reached (MFU)", told.mfu, "share"),
        ("memory of a GPU", told.memory_bytes / _GIB, "GiB"),
    ):
        yield Measurement(case, metric, value, unit, 1)
    if told.memory_bytes > cluster.memory_bytes:
        yield Notice(
            f"{case}: {told.memory_bytes / _GIB:.0f} GiB do not fit into {cluster.memory_bytes / _GIB:.0f}; "
            "--set train.recompute=1, a smaller train.batch_size, or a larger parallel.sequence"
        )
    yield Notice(f"{case}: a step is longest for {told.bound}")
