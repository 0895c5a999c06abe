"""What the pages that we write have in common: they open from disk, and look alike by day and by night."""

from __future__ import annotations

from html import escape

MARK = '<meta name="generator" content="osora">'
"""By which a page of ours is known."""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{mark}
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fafaf8; --card: #fff; --ink: #202124; --quiet: #6b6f76; --line: #e4e4e0; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #15161a; --card: #1e2025; --ink: #e9eaec; --quiet: #9aa0a8; --line: #2e3138; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; padding: 2.5rem clamp(1rem, 4vw, 4rem); background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ margin: 0; font-size: 1.4rem; font-weight: 600; }}
{style}
</style>
</head>
"""


def page_head(title: str, style: str) -> str:
    """A page up to its body, with rules of its own beside the common ones."""
    return _HEAD.format(mark=MARK, title=escape(title), style=style.strip())
