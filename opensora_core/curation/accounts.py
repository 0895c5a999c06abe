"""The rows of a source: what it is, its clips, and what is in none of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora_core.curation.boundaries import Detection
from opensora_core.curation.records import Row
from opensora_core.curation.scenes import Gap, Range
from opensora_core.media.cut import Cut


class Accounts:
    """Makes the rows of a source that was decoded.

    Args:
        path: of the source.
        found: what decoding showed.
        end_seconds: when its last frame ends.
    """

    def __init__(self, path: Path, found: Detection, end_seconds: float) -> None:
        self.path, self.found = path, found
        self.times = [*map(float, found.seconds), end_seconds]
        """When each frame begins, and when the last one ends."""

    @property
    def num_frames(self) -> int:
        """As many as were decoded."""
        return len(self.times) - 1

    def source(self, header: Mapping[str, Any], size_bytes: int, num_clips: int, gaps: Sequence[Gap]) -> Row:
        """The row of the source; `header` is what the file says of itself."""
        found = self.found
        why_none = "" if num_clips else f"no clip: {', '.join(dict.fromkeys(gap.reason for gap in gaps))}"
        shown = {"shown_width": int(found.width), "shown_height": int(found.height), "measured_fps": float(found.fps)}
        return {
            "source": str(self.path),
            "status": "damaged" if found.damage else "ok",
            "reason": "; ".join(filter(None, (found.damage, why_none))),
            "size_bytes": size_bytes,
            "probe": {**header, **shown},
            "num_frames": self.num_frames,
            "start_seconds": self.times[0],
            "end_seconds": self.times[-1],
            "num_clips": num_clips,
            "boundaries": [_plain(dataclasses.asdict(item)) for item in found.boundaries],
        }

    def clip(self, item: Range, made: Cut, folder: Path) -> Row:
        """The row of a clip that was cut; its path is relative to `folder`."""
        is_late = made.start_frame > item.start
        return {
            "path": made.path.relative_to(folder).as_posix(),
            "num_frames": int(made.num_frames),
            "fps": float(made.fps),
            "width": int(made.width),
            "height": int(made.height),
            "duration_seconds": float(
                made.num_frames / made.fps if made.fps else made.end_seconds - made.start_seconds
            ),
            "sha256": made.sha256,
            "source": str(self.path),
            "scores": _place(
                (made.start_frame, made.end_frame),
                (made.start_seconds, made.end_seconds),
                (0.0 if is_late else item.start_score, item.end_score),
            ),
        }

    def whole(self, item: Range, content: str) -> Row:
        """The row of a range that stays in its source; `content` is the sum of the whole file."""
        num_frames = item.end - item.start
        start, end = self.times[item.start], self.times[item.end]
        shown = self.times[item.end - 1] - start
        fps = (num_frames - 1) / shown if shown > 0 else float(self.found.fps)
        row: Row = {
            "path": str(self.path),
            "num_frames": num_frames,
            "fps": fps,
            "width": int(self.found.width),
            "height": int(self.found.height),
            "duration_seconds": num_frames / fps if fps else end - start,
            "sha256": content,
            "source": str(self.path),
        }
        # a manifest has no times before 0, and needs none for what begins with the file or ends with it
        if item.start:
            row["start_seconds"] = start
        if item.end < self.num_frames:
            row["end_seconds"] = end
        row["scores"] = _place((item.start, item.end), (start, end), (item.start_score, item.end_score))
        return row

    def rejects(self, gaps: Sequence[Gap]) -> list[Row]:
        """The rows of all that is in no clip."""
        rows: list[Row] = []
        if self.found.damage:
            rows.append({"source": str(self.path), "what": "source", "reason": self.found.damage})
        for gap in gaps:
            row: Row = {"source": str(self.path), "what": "frames", "reason": gap.reason}
            row |= {"start_frame": gap.start, "end_frame": gap.end}
            rows.append(row | {"start_seconds": self.times[gap.start], "end_seconds": self.times[gap.end]})
        return rows


def _place(frames: tuple[int, int], seconds: tuple[float, float], scores: tuple[float, float]) -> dict[str, float]:
    """Where a clip lies in its source, and what bounds it, as scores that a manifest can hold."""
    names = ("source_start_frame", "source_end_frame", "source_start_seconds", "source_end_seconds")
    values = (*frames, *seconds, *scores)
    return {name: float(value) for name, value in zip((*names, "start_score", "end_score"), values, strict=True)}


def _plain(values: Row) -> Row:
    """Numbers of numpy as those of JSON."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
