"""A picture of what became of a source, and one page with the pictures of all.

The page and every picture stand alone: they open from disk, and nothing in them points elsewhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opensora_core.curation.records import Row
from opensora_core.curation.scenes import Gap
from opensora_core.files import replacing
from opensora_core.media.page import page_head

if TYPE_CHECKING:
    from opensora_core.curation.boundaries import Boundary, Detection

KINDS = {"cut": "#e5484d", "dissolve": "#8e4ec6", "fade": "#3e7bdd", "wipe": "#e08a00"}
"""Colours of the kinds of boundaries."""

_WIDTH = 1000
_ROW_SECONDS, _MOST_ROWS = 30.0, 12  # of film on a line; longer sources get more of it on each
_STRIP, _CURVE, _CLIPS, _AXIS, _SPACE = 72, 46, 18, 16, 14  # heights
_POINTS = 500  # of a curve on a line
_CELL = 108  # pixels that a thumbnail is high, for screens of more than one pixel per point
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200)

_STYLE = """<style>
.os-t{font:10.5px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#6b6f76}
.os-n{font:600 10.5px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#fff;text-anchor:middle}
.os-back{fill:#eeeeea}.os-area{fill:#4c5bd4;fill-opacity:.16}.os-line{fill:none;stroke:#4c5bd4;stroke-width:1.3}
.os-clip{fill:#12a594}.os-odd{fill:#0c8376}.os-gap{fill:url(#os-hatch)}.os-tick{stroke:#b9bbb6;stroke-width:1}
@media (prefers-color-scheme:dark){.os-t{fill:#9aa0a8}.os-back{fill:#26282e}.os-line{stroke:#9aa5ff}
.os-area{fill:#9aa5ff}.os-tick{stroke:#4a4e57}}
</style>"""
_HATCH = (
    '<defs><pattern id="os-hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#9a9a94" fill-opacity=".22"/>'
    '<rect width="2" height="6" fill="#9a9a94" fill-opacity=".75"/></pattern></defs>'
)


def draw_sheet(found: Detection, end_seconds: float, clips: Sequence[tuple[int, int]], gaps: Sequence[Gap]) -> str:
    """Draw a source as SVG, line by line: a strip of frames with its cuts, the score over time, the clips.

    Args:
        found: what decoding showed.
        end_seconds: when the last frame ends.
        clips: the frames [start, end) of each.
        gaps: what is in no clip.

    Returns:
        SVG, 1000 wide.
    """
    times = np.append(found.seconds, end_seconds)
    length = float(end_seconds - times[0])
    row_seconds = min(length, max(_ROW_SECONDS, length / _MOST_ROWS))
    num_rows = max(int(np.ceil(length / row_seconds - 1e-6)), 1)
    height = num_rows * (_STRIP + _CURVE + _CLIPS + _AXIS + _SPACE) - _SPACE
    score = _score(found)
    height_of = np.sqrt(score / (float(score.max()) or 1.0))  # which leaves the small ones visible
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        _STYLE,
        _HATCH,
    ]
    for number in range(num_rows):
        line = _Line(times, float(times[0]) + number * row_seconds, row_seconds)
        top = number * (_STRIP + _CURVE + _CLIPS + _AXIS + _SPACE)
        width = line.x(end_seconds)
        parts.append(f'<g transform="translate(0 {top})">')
        parts.append(_strip(found, line, width))
        parts.append(f'<rect class="os-back" y="{_STRIP}" width="{width:.1f}" height="{_CURVE}"/>')
        parts.append(_curve(height_of, line))
        parts += [_mark(item, line) for item in found.boundaries if line.holds(item.start_frame, item.end_frame)]
        parts += [_block(span, line, number) for number, span in enumerate(clips, 1) if line.holds(*span)]
        parts += [_hole(gap, line) for gap in gaps if line.holds(gap.start, gap.end)]
        parts.append(_axis(line, width))
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class _Line:
    """A line of the picture: so many seconds of the source across its width."""

    times: NDArray[np.float64]
    start: float
    seconds: float

    def x(self, seconds: float) -> float:
        return min(max((seconds - self.start) / self.seconds, 0.0), 1.0) * _WIDTH

    def span(self, first: int, last: int) -> tuple[float, float]:
        left, right = self.x(float(self.times[first])), self.x(float(self.times[last]))
        return left, right - left

    def holds(self, first: int, last: int) -> bool:
        return bool(self.times[first] < self.start + self.seconds and self.times[max(last, first)] >= self.start)


def _score(found: Detection) -> NDArray[np.float32]:
    curve = found.scores.get("score")
    if curve is None or not len(curve):
        return np.zeros(len(found.seconds), np.float32)
    return np.maximum(np.nan_to_num(np.asarray(curve, np.float32), posinf=0, neginf=0), 0)


def _strip(found: Detection, line: _Line, width: float) -> str:
    """Frames side by side, each from the shot that is shown at its place."""
    if not len(found.thumbnails) or width < 1:
        return ""
    aspect = found.thumbnails.shape[2] / found.thumbnails.shape[1]
    count = max(round(width / (_STRIP * aspect)), 1)
    cell = max(round(_CELL * width / count / _STRIP), 1)
    picture = Image.new("RGB", (cell * count, _CELL))
    shots = np.array([item.frame for item in found.boundaries], np.int64)
    own = np.searchsorted(shots, found.thumbnail_frames, "right")
    for number in range(count):
        seconds = line.start + (number + 0.5) / count * width / _WIDTH * line.seconds
        frame = int(np.searchsorted(found.seconds, seconds, "right")) - 1
        far = np.abs(found.thumbnail_frames - frame) + (own != np.searchsorted(shots, frame, "right")) * 10**9
        picture.paste(_filling(found.thumbnails[int(far.argmin())], cell), (number * cell, 0))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=72)
    content = base64.b64encode(file.getvalue()).decode()
    return (
        f'<image width="{width:.1f}" height="{_STRIP}" preserveAspectRatio="none" '
        f'href="data:image/jpeg;base64,{content}"/>'
    )


def _filling(thumbnail: NDArray[np.uint8], width: int) -> Image.Image:
    """The middle of a thumbnail, as large as a cell."""
    image = Image.fromarray(thumbnail)
    scale = max(width / image.width, _CELL / image.height)
    image = image.resize((max(round(image.width * scale), width), max(round(image.height * scale), _CELL)))
    left, top = (image.width - width) // 2, (image.height - _CELL) // 2
    return image.crop((left, top, left + width, top + _CELL))


def _curve(height: NDArray[np.float32], line: _Line) -> str:
    """The score of a line, 0..1; where frames are denser than points, the highest of each point."""
    times = line.times[:-1]
    inside = np.flatnonzero((times >= line.start) & (times < line.start + line.seconds))
    if not len(inside):
        return ""
    points = []
    for part in np.array_split(inside, min(_POINTS, len(inside))):
        highest = part[height[part].argmax()]
        points.append(f"{line.x(float(times[highest])):.1f},{_STRIP + _CURVE - 2 - height[highest] * (_CURVE - 6):.1f}")
    first, last = points[0].partition(",")[0], points[-1].partition(",")[0]
    floor = _STRIP + _CURVE
    return (
        f'<polygon class="os-area" points="{first},{floor} {" ".join(points)} {last},{floor}"/>'
        f'<polyline class="os-line" points="{" ".join(points)}"/>'
    )


def _mark(item: Boundary, line: _Line) -> str:
    """A cut as a line, a transition as a band."""
    left, wide = line.span(item.start_frame, item.end_frame)
    height, colour = _STRIP + _CURVE, KINDS.get(item.kind, "#e5484d")
    words = f"{item.kind} at frame {item.frame}, {item.seconds:.3f} s, score {item.score:.3g}"
    if item.end_frame > item.start_frame:
        words += f", from frame {item.start_frame} to {item.end_frame}"
    band = f'<rect x="{left:.1f}" width="{wide:.1f}" height="{height}" fill="{colour}" fill-opacity=".38"/>'
    middle = left + wide / 2
    edge = f'<rect x="{middle - 1.75:.1f}" width="3.5" height="{_STRIP}" fill="#fff" fill-opacity=".75"/>'
    edge += f'<rect x="{middle - 1:.1f}" width="2" height="{height}" fill="{colour}"/>'
    edge += f'<path d="M{middle - 5:.1f} 0h10l-5 7z" fill="{colour}" stroke="#fff" stroke-width=".8"/>'
    return f"<g><title>{escape(words)}</title>{band if wide > 0 else ''}{edge}</g>"


def _block(span: tuple[int, int], line: _Line, number: int) -> str:
    """A clip, with its length where there is room for it."""
    left, wide = line.span(*span)
    seconds = float(line.times[span[1]] - line.times[span[0]])
    words = f"clip {number}: {seconds:.2f} s, frames {span[0]} to {span[1]}"
    top = _STRIP + _CURVE + 3
    name = "os-clip" if number % 2 else "os-odd"
    text = f'<text class="os-n" x="{left + wide / 2:.1f}" y="{top + 11.5}">{seconds:.1f} s</text>' if wide > 38 else ""
    block = f'<rect class="{name}" x="{left + 0.5:.1f}" y="{top}" width="{max(wide - 1, 0.8):.1f}" '
    return f'<g><title>{words}</title>{block}height="{_CLIPS - 3}" rx="3"/>{text}</g>'


def _hole(gap: Gap, line: _Line) -> str:
    left, wide = line.span(gap.start, gap.end)
    words = escape(f"{gap.reason}: frames {gap.start} to {gap.end}")
    rect = f'<rect class="os-gap" x="{left:.1f}" y="{_STRIP + _CURVE + 3}" width="{max(wide, 0.8):.1f}" '
    return f'<g><title>{words}</title>{rect}height="{_CLIPS - 3}"/></g>'


def _axis(line: _Line, width: float) -> str:
    step = next((tick for tick in _TICKS if line.seconds / tick <= 12), line.seconds)
    top = _STRIP + _CURVE + _CLIPS
    parts, tick = [], np.ceil(line.start / step - 1e-9) * step
    while (x := (tick - line.start) / line.seconds * _WIDTH) <= width + 1e-6:
        anchor = "start" if x < 12 else "end" if x > _WIDTH - 24 else "middle"
        parts.append(f'<line class="os-tick" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + 4}"/>')
        words = _clock(float(tick), step)
        parts.append(f'<text class="os-t" x="{x:.1f}" y="{top + 14}" text-anchor="{anchor}">{words}</text>')
        tick += step
    return "".join(parts)


def _clock(seconds: float, step: float) -> str:
    minutes, rest = divmod(round(seconds, 3), 60)
    shown = f"{rest:04.1f}" if step < 1 else f"{rest:02.0f}"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{shown}" if hours else f"{minutes}:{shown}"


_PAGE_STYLE = """
header, main { max-width: 1160px; margin: 0 auto; }
header p { margin: .2rem 0; color: var(--quiet); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .8rem 0 1.6rem; color: var(--quiet);
  font-size: .85rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; border-radius: 3px;
  vertical-align: -.1rem; }
section { margin: 0 0 1.2rem; padding: 1rem 1.2rem 1.1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
h2 { margin: 0; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }
section p { margin: .1rem 0 .8rem; color: var(--quiet); font-size: .87rem; overflow-wrap: anywhere; }
section p:last-child { margin-bottom: 0; }
svg { display: block; width: 100%; height: auto; }
.badge { margin-left: .5rem; padding: .05rem .5rem; border-radius: 99px; color: #fff; font-size: .75rem;
  font-weight: 600; }
.damaged { background: #b76e00; } .rejected, .failed { background: #c5383d; }
"""
_PAGE_BODY = """<body>
<header><h1>{title}</h1><p>{facts}</p>
<div class="legend">{legend}</div></header>
<main>
"""


def write_page(path: Path, sources: Iterable[tuple[Row, list[Row], list[Row], str]], facts: str) -> None:
    """Write the page of a run.

    Args:
        path: of the page.
        sources: per source its row, those of its clips, those of what was left out, and its picture or "".
        facts: a line about all of them.

    Raises:
        ResourceError: the file system refuses it.
    """
    colours = {**KINDS, "clip": "#12a594", "in no clip": "#9a9a94"}
    legend = "".join(f'<span><i style="background:{colour}"></i>{name}</span>' for name, colour in colours.items())
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(page_head("osora split", _PAGE_STYLE))
        file.write(_PAGE_BODY.format(title="osora split", facts=escape(facts), legend=legend))
        for section in _sections(sources):
            file.write(section)
        file.write("</main>\n</body>\n</html>\n")


def _sections(sources: Iterable[tuple[Row, list[Row], list[Row], str]]) -> Iterator[str]:
    for row, clips, rejects, sheet in sources:
        source = Path(row["source"])
        status = str(row["status"])
        badge = "" if status == "ok" else f'<span class="badge {status}">{status}</span>'
        lines = [f"<section><h2>{_text(source.name)}{badge}</h2>", f"<p>{_facts(row, clips, rejects)}</p>"]
        if row["reason"]:
            lines.append(f"<p>{_text(row['reason'])}</p>")
        yield "\n".join([*lines, sheet, "</section>\n"])


def _facts(row: Row, clips: list[Row], rejects: list[Row]) -> str:
    facts = [_text(str(Path(row["source"]).parent))]
    if probe := row["probe"]:
        facts.append(f"{probe['shown_width']} x {probe['shown_height']}, {probe['measured_fps']:.4g} fps")
        facts.append(f"{probe['codec']}, {_clock(row['end_seconds'] - row['start_seconds'], 1)}")
        facts.append(f"{len(row['boundaries'])} boundaries")
        kept = sum(clip["duration_seconds"] for clip in clips)
        facts.append(f"{len(clips)} clip{'' if len(clips) == 1 else 's'} of {kept:.1f} s")
        lost: dict[str, float] = {}
        for reject in rejects:
            if reject["what"] == "frames":
                lost[reject["reason"]] = lost.get(reject["reason"], 0) + reject["end_seconds"] - reject["start_seconds"]
        facts += [f"{_text(reason)} {seconds:.1f} s" for reason, seconds in lost.items()]
    return " · ".join(facts)


def _text(text: str) -> str:
    """Text as a page can show it: names that are not UTF-8 and control characters become visible."""
    return escape("".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text))
