"""The invented world: coloured shapes that move under a sky, with captions, and a verifier that reads them back."""

from opensora_core.world.grammar import (
    ATTRIBUTES,
    HELD_OUT,
    Scene,
    canonical_caption,
    caption,
    draw_scene,
    is_held_out,
    parse,
    vocabulary,
)
from opensora_core.world.palette import FPS, NUM_FRAMES, SIZE
from opensora_core.world.renderer import render, render_batch
from opensora_core.world.verifier import track, verify

__all__ = [
    "ATTRIBUTES",
    "FPS",
    "HELD_OUT",
    "NUM_FRAMES",
    "SIZE",
    "Scene",
    "canonical_caption",
    "caption",
    "draw_scene",
    "is_held_out",
    "parse",
    "render",
    "render_batch",
    "track",
    "verify",
    "vocabulary",
]
