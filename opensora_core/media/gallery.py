"""A gallery of samples: one page of HTML that opens from disk and needs nothing but the files beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from opensora_core.files import write_bytes
from opensora_core.media.page import MARK, page_head

_STYLE = """
header p { margin: .2rem 0 2rem; color: var(--quiet); }
main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
figure { margin: 0; overflow: hidden; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
figure video, figure img { display: block; width: 100%; background: #000; }
.small { image-rendering: pixelated; }
figcaption { padding: .8rem 1rem 1rem; overflow-wrap: anywhere; }
details { margin-top: .4rem; color: var(--quiet); font-size: .85rem; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .8rem; margin: .4rem 0 0; }
dt { opacity: .75; } dd { margin: 0; }
"""
_BODY = """<body>
<header><h1>{title}</h1><p>{count}</p></header>
<main>
{cards}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Exhibit:
    """A file, the prompt it was made from, and its settings."""

    path: Path
    prompt: str
    settings: Mapping[str, str]


def write_gallery(path: Path, exhibits: Sequence[Exhibit], title: str = "Samples") -> bool:
    """Write a page that shows the files; they may lie beside it or anywhere else on the disk.

    Returns:
        False where a page that is not ours has the name already; it is left alone.

    Raises:
        ResourceError: no space or no permission.
    """
    if path.exists() and not is_gallery(path):
        return False
    cards = "\n".join(_card(exhibit, path.parent) for exhibit in exhibits)
    count = f"{len(exhibits)} sample{'' if len(exhibits) == 1 else 's'}"
    page = page_head(title, _STYLE) + _BODY.format(title=escape(title), count=count, cards=cards)
    write_bytes(path, page.encode())
    return True


def is_gallery(path: Path) -> bool:
    """Whether a file is a gallery that we wrote."""
    try:
        return MARK.encode() in path.read_bytes()[:1000]
    except OSError:
        return False


def _card(exhibit: Exhibit, folder: Path) -> str:
    relative = Path(os.path.relpath(exhibit.path.absolute(), folder.absolute())).as_posix()
    # a colon in the first segment would make the name look like a protocol
    source, prompt = escape("./" + quote(relative)), escape(exhibit.prompt)
    height = exhibit.settings.get("size", "").partition("x")[0]
    small = ' class="small"' if height.isdigit() and int(height) < 200 else ""
    if exhibit.path.suffix.lower() == ".mp4":
        picture = f'<video src="{source}"{small} autoplay loop muted playsinline controls></video>'
    else:
        picture = f'<img src="{source}"{small} alt="{prompt}" loading="lazy">'
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in exhibit.settings.items())
    details = f"<details><summary>{escape(exhibit.path.name)}</summary><dl>{facts}</dl></details>" if facts else ""
    return f"<figure>{picture}<figcaption>{prompt}{details}</figcaption></figure>"
