"""The doctor of data sets: which clips of a manifest can be trained on, and why the others cannot."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from opensora_core.data.buckets import Bucket, Pace, choose_bucket
from opensora_core.data.manifest import Clip, Manifest, ManifestBuilder
from opensora_core.errors import InputError
from opensora_core.files import sha256
from opensora_core.media import probe

USABLE_STATUS = ("", "ok")
UNREADABLE = "unreadable"
_EVERY = 64  # clips between two reports
_AHEAD = 4  # clips per thread that may wait for their turn


@dataclass(frozen=True)
class Looked:
    """How many clips have been looked at."""

    done: int
    total: int


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        manifest: all clips, with the counts that decoding gave; status and reason tell why one is not usable.
        members: the usable clips, per bucket.
        reasons: how many clips were left out, per kind of reason.
    """

    manifest: Manifest
    members: tuple[tuple[int, ...], ...]
    reasons: Counter[str]

    @property
    def num_usable(self) -> int:
        """Clips that can be trained on."""
        return sum(map(len, self.members))

    def rejects(self) -> Iterator[tuple[str, str]]:
        """The clips that were left out, by name and reason, in the order of the manifest."""
        for clip in self.manifest:
            if clip.status not in USABLE_STATUS:
                yield clip.id, clip.reason

    @property
    def share_unreadable(self) -> float:
        """The share of clips that are broken or missing."""
        return self.reasons[UNREADABLE] / max(len(self.manifest), 1)


def survey(
    manifest: Manifest,
    buckets: Sequence[Bucket],
    pace: Pace,
    *,
    max_upscale: float,
    need_caption: bool,
    num_threads: int,
) -> Generator[Looked, None, Survey]:
    """Look at every clip: is it there, can it be read, is it long and large enough, has it words, is it a copy?

    Clips whose row says how many frames of what size they have are not opened. The others are decoded once.

    Args:
        manifest: the clips.
        buckets: sizes that are trained on.
        pace: how frames are taken.
        max_upscale: how much smaller than its bucket a clip may be.
        need_caption: leave out clips without words.
        num_threads: clips that are opened at once.

    Yields:
        How far it is.
    """
    members: list[list[int]] = [[] for _ in buckets]
    reasons: Counter[str] = Counter()
    copies = _copies(manifest)

    def judge(number: int, clip: Clip) -> tuple[Clip, int]:
        if clip.status not in USABLE_STATUS:
            return clip, -1
        if number in copies:
            return _left_out(clip, f"duplicate: the same as {copies[number]}"), -1
        if need_caption and not (clip.caption or "").strip():
            return _left_out(clip, "no caption"), -1
        if not clip.path.is_file():
            return _left_out(clip, f"{UNREADABLE}: there is no such file"), -1
        if _needs_opening(clip):
            try:
                clip = _counted(clip)
            except InputError as error:
                return _left_out(clip, f"{UNREADABLE}: {error.message}"), -1
        bucket, reason = _bucket_of(clip, buckets, pace, max_upscale)
        return (clip if bucket >= 0 else _left_out(clip, reason)), bucket

    builder = ManifestBuilder(manifest.folder, manifest.format, manifest.notes)
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[tuple[Clip, int]]] = deque()
        for number, clip in enumerate(manifest):
            waiting.append(pool.submit(judge, number, clip) if _needs_opening(clip) else _done(judge(number, clip)))
            while waiting and (len(waiting) > _AHEAD * num_threads or number + 1 == len(manifest)):
                judged, bucket = waiting.popleft().result()
                if bucket >= 0:
                    members[bucket].append(len(builder))
                else:
                    reasons[judged.reason.partition(":")[0]] += 1
                builder.add(judged)
                if len(builder) % _EVERY == 0:
                    yield Looked(len(builder), len(manifest))
    return Survey(builder.build(), tuple(map(tuple, members)), reasons)


def sort_into_buckets(
    manifest: Manifest, buckets: Sequence[Bucket], pace: Pace, max_upscale: float
) -> tuple[tuple[int, ...], ...]:
    """The usable clips of a manifest that was surveyed before, per bucket; no file is looked at."""
    members: list[list[int]] = [[] for _ in buckets]
    for number, clip in enumerate(manifest):
        if clip.status in USABLE_STATUS:
            bucket, _ = _bucket_of(clip, buckets, pace, max_upscale)
            if bucket >= 0:
                members[bucket].append(number)
    return tuple(map(tuple, members))


def _bucket_of(clip: Clip, buckets: Sequence[Bucket], pace: Pace, max_upscale: float) -> tuple[int, str]:
    return choose_bucket(
        buckets,
        pace,
        num_frames=clip.num_frames or 0,
        fps=clip.fps,
        height=clip.height or 1,
        width=clip.width or 1,
        max_upscale=max_upscale,
    )


def _needs_opening(clip: Clip) -> bool:
    return not (clip.num_frames and clip.width and clip.height)


def _done(result: tuple[Clip, int]) -> Future[tuple[Clip, int]]:
    future: Future[tuple[Clip, int]] = Future()
    future.set_result(result)
    return future


def _counted(clip: Clip) -> Clip:
    """The clip with the counts that decoding gives."""
    found = probe(clip.path, start_seconds=clip.start_seconds, end_seconds=clip.end_seconds)
    return replace(
        clip,
        num_frames=found.num_frames,
        fps=found.fps,
        width=found.width,
        height=found.height,
        duration_seconds=found.duration_seconds,
    )


def _left_out(clip: Clip, reason: str) -> Clip:
    return replace(clip, status="left out", reason=reason)


def _copies(manifest: Manifest) -> dict[int, str]:
    """Rows that repeat an earlier one: the same clip, or another file of the same bytes and the same range."""
    copies: dict[int, str] = {}
    first: dict[tuple[object, ...], tuple[int, str]] = {}

    def note(number: int, clip: Clip, key: tuple[object, ...]) -> None:
        if key in first:
            copies.setdefault(number, first[key][1])
        else:
            first[key] = (number, clip.id)

    same_size: dict[int, list[int]] = {}
    for number, clip in enumerate(manifest):
        note(number, clip, (str(clip.path), clip.start_seconds, clip.end_seconds))
        if clip.sha256:
            note(number, clip, (clip.sha256, clip.start_seconds, clip.end_seconds))
        elif number not in copies and clip.path.is_file():
            same_size.setdefault(clip.path.stat().st_size, []).append(number)
    # only files of the same size can be of the same bytes, so hardly any is read
    for numbers in same_size.values():
        if len({str(manifest[number].path) for number in numbers}) > 1:
            for number in numbers:
                clip = manifest[number]
                note(number, clip, (sha256(clip.path), clip.start_seconds, clip.end_seconds))
    return copies
