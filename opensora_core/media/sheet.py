"""A contact sheet: frames of all samples in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from opensora_core.files import replacing
from opensora_core.media.pixels import Frames, tile

_MAX_CELL = 192  # pixels; larger frames are shrunk to it, small ones are enlarged by whole factors
_MIN_CELL = 96
_SHEET_WIDTH = 1000  # samples narrower than half of it share a row
_MARGIN = 12
_FONT_SIZE = 15
_INK, _PAPER = (32, 33, 36), (250, 250, 248)


def write_contact_sheet(
    samples: Sequence[tuple[str, Frames]], path: Path, num_columns: int = 8, max_samples: int = 200
) -> None:
    """Draw for each sample its caption, and below it evenly spaced frames from the first to the last.

    Args:
        samples: (caption, frames (T, H, W, 3) uint8), at most `max_samples` of which are drawn.
        path: the PNG file.
        num_columns: frames per sample.
        max_samples: as many as a picture can reasonably show.

    Raises:
        ResourceError: no space or no permission.
    """
    blocks = [_block(caption, frames, num_columns) for caption, frames in samples[:max_samples]]
    limit = max(_SHEET_WIDTH, *(block.width for block in blocks))
    places, left, top, bottom = [], 0, 0, 0
    for block in blocks:  # as words in a line
        if left and left + block.width > limit:
            left, top = 0, bottom + _MARGIN
        places.append((left + _MARGIN, top + _MARGIN))
        left, bottom = left + block.width + _MARGIN, max(bottom, top + block.height)
    right = max(place[0] + block.width for place, block in zip(places, blocks, strict=True))
    sheet = Image.new("RGB", (right + _MARGIN, bottom + 2 * _MARGIN), _PAPER)
    for place, block in zip(places, blocks, strict=True):
        sheet.paste(block, place)
    with replacing(path) as part:
        sheet.save(part, "PNG")


def pick(num_frames: int, count: int) -> list[int]:
    """Indices of `count` evenly spaced frames, the first and the last among them."""
    return [round(index) for index in np.linspace(0, num_frames - 1, min(count, num_frames))]


def _block(caption: str, frames: Frames, num_columns: int) -> Image.Image:
    chosen = frames[pick(len(frames), num_columns)]
    strip = Image.fromarray(tile(np.stack([_resized(frame) for frame in chosen]), len(chosen)))
    font = _font(caption)
    width = max(strip.width, _MAX_CELL)
    lines = _wrapped(caption, font, width)
    line_height = _FONT_SIZE + 5
    block = Image.new("RGB", (width, line_height * len(lines) + strip.height), _PAPER)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        draw.text((0, number * line_height), line, fill=_INK, font=font)
    block.paste(strip, (0, line_height * len(lines)))
    return block


def _resized(frame: Frames) -> Frames:
    height, width = frame.shape[:2]
    longest = max(height, width)
    if longest > _MAX_CELL:
        size = (max(1, width * _MAX_CELL // longest), max(1, height * _MAX_CELL // longest))
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
    factor = -(-_MIN_CELL // longest)
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, or for text beyond Latin one that most systems have."""
    if not text.isascii():
        for name in ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf"):
            try:
                return ImageFont.truetype(name, _FONT_SIZE)
            except OSError:
                continue
    return ImageFont.load_default(_FONT_SIZE)


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int = 2
) -> list[str]:
    """Break at spaces, and within words that are too long; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < max_lines:
        end = min(len(rest), width)  # no character is narrower than a pixel
        while end > 1 and font.getlength(rest[:end]) > width:
            end -= 1
        if end < len(rest) and len(lines) == max_lines - 1:
            lines.append(rest[: end - 1].rstrip() + "…")
            break
        if end < len(rest) and (space := rest.rfind(" ", 1, end + 1)) > 0:
            end = space
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines or [""]
