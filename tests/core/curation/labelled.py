"""Labelled videos joined from real ones: `python -m tests.core.curation.labelled OUT` writes them and labels.json.

The sources fall into parts that share no footage: one for tuning, one that is kept aside, and two that were fetched
when the detector was finished, to be looked at once each. Those two are of Debian's packages of documentation and
games, which `python -m tests.core.curation.labelled OUT FOLDER` finds below FOLDER, where these were unpacked:

    apt-get download planetblupi-common opencv-doc forensics-samples-files python-nbsphinx-doc python3-hug-doc \\
        python-kivy-examples pd-extendedview python3-mecavideo
    for package in *.deb; do dpkg-deb -x "$package" FOLDER; done

`--draw WORD` joins the same footage in another way.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from opensora_core.bench.joined import WIPES, Frames, Reel

VIDEOS = Path(__file__).parents[4] / "shared" / "videos"
WIDTH, HEIGHT = 320, 180

# stretches [first, last) of one shot each, as they were seen with the eye
SOURCES: dict[str, dict[str, list[tuple[int, int]]]] = {
    "tuning": {
        "bbb_480p_30s.mp4": [(100, 285), (290, 376), (380, 430), (556, 640)],
        "dvr_traffic_camera.mp4": [(0, 300)],
        "imageio_cockatoo.mp4": [(3, 130), (160, 280)],
        "intel_bottle-detection.mp4": [(0, 400)],
        "intel_one-by-one-person-detection.mp4": [(0, 500)],
        "intel_again.mkv": [(0, 77)],
        "mdn_crystal.mp4": [(0, 359)],
        "mdn_elf.mp4": [(0, 241)],
        "mdn_friday.mp4": [(0, 185)],
        "mdn_pig.mp4": [(0, 196)],
        "nasa_13013.mp4": [(0, 110), (205, 325)],
        "ocv_box.mp4": [(0, 360)],
        "ocv_tree.avi": [(0, 68)],
        "psd_testvideo.mp4": [(35, 175), (430, 540), (580, 650)],
        "skv_bikes.mp4": [(0, 30), (30, 76), (76, 137), (137, 187), (187, 242)],
    },
    "aside": {
        "cosmos_30s.mp4": [(526, 572), (576, 609)],
        "intel_car-detection.mp4": [(0, 377)],
        "intel_walk.mkv": [(0, 89)],
        "mb_video.mp4": [(0, 125)],
        "mb_video-h265.mp4": [(0, 200)],
        "mdn_chroma.mp4": [(0, 300), (300, 600)],
        "mdn_flower.mp4": [(0, 150)],
        "mdn_frog.mp4": [(0, 248)],
        "mdn_monster.mp4": [(0, 220)],
        "mdn_rabbit.mp4": [(0, 234)],
        "mdn_stream_of_water.mp4": [(0, 90)],
        "mpy_chaplin.mp4": [(0, 241)],
        "mpy_video_with_failing_audio.mp4": [(0, 75), (100, 175)],
        "ocv_cup.mp4": [(0, 217)],
        "skv_bigbuckbunny.mp4": [(0, 132)],
        "skv_carphone_pristine.mp4": [(0, 120)],
    },
    "first": {
        "Megamind.avi": [(18, 82), (203, 268)],
        "balle-jbart.mp4": [(17, 255)],
        "cityCC0.mpg": [(0, 105), (122, 188)],
        "history2.mkv": [(0, 130)],
        "movie.mp4": [(0, 166)],
        "play103.mkv": [(0, 144)],
        "play107.mkv": [(0, 86)],
        "play113.mkv": [(0, 61)],
        "play118.mkv": [(0, 92)],
        "play124.mkv": [(0, 96)],
        "vtest.avi": [(0, 400)],
    },
    "second": {
        "Shepard_Calais_1906_FrenchGP.ogv.160p.ogv": [(8, 285)],
        "balle1-vp9.avi": [(0, 295)],
        "diver.mov": [(0, 350)],
        "movie-hello.mp4": [(0, 249)],
        "play101.mkv": [(15, 79)],
        "play105.mkv": [(0, 108)],
        "play108.mkv": [(0, 60)],
        "play110.mkv": [(6, 96)],
        "play116.mkv": [(0, 96)],
        "play119.mkv": [(0, 72)],
        "win005.mkv": [(0, 210)],
        "win129.mkv": [(0, 136)],
    },
}
OURS = ("tuning", "aside")  # whose footage lies beside the repository


def read_shots(part: str, folder: Path = VIDEOS) -> dict[str, list[Frames]]:
    """All stretches of a part, by the name of their source, which lies somewhere in a folder."""
    return {name: list(_stretches(next(folder.rglob(name)), ranges)) for name, ranges in SOURCES[part].items()}


def _stretches(path: Path, ranges: list[tuple[int, int]]) -> Iterator[Frames]:
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        number = 0
        for first, last in ranges:
            kept = []
            while number < last:
                frame = next(frames)
                if number >= first:
                    kept.append(frame.reformat(width=WIDTH, height=HEIGHT, format="rgb24").to_ndarray())
                number += 1
            yield np.stack(kept)


@dataclass
class Pool:
    """Hands out pieces of shots; neighbours are of different sources unless they should be alike."""

    shots: dict[str, list[Frames]]
    rng: random.Random
    last: str = ""
    places: dict[str, int] = field(default_factory=dict)

    def piece(self, least: int = 24, most: int = 70) -> Frames:
        name = self.rng.choice([name for name in self.shots if name != self.last])
        self.last = name
        return self._of(name, self.rng.randint(least, most))

    def long(self, name: str, length: int) -> Frames:
        return max(self.shots[name], key=len)[:length].copy()

    def _of(self, name: str, length: int) -> Frames:
        shot = self.rng.choice(self.shots[name])
        start = self.rng.randint(0, max(len(shot) - length, 0))
        return shot[start : start + length].copy()

    def alike(self, family: str, count: int) -> Iterator[Frames]:
        """Pieces of sources with a common beginning of their names, which look alike."""
        names = [name for name in self.shots if name.startswith(family)]
        last = None
        for number in range(count if names else 0):
            piece = self._of(names[number % len(names)], self.rng.randint(24, 60))
            # a still scene may go on as if nothing had happened: nobody could find that
            while last is not None and abs(piece[0].astype(np.int16) - last).mean() < 4:
                piece = self._of(self.rng.choice(names), self.rng.randint(24, 60))
            last = piece[-1]
            yield piece


@dataclass(frozen=True)
class Recipe:
    """How a reel is written."""

    suffix: str = ".mp4"
    codec: str = "libx264"
    options: tuple[tuple[str, str], ...] = (("crf", "23"), ("preset", "veryfast"))
    fps: int = 25
    width: int = WIDTH
    height: int = HEIGHT
    pixels: str = "yuv420p"
    interlaced: bool = False
    variable: bool = False
    start: float = 0.0


def write(path: Path, frames: Frames, recipe: Recipe) -> None:
    """Encode frames. With `variable`, frame n is shown at an uneven time; none is lost."""
    rng = random.Random(path.name)
    base = Fraction(1, 90000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(recipe.codec, rate=recipe.fps, options=dict(recipe.options))
        stream.width, stream.height, stream.pix_fmt = recipe.width, recipe.height, recipe.pixels
        stream.time_base = stream.codec_context.time_base = base if recipe.variable else Fraction(1, recipe.fps)
        time = round(recipe.start / stream.codec_context.time_base)
        if recipe.interlaced:  # two moments in each frame
            woven = frames.copy()
            woven[:-1, 1::2] = (frames[:-1, 1::2].astype(np.uint16) + frames[1:, 1::2]) // 2
            frames = woven
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(width=recipe.width, height=recipe.height, format=recipe.pixels)
            frame.pts, frame.time_base = time, stream.codec_context.time_base
            time += rng.choice((1500, 3003, 3600, 7200)) if recipe.variable else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


_X264 = Recipe()
_FIELDS = (("crf", "23"), ("preset", "veryfast"), ("x264-params", "tff=1"))


def _cuts(pool: Pool, count: int = 12, least: int = 20, most: int = 70) -> Reel:
    reel = Reel()
    for _ in range(count):
        reel.cut(pool.piece(least, most))
    return reel


def _thinned(reel: Reel, step: int) -> Reel:
    """Every n-th frame of each shot, as a low rate has it."""
    thin = Reel()
    for piece in reel.pieces:
        thin.cut(piece[::step])
    return thin


def _alike(pool: Pool, families: tuple[str, ...]) -> Reel:
    reel = Reel()
    for family in families:
        for piece in pool.alike(family, 5):
            reel.cut(piece)
    return reel


def _dark(pool: Pool) -> Reel:
    reel = Reel()
    for _ in range(12):
        reel.cut((pool.piece() * 0.16 + 8).astype(np.uint8))
    return reel


def _flashes(pool: Pool) -> Reel:
    reel = Reel()
    for number in range(10):
        reel.cut(pool.piece(44, 70))
        if number % 3 == 2:
            reel.flash(30, 14, 0.9, period=pool.rng.choice((2, 4, 6)))
        else:
            reel.flash(24, pool.rng.randint(1, 4), pool.rng.uniform(0.5, 1.0))
    return reel


def _dissolves(pool: Pool) -> Reel:
    reel = _cuts(pool, 1, 50, 70)
    for number in range(8):
        if number % 4 == 3:
            reel.cut(pool.piece(50, 80))
        else:
            reel.dissolve(pool.piece(50, 80), pool.rng.randint(8, 28))
    return reel


def _fades(pool: Pool) -> Reel:
    reel = _cuts(pool, 1, 50, 70)
    for number in range(8):
        out, into = (True, True) if number % 4 < 2 else (number % 4 == 2, number % 4 == 3)
        level = 255 if number % 3 == 2 else 0
        reel.fade(pool.piece(50, 80), pool.rng.randint(6, 18), pool.rng.randint(1, 10), level, out=out, into=into)
    return reel


def _wipes(pool: Pool) -> Reel:
    reel = _cuts(pool, 1, 50, 70)
    for kind in WIPES:
        reel.wipe(pool.piece(50, 80), pool.rng.randint(10, 30), kind)
    return reel


def _mixed(pool: Pool) -> Reel:
    reel = _cuts(pool, 2, 40, 60)
    reel.dissolve(pool.piece(50, 70), 14)
    reel.cut(pool.piece(40, 60))
    reel.fade(pool.piece(50, 70), 10, 3, 0)
    reel.flash(20, 2, 0.95)
    reel.cut(pool.piece(40, 60))
    reel.wipe(pool.piece(50, 70), 16, pool.rng.choice(list(WIPES)))
    reel.cut(pool.piece(40, 60))
    return reel


def _boxed(pool: Pool) -> Reel:
    reel = _mixed(pool)
    for piece in reel.pieces:
        piece[:, :22] = 0
        piece[:, -22:] = 0
    return reel


def _uncut(names: tuple[str, ...]) -> Callable[[Pool], Reel]:
    def make(pool: Pool) -> Reel:
        reel = Reel()
        reel.cut(pool.long(next(name for name in names if name in pool.shots), 300))
        return reel

    return make


CASES: dict[str, tuple[Callable[[Pool], Reel], Recipe]] = {
    "cuts-1": (_cuts, _X264),
    "cuts-2": (_cuts, Recipe(options=(("crf", "30"), ("preset", "veryfast")))),
    "cuts-short": (lambda pool: _cuts(pool, 16, 10, 24), _X264),
    "cuts-60fps": (lambda pool: _cuts(pool, 10, 40, 70), Recipe(fps=60)),
    "cuts-10fps": (lambda pool: _thinned(_cuts(pool, 12, 50, 77), 3), Recipe(fps=10)),
    "alike-1": (lambda pool: _alike(pool, ("mdn_", "intel_", "psd_", "mpy_", "cosmos", "play", "win")), _X264),
    "alike-2": (
        lambda pool: _alike(pool, ("mdn_", "bbb", "skv", "imageio", "ocv", "mdn_chroma", "play", "Mega")),
        Recipe(options=(("crf", "28"), ("preset", "veryfast"))),
    ),
    "dark": (_dark, _X264),
    "low-quality": (_cuts, Recipe(options=(("crf", "42"), ("preset", "ultrafast")), width=160, height=90)),
    "flashes-1": (_flashes, _X264),
    "flashes-2": (_flashes, Recipe(options=(("crf", "30"), ("preset", "veryfast")), fps=30)),
    "variable": (_mixed, Recipe(variable=True, start=1.5)),
    "interlaced": (_mixed, Recipe(options=_FIELDS, interlaced=True)),
    "dissolves-1": (_dissolves, _X264),
    "dissolves-2": (_dissolves, Recipe(options=(("crf", "32"), ("preset", "veryfast")), fps=30)),
    "fades-1": (_fades, _X264),
    "fades-2": (_fades, Recipe(options=(("crf", "30"), ("preset", "veryfast")), fps=30)),
    "wipes-1": (_wipes, _X264),
    "wipes-2": (_wipes, Recipe(options=(("crf", "30"), ("preset", "veryfast")), fps=30)),
    "boxed": (_boxed, _X264),
    "mpeg2": (_mixed, Recipe(".ts", "mpeg2video", (("b", "900k"),))),
    "mpeg4": (_mixed, Recipe(".avi", "mpeg4", (("b", "700k"),))),
    "hevc": (_mixed, Recipe(".mp4", "libx265", (("x265-params", "log-level=none"), ("preset", "ultrafast")))),
    "ten-bits": (_mixed, Recipe(".mkv", "libx264", (("preset", "veryfast"),), pixels="yuv420p10le")),
    "vp9": (_mixed, Recipe(".webm", "libvpx-vp9", (("cpu-used", "8"), ("deadline", "realtime"), ("b", "400k")))),
    "av1": (_mixed, Recipe(".mkv", "libsvtav1", (("preset", "12"), ("crf", "40")))),
    "uncut-1": (_uncut(("imageio_cockatoo.mp4", "mdn_chroma.mp4", "play103.mkv", "diver.mov")), _X264),
    "uncut-2": (_uncut(("ocv_box.mp4", "mpy_chaplin.mp4", "history2.mkv", "play116.mkv")), _X264),
    "uncut-3": (
        _uncut(("intel_one-by-one-person-detection.mp4", "intel_car-detection.mp4", "vtest.avi", "win005.mkv")),
        Recipe(fps=10),
    ),
}


def _made(make: Callable[[Pool], Reel], shots: dict[str, list[Frames]], seed: str) -> Reel:
    """A reel; drawn again where a transition was to be longer than what is left of a shot."""
    with suppress(AssertionError):
        return make(Pool(shots, random.Random(seed)))
    return _made(make, shots, f"{seed}, again")


def build(
    folder: Path, part: str, cases: tuple[str, ...] = tuple(CASES), videos: Path = VIDEOS, draw: str = ""
) -> None:
    """Write the videos of a part and their labels.json, as `osora bench split --data FOLDER` reads them."""
    shots = read_shots(part, videos)
    folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for name in cases:
        make, recipe = CASES[name]
        reel = _made(make, shots, f"{draw} {part} {name}".strip())
        path = folder / f"{name}{recipe.suffix}"
        write(path, reel.frames(), recipe)
        labels[path.name] = {"num_frames": reel.num_frames, "labels": [label.to_dict() for label in reel.labels]}
    (folder / "labels.json").write_text(json.dumps(labels, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--draw", default="")
    words = parser.parse_args()
    for part in SOURCES:
        if folder := VIDEOS if part in OURS else words.folder:
            build(words.out / part, part, videos=folder, draw=words.draw)
