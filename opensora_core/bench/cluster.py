"""How long a training step takes on a cluster that one does not have yet: a model, with its assumptions as numbers.

What is modelled, per step, with N processes, N / p of them with samples of their own (p share the frames of a sample):

    compute      3 forward passes, and one more where blocks recompute, / (p * peak * efficiency)
    weights      zero3: all-gather of the bf16 weights forward and backward, reduce-scatter of the fp32 gradients;
                 hybrid: the same within a machine, and an all-reduce of what each GPU owns between machines;
                 replicate: an all-reduce of the gradients; each moves bytes * (n - 1) / n through a ring of n
    frames       all-to-alls, two per temporal and four per full attention and pass, each of the bytes of the tokens
                 on this GPU * (p - 1) / p
    data         clips of the step / what the loaders decode
    checkpoint   weights, average and moments in fp32 / what the file system takes, spread over the steps between two

A ring is as fast as its slowest link, and every card of a machine takes part in one: between machines it has the sum of
their network links, or one GPU's own link within the machine if that is less. Each hop of a ring costs a latency.
Weights travel while other blocks compute, up to `overlap` of the compute time; frames are waited for. Encoders are left
out, as with a cache of latents and captions. Loading hides behind the step until it is longer than the step.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from opensora_core.errors import ConfigError, InputError, nearest


@dataclass(frozen=True)
class Cluster:
    """A cluster, in bytes, seconds and operations per second; every field can stand in a TOML file.

    Attributes:
        name: of the GPU.
        peak_flops: of one GPU, dense bf16.
        efficiency: share of the peak that a training step's arithmetic reaches by itself.
        memory_bytes: of one GPU.
        gpus_per_node: of a machine.
        link_bytes: that one GPU sends per second to the others of its machine.
        network_bytes: that one machine sends per second to the others.
        link_latency: seconds of a hop within a machine.
        network_latency: seconds of a hop between machines.
        achieved: share of the links' speed that collectives reach.
        overlap: share of the compute time that weights can travel in.
        cores_per_node: for the loaders.
        clips_per_core: that one core decodes per second; measured by `osora bench data`.
        storage_bytes: that the shared file system takes per second, from all together.
        node_storage_bytes: that one machine can send there.
        gpus: numbers of GPUs to tell of.
    """

    name: str = "H100"
    peak_flops: float = 989e12
    efficiency: float = 0.45
    memory_bytes: float = 80 * 2**30
    gpus_per_node: int = 8
    link_bytes: float = 450e9
    network_bytes: float = 400e9
    link_latency: float = 4e-6
    network_latency: float = 12e-6
    achieved: float = 0.8
    overlap: float = 0.8
    cores_per_node: int = 96
    clips_per_core: float = 2.0
    storage_bytes: float = 20e9
    node_storage_bytes: float = 5e9
    gpus: tuple[int, ...] = (8, 64, 512)


CLUSTERS: dict[str, Cluster] = {
    "h100": Cluster(),
    "h200": Cluster(name="H200", memory_bytes=141 * 2**30),
    "h800": Cluster(name="H800", link_bytes=200e9),
    "a100": Cluster(name="A100", peak_flops=312e12, link_bytes=300e9, network_bytes=200e9),
    "a100-25gbe": Cluster(name="A100, 25 GbE", peak_flops=312e12, link_bytes=300e9, network_bytes=3.1e9),
}
"""Clusters by name: makers' numbers for cards and links, and the defaults above for the rest."""


def load_cluster(word: str) -> Cluster:
    """Find a cluster by its name, or read it from a TOML file, whose `base` names the one it differs from.

    Raises:
        ConfigError: no such name or key, or a value of the wrong kind.
        InputError: a file that is no TOML.
    """
    path = Path(word)
    if word in CLUSTERS:
        return CLUSTERS[word]
    if not path.is_file():
        raise ConfigError(f"'{word}' is neither a cluster nor a file", nearest(word, CLUSTERS))
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML: {error}", "lines such as: network_bytes = 50e9") from error
    base = told.pop("base", "h100")
    if base not in CLUSTERS:
        raise ConfigError(f"{path}: base = {base!r} is no cluster", nearest(str(base), CLUSTERS))
    known = {field.name: getattr(CLUSTERS[base], field.name) for field in dataclasses.fields(Cluster)}
    for key, value in told.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key '{key}'", nearest(key, known))
        told[key] = _value(path, key, value, known[key])
    return dataclasses.replace(CLUSTERS[base], **told)


def _value(path: Path, key: str, value: object, like: object) -> object:
    if isinstance(like, str) and isinstance(value, str):
        return value
    if isinstance(like, tuple) and isinstance(value, list) and value:
        if all(isinstance(item, int) and item > 0 for item in value):
            return tuple(value)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        if isinstance(like, float):
            return float(value)
        if isinstance(like, int) and value == int(value):
            return int(value)
    kind = "text" if isinstance(like, str) else "a list of counts" if isinstance(like, tuple) else "a number above 0"
    raise ConfigError(f"{path}: {key} = {value!r} is not {kind}")


@dataclass(frozen=True)
class Load:
    """What one step of a training asks for.

    Attributes:
        forward_flops: of one sample.
        recompute: share of the blocks that recompute.
        parameters: of the model.
        blocks: whose weights travel one after the other.
        exchanges: all-to-alls of a forward pass.
        exchanged_bytes: of a sample's tokens, in the dtype of the arithmetic.
        activation_bytes: that one sample keeps for the backward pass.
        samples: of each group of processes that share frames.
        sequence: processes that share the frames of a sample.
        sharding: replicate, zero2, zero3 or hybrid.
        steps_per_checkpoint: steps between two.
    """

    forward_flops: float
    recompute: float
    parameters: int
    blocks: int
    exchanges: int
    exchanged_bytes: float
    activation_bytes: float
    samples: int
    sequence: int
    sharding: str
    steps_per_checkpoint: int


@dataclass(frozen=True)
class Forecast:
    """A step on so many GPUs, in seconds, samples per second and bytes.

    Attributes:
        gpus: of the cluster that are used.
        compute: arithmetic.
        weights: their collectives, all of them.
        frames: exchange of frames.
        waiting: part of the two that arithmetic does not hide.
        data: decoding the clips of a step.
        checkpoint: of one, written while everybody waits.
        step: from one to the next.
        samples_per_second: of all GPUs.
        mfu: share of the peak, recomputation not counted as work.
        memory_bytes: of one GPU, weights and state and activations.
        bound: what the step is longest for.
    """

    gpus: int
    compute: float
    weights: float
    frames: float
    waiting: float
    data: float
    checkpoint: float
    step: float
    samples_per_second: float
    mfu: float
    memory_bytes: float
    bound: str


def forecast(cluster: Cluster, load: Load, gpus: int) -> Forecast:
    """Evaluate the model of this module.

    Raises:
        ConfigError: GPUs that do not fill machines, or do not divide into groups that share frames.
    """
    nodes, rest = divmod(gpus, cluster.gpus_per_node)
    if (rest and nodes) or gpus % load.sequence:
        raise ConfigError(
            f"{gpus} GPUs are no whole number of machines of {cluster.gpus_per_node}, or of groups of {load.sequence}",
            f"gpus = [{cluster.gpus_per_node}, {8 * cluster.gpus_per_node}]",
        )
    groups = gpus // load.sequence
    flops = load.samples * load.forward_flops / load.sequence
    compute = flops * (3 + load.recompute) / (cluster.peak_flops * cluster.efficiency)
    weights = _weights(cluster, load, gpus)
    frames = _frames(cluster, load)
    waiting = max(weights - cluster.overlap * compute, 0.0) + frames
    samples = groups * load.samples
    data = samples / (max(nodes, 1) * cluster.cores_per_node * cluster.clips_per_core)
    state = 16.0 * load.parameters  # weights, average and two moments
    checkpoint = state / min(cluster.storage_bytes, max(nodes, 1) * cluster.node_storage_bytes)
    at_work = compute + waiting
    step = max(at_work, data) + checkpoint / load.steps_per_checkpoint
    parts = {
        "data": data if data > at_work else 0.0,
        "arithmetic": compute,
        "weights": waiting - frames,
        "frames": frames,
        "checkpoint": checkpoint / load.steps_per_checkpoint,
    }
    return Forecast(
        gpus=gpus,
        compute=compute,
        weights=weights,
        frames=frames,
        waiting=waiting,
        data=data,
        checkpoint=checkpoint,
        step=step,
        samples_per_second=samples / step,
        mfu=3 * flops / (step * cluster.peak_flops),
        memory_bytes=_memory(cluster, load, gpus),
        bound=max(parts, key=lambda name: parts[name]),
    )


def _ring(cluster: Cluster, num_bytes: float, gpus: int) -> float:
    """Seconds of an all-gather or reduce-scatter of so many bytes in all."""
    if gpus == 1:
        return 0.0
    nodes = -(-gpus // cluster.gpus_per_node)
    speed = cluster.link_bytes if nodes == 1 else min(cluster.link_bytes, cluster.network_bytes)
    hops = (gpus - nodes) * cluster.link_latency + (nodes if nodes > 1 else 0) * cluster.network_latency
    return num_bytes * (gpus - 1) / gpus / (speed * cluster.achieved) + hops


def _weights(cluster: Cluster, load: Load, gpus: int) -> float:
    """Seconds of all collectives that weights and gradients need; each block has its own."""
    weights, gradients = 2.0 * load.parameters, 4.0 * load.parameters
    blocks, here = load.blocks, min(gpus, cluster.gpus_per_node)

    def rings(num_bytes: float, members: int) -> float:
        return blocks * _ring(cluster, num_bytes / blocks, members)

    if load.sharding == "replicate":
        return 2 * rings(gradients, gpus)
    if load.sharding == "zero2":
        return rings(weights, gpus) + rings(gradients, gpus)
    if load.sharding == "zero3":
        return 2 * rings(weights, gpus) + rings(gradients, gpus)
    within = 2 * rings(weights, here) + rings(gradients, here)
    nodes = -(-gpus // cluster.gpus_per_node)
    if nodes == 1:
        return within
    # each GPU's own part goes round among its peers of the other machines; together they have the machine's network
    moved = 2 * gradients * (nodes - 1) / nodes / (cluster.network_bytes * cluster.achieved)
    return within + moved + 2 * blocks * nodes * cluster.network_latency


def _frames(cluster: Cluster, load: Load) -> float:
    """Seconds of the exchanges of frames in a step."""
    p = load.sequence
    if p == 1:
        return 0.0
    count = load.exchanges * (2 + load.recompute)  # what is recomputed is exchanged again
    sent = load.samples * load.exchanged_bytes / p * (p - 1) / p
    here = min(p, cluster.gpus_per_node)
    within = sent * (here - 1) / (p - 1) / (cluster.link_bytes * cluster.achieved)
    beyond = sent * (p - here) / (p - 1) / (cluster.network_bytes / cluster.gpus_per_node * cluster.achieved)
    latency = cluster.link_latency if p <= cluster.gpus_per_node else cluster.network_latency
    return count * (max(within, beyond) + latency)


def _memory(cluster: Cluster, load: Load, gpus: int) -> float:
    """Bytes of one GPU: fp32 weights, gradients, average and two moments, bf16 weights at work, activations."""
    owners = {
        "replicate": 1,
        "zero2": gpus,
        "zero3": gpus,
        "hybrid": min(gpus, cluster.gpus_per_node),
    }[load.sharding]
    state = 20.0 * load.parameters / owners
    whole = 2.0 * load.parameters  # bf16; zero3 has one or two blocks of it at a time
    at_work = whole if load.sharding in ("replicate", "zero2") else 2 * whole / load.blocks
    return state + at_work + load.samples * load.activation_bytes / load.sequence
