"""The doctor of data sets: which clips of a manifest can be trained on, and why the others cannot."""

from __future__ import annotations

import stat
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from opensora_core.data.buckets import Bucket, Pace, choose_bucket
from opensora_core.data.manifest import Clip, Manifest, ManifestBuilder
from opensora_core.errors import InputError
from opensora_core.files import sha256
from opensora_core.media import probe

USABLE_STATUS = ("", "ok")
LEFT_OUT = "left out"
"""The status that a survey gives. It holds for that survey's settings, so the next one judges anew."""
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
                yield clip.id, clip.reason or clip.status

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

    Clips whose row says how many frames of what size they have, and at which rate where that matters, are not opened.
    The others are decoded once. What curation has given another status than `ok` stays as it is.

    Args:
        manifest: the clips; what an earlier survey left out is judged anew.
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
    copies = _copies(manifest, need_caption)

    def judge(number: int, clip: Clip) -> tuple[Clip, int]:
        if clip.status == LEFT_OUT:
            clip = replace(clip, status="", reason="")
        if clip.status not in USABLE_STATUS:
            return clip, -1
        if need_caption and not _has_words(clip):
            return _left_out(clip, "no caption"), -1
        if number in copies:
            return _left_out(clip, f"duplicate: the same as {copies[number]}"), -1
        if _num_bytes(clip.path) is None:
            return _left_out(clip, f"{UNREADABLE}: there is no such file"), -1
        if _needs_opening(clip, pace):
            try:
                clip = _counted(clip)
            except InputError as error:
                return _left_out(clip, f"{UNREADABLE}: {error.message}"), -1
        bucket, reason = _bucket_of(clip, buckets, pace, max_upscale)
        return (clip if bucket >= 0 else _left_out(clip, reason)), bucket

    builder = ManifestBuilder(manifest.folder, manifest.format, manifest.notes)
    waiting: deque[Future[tuple[Clip, int]]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for number, clip in enumerate(manifest):
            later = _needs_opening(clip, pace)
            waiting.append(pool.submit(judge, number, clip) if later else _done(judge(number, clip)))
            while waiting and (len(waiting) > _AHEAD * num_threads or number + 1 == len(manifest)):
                judged, bucket = waiting.popleft().result()
                if bucket >= 0:
                    members[bucket].append(len(builder))
                else:
                    reasons[(judged.reason or judged.status).partition(":")[0]] += 1
                builder.add(judged)
                if len(builder) % _EVERY == 0:
                    yield Looked(len(builder), len(manifest))
    finally:
        pool.shutdown(cancel_futures=True)  # whoever stops asking does not wait for clips that nobody needs
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


def _needs_opening(clip: Clip, pace: Pace) -> bool:
    needs_fps = pace.fps > 0 and clip.num_frames != 1
    return not (clip.num_frames and clip.width and clip.height and (clip.fps or not needs_fps))


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
    return replace(clip, status=LEFT_OUT, reason=reason)


def _has_words(clip: Clip) -> bool:
    return bool((clip.caption or "").strip())


def _num_bytes(path: Path) -> int | None:
    """The size of a file; None where there is none, or none that may be looked at."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _copies(manifest: Manifest, need_caption: bool) -> dict[int, str]:
    """Rows that repeat an earlier one: the same range of the same file, or of another file of the same bytes.

    A row that is left out for another reason has no copies, or the clip would be lost with it.
    """
    copies: dict[int, str] = {}
    first: dict[tuple[str, float | None, float | None], str] = {}
    sums: dict[str, str] = {}
    rows: list[int] = []
    for number, clip in enumerate(manifest):
        if clip.status not in (*USABLE_STATUS, LEFT_OUT) or (need_caption and not _has_words(clip)):
            continue
        path = str(clip.path)
        if (path, clip.start_seconds, clip.end_seconds) in first:
            copies[number] = clip.id
        else:
            first[path, clip.start_seconds, clip.end_seconds] = clip.id
            rows.append(number)
            sums[path] = clip.sha256.lower() or sums.get(path, "")
    _add_sums(sums)
    first.clear()
    for number in rows:
        clip = manifest[number]
        if content := sums[str(clip.path)]:
            name = first.setdefault((content, clip.start_seconds, clip.end_seconds), clip.id)
            if name != clip.id:
                copies[number] = name
    return copies


def _add_sums(sums: dict[str, str]) -> None:
    """Add the SHA-256 sums that tell files apart. Only files of the same size can be the same, so few are read."""
    if all(sums.values()):
        return
    same_size: dict[int | None, list[str]] = {}
    for path in sums:
        same_size.setdefault(_num_bytes(Path(path)), []).append(path)
    for num_bytes, paths in same_size.items():
        if num_bytes is None or len(paths) == 1:
            continue
        for path in paths:
            if not sums[path]:
                with suppress(OSError):  # whoever opens the clip will tell
                    sums[path] = sha256(Path(path))
