"""What ships was trained by this code: eight thousand clips, from nothing, and colours and skies are learnt.

A smaller model than the one that ships, for minutes instead of an hour. It is asked what it has learnt about colour
before its objects have shapes: for the same noise, what differs between a red ball and a blue one differs towards red.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from opensora_core import components, diffusion, world
from opensora_core.config import Config, with_settings
from opensora_core.media import to_uint8
from opensora_core.presets import preset
from opensora_core.training import train
from opensora_core.world.palette import OBJECT

BRIEF = {
    "model.hidden_size": 128,
    "model.depth": 4,
    "model.num_heads": 4,
    "train.batch_size": 16,
    "train.draws": 1,
    "train.max_steps": 500,
    "train.vae_steps": 110,
    "train.decoder_steps": 0,
    "train.text_steps": 110,
    "train.lr": 2e-3,
    "train.num_workers": 1,
    "train.checkpoint_every": 500,
    "runtime.device": "cpu",
}
COLORS = np.array(list(OBJECT.values()), dtype=np.float32)


@pytest.mark.timeout(900)
def test_colours_and_skies_are_learnt_from_nothing(tmp_path: Path) -> None:
    config, run = with_settings(preset("tiny"), BRIEF), tmp_path / "run"
    assert config.train.max_steps * config.train.batch_size >= 8_000
    for _ in train(config, output=run):
        pass
    weights = {"model.weights": str(run), "vae.weights": str(run / "vae"), "text.weights": str(run / "text")}
    trained = with_settings(config, weights)
    draw = Draw(trained)
    colors, skies = [], []
    for number in range(6):
        scene = replace(world.draw_scene(np.random.default_rng(number), "seen"), weather="clear")  # rain hides a lot
        clips = draw([replace(scene, color=color) for color in world.ATTRIBUTES["color"]], seed=number)  # type: ignore[arg-type]
        colors += list(nearest_colors(clips) == np.arange(len(COLORS)))
        skies += [world.verify(clip)["sky"] == scene.sky for clip in clips]
    assert np.mean(skies) >= 0.9, skies  # chance: a third
    assert np.mean(colors) >= 0.5, colors  # chance: a sixth


class Draw:
    """Samples of scenes, all of them from the same noise."""

    def __init__(self, config: Config) -> None:
        self.text = components.build_text_encoder(config)
        self.vae, self.model = components.build_vae(config), components.build_model(config)
        self.objective = components.build_objective(config)

    @torch.no_grad()
    def __call__(self, scenes: list[world.Scene], seed: int) -> NDArray[np.uint8]:
        """Frames (B, T, H, W, 3)."""
        condition = self.text.encode([world.canonical_caption(scene) for scene in scenes])
        shape = self.vae.latent_shape(world.NUM_FRAMES, world.SIZE, world.SIZE)
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)).expand(
            len(scenes), -1, -1, -1, -1
        )
        *_, last = diffusion.sample(
            self.model,
            noise,
            condition,
            self.model.null_condition(condition),
            objective=self.objective,
            sampler="euler",
            steps=12,
            guidance=4.0,
        )
        return np.stack([to_uint8(video) for video in self.vae.decode(last.latents)])


def nearest_colors(clips: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The colour that each clip is drawn towards where it differs most from the mean of them all."""
    away = clips.astype(np.float32) - clips.mean(axis=0, dtype=np.float32)
    strength = np.abs(away).max(axis=(0, -1))
    drawn = away[:, strength >= np.quantile(strength, 0.96)].mean(axis=1)
    expected = COLORS - COLORS.mean(axis=0)
    cosines = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)) @ (
        expected / np.linalg.norm(expected, axis=1, keepdims=True)
    ).T
    return np.asarray(cosines.argmax(axis=1))
