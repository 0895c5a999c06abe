"""The model that ships: small, whole, and doing what it is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opensora_core import world
from opensora_core.assets.search import BUNDLED_FOLDER
from opensora_core.bench import Measurement
from opensora_core.bench import world as suite
from opensora_core.config import with_settings
from opensora_core.files import verify_manifest
from opensora_core.media import read_video
from opensora_core.presets import preset
from opensora_core.sampling import Saved, plan, sample

MAX_BYTES = 16_000_000
PROMPTS = (
    "a large red ball moving to the right over green grass during the day in clear weather",
    "a large yellow ball standing still over the sea at night in the rain",
)


def test_it_is_whole_and_small() -> None:
    verify_manifest(BUNDLED_FOLDER)
    assert sum(path.stat().st_size for path in BUNDLED_FOLDER.rglob("*") if path.is_file()) <= MAX_BYTES


def test_it_follows_a_prompt(tmp_path: Path) -> None:
    config = with_settings(preset("tiny"), {"sampling.batch_size": 2, "runtime.device": "cpu"})
    saved = [event for event in sample(config, plan(config, PROMPTS, tmp_path)) if isinstance(event, Saved)]
    assert len(saved) == len(PROMPTS)
    for event in saved:
        video = read_video(event.path)
        assert video.frames.shape == (world.NUM_FRAMES, world.SIZE, world.SIZE, 3) and video.fps == world.FPS
        said, seen = world.parse(event.prompt), world.verify(video.frames)
        for name in ("color", "sky", "ground", "weather"):
            assert seen.get(name) == said[name], f"{event.prompt}: {name} is {seen.get(name)}"


@pytest.mark.slow
def test_it_keeps_what_the_benchmark_says() -> None:
    config = with_settings(preset("tiny"), {"sampling.batch_size": 8, "runtime.device": "cpu"})
    found = {
        (event.case, event.metric): event.value
        for event in suite.measure(config, prompts=40, seeds=1)
        if isinstance(event, Measurement)
    }
    for name, floor in (
        ("color", 0.95),
        ("sky", 0.95),
        ("ground", 0.95),
        ("weather", 0.95),
        ("size", 0.85),
        ("motion", 0.8),
        ("shape", 0.7),
    ):
        assert found["seen", name] >= floor, name
    assert found["seen", "color, shape and motion together"] >= 0.5
    few = next(case for case, _ in found if case.startswith("seen, 6 steps"))
    assert found[few, "color, shape and motion together"] >= found["seen", "color, shape and motion together"] - 0.15
    assert found["autoencoder", "PSNR"] >= 31
    assert min(found["autoencoder", name] for name in world.ATTRIBUTES) >= 0.9


def test_steadiness_is_told_from_jumps() -> None:
    line = np.stack([np.arange(16.0), np.zeros(16)], axis=1).astype(np.float32)
    assert suite._is_smooth(line)
    jump = line.copy()
    jump[8:] += 9
    assert not suite._is_smooth(jump)
    lost = line.copy()
    lost[3] = np.nan
    assert not suite._is_smooth(lost)


def test_flicker_is_measured_away_from_the_object() -> None:
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    track = np.full((4, 2), 10, np.float32)
    assert suite._flicker(frames, track) == 0
    frames[1::2, :, :20] = 200  # near the object
    assert suite._flicker(frames, track) == 0
    frames[1::2, :, 40:] = 10
    flicker = suite._flicker(frames, track)
    assert flicker is not None and 5 < flicker < 10
    assert suite._flicker(frames, np.full((4, 2), np.nan, np.float32)) is None
