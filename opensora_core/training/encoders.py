"""The frozen parts that turn clips and captions into what a denoiser learns from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from opensora_core import components
from opensora_core.config import Config
from opensora_core.data.dataset import ClipBatch
from opensora_core.parallel import Mesh
from opensora_core.parallel.text import shared_encoder
from opensora_core.tensors import Condition
from opensora_core.text import TextEncoder
from opensora_core.vae import VideoVAE


@dataclass(frozen=True)
class Encoders:
    """What makes latents and conditions of a batch.

    Attributes:
        vae: pixels to latents; None where the cache has them.
        text: captions to conditions; None where the cache has them.
        device: of the denoiser.
        tells_size: the model is told the size in pixels (PixArt-MS).
    """

    vae: VideoVAE | None
    text: TextEncoder | None
    device: torch.device
    tells_size: bool = False

    def encode(self, batch: ClipBatch, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """Latents (B, C, T', h, w) fp32, drawn from the posterior, and conditions; on the device."""
        mean, std = self.moments(batch)
        latents = mean + std * torch.randn(mean.shape, generator=generator, device=self.device)
        return latents, self.condition(batch)

    def condition(self, batch: ClipBatch) -> Condition:
        """What the model is told of a batch; on the device."""
        condition = batch.condition
        if condition is None:
            condition = self.conditions(list(batch.captions), batch.bucket.height, batch.bucket.width)
        elif self.tells_size:
            condition = _with_size(condition, batch.bucket.height, batch.bucket.width)
        return condition.to(self.device)

    def moments(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the posterior, each (B, C, T', h, w) fp32."""
        if batch.moments is not None:
            mean, std = batch.moments
            return mean.to(self.device).float(), std.to(self.device).float()
        assert self.vae is not None
        with torch.no_grad():
            return self.vae.moments(batch.video(self.device))

    def conditions(self, captions: list[str], height: int, width: int) -> Condition:
        """What the model is told of captions and of the size in pixels."""
        assert self.text is not None
        with torch.no_grad():
            condition = self.text.encode(captions)
        return _with_size(condition, height, width) if self.tells_size else condition


def _with_size(condition: Condition, height: int, width: int) -> Condition:
    size = torch.tensor([[height, width]], dtype=torch.float32, device=condition.tokens.device)
    return replace(condition, size=size.repeat(len(condition), 1))


class Parts:
    """Builds VAE and text encoder when they are first needed, and lets go of them when they are not any more."""

    def __init__(self, config: Config, mesh: Mesh | None = None) -> None:
        self.config = config
        self.device = components.resolve_device(config.runtime.device)
        self.mesh = mesh or Mesh(self.device)

    @cached_property
    def vae(self) -> VideoVAE:
        """The VAE."""
        return components.build_vae(self.config)

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder, on each process or shared by those of a machine."""
        how, build = self.config.parallel.text, lambda: components.build_text_encoder(self.config)
        return shared_encoder(build, how, self.mesh)

    def null_caption(self) -> Tensor:
        """The embedding of the empty caption (L, E)."""
        with torch.no_grad():
            return self.text.encode([""]).tokens[0]

    def encoders(self) -> Encoders:
        """Both."""
        return Encoders(self.vae, self.text, self.device, self.config.model.family == "pixart-ms")

    def let_go(self) -> Encoders:
        """Neither: what trains from a cache."""
        for name in ("vae", "text"):
            self.__dict__.pop(name, None)
        return Encoders(None, None, self.device, self.config.model.family == "pixart-ms")
