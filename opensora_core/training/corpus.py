"""From `--data` to clips that can be trained on: read, counted, put into buckets, and kept for a resume."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora_core import components
from opensora_core.config import Config, VideoConfig
from opensora_core.data.buckets import Bucket, Pace, parse_buckets
from opensora_core.data.manifest import Manifest, read_manifest, write_clips
from opensora_core.data.survey import Survey, sort_into_buckets, survey
from opensora_core.errors import ConfigError, InputError
from opensora_core.runs import CLIPS_FILE
from opensora_core.training.events import Event, Notice, Working

DEFAULT_STRIDE = 8  # pixels per latent position of every VAE that was published with these models
FRAME_BY_FRAME = ("kl", "temporal-decoder", "patch")  # kinds of VAE that keep the number of frames
MOST_HELD_OUT = 0.1


@dataclass(frozen=True)
class Corpus:
    """The clips of a run.

    Attributes:
        manifest: all of them, counted.
        buckets: the sizes.
        pace: how the frames of a sample lie in a clip.
        members: per bucket, the clips that are trained on.
        held_out: per bucket, the clips that are validated on; of another manifest where there is one.
        validation: that other manifest, or the same.
        survey: what was found; None for a run that is resumed.
    """

    manifest: Manifest
    buckets: tuple[Bucket, ...]
    pace: Pace
    members: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    validation: Manifest
    survey: Survey | None = None

    @property
    def num_clips(self) -> int:
        """Clips that are trained on."""
        return sum(map(len, self.members))


def gather(config: Config, run: Path | None) -> Generator[Event, None, Corpus]:
    """Read the data of a run, or take what the run kept of it when it began.

    Args:
        config: `data`, `video` and `validation` settings.
        run: its folder; the counted clips are kept there. None keeps nothing.

    Raises:
        InputError: it cannot be read, or not one clip of it is usable; says which limit removed how many.
        ConfigError: impossible buckets.
    """
    buckets, pace = buckets_of(config), pace_of(config)
    kept = run / CLIPS_FILE if run is not None else None
    if kept is not None and kept.exists():
        # named from where they were named when the run began, so that every row of the report calls them the same
        manifest = Manifest.of(read_manifest(kept), folder=folder_of(config.data.source))
        members = sort_into_buckets(manifest, buckets, pace, config.data.max_upscale)
        found = None
    else:
        manifest = read_manifest(Path(config.data.source))
        found = yield from look(config, manifest, buckets, pace)
        manifest, members = found.manifest, found.members
        for note in manifest.notes:
            yield Notice(note)
        require_some(config, found, buckets)
        if kept is not None:
            write_clips(manifest, kept)
    held_out: tuple[tuple[int, ...], ...] = tuple(() for _ in buckets)
    validation = manifest
    wanted = config.validation.num_clips if config.validation.every or config.validation.sample_every else 0
    if wanted and config.validation.data:
        validation = read_manifest(Path(config.validation.data))
        others = yield from look(config, validation, buckets, pace)
        require_some(config, others, buckets)
        validation = others.manifest
        held_out = _some(others.members, wanted, config.train.seed)
    elif wanted:
        clips = sum(map(len, members))
        most = max(int(MOST_HELD_OUT * clips), 1 if clips > 1 else 0)
        held_out = _some(members, min(wanted, most), config.train.seed)
        chosen = {index for indices in held_out for index in indices}
        members = tuple(tuple(index for index in indices if index not in chosen) for indices in members)
    return Corpus(manifest, tuple(buckets), pace, members, held_out, validation, found)


def folder_of(source: str) -> Path:
    """The folder that the clips of a source are named from."""
    path = Path(source)
    return path if path.is_dir() else path.parent


def look(config: Config, manifest: Manifest, buckets: Sequence[Bucket], pace: Pace) -> Generator[Event, None, Survey]:
    """Survey a manifest under a run's settings."""
    looking = survey(
        manifest,
        buckets,
        pace,
        max_upscale=config.data.max_upscale,
        need_caption=not config.data.allow_no_caption,
        num_threads=max(os.cpu_count() or 1, 1),
    )
    while True:
        try:
            seen = next(looking)
        except StopIteration as end:
            found: Survey = end.value
            return found
        yield Working("looking at the clips", seen.done, seen.total)


def require_some(config: Config, found: Survey, buckets: Sequence[Bucket]) -> None:
    """Check that there is something to train on.

    Raises:
        InputError: there is not; the reasons are counted.
    """
    if found.num_usable:
        return
    if not len(found.manifest):
        raise InputError(f"{config.data.source} names no clip at all", "see docs/train.md for what --data takes")
    counted = ", ".join(f"{count} {reason}" for reason, count in found.reasons.most_common())
    example = next(found.rejects(), ("", ""))
    hints = {
        "too short": "lower video.num_frames or video.frame_interval",
        "too small": "lower the size, or --set data.max_upscale=2",
        "no caption": "osora caption writes captions; --set data.allow_no_caption=true trains without",
        "duplicate": "remove the copies",
        "unreadable": "mend or replace the files",
    }
    sizes = " or ".join(map(str, buckets))
    first = found.reasons.most_common(1)[0][0]
    raise InputError(
        f"none of the {len(found.manifest)} clips of {config.data.source} can be trained on at {sizes}: {counted}; "
        f"for example {example[0]}: {example[1]}",
        hints.get(first, "osora train --dry-run tells more"),
    )


def latent_shape(config: Config, size: Bucket | VideoConfig) -> tuple[int, int, int, int]:
    """(C, T, h, w) of a clip of that size."""
    stride = _stride(config)
    return config.model.in_channels, size.num_frames, size.height // stride, size.width // stride


def _stride(config: Config) -> int:
    return components.spatial_stride(config) or DEFAULT_STRIDE


def buckets_of(config: Config) -> list[Bucket]:
    """The sizes that clips are brought to."""
    stride = _stride(config)
    depth, rows, columns = config.model.patch_size
    found = _parsed(config, (depth, rows * stride, columns * stride))
    if config.vae.kind in FRAME_BY_FRAME:
        for bucket in found:
            if bucket.num_frames % depth:
                raise ConfigError(
                    f"{bucket.num_frames} frames are not a multiple of {depth}, the depth of this model's patches",
                    f"--set video.num_frames={-(-bucket.num_frames // depth) * depth}",
                )
    return found


def _parsed(config: Config, patch: tuple[int, int, int]) -> list[Bucket]:
    return parse_buckets(
        config.data.buckets,
        main=(config.video.num_frames, config.video.height, config.video.width),
        batch_size=config.train.batch_size,
        tokens_per_batch=config.data.tokens_per_batch,
        patch=patch,
    )


def pace_of(config: Config) -> Pace:
    """How the frames of a sample lie in a clip."""
    return Pace(
        config.video.frame_interval,
        fps=config.video.fps if config.data.frame_choice == "fps" else 0.0,
        squeeze=config.data.frame_choice == "published",
    )


def _some(members: Sequence[Sequence[int]], count: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Up to so many clips, drawn over all buckets."""
    flat = [(bucket, index) for bucket, indices in enumerate(members) for index in indices]
    drawn = np.random.default_rng([seed, 2]).permutation(len(flat))[:count]
    chosen: list[list[int]] = [[] for _ in members]
    for place in sorted(drawn):
        bucket, index = flat[place]
        chosen[bucket].append(index)
    return tuple(map(tuple, chosen))
