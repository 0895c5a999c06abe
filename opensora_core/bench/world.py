"""Does the model that ships do what the prompt says? Its videos are read back by the world's own verifier.

Everything goes the way of a user: `sample` writes files, as shipped, and the files are read. The verifier never sees
the prompt. Prompts are the canonical captions of freshly drawn scenes, which say every attribute; the scenes of the
split `held-out` have a pair of values that no training clip has. Two more cases ask what fewer steps cost, and what
becomes of prompts in free words: other words and orders, two sentences, capitals, slips of the finger.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from opensora_core import components, sampling, world
from opensora_core.bench.measurement import Event, Measurement
from opensora_core.config import Config, with_settings
from opensora_core.media import read_video, to_uint8
from opensora_core.training.world import to_tensor

SPLITS: tuple[Literal["seen", "held-out"], ...] = ("seen", "held-out")
PROMPTS, SEEDS = 240, 2
QUICK_PROMPTS = 24
FEW_STEPS, FEW_STEPS_SAMPLER = 6, "unipc"
TOGETHER = ("color", "shape", "motion")
_LINEAR = ("left", "right", "up", "down")
_JUMP_LIMIT = 2.5  # of the median step between frames, beyond which an object counts as having jumped

Frames = NDArray[np.uint8]


def measure(config: Config, *, quick: bool = False, prompts: int = PROMPTS, seeds: int = SEEDS) -> Iterator[Event]:
    """Measure the autoencoder alone, prompt-following and steadiness per split, fewer steps, free words, and cost.

    Args:
        config: the settings of the model, as for `sample`.
        quick: no more than `QUICK_PROMPTS` prompts, once each.
        prompts: how many per split.
        seeds: how many samples of each prompt.

    Raises:
        InputError: a model that does not make videos of the world's size.
    """
    if quick:
        prompts, seeds = min(prompts, QUICK_PROMPTS), 1
    yield from _measure_vae(config, num_clips=max(prompts // 4, 8))
    begin, count = time.monotonic(), 0
    for split in SPLITS:
        rng = np.random.default_rng([config.sampling.seed, len(split)])
        scenes = _distinct(rng, split, prompts)
        results = yield from _sample(config, {world.canonical_caption(scene): scene for scene in scenes}, seeds)
        count += len(results)
        yield from _measure_split(split, results)
    seconds = (time.monotonic() - begin) / count
    rng = np.random.default_rng([config.sampling.seed, 0])
    scenes = _distinct(rng, "seen", prompts)
    few = with_settings(config, {"sampling.steps": FEW_STEPS, "sampling.sampler": FEW_STEPS_SAMPLER})
    if config.diffusion.objective == "rectified-flow":
        results = yield from _sample(few, {world.canonical_caption(scene): scene for scene in scenes}, 1)
        yield from _measure_attributes(f"seen, {FEW_STEPS} steps of {FEW_STEPS_SAMPLER}", results)
    results = yield from _sample(config, {world.caption(scene, rng): scene for scene in scenes}, 1)
    yield from _measure_attributes("seen, in free words", results)
    yield Measurement("cost", "seconds per sample, loading included", seconds, "s", count)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    yield Measurement("cost", "peak resident memory", kilobytes / 2**20, "GiB", 1)


@dataclass(frozen=True)
class _Result:
    """A sample: what it should show, the attributes that its prompt says, and its frames."""

    scene: world.Scene
    said: frozenset[str]
    frames: Frames


def _sample(config: Config, prompts: dict[str, world.Scene], seeds: int) -> Generator[Event, None, list[_Result]]:
    """Sample each prompt as a user would, and read the files back."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        run = with_settings(config, {"sampling.num_samples": seeds})
        for event in sampling.sample(run, sampling.plan(run, list(prompts), Path(folder), "mp4")):
            if isinstance(event, sampling.Progress):
                yield event
            elif isinstance(event, sampling.Saved):
                said = frozenset(world.parse(event.prompt))
                results.append(_Result(prompts[event.prompt], said, read_video(event.path).frames))
    return results


def _distinct(rng: np.random.Generator, split: Literal["seen", "held-out"], count: int) -> list[world.Scene]:
    scenes: dict[world.Scene, None] = {}
    while len(scenes) < count:
        scenes[world.draw_scene(rng, split)] = None
    return list(scenes)


def _measure_vae(config: Config, num_clips: int) -> Iterator[Measurement]:
    """What is lost before the denoiser has a say: clips that training never saw, through the autoencoder and back."""
    vae = components.build_vae(config)
    device = components.resolve_device(config.runtime.device)
    decibels, read = [], []
    for index in range(num_clips):
        rng = np.random.default_rng([10**6, index])
        scene = world.draw_scene(rng, "held-out" if index % 2 else "seen")
        frames = world.render(scene, rng)
        video = to_tensor(frames)[None]
        with torch.no_grad():
            decoded = to_uint8(vae.decode(vae.encode(video.to(device)))[0])
        error = np.mean((decoded.astype(np.float64) - frames) ** 2)
        decibels.append(10 * np.log10(255**2 / error))
        read.append(_right(scene, decoded))
    yield Measurement("autoencoder", "PSNR", float(np.mean(decibels)), "dB", num_clips)
    for name in world.ATTRIBUTES:
        yield Measurement("autoencoder", name, _share(right[name] for right in read), "share", num_clips)


def _measure_attributes(case: str, results: list[_Result]) -> Iterator[Measurement]:
    """How many samples show what their prompt says; what it leaves open does not count."""
    read = [_right(result.scene, result.frames) for result in results]
    for name in world.ATTRIBUTES:
        shown = [right[name] for right, result in zip(read, results, strict=True) if name in result.said]
        yield Measurement(case, name, _share(shown), "share", len(shown))
    for metric, names in (("color, shape and motion together", TOGETHER), ("everything", tuple(world.ATTRIBUTES))):
        shown = [
            all(right[name] for name in names if name in result.said)
            for right, result in zip(read, results, strict=True)
        ]
        yield Measurement(case, metric, _share(shown), "share", len(shown))


def _measure_split(split: str, results: list[_Result]) -> Iterator[Measurement]:
    yield from _measure_attributes(split, results)
    tracks = [world.track(result.frames) for result in results]
    pairs = list(zip(results, tracks, strict=True))
    smooth = [_is_smooth(track) for result, track in pairs if result.scene.motion in _LINEAR]
    yield Measurement(split, f"no jump beyond {_JUMP_LIMIT} x the median step", _share(smooth), "share", len(smooth))
    still = [
        change
        for result, track in pairs
        if result.scene.weather == "clear"
        and result.scene.ground != "sea"
        and (change := _flicker(result.frames, track)) is not None
    ]
    if still:
        yield Measurement(split, "flicker of a still background", float(np.mean(still)), "levels of 255", len(still))


def _right(scene: world.Scene, frames: Frames) -> dict[str, bool]:
    found = world.verify(frames)
    return {name: found.get(name) == value for name, value in asdict(scene).items()}


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values) or [False]))


def _is_smooth(track: NDArray[np.float32]) -> bool:
    """Whether the object of a track (T, 2) is there in every frame and never jumps."""
    steps = np.hypot(*np.diff(track, axis=0).T)
    return bool(np.isfinite(steps).all() and steps.max() <= _JUMP_LIMIT * max(float(np.median(steps)), 0.5))


def _flicker(frames: Frames, track: NDArray[np.float32]) -> float | None:
    """Mean change between frames of the columns that the object never comes near; None where there are none."""
    columns = np.arange(frames.shape[2])
    centres = track[np.isfinite(track).all(axis=1), 0]
    if not len(centres):
        return None
    away = np.abs(columns[:, None] - centres[None]).min(axis=1) > 16
    if not away.any():
        return None
    return float(np.abs(np.diff(frames[:, :, away].astype(np.int16), axis=0)).mean())
