"""The model of a step on a cluster, against what can be worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from opensora_core.bench.cluster import CLUSTERS, Cluster, Load, forecast, load_cluster
from opensora_core.bench.scaling import load_of
from opensora_core.config import with_settings
from opensora_core.errors import ConfigError, InputError
from opensora_core.presets import preset

PLAIN = Cluster(
    peak_flops=100.0,
    efficiency=0.5,
    link_bytes=100.0,
    network_bytes=10.0,
    link_latency=1e-30,
    network_latency=1e-30,
    achieved=1.0,
    overlap=1e-9,
    cores_per_node=1000,
    storage_bytes=1e30,
    node_storage_bytes=1e30,
)
LOAD = Load(
    forward_flops=1000.0,
    recompute=0.0,
    parameters=10,
    blocks=2,
    exchanges=4,
    exchanged_bytes=800.0,
    activation_bytes=0.0,
    samples=2,
    sequence=1,
    sharding="replicate",
    steps_per_checkpoint=1,
)


def test_a_step_alone_is_its_arithmetic() -> None:
    told = forecast(PLAIN, LOAD, 1)
    assert told.compute == pytest.approx(2 * 3 * 1000 / 50)
    assert told.step == pytest.approx(told.compute) and told.mfu == pytest.approx(0.5)
    assert forecast(PLAIN, replace(LOAD, recompute=1.0), 1).compute == pytest.approx(2 * 4 * 1000 / 50)


def test_gradients_go_twice_around_the_ring() -> None:
    assert forecast(PLAIN, LOAD, 8).weights == pytest.approx(2 * 40 * 7 / 8 / 100)
    assert forecast(PLAIN, LOAD, 16).weights == pytest.approx(2 * 40 * 15 / 16 / 10)


@pytest.mark.parametrize(("sharding", "num_bytes"), [("zero2", 20 + 40), ("zero3", 20 + 20 + 40)])
def test_owned_weights_are_gathered(sharding: str, num_bytes: int) -> None:
    assert forecast(PLAIN, replace(LOAD, sharding=sharding), 8).weights == pytest.approx(num_bytes * 7 / 8 / 100)


def test_hybrid_sends_only_gradients_between_machines() -> None:
    within = 80 * 7 / 8 / 100
    assert forecast(PLAIN, replace(LOAD, sharding="hybrid"), 8).weights == pytest.approx(within)
    between = 2 * 40 * 3 / 4 / 10
    assert forecast(PLAIN, replace(LOAD, sharding="hybrid"), 32).weights == pytest.approx(within + between)


def test_frames_are_exchanged_and_arithmetic_is_shared() -> None:
    told = forecast(PLAIN, replace(LOAD, sequence=2), 8)
    assert told.frames == pytest.approx(4 * 2 * (2 * 800 / 2 / 2) / 100)
    assert told.compute == pytest.approx(forecast(PLAIN, LOAD, 8).compute / 2)
    assert told.samples_per_second == pytest.approx(4 * 2 / told.step)
    beyond = forecast(PLAIN, replace(LOAD, sequence=16), 16)
    assert beyond.frames == pytest.approx(4 * 2 * (2 * 800 / 16 / 16 * 8) / (10 / 8))


def test_a_step_waits_for_clips_that_loaders_cannot_decode() -> None:
    told = forecast(replace(PLAIN, cores_per_node=1, clips_per_core=0.001), LOAD, 8)
    assert told.step == pytest.approx(16 / 0.001) and told.bound == "data"


def test_groups_that_do_not_fill_machines_are_refused() -> None:
    with pytest.raises(ConfigError, match="12 GPUs"):
        forecast(PLAIN, LOAD, 12)
    with pytest.raises(ConfigError, match="groups of 3"):
        forecast(PLAIN, replace(LOAD, sequence=3), 8)


def test_settings_become_a_load() -> None:
    load = load_of(with_settings(preset("64x512x512"), {"parallel.sequence": 2}))
    assert load.parameters == 759_620_768 and load.blocks == 28 and load.exchanges == 56
    assert load.forward_flops == pytest.approx(97.9e12, rel=0.01)  # FACTS: 96 TFLOP
    assert load.exchanged_bytes == 2 * 64 * 1024 * 1152


def test_a_cluster_is_a_name_or_a_file(tmp_path: Path) -> None:
    assert load_cluster("a100") is CLUSTERS["a100"]
    file = tmp_path / "ours.toml"
    file.write_text('base = "a100"\nnetwork_bytes = 5e10\ngpus = [16]\n')
    assert load_cluster(str(file)) == replace(CLUSTERS["a100"], network_bytes=5e10, gpus=(16,))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("netwrok_bytes = 1", "network_bytes"),
        ("gpus = [0]", "gpus"),
        ("base = 'a10'", "a100"),
        ("cores_per_node = 1.5", "1.5"),
    ],
)
def test_a_wrong_line_of_a_file_is_named(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "ours.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(str(file))
    assert told in f"{caught.value.message} {caught.value.hint}"
    file.write_text("[")
    with pytest.raises(InputError, match="no TOML"):
        load_cluster(str(file))
    with pytest.raises(ConfigError, match="neither"):
        load_cluster("h10")
