"""From a step to its batch: which frames of which clips, read, fitted, and told apart from those that are broken."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from opensora_core.data.buckets import Bucket, Pace
from opensora_core.data.cache import Cache
from opensora_core.data.frames import at_rate, evenly_spaced, published_indices
from opensora_core.data.keys import caption_key, clip_key
from opensora_core.data.manifest import Clip, Manifest
from opensora_core.data.order import WHOLE, BatchOrder, Share, Slot
from opensora_core.data.transforms import fit_video, normalise
from opensora_core.errors import CheckpointError, InputError
from opensora_core.media import read_frames
from opensora_core.tensors import Condition

# words end at anything but a letter: the names of classes are written as `turn_left`
_SIDED = re.compile(r"(?<![^\W\d_])(left|right)(wards?|most|-?hand(ed)?)?(?![^\W\d_])", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """What is taken of a clip: which of its frames, and whether they are mirrored."""

    indices: tuple[int, ...]
    flip: bool


@dataclass(frozen=True)
class Reject:
    """A clip that could not be read."""

    clip: str
    reason: str


@dataclass(frozen=True)
class ClipBatch:
    """Clips of one size, as pixels and captions or as what the encoders made of them.

    Attributes:
        bucket: whose size they have.
        ids: of the clips, as the manifest calls them.
        captions: of the clips; those without have an empty one.
        pixels: (B, T, H, W, 3) uint8, or (B, T, 3, H, W) fp32 in [-1, 1] where they were fitted as published; None with
            `moments`.
        moments: mean and deviation of the posterior of the latents, each (B, C, T', h, w), from the cache.
        condition: of the captions, from the cache.
        rejects: clips that could not be read, for which the next of the order stand.
        is_hopeless: no clip of the bucket can be read; there are fewer clips than a batch needs.
    """

    bucket: Bucket
    ids: tuple[str, ...]
    captions: tuple[str, ...]
    pixels: Tensor | None = None
    moments: tuple[Tensor, Tensor] | None = None
    condition: Condition | None = None
    rejects: tuple[Reject, ...] = field(default=())
    is_hopeless: bool = False

    def video(self, device: torch.device) -> Tensor:
        """The pixels as (B, 3, T, H, W) fp32 in [-1, 1], on a device."""
        assert self.pixels is not None
        pixels = self.pixels.to(device)
        return normalise(pixels).movedim(-1, 1) if pixels.dtype == torch.uint8 else pixels.transpose(1, 2)


@dataclass(frozen=True)
class ClipReader:
    """Reads clips of a manifest as samples of the buckets' sizes.

    Attributes:
        manifest: the clips, all with their number of frames.
        buckets: the sizes.
        pace: how the frames of a sample lie in a clip.
        resize: `antialiased` shrinks by a filter; `published` is Open-Sora 1.0's bilinear grid.
        flip: `unless-sided` mirrors half of the samples, but none whose caption tells left from right; `always`
            mirrors half of all samples, whatever their captions tell; `never` mirrors none.
        seed: of the run.
        threads: of the decoder.
    """

    manifest: Manifest
    buckets: Sequence[Bucket]
    pace: Pace
    resize: Literal["antialiased", "published"]
    flip: Literal["unless-sided", "never", "always"]
    seed: int
    threads: int = 1

    def choose(self, clip: Clip, bucket: Bucket, epoch: int, index: int) -> Choice:
        """Draw what is taken of a clip in an epoch; a function of (seed, epoch, index)."""
        rng = random.Random(f"{self.seed} {epoch} {index}")
        total, pace = clip.num_frames or 1, self.pace
        if bucket.num_frames == 1:
            indices = [rng.randrange(total)]
        elif pace.squeeze:
            indices = published_indices(total, bucket.num_frames, pace.frame_interval, rng)
        elif pace.fps:
            indices = at_rate(total, bucket.num_frames, clip.fps or pace.fps, pace.fps, rng)
        else:
            indices = evenly_spaced(total, bucket.num_frames, pace.frame_interval, rng)
        flip = rng.random() < 0.5
        if self.flip == "never" or (self.flip == "unless-sided" and _SIDED.search(clip.caption or "")):
            flip = False
        return Choice(tuple(indices), flip)

    def read(self, clip: Clip, bucket: Bucket, choice: Choice) -> Tensor:
        """Read and fit frames: one sample of `ClipBatch.pixels`.

        Raises:
            InputError: the clip cannot be read.
        """
        fits = self.resize == "antialiased"
        frames = read_frames(
            clip.path,
            choice.indices,
            height=bucket.height if fits else None,
            width=bucket.width if fits else None,
            start_seconds=clip.start_seconds,
            end_seconds=clip.end_seconds,
            threads=self.threads,
        )
        if self.resize == "published":
            pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
            return fit_video(pixels, bucket.height, bucket.width, flip=choice.flip)
        return torch.from_numpy(np.ascontiguousarray(frames[:, :, ::-1] if choice.flip else frames))


@dataclass(frozen=True)
class CachedClips:
    """Clips whose encoders' work is done.

    Attributes:
        cache: holds it.
        vae: fingerprint of the VAE.
        text: fingerprint of the text encoder.
        hashes: SHA-256 of each clip's file, by the clip's number.
        variants: choices of frames that are kept per clip; epoch e takes number e modulo that.
    """

    cache: Cache
    vae: str
    text: str
    hashes: Sequence[str]
    variants: int

    def key(self, reader: ClipReader, clip: Clip, bucket: Bucket, index: int, choice: Choice) -> str:
        """The key of a sample's moments."""
        return clip_key(
            self.hashes[index],
            start_seconds=clip.start_seconds,
            end_seconds=clip.end_seconds,
            indices=choice.indices,
            flip=choice.flip,
            height=bucket.height,
            width=bucket.width,
            resize=reader.resize,
            vae=self.vae,
        )

    def sample(self, reader: ClipReader, clip: Clip, bucket: Bucket, slot: Slot) -> tuple[Tensor, Tensor, Condition]:
        """Moments and condition of one clip.

        Raises:
            InputError: it could not be read when the cache was filled.
            CheckpointError: the cache is damaged.
        """
        choice = reader.choose(clip, bucket, slot.epoch % self.variants, slot.index)
        key = self.key(reader, clip, bucket, slot.index, choice)
        if not self.cache.has_latents(key):
            raise InputError(f"{clip.id} is not in the cache {self.cache.folder}", "start the run again to fill it")
        mean, std = self.cache.latents(key)
        return mean, std, self.cache.caption(caption_key(clip.caption or "", self.text))


class Batches:
    """The batches of a run; picklable, so that loader workers can make them.

    Args:
        reader: reads samples.
        order: says which.
        cached: what the encoders made of the clips; None reads pixels.
    """

    def __init__(self, reader: ClipReader, order: BatchOrder, cached: CachedClips | None = None) -> None:
        self.reader, self.order, self.cached = reader, order, cached

    def batch(self, step: int, share: Share = WHOLE) -> ClipBatch:
        """The batch of a step, or a part of it.

        A clip that cannot be read is told, and the next of the order stands in for it, whoever has which part.
        """
        slots = self.order.batch(step, share)
        bucket = self.reader.buckets[slots[0].bucket]
        rejects: dict[str, Reject] = {}
        clips: list[Clip] = []
        samples: list[Any] = []
        for slot in slots:
            found = self._first_readable(slot, bucket, rejects)
            if found is None:
                return ClipBatch(bucket, (), (), rejects=tuple(rejects.values()), is_hopeless=True)
            clips.append(found[0])
            samples.append(found[1])
        batch = ClipBatch(
            bucket,
            ids=tuple(clip.id for clip in clips),
            captions=tuple(clip.caption or "" for clip in clips),
            rejects=tuple(rejects.values()),
        )
        if self.cached is None:
            return replace(batch, pixels=torch.stack(samples))
        means, stds, conditions = zip(*samples, strict=True)
        return replace(batch, moments=(torch.cat(means), torch.cat(stds)), condition=Condition.cat(list(conditions)))

    def _first_readable(self, slot: Slot, bucket: Bucket, rejects: dict[str, Reject]) -> tuple[Clip, Any] | None:
        # what is left of this walk and all of the next: less might miss the only clip that is whole
        for _ in range(2 * len(self.order.members[slot.bucket])):
            clip = self.reader.manifest[slot.index]
            if clip.id not in rejects:
                try:
                    return clip, self._sample(clip, bucket, slot)
                except (InputError, CheckpointError) as error:
                    rejects[clip.id] = Reject(clip.id, error.message)
            slot = self.order.next_in_order(slot)
        return None

    def _sample(self, clip: Clip, bucket: Bucket, slot: Slot) -> Any:
        if self.cached is not None:
            return self.cached.sample(self.reader, clip, bucket, slot)
        return self.reader.read(clip, bucket, self.reader.choose(clip, bucket, slot.epoch, slot.index))
