"""A page about the scores of many clips: how they are spread, where the limits cut, and what lies on both sides."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opensora_core.config import FilterConfig
from opensora_core.curation.filters.table import FILTERS, limits_of
from opensora_core.errors import InputError
from opensora_core.files import replacing
from opensora_core.media import read_frames
from opensora_core.media.page import page_head

if TYPE_CHECKING:
    from opensora_core.data.manifest import Clip, Manifest

_WIDTH, _HEIGHT, _AXIS = 1000, 150, 22
_BINS = 60
_TAIL = 0.005  # share of clips at both ends that may lie beyond the drawing, in its outermost bars
_EXAMPLES = 5  # on each side of a limit
_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the clips, where examples are taken without a limit
_SIDE = 192  # pixels of an example

_STYLE = """
header, main { max-width: 1160px; margin: 0 auto; }
header p, section p { margin: .2rem 0 .8rem; color: var(--quiet); }
section { margin: 0 0 1.2rem; padding: 1rem 1.2rem 1.1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
h2 { margin: 0; font-size: 1rem; font-weight: 600; }
h3 { margin: .9rem 0 .4rem; font-size: .87rem; font-weight: 600; color: var(--quiet); }
svg { display: block; width: 100%; height: auto; }
.k { fill: #12a594; } .r { fill: #e5484d; } .l { stroke: var(--ink); stroke-dasharray: 4 3; }
text { font: 11px system-ui, sans-serif; fill: var(--quiet); } .a { stroke: var(--line); }
.row { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; width: 160px; font-size: .74rem; line-height: 1.3; color: var(--quiet); overflow-wrap: anywhere; }
figure img { width: 160px; height: auto; display: block; border-radius: 6px; border: 3px solid #12a594; }
figure.out img { border-color: #e5484d; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
td, th { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); font-weight: 400; }
th { color: var(--quiet); }
"""


def write_report(
    path: Path,
    clips: Manifest,
    scores: Sequence[Mapping[str, float]],
    refused: Mapping[int, str],
    settings: FilterConfig,
    *,
    copies: Mapping[int, int] | None = None,
) -> None:
    """Write the page. It opens from disk and needs no other file.

    Args:
        path: of the page.
        clips: all of them, kept and refused.
        scores: of each clip.
        refused: number of a refused clip -> why.
        settings: the limits.
        copies: number of a copy -> number of the clip that it is a copy of.

    Raises:
        ResourceError: the file system refuses it.
    """
    pictures = _Pictures()
    limits = ", ".join(f"{name} = {value:g}" for name, value in limits_of(settings).items()) or "no limits"
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(page_head("osora split: filters", _STYLE))
        file.write("<body>\n<header><h1>Filters</h1>")
        file.write(
            f"<p>{len(clips) - len(refused)} of {len(clips)} clips are kept. {escape(limits)}</p></header>\n<main>\n"
        )
        for name in FILTERS:
            file.writelines(
                _section(name, clips, scores, refused, settings=settings, copies=copies or {}, pictures=pictures)
            )
        file.writelines(_refused(clips, refused))
        file.write("</main>\n</body>\n</html>\n")


def _section(
    name: str,
    clips: Manifest,
    scores: Sequence[Mapping[str, float]],
    refused: Mapping[int, str],
    *,
    settings: FilterConfig,
    copies: Mapping[int, int],
    pictures: _Pictures,
) -> Iterator[str]:
    item = FILTERS[name]
    chosen = [number for number, own in enumerate(scores) if name in own]
    if not chosen:
        return
    values = np.array([scores[number][name] for number in chosen])
    limits = {setting: float(getattr(settings, setting)) for setting in item.limits if getattr(settings, setting)}
    low, middle, high = (float(value) for value in np.quantile(values, (0.05, 0.5, 0.95)))
    yield f"<section><h2>{name}</h2><p>{escape(item.about)}; {escape(item.unit)}. "
    yield f"{len(chosen)} clips: 5% below {low:.3g}, half below {middle:.3g}, 95% below {high:.3g}.</p>\n"
    is_out = np.zeros(len(values), np.bool_)
    for setting, limit in limits.items():
        is_out |= values < limit if setting == item.least else values > limit
    yield _histogram(values, is_out, limits)
    order = np.lexsort((np.array(chosen), values))
    if item.measure is None:
        yield "<h3>copies, each with the clip that is kept</h3><div class='row'>"
        for place in order[:: max(len(order) // _EXAMPLES, 1)][:_EXAMPLES]:
            number = chosen[int(place)]
            if number in copies:
                yield _figure(pictures, clips[number], f"{values[place]:.3g}", True)
                yield _figure(pictures, clips[copies[number]], "kept", copies[number] in refused)
        yield "</div>"
    elif limits:
        for setting, limit in limits.items():
            at = int(np.searchsorted(values[order], limit, side="left" if setting == item.least else "right"))
            near = order[max(at - _EXAMPLES, 0) : at + _EXAMPLES]
            yield f"<h3>around filter.{setting} = {limit:g}</h3><div class='row'>"
            for place in near:
                yield _figure(pictures, clips[chosen[int(place)]], f"{values[place]:.3g}", bool(is_out[place]))
            yield "</div>"
    else:
        yield "<h3>no limit: from the lowest to the highest</h3><div class='row'>"
        for place in dict.fromkeys(int(order[round(share * (len(order) - 1))]) for share in _SHARES):
            yield _figure(pictures, clips[chosen[place]], f"{values[place]:.3g}", False)
        yield "</div>"
    yield "</section>\n"


def _histogram(values: NDArray[np.float64], is_out: NDArray[np.bool_], limits: Mapping[str, float]) -> str:
    """Bars of what is kept and what this limit refuses; the outermost ones hold what lies beyond."""
    ends = [*np.quantile(values, (_TAIL, 1 - _TAIL)), *limits.values()]
    low, high = float(min(ends)), float(max(ends))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    inside = np.clip(values, low, high)
    kept, out = (np.histogram(inside[mask], edges)[0] for mask in (~is_out, is_out))
    top = max(int((kept + out).max()), 1)
    wide = _WIDTH / _BINS
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _AXIS}" role="img">']
    for bar, (some, others) in enumerate(zip(kept.tolist(), out.tolist(), strict=True)):
        floor = float(_HEIGHT)
        for kind, count in (("k", some), ("r", others)):
            height = (_HEIGHT - 14) * count / top
            if count:
                floor -= height
                parts.append(
                    f'<rect class="{kind}" x="{bar * wide:.1f}" y="{floor:.1f}" width="{wide - 1:.1f}" '
                    f'height="{height:.1f}"><title>{edges[bar]:.3g} to {edges[bar + 1]:.3g}: {count}</title></rect>'
                )
    parts.append(f'<line class="a" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>')
    for share, anchor in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end")):
        told = f"{low + share * (high - low):.3g}"
        parts.append(f'<text x="{share * _WIDTH:.0f}" y="{_HEIGHT + 15}" text-anchor="{anchor}">{told}</text>')
    for setting, limit in limits.items():
        x = (limit - low) / (high - low) * _WIDTH
        side, shift = ("end", -5) if x > _WIDTH / 2 else ("start", 5)
        parts.append(f'<line class="l" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}"/>')
        parts.append(f'<text x="{x + shift:.1f}" y="11" text-anchor="{side}">{setting} = {limit:g}</text>')
    return "".join([*parts, "</svg>\n"])


def _figure(pictures: _Pictures, clip: Clip, told: str, is_out: bool) -> str:
    name = escape("".join(char if char.isprintable() else "?" for char in clip.id))
    return f'<figure class="{"out" if is_out else "in"}">{pictures.of(clip)}{told}<br>{name}</figure>'


class _Pictures:
    """The middle frame of clips, or the first one of those whose rows do not say how long they are; each read once."""

    def __init__(self) -> None:
        self._read: dict[str, str] = {}

    def of(self, clip: Clip) -> str:
        """As an element of the page; a clip that cannot be decoded has none."""
        if clip.id not in self._read:
            self._read[clip.id] = self._of(clip)
        return self._read[clip.id]

    def _of(self, clip: Clip) -> str:
        try:
            frame = read_frames(
                clip.path,
                [(clip.num_frames or 0) // 2],
                start_seconds=clip.start_seconds,
                end_seconds=clip.end_seconds,
            )[0]
        except InputError:
            return ""
        image = Image.fromarray(frame)
        image.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _refused(clips: Manifest, refused: Mapping[int, str], most: int = 1000) -> Iterator[str]:
    if not refused:
        return
    yield "<section><h2>refused</h2><table><tr><th>clip</th><th>why</th></tr>\n"
    for number in sorted(refused)[:most]:
        shown = (
            escape("".join(c if c.isprintable() else "?" for c in text)) for text in (clips[number].id, refused[number])
        )
        yield "<tr><td>{}</td><td>{}</td></tr>\n".format(*shown)
    yield "</table>"
    if len(refused) > most:
        yield f"<p>and {len(refused) - most} more, in rejects.jsonl</p>"
    yield "</section>\n"
