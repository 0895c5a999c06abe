"""Why a clip is kept or refused, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora_core.config import FilterConfig
from opensora_core.curation.events import ClipExplained, Event
from opensora_core.curation.filters.look import Place
from opensora_core.curation.filters.rows import manifest_of, read_rows
from opensora_core.curation.filters.scoring import Log, score, wanted_of
from opensora_core.curation.filters.sift import UNREADABLE, saved_settings, task_of
from opensora_core.curation.filters.table import FILTERS, check, judge, verdicts
from opensora_core.errors import UsageError


def explain(row: Mapping[str, Any], settings: FilterConfig) -> ClipExplained:
    """What each filter says of a row of a manifest or of the rejects.

    Args:
        row: with `scores`; one of the rejects also says why it was refused when it was.
        settings: limits to hold it against, which need not be those that it was judged by.
    """
    scores = {name: float(value) for name, value in (row.get("scores") or {}).items()}
    found = verdicts(scores, settings)
    reasons = [str(reason) for reason in judge(scores, settings)]
    if str(row.get("reason", "")).startswith(UNREADABLE):
        reasons = [str(row["reason"])]
    return ClipExplained(str(row.get("path", "")), not reasons, tuple(found), "; ".join(reasons))


def why(source: Path | None, name: str, settings: FilterConfig | None) -> Iterator[Event]:
    """Tell what each filter says of one clip. Nothing is written.

    Args:
        source: a manifest, or the folder of one, that has or had the clip; None if `name` is a file by itself.
        name: of the clip in the manifest, or a file.
        settings: limits to hold it against; None are those that the folder is filtered with, or the defaults.

    Raises:
        UsageError: there is no such clip.
        InputError: it has not been measured, and cannot be decoded.
    """
    folder = None if source is None else manifest_of(source).parent
    settings = settings or (folder and saved_settings(folder)) or FilterConfig()
    check(settings)
    if source is None:
        if not Path(name).is_file():
            raise UsageError(f"there is no clip {name}", "name its manifest too: osora split MANIFEST --why CLIP")
        yield explain({"path": name, "scores": score(Path(name), settings)}, settings)
        return
    manifest = manifest_of(source)
    rows = read_rows(manifest, manifest.parent)
    ids = [clip.id for clip in rows.clips]
    number = next((number for number, id in enumerate(ids) if id == name), None)
    if number is None:
        likely = [number for number, id in enumerate(ids) if id.endswith(name) or str(rows.clips[number].path) == name]
        if len(likely) != 1:
            told = f"{len(likely)} clips end in {name}" if likely else f"{manifest} has no clip {name}"
            raise UsageError(told, f"for example {ids[(likely or [0])[0]]}")
        number = likely[0]
    clip = rows.clips[number]
    row = {**rows.row(number), "path": clip.id}
    known = Log(manifest.parent).get(clip.id, task_of(clip, settings).identity)
    if known.broken:
        row["reason"] = f"{UNREADABLE}: {known.broken}"
    elif any(name not in known.made for name in wanted_of(settings, clip.caption) if name in FILTERS):
        place = Place(clip.path, clip.num_frames, clip.start_seconds, clip.end_seconds, clip.caption)
        row["scores"] = {**(row.get("scores") or {}), **score(place, settings)}
    yield explain(row, settings)
