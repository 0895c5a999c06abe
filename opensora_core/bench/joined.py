"""Videos joined from shots, with a record of what joins them: what a detector of shot boundaries is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
Ramp = NDArray[np.floating]

WIPES: dict[str, Callable[[Ramp, Ramp], Ramp]] = {
    "right": lambda x, y: x,
    "left": lambda x, y: 1 - x,
    "down": lambda x, y: y,
    "up": lambda x, y: 1 - y,
    "diagonal": lambda x, y: (x + y) / 2,
    "iris": lambda x, y: np.hypot(x - 0.5, y - 0.5) * 2**0.5,
    "doors": lambda x, y: abs(x - 0.5) * 2,
}
"""Per kind of wipe: when, in 0..1, the edge passes the places x and y of the picture, which are in 0..1 too."""


@dataclass(frozen=True, slots=True)
class Label:
    """Something that a detector has to find, or must not take for a boundary.

    Attributes:
        kind: cut, dissolve, fade, wipe; or flash, which is no boundary.
        frame: first frame of the new shot; the middle, where one shot turns into another by and by.
        start_frame: first frame that is touched.
        end_frame: the frame after the last one that is touched; equal to `start_frame` for a cut.
    """

    kind: str
    frame: int
    start_frame: int
    end_frame: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass
class Reel:
    """Shots, (T, H, W, 3) uint8 of one size, joined one after the other."""

    pieces: list[Frames] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    num_frames: int = 0

    def cut(self, shot: Frames) -> None:
        """Go on with another shot, at once."""
        if self.num_frames:
            self.labels.append(Label("cut", self.num_frames, self.num_frames, self.num_frames))
        self._add(shot)

    def dissolve(self, shot: Frames, length: int) -> None:
        """Mix the end of what is there with the beginning of a shot."""
        share = ((np.arange(length, dtype=np.float32) + 1) / (length + 1)).reshape(-1, 1, 1, 1)
        self._overlap("dissolve", shot, length, share)

    def wipe(self, shot: Frames, length: int, kind: str) -> None:
        """Let a soft edge uncover a shot: one of `WIPES`."""
        height, width = shot.shape[1:3]
        y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
        ramp = WIPES[kind](x.astype(np.float32), y.astype(np.float32))
        when = (np.arange(length, dtype=np.float32) + 1).reshape(-1, 1, 1) / (length + 1)
        self._overlap("wipe", shot, length, ((when - ramp) * 60 + 0.5).clip(0, 1)[..., None])

    def fade(self, shot: Frames, length: int, held: int, level: int, *, out: bool = True, into: bool = True) -> None:
        """Fade to black (0) or white (255), hold it, and fade into a shot; or only one of the two."""
        away = (np.arange(length, dtype=np.float32) + 1).reshape(-1, 1, 1, 1) / (length + 1)
        start = self.num_frames - length * out
        if out:
            (tail,) = self._take(length)
            self._add(_mixed(tail, np.full_like(tail, level), away))
        first = self.num_frames
        self._add(np.full((held, *shot.shape[1:]), level, np.uint8))
        end = self.num_frames + length * into
        if into:
            shot = np.concatenate(
                [_mixed(shot[:length], np.full_like(shot[:length], level), away[::-1]), shot[length:]]
            )
        self.labels.append(Label("fade", (first + self.num_frames + 1) // 2 if into else self.num_frames, start, end))
        self._add(shot)

    def flash(self, before: int, length: int, strength: float, period: int = 0) -> None:
        """Light the frames up that begin `before` the end; again and again with a `period`, as a strobe does."""
        tail = np.concatenate(self._take(before))
        start = self.num_frames
        for number in range(length):
            if not period or number % period < (period + 1) // 2:
                gain = strength if period else strength * (1 - number / (length + 1))
                tail[number] = _mixed(tail[number], np.full_like(tail[number], 255), gain)
        self.labels.append(Label("flash", start, start, start + length))
        self._add(tail)

    def frames(self) -> Frames:
        """All of it."""
        return np.concatenate(self.pieces)

    def _add(self, frames: Frames) -> None:
        self.pieces.append(frames)
        self.num_frames += len(frames)

    def _take(self, length: int) -> list[Frames]:
        """Take frames off the end of the last shot."""
        last = self.pieces.pop()
        assert len(last) > length, "a shot is too short for what happens at its end"
        self.pieces.append(last[:-length])
        self.num_frames -= length
        return [last[-length:].copy()]

    def _overlap(self, kind: str, shot: Frames, length: int, share: Ramp) -> None:
        (tail,) = self._take(length)
        start = self.num_frames
        self._add(_mixed(tail, shot[:length], share))
        self.labels.append(Label(kind, start + length // 2, start, start + length))
        self._add(shot[length:])


def _mixed(old: Frames, new: Frames, share: Ramp | float) -> Frames:
    return np.rint(old + (new.astype(np.float32) - old) * share).astype(np.uint8)
