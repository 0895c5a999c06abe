"""A page of clips: their frames, and what was said of them."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from opensora_core.config import CaptionConfig
from opensora_core.curation.captions.frames import Unseen, see
from opensora_core.curation.captions.ledger import Ledger
from opensora_core.curation.captions.protocol import Shown
from opensora_core.files import replacing
from opensora_core.media.page import page_head

_STYLE = """
header, main { max-width: 1160px; margin: 0 auto; }
header p { margin: .2rem 0 1.6rem; color: var(--quiet); }
article { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1.2rem; margin: 0 0 1.2rem;
  padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
@media (max-width: 720px) { article { grid-template-columns: 1fr; } }
.frames { display: flex; gap: 4px; align-items: flex-start; }
.frames img { flex: 1 1 0; min-width: 0; width: 0; border-radius: 5px; }
h2 { margin: 0 0 .4rem; font-size: .85rem; font-weight: 500; color: var(--quiet); overflow-wrap: anywhere; }
p { margin: 0; overflow-wrap: anywhere; } .reason { color: #c5383d; }
"""
_SIDE = 320
_SPREAD = (0.2, 0.5, 0.8)


def write_preview(path: Path, ledger: Ledger, config: CaptionConfig, count: int, at: tuple[float, ...]) -> None:
    """Write a page of clips spread over the manifest, with their frames, captions, or why they have none.

    Args:
        path: of the page.
        ledger: which is in order.
        config: how clips are read.
        count: of clips, at most.
        at: shares of a clip that are shown.

    Raises:
        ResourceError: the file system refuses it.
    """
    chosen = np.unique(np.linspace(0, len(ledger.manifest) - 1, min(count, len(ledger.manifest))).round().astype(int))
    wanted = [int(index) for index in chosen]
    captions = dict(_captions(ledger, set(wanted)))
    clips = [(index, ledger.manifest[index]) for index in wanted]
    small = dataclasses.replace(config, camera=False, side=min(config.side or _SIDE, _SIDE))
    seen = {item.index: _look(item) for item in see(small, at or _SPREAD, clips) if item is not None}
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(page_head("osora caption", _STYLE))
        file.write(f"<body>\n<header><h1>osora caption</h1><p>{len(wanted)} of {len(ledger.manifest)} clips of ")
        file.write(f"{_text(ledger.output.name)}</p></header>\n<main>\n")
        for index in wanted:
            file.write(_article(ledger, index, *seen[index], captions.get(index)))
        file.write("</main>\n</body>\n</html>\n")


def _captions(ledger: Ledger, wanted: set[int]) -> Iterator[tuple[int, str]]:
    """Captions of rows, from an output that is in the order of the manifest."""
    with ledger.output.open("rb") as file:
        for index in range(len(ledger.manifest)):
            if ledger.is_written(index):
                text = file.readline()
                if index in wanted:
                    yield index, json.loads(text).get("caption") or ""


def _look(item: Shown | Unseen) -> tuple[str, str, str]:
    """The name of a clip, its pictures as HTML, and why there are none; the frames themselves are not kept."""
    if isinstance(item, Unseen):
        return item.clip.id, "", item.reason
    pictures = (f'<img alt="" src="data:image/jpeg;base64,{_jpeg(Image.fromarray(frame))}">' for frame in item.frames)
    return item.clip.id, "".join(pictures), ""


def _article(ledger: Ledger, index: int, name: str, pictures: str, unseen: str, caption: str | None) -> str:  # noqa: PLR0917
    row = ledger.rejected.get(ledger.same.get(index, index), {})
    reason = str(row.get("reason") or unseen)
    words = f"<p>{_text(caption)}</p>" if caption else f'<p class="reason">{_text(reason or "no caption")}</p>'
    return f'<article><div class="frames">{pictures}</div><div><h2>{_text(name)}</h2>{words}</div></article>\n'


def _jpeg(image: Image.Image) -> str:
    image.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=82)
    return base64.b64encode(content.getvalue()).decode()


def _text(text: str) -> str:
    return escape("".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text))
