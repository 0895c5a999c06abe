"""Video <-> latents: autoencoders behind one protocol."""

from __future__ import annotations

from opensora_core.vae.protocol import VideoVAE

__all__ = ["VideoVAE"]
