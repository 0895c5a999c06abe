"""Filling the cache: every clip and caption of a run through the frozen encoders, once."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opensora_core import components
from opensora_core.config import Config
from opensora_core.data.cache import Cache
from opensora_core.data.dataset import CachedClips, ClipBatch, ClipReader, Reject
from opensora_core.data.keys import caption_key, fingerprint
from opensora_core.data.order import Share
from opensora_core.errors import InputError
from opensora_core.parallel import Mesh
from opensora_core.parallel.agreement import agreed, by_first, gathered, patient
from opensora_core.training.clips import Rejects
from opensora_core.training.corpus import Corpus
from opensora_core.training.encoders import Encoders
from opensora_core.training.events import Event, Notice, Working
from opensora_core.training.loop import leave_signals_to_parent

T = TypeVar("T")

CAPTIONS_AT_ONCE = 32
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}

Job = tuple[int, int, int]
"""Number of the bucket, number of the clip, number of the choice of frames."""


class _Missing(Dataset[tuple[Job, Tensor | str]]):
    """Samples that the cache lacks, read by loader workers; in place of a broken one, the reason."""

    def __init__(self, reader: ClipReader, jobs: Sequence[Job]) -> None:
        self.reader, self.jobs = reader, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, place: int) -> tuple[Job, Tensor | str]:
        bucket_number, index, variant = self.jobs[place]
        clip, bucket = self.reader.manifest[index], self.reader.buckets[bucket_number]
        try:
            return self.jobs[place], self.reader.read(clip, bucket, self.reader.choose(clip, bucket, variant, index))
        except InputError as error:
            return self.jobs[place], error.message


def fill(
    config: Config, corpus: Corpus, reader: ClipReader, rejects: Rejects, mesh: Mesh
) -> Generator[Event, None, CachedClips]:
    """Encode what the cache lacks of a run's clips and captions. What is there is kept, however far this gets.

    The processes share what is to be encoded; the folder is seen by all.

    Raises:
        TrainingError: too many clips cannot be read.
        ResourceError: the cache cannot be written.
        WeightsError, CheckpointError: the encoders cannot be had.
    """
    cached = yield from by_first(mesh, _opened(config, corpus))
    gathered(mesh.whole, None)  # all know what is there before anybody adds to it
    share = Share(mesh.rank, mesh.size)
    with patient(mesh) as everybody:
        with agreed(everybody), cached.cache:
            yield from _fill_captions(config, corpus, cached, share)
            found = yield from _fill_latents(config, corpus, cached, _Own(reader, share, rejects))
        told = gathered(everybody, found)
    if mesh.size > 1:
        for reject in [each for one in told for each in one]:
            yield from rejects.add(reject.clip, reject.reason)
        cached = replace(cached, cache=_cache(config))  # which sees what the others have added
    return cached


def _cache(config: Config) -> Cache:
    return Cache(Path(config.data.cache), DTYPES[config.data.cache_dtype])


def _opened(config: Config, corpus: Corpus) -> Generator[Event, None, CachedClips]:
    cache = _cache(config)
    yield from map(Notice, cache.notes)
    hashes = yield from _hashes(cache, corpus)
    yield Working("hashing the encoders", 0, 1)
    return CachedClips(cache, _vae_print(config, cache), _text_print(config, cache), hashes, config.data.cache_variants)


def _hashes(cache: Cache, corpus: Corpus) -> Generator[Event, None, list[str]]:
    """SHA-256 of the file of each clip that is trained on."""
    hashes = [""] * len(corpus.manifest)
    wanted = [index for indices in corpus.members for index in indices]
    for number, index in enumerate(wanted):
        if number % 64 == 0:
            yield Working("hashing the clips", number, len(wanted))
        clip = corpus.manifest[index]
        if clip.path.is_file():  # one that has gone since it was counted is told when it is read
            hashes[index] = cache.hashes.of(clip.path, clip.sha256)
    return hashes


def _vae_print(config: Config, cache: Cache) -> str:
    device = components.resolve_device(config.runtime.device)
    return fingerprint(
        components.locate(config, "vae").path,
        cache.hashes,
        parts=("vae",),
        kind=config.vae.kind,
        scaling_factor=config.vae.scaling_factor,
        tiling=config.vae.tiling,
        sample_posterior=config.vae.sample_posterior,
        dtype=str(components.vae_dtype(config, device)),
    )


def _text_print(config: Config, cache: Cache) -> str:
    device = components.resolve_device(config.runtime.device)
    name = config.text.dtype if config.text.dtype != "auto" else config.runtime.dtype
    return fingerprint(
        components.locate(config, "text").path if config.text.weights else None,
        cache.hashes,
        parts=("text_encoder", "tokenizer"),
        kind=config.text.kind,
        cleaning=config.text.cleaning,
        max_length=components.text_length(config),
        num_classes=config.model.num_classes,
        dtype=str(components.resolve_dtype(name, device)),
    )


def _fill_captions(config: Config, corpus: Corpus, cached: CachedClips, share: Share) -> Iterator[Event]:
    captions = {corpus.manifest[index].caption or "" for indices in corpus.members for index in indices}
    missing = sorted(text for text in captions if not cached.cache.has_caption(caption_key(text, cached.text)))
    missing = missing[share.rank :: share.size]
    if not missing:
        return
    encoder = components.build_text_encoder(config)
    started = time.monotonic()
    for start in range(0, len(missing), CAPTIONS_AT_ONCE):
        yield _progress("encoding captions", start, len(missing), started)
        texts = missing[start : start + CAPTIONS_AT_ONCE]
        with torch.no_grad():
            conditions = encoder.encode(texts).to("cpu")
        for place, text in enumerate(texts):
            cached.cache.put_caption(caption_key(text, cached.text), conditions[place : place + 1])


@dataclass(frozen=True)
class _Own:
    """What a process reads with, its share of the clips, and where those go that cannot be read."""

    reader: ClipReader
    share: Share
    rejects: Rejects


def _fill_latents(
    config: Config, corpus: Corpus, cached: CachedClips, own: _Own
) -> Generator[Event, None, list[Reject]]:
    """Encode this process's share; returns the clips that cannot be read, told already if nobody else reads."""
    unread: list[Reject] = []
    reader, share = own.reader, own.share

    def key_of(job: Job) -> str:
        bucket_number, index, variant = job
        clip, bucket = corpus.manifest[index], corpus.buckets[bucket_number]
        return cached.key(reader, clip, bucket, index, reader.choose(clip, bucket, variant, index))

    jobs = [
        (bucket, index, variant)
        for bucket, indices in enumerate(corpus.members)
        for index in indices
        for variant in range(config.data.cache_variants)
    ]
    missing = [job for job in jobs if not cached.cache.has_latents(key_of(job))][share.rank :: share.size]
    if not missing:
        return unread
    device = components.resolve_device(config.runtime.device)
    encoders = Encoders(components.build_vae(config), None, device)
    workers = config.train.num_workers
    loader: DataLoader[tuple[Job, Tensor | str]] = DataLoader(
        _Missing(reader, missing),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=leave_signals_to_parent,
    )
    started, done = time.monotonic(), 0
    for bucket_number, items in groupby(loader, key=lambda item: item[0][0]):
        bucket = corpus.buckets[bucket_number]
        for group in batched(items, bucket.batch_size):
            done += len(group)
            yield _progress("encoding clips", done, len(missing), started)
            read = [(job, pixels) for job, pixels in group if isinstance(pixels, Tensor)]
            for job, reason in group:
                if isinstance(reason, str):
                    unread.append(Reject(corpus.manifest[job[1]].id, reason))
                    if share.size == 1:
                        yield from own.rejects.add(corpus.manifest[job[1]].id, reason)
            if read:
                batch = ClipBatch(bucket, (), (), pixels=torch.stack([pixels for _, pixels in read]))
                means, stds = encoders.moments(batch)
                for (job, _), mean, std in zip(read, means.cpu(), stds.cpu(), strict=True):
                    cached.cache.put_latents(key_of(job), mean[None], std[None])
    return unread


def _progress(task: str, done: int, total: int, started: float) -> Working:
    seconds = time.monotonic() - started
    return Working(task, done, total, seconds / done * (total - done) if done else None)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items."""
    walk = iter(items)
    while group := list(islice(walk, size)):
        yield group
