"""What a model is asked, and which frames it is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opensora_core.config import CaptionConfig
from opensora_core.errors import ConfigError, InputError
from opensora_core.media.pixels import Frames

NUM_FRAMES = 3
MOST_FRAMES = 64
MOST_PROMPT = 20_000  # characters
_GAP = 6  # pixels between the frames of a grid

PROMPT = """\
Describe this clip so that somebody who has not seen it could film it again. Say, in this order and only as far as it \
is visible: who or what is in it and how they look; what they do and how that changes from the first frame to the \
last; where it takes place; the light and the colours; how the camera is placed and how it moves. \
Write plain sentences in the present tense, at most six of them, and begin with the subject itself. \
Do not write about frames, pictures or a video, do not list, do not guess at names, feelings or what may come before \
or after, and leave out whatever you are not sure of."""
"""Ours: what training needs to know of a clip, in the words of a prompt."""

SEPARATE = "These are {count} frames of one video clip, in the order of time. "
GRID = "This picture shows {count} frames of one video clip, in the order of time: row by row, from left to right. "
STILL = "This is a frame of a video clip. "


def ask(config: CaptionConfig) -> str:
    """The prompt of the settings: that of a file, or ours.

    Raises:
        InputError: the file cannot be read, is empty, or longer than any prompt is.
    """
    if not config.prompt:
        return PROMPT
    try:
        text = Path(config.prompt).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompt {config.prompt}: {error}", "--prompt names a file of text") from None
    if not 0 < len(text) <= MOST_PROMPT:
        raise InputError(f"the prompt in {config.prompt} has {len(text)} characters, not 1 to {MOST_PROMPT}")
    return text


def introduced(prompt: str, count: int, *, grid: bool) -> str:
    """A prompt of ours or of the user, with a word on how the frames are shown."""
    return (STILL if count == 1 else GRID if grid else SEPARATE).format(count=count) + prompt


def places(config: CaptionConfig, asked_for: Sequence[float] = ()) -> tuple[float, ...]:
    """Shares 0..1 of a clip's length that frames are taken at: of the settings, of the model, or spread.

    Raises:
        ConfigError: they are no such shares, not in the order of time, or too many.
    """
    if config.at:
        try:
            at = tuple(float(word.rstrip("%")) / (100 if "%" in word else 1) for word in config.at.split())
        except ValueError:
            at = ()
        if not at or not all(0 <= x <= 1 for x in at) or list(at) != sorted(at) or len(at) > MOST_FRAMES:
            raise ConfigError(
                f"caption.at = {config.at!r} is not a row of shares of a clip", "for example caption.at='20% 50% 80%'"
            )
        if config.frames and config.frames != len(at):
            raise ConfigError(
                f"caption.frames = {config.frames}, and caption.at names {len(at)}", "leave one of them out"
            )
        return at
    if not 0 <= config.frames <= MOST_FRAMES:
        raise ConfigError(f"caption.frames = {config.frames} is not between 1 and {MOST_FRAMES}")
    if not config.frames and asked_for:
        return tuple(asked_for)
    count = config.frames or NUM_FRAMES
    return tuple(float(x) for x in np.linspace(0.2, 0.8, count).round(4)) if count > 1 else (0.5,)


def grid(frames: Sequence[Frames]) -> Frames:
    """Lay frames (H, W, 3) of one size out in one picture, as near to a square as they go."""
    height, width = frames[0].shape[:2]
    count = len(frames)

    def unlike_a_square(columns: int) -> float:
        rows = math.ceil(count / columns)
        return abs(math.log(columns * width / (rows * height))) + (rows * columns - count) / count

    columns = min(range(1, count + 1), key=unlike_a_square)
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), np.uint8)
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        top, left = row * (height + _GAP), column * (width + _GAP)
        sheet[top : top + height, left : left + width] = frame
    return sheet
