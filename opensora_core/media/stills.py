"""Pictures, and the animations that picture formats can hold, by Pillow."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps

from opensora_core.errors import InputError
from opensora_core.media.pixels import Frames
from opensora_core.media.read import Budget, Limits, require_file
from opensora_core.media.shown import covering, fit

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""File names that Pillow is asked about; what is inside decides the format."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
# what Pillow's decoders have been seen to raise on torn and hostile files
_TORN = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)


@contextmanager
def opened_picture(path: Path, limits: Limits) -> Iterator[Image.Image]:
    """Open a picture or an animation.

    Raises:
        InputError: no such file, no picture, or one of more than `max_pixels`.
    """
    require_file(path)
    with _refusing(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below refuses it for good
        image = Image.open(path, formats=_FORMATS)
    with image:
        if image.width * image.height > limits.max_pixels:
            raise InputError(
                f"{path} has {image.width} x {image.height} pixels, more than max_pixels={limits.max_pixels}",
                "scale it down first, or raise the limit",
            )
        yield image


def is_animation(path: Path, image: Image.Image) -> bool:
    """Whether a picture is a GIF or WebP of several frames."""
    with _refusing(path):
        return image.format in ("GIF", "WEBP") and bool(getattr(image, "is_animated", False))


def upright_size(path: Path, image: Image.Image) -> tuple[int, int]:
    """Height and width of a picture that is turned as its EXIF says."""
    with _refusing(path):
        turned = image.getexif().get(274, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def read_picture(path: Path, image: Image.Image, wanted: tuple[int, int] | None, limits: Limits) -> Frames:
    """The picture, upright and of the wanted height and width: (1, H, W, 3)."""
    size = upright_size(path, image)
    rows, columns = covering(size, wanted, path, limits.max_pixels)[0]
    with _refusing(path):
        if image.format == "JPEG" and (rows, columns) != size:
            # the JPEG decoder halves for next to nothing; twice the size leaves the resize something to average
            turned = size != (image.height, image.width)
            image.draft(None, (2 * rows, 2 * columns) if turned else (2 * columns, 2 * rows))
        return fit(ImageOps.exif_transpose(image), wanted, path, limits.max_pixels)[None]


def animation(image: Image.Image, budget: Budget) -> Iterator[tuple[float, Image.Image]]:
    """Frames of an animation with the seconds they begin at, in order. Each is valid until the next.

    Raises:
        InputError: beyond the budget, or a frame that is torn.
    """
    milliseconds, index = 0.0, 0
    while True:
        with _refusing(budget.path):
            try:
                image.seek(index)
            except EOFError:
                return
            image.load()
        budget.check(index + 1)
        yield milliseconds / 1000, image
        # browsers show a frame that has no duration for a tenth of a second
        milliseconds += float(image.info.get("duration") or 100)
        index += 1


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except _TORN as error:
        raise InputError(f"cannot read {path} as a picture: {error}") from error
