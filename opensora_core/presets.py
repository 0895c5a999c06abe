"""Named settings. A preset states only its difference from its parent; where each setting came from is kept.

Sizes, scales and rates of the published models: FACTS 9.3 (the configs of Open-Sora 1.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_core.config import Config, iterate, read_settings, with_settings
from opensora_core.errors import UsageError, nearest


@dataclass(frozen=True)
class Preset:
    """What a preset changes in its parent, and what it is for in a line."""

    about: str
    changes: Mapping[str, Any]
    parent: str = ""


_TEXT_TO_VIDEO: dict[str, Any] = {"video.source_fps": 24.0, "video.frame_interval": 3}
_POOLED: dict[str, Any] = {
    "model.condition": "pooled",
    "model.caption_channels": 512,
    "model.caption_length": 1,
    "text.kind": "clip",
    "text.weights": "clip-vit-b-32",
    "text.cleaning": "plain",
    "sampling.sampler": "dpm-solver",
    "sampling.steps": 20,
    "sampling.guidance": 4.0,
    "sampling.batch_size": 2,
}
_CLASSES: dict[str, Any] = {"model.condition": "class", "text.kind": "class", "text.weights": ""}
_IMAGE: dict[str, Any] = {
    "video.num_frames": 1,
    "video.frame_interval": 1,
    "video.source_fps": 1.0,
    "model.temporal_positions": False,
}

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        "the model that ships: 16x64x64, an invented world of coloured shapes",
        {
            "video.height": 64,
            "video.width": 64,
            # 64 tokens are so few that full attention costs nothing, and a caption of this world fits one vector: twice
            # the clips a second on a processor that an STDiT with its captions by cross attention gets through
            "model.family": "dit",
            "model.weights": "bundled",
            "model.in_channels": 8,
            "model.patch_size": (4, 2, 2),
            "model.hidden_size": 160,
            "model.depth": 6,
            "model.num_heads": 5,
            "model.qk_norm": True,
            "model.learn_sigma": False,
            "model.condition": "pooled",
            "model.caption_channels": 128,
            "model.caption_length": 1,
            "vae.kind": "patch",
            "vae.weights": "bundled",
            "vae.micro_batch": 256,
            "text.kind": "t5-pooled",
            "text.weights": "bundled",
            "text.max_length": 48,
            "text.cleaning": "plain",
            "diffusion.objective": "rectified-flow",
            "diffusion.timestep_shift": 3.0,
            "sampling.sampler": "euler",
            "sampling.steps": 20,
            "sampling.guidance": 5.0,
            "sampling.batch_size": 4,
            "data.source": "world",
            "train.optimizer": "muon",
            "train.lr": 1e-3,
            "train.muon_lr": 0.014,
            "train.batch_size": 8,
            "train.draws": 4,  # rendering a clip costs as much as a training step on it
            "train.max_steps": 15400,
            "train.vae_steps": 2000,
            "train.decoder_steps": 1600,
            "train.text_steps": 700,
            "train.warmup_steps": 50,
            "train.decay_fraction": 0.8,  # at the full rate the loss stops falling after some thousand clips
            "train.ema_decay": 0.999,
            "train.ema_warmup": True,
            "train.checkpoint_every": 250,
        },
    ),
    "1x256x256": Preset(
        "stage 1: STDiT on images of 256x256, from PixArt-alpha",
        {
            "video.num_frames": 1,
            "video.frame_interval": 1,
            "video.source_fps": 1.0,
            "model.space_scale": 0.5,
            "vae.micro_batch": 64,
            "train.init": "pixart-512",
            "train.batch_size": 128,
            "train.checkpoint_every": 1000,
        },
    ),
    "1x512x512": Preset(
        "stage 1: STDiT on images of 512x512, from PixArt-alpha",
        {
            "video.height": 512,
            "video.width": 512,
            "model.space_scale": 1.0,
            "train.batch_size": 32,
            "train.recompute": 1.0,
        },
        parent="1x256x256",
    ),
    "16x256x256": Preset(
        "Open-Sora 1.0, stage 2: 16 frames of 256x256",
        {
            **_TEXT_TO_VIDEO,
            "model.weights": "opensora-v1-hq-16x256x256",
            "model.space_scale": 0.5,
            "sampling.batch_size": 2,
            "train.init": "pixart-512",
            "train.recompute": 1.0,
        },
    ),
    "16x256x256-hq": Preset(
        "Open-Sora 1.0, stage 3, first step: high-quality clips of 16x256x256",
        {"train.init": "opensora-v1-16x256x256"},
        parent="16x256x256",
    ),
    "16x512x512": Preset(
        "Open-Sora 1.0, stage 3: 16 frames of 512x512",
        {
            "video.height": 512,
            "video.width": 512,
            "model.weights": "opensora-v1-hq-16x512x512",
            "model.space_scale": 1.0,
            "train.init": "opensora-v1-hq-16x256x256",
            "train.recompute": 0.0,
            "train.checkpoint_every": 500,
        },
        parent="16x256x256",
    ),
    "64x512x512": Preset(
        "Open-Sora 1.0, stage 3, 64 frames; its weights were never published, the 16-frame ones are used",
        {
            "video.num_frames": 64,
            "video.frame_interval": 2,
            "model.time_scale": 2 / 3,
            "sampling.batch_size": 1,
            "train.batch_size": 4,
            "train.init": "opensora-v1-hq-16x512x512",
            "train.recompute": 1.0,
            "train.checkpoint_every": 250,
        },
        parent="16x512x512",
    ),
    "dit-16x256x256": Preset(
        "DiT-XL/2 with full space-time attention and CLIP captions",
        {**_TEXT_TO_VIDEO, **_POOLED, "model.family": "dit", "train.init": "dit-xl-2-256"},
    ),
    "dit-16x256x256-2x2": Preset(
        "DiT-XL/2x2: patches two frames deep", {"model.patch_size": (2, 2, 2)}, parent="dit-16x256x256"
    ),
    "dit-1x256x256": Preset(
        "DiT-XL/2 images with CLIP captions",
        {**_IMAGE, "train.batch_size": 128, "train.lr": 1e-4, "train.init": ""},
        parent="dit-16x256x256",
    ),
    "dit-1x256x256-class": Preset(
        "the published DiT-XL/2: ImageNet classes at 256x256",
        {**_CLASSES, "model.weights": "dit-xl-2-256", "model.num_classes": 1000},
        parent="dit-1x256x256",
    ),
    "dit-1x512x512-class": Preset(
        "the published DiT-XL/2: ImageNet classes at 512x512",
        {"video.height": 512, "video.width": 512, "model.weights": "dit-xl-2-512"},
        parent="dit-1x256x256-class",
    ),
    "latte-16x256x256": Preset(
        "Latte-XL/2 with CLIP captions",
        {"model.family": "latte", "train.init": "", "train.recompute": 1.0},
        parent="dit-16x256x256",
    ),
    "latte-16x256x256-2x2": Preset(
        "Latte-XL/2x2: patches two frames deep", {"model.patch_size": (2, 2, 2)}, parent="latte-16x256x256"
    ),
    "latte-16x256x256-class": Preset(
        "the published Latte-XL/2: UCF101 classes",
        {**_CLASSES, "model.weights": "latte-xl-2-ucf101", "model.num_classes": 101},
        parent="latte-16x256x256",
    ),
    "latte-1-16x512x512": Preset(
        "the published Latte-1: text to video at 512x512 by T5 captions, in diffusers' layout",
        {
            "model.family": "latte-1",
            "model.weights": "latte-1",
            "train.init": "latte-1",
            "model.depth": 56,  # 28 blocks over space and 28 over time
            "model.base_size": 32,
            "sampling.sampler": "ddim",
            "sampling.steps": 50,
            "sampling.guidance": 7.5,
        },
        parent="16x512x512",
    ),
    "pixart-1x512x512": Preset(
        "PixArt-alpha images of 512x512",
        {
            **_IMAGE,
            "video.height": 512,
            "video.width": 512,
            "model.family": "pixart",
            "model.weights": "pixart-512",
            "train.init": "pixart-512",
            "train.batch_size": 32,
            "train.recompute": 1.0,
            "sampling.sampler": "dpm-solver",
            "sampling.steps": 20,
            "sampling.batch_size": 2,
        },
    ),
    "pixart-1x256x256": Preset(
        "PixArt-alpha images of 256x256",
        # the published 256 model was trained on its own grid, so positions are not scaled
        {"video.height": 256, "video.width": 256, "model.weights": "pixart-256", "train.init": "pixart-256"},
        parent="pixart-1x512x512",
    ),
    "pixart-1x1024-ms": Preset(
        "PixArt-alpha images of about a megapixel, any aspect ratio",
        {
            "video.height": 1024,
            "video.width": 1024,
            "model.family": "pixart-ms",
            "model.weights": "pixart-1024-ms",
            "train.init": "pixart-1024-ms",
            "model.space_scale": 2.0,
            "model.base_size": 64,
        },
        parent="pixart-1x512x512",
    ),
    "pixart-16x256x256": Preset(
        "PixArt with full space-time attention, started from its image weights",
        {
            **_TEXT_TO_VIDEO,
            "video.num_frames": 16,
            "video.height": 256,
            "video.width": 256,
            "model.temporal_positions": True,
            "model.space_scale": 0.5,
            "train.batch_size": 8,
            "train.recompute": 0.0,
        },
        parent="pixart-1x512x512",
    ),
}


STAGES: dict[int, tuple[str, ...]] = {
    1: ("1x256x256", "1x512x512"),
    2: ("16x256x256",),
    3: ("16x512x512", "16x256x256-hq", "64x512x512"),
}
"""The presets of each stage of the published training, the one that a stage means first."""

RECIPES: dict[str, tuple[str, ...]] = {
    "three-stages": ("1x256x256", "16x256x256", "16x256x256-hq", "16x512x512", "64x512x512"),
}
"""Presets that are trained one after the other, each from what the one before it made."""


def stage_of(name: str) -> int | None:
    """The stage that a preset belongs to."""
    return next((stage for stage, names in STAGES.items() if name in names), None)


def lineage(name: str) -> list[str]:
    """The preset's ancestors, oldest first, and itself.

    Raises:
        UsageError: an unknown name; the nearest ones are offered.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preset '{name}'", nearest(name, PRESETS))
    chain = [name]
    while parent := PRESETS[chain[0]].parent:
        chain.insert(0, parent)
    return chain


def preset(name: str) -> Config:
    """The resolved settings of a preset."""
    return resolve(name)[0]


def resolve(
    preset: str | None = None,
    config_file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    saved: Mapping[str, Any] | None = None,
) -> tuple[Config, dict[str, str]]:
    """Resolve the settings of a command; later sources win.

    Args:
        preset: a name of `PRESETS`; None starts from the defaults of `Config`.
        config_file: TOML or JSON, `--config`.
        settings: dotted path -> word, `--set`.
        flags: dotted path -> value of the command's own flags; None means "not given".
        saved: settings saved with a checkpoint; they stand where a preset would and are refined by one.

    Returns:
        The settings, and for each dotted path the source that had the last word.
    """
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if saved:
        sources.append(("saved with the model", saved))
    if preset is not None:
        sources += [(f"preset {name}", PRESETS[name].changes) for name in lineage(preset)]
    if config_file is not None:
        sources.append((str(config_file), read_settings(config_file)))
    if settings:
        sources.append(("--set", settings))
    if flags:
        sources.append(("flag", {path: value for path, value in flags.items() if value is not None}))
    config = Config()
    origins = {path: "default" for path, _ in iterate(config)}
    for origin, changes in sources:
        config = with_settings(config, changes)
        origins.update(dict.fromkeys(changes, origin))
    return config, origins
