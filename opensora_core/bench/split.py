"""How well and how fast shots are found, against PySceneDetect and decoding alone, and how fast they are cut out."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opensora_core.bench.joined import WIPES, Frames, Label, Reel
from opensora_core.bench.measurement import Event, Measurement
from opensora_core.config import Config, SplitConfig
from opensora_core.curation.boundaries import Boundary, Detection, detect
from opensora_core.curation.scenes import choose_ranges, last_end
from opensora_core.errors import InputError
from opensora_core.media import write_video
from opensora_core.media.cut import Cut, Encoding, How, Piece, cut
from opensora_core.media.glance import count_frames
from opensora_core.sampling import Notice, Progress

HEIGHT, WIDTH, FPS = 144, 256, 25
TOLERANCE = 2  # frames
WAYS: dict[str, tuple[str, bool]] = {
    "auto": ("auto", False),
    "auto --fast": ("auto", True),
    "content": ("content", False),
    "adaptive": ("adaptive", False),
}
"""Name -> detector of `DETECTORS`, and whether it looks at keyframes first."""
CUTS: tuple[How, ...] = ("copy", "smart", "exact")
RIVAL = "PySceneDetect reading by itself"
GRADUAL = ("dissolve", "fade", "wipe")


@dataclass
class Count:
    """Of what was to be found, how much was."""

    cuts: int = 0
    cuts_found: int = 0
    false_cuts: int = 0
    false: int = 0
    flashes: int = 0
    flashes_taken: int = 0
    gradual: dict[str, list[int]] = field(default_factory=lambda: {kind: [0, 0] for kind in GRADUAL})

    @property
    def precision(self) -> float:
        """Of all that was found, of whatever kind."""
        right = self.cuts_found + sum(found for found, _ in self.gradual.values())
        return right / max(right + self.false, 1)

    @property
    def f1(self) -> float:
        """Of hard cuts: what was found where there is nothing counts against it, unless it is called gradual."""
        return 2 * self.cuts_found / max(self.cuts + self.cuts_found + self.false_cuts, 1)

    def add(self, boundaries: Sequence[Boundary], labels: Sequence[Label]) -> None:
        """Match a video's boundaries with its labels, each boundary with one label."""
        free = list(boundaries)
        for label in labels:
            if label.kind == "cut":
                self.cuts += 1
                near = [item for item in free if abs(item.frame - label.frame) <= TOLERANCE]
                if near:
                    self.cuts_found += 1
                    free.remove(min(near, key=lambda item: abs(item.frame - label.frame)))
        for label in labels:
            if label.kind in self.gradual:
                tally = self.gradual[label.kind]
                tally[1] += 1
                near = [item for item in free if _within(item, label)]
                if near:
                    tally[0] += 1
                    free.remove(near[0])
        for label in labels:
            if label.kind == "flash":
                self.flashes += 1
                self.flashes_taken += any(_within(item, label) for item in free)
        self.false += len(free)
        self.false_cuts += sum(item.kind == "cut" for item in free)


def _within(item: Boundary, label: Label) -> bool:
    return label.start_frame - TOLERANCE <= item.frame <= label.end_frame + TOLERANCE


def measure(config: Config, *, quick: bool = False, source: Path | None = None) -> Iterator[Event]:
    """Measure accuracy and CPU time of the detectors, and CPU time of the ways to cut.

    Args:
        config: not asked.
        quick: fewer of the videos that are made here.
        source: a folder of videos and their labels.json, as `python -m tests.core.curation.labelled OUT` writes it from
            real ones; None makes some from drawn pictures.

    Raises:
        InputError: the folder has no labels.json, or one that is none.
    """
    import scenedetect  # of this suite alone; with OpenCV it takes a while

    with tempfile.TemporaryDirectory() as made:
        folder = source
        if folder is None:
            folder = Path(made)
            yield from make(folder, 1 if quick else 4)
        videos = read_labels(folder)
        yield Notice(f"{len(videos)} videos in {'a folder made here' if source is None else source}")
        counts: dict[str, Count] = {name: Count() for name in WAYS}
        spent = dict.fromkeys(["decoding alone", RIVAL, *WAYS], 0.0)
        num_frames = 0
        for number, (path, labels) in enumerate(videos.items()):
            yield Progress("finding shots", number, len(videos), None)
            begin = time.process_time()
            num_frames += count_frames(path)
            spent["decoding alone"] += time.process_time() - begin
            for name, (detector, fast) in WAYS.items():
                begin = time.process_time()
                counts[name].add(detect(path, detector, fast=fast).boundaries, labels)
                spent[name] += time.process_time() - begin
            begin = time.process_time()
            scenedetect.detect(str(path), scenedetect.ContentDetector())
            spent[RIVAL] += time.process_time() - begin
        yield from _cutting(list(videos), rounds=1 if quick else 2)
        for name, count in counts.items():
            yield from _report(name, count)
            share = spent[name] / spent["decoding alone"]
            yield Measurement(name, "CPU time against decoding alone", share, "x", num_frames)
        for name in ("content", "adaptive", RIVAL):
            yield Measurement("auto", f"CPU time against {name}", spent["auto"] / spent[name], "x", num_frames)
        yield Measurement("auto --fast", "times as fast as auto", spent["auto"] / spent["auto --fast"], "x", num_frames)


def _cutting(paths: Sequence[Path], rounds: int) -> Iterator[Event]:
    """The ways to cut in turns over the same clips, each with detection, against detection alone."""
    spent = dict.fromkeys(["detection", *CUTS], 0.0)
    copied, written = dict.fromkeys(CUTS, 0), dict.fromkeys(CUTS, 0)
    for number, path in enumerate(paths):
        yield Progress("cutting", number, len(paths), None)
        taken: dict[str, list[float]] = {name: [] for name in spent}
        for last in range(rounds, 0, -1):
            begin = time.process_time()
            found = detect(path)
            taken["detection"].append(time.process_time() - begin)
            for how in CUTS:
                with tempfile.TemporaryDirectory() as folder:
                    begin = time.process_time()
                    clips = _cut(path, found, how, Path(folder))
                    taken[how].append(time.process_time() - begin)
                if last == 1:
                    copied[how] += sum(clip.num_copied for clip in clips)
                    written[how] += sum(clip.num_frames for clip in clips)
        for name, times in taken.items():
            spent[name] += min(times)
    for how in CUTS:
        share = 1 + spent[how] / spent["detection"]
        yield Measurement(f"cut {how}", "CPU time against detection alone", share, "x", written[how])
        yield Measurement(f"cut {how}", "frames copied", copied[how] / max(written["exact"], 1), "", written["exact"])


def _cut(path: Path, found: Detection, how: How, folder: Path) -> list[Cut]:
    """The clips of a source, as `osora split` cuts them by default, but for their size."""
    end = last_end(found.seconds, found.fps)
    times = [*map(float, found.seconds), end]
    ranges, _ = choose_ranges(
        found.boundaries,
        found.seconds,
        end,
        min_seconds=SplitConfig.min_seconds,
        max_seconds=SplitConfig.max_seconds,
        keyframes=None if how == "exact" else found.is_keyframe,
    )
    pieces = [
        Piece(folder / f"{number}.mp4", item.start, item.end, times[item.start], times[item.end])
        for number, item in enumerate(ranges)
    ]
    encoding = Encoding(short_side=None)
    made = cut(path, pieces, found.seconds, how, encoding, is_decoded=not found.damage)
    return [clip for clip in made if isinstance(clip, Cut)]


def _report(name: str, count: Count) -> Iterator[Measurement]:
    yield Measurement(name, "F1 of hard cuts", count.f1, "", count.cuts)
    yield Measurement(name, "hard cuts found", count.cuts_found / max(count.cuts, 1), "", count.cuts)
    yield Measurement(name, "precision of all", count.precision, "", count.cuts)
    for kind, (found, total) in count.gradual.items():
        if total:
            yield Measurement(name, f"{kind}s found", found / total, "", total)
    yield Measurement(name, "flashes taken for boundaries", count.flashes_taken, "", count.flashes)


def read_labels(folder: Path) -> dict[Path, list[Label]]:
    """The labels of the videos in a folder.

    Raises:
        InputError: there is no labels.json, or it is none.
    """
    try:
        table: Mapping[str, Mapping[str, list[Mapping[str, int]]]] = json.loads((folder / "labels.json").read_text())
        return {folder / name: [_label(row) for row in entry["labels"]] for name, entry in table.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"cannot read {folder / 'labels.json'}: {error}",
            "python -m tests.core.curation.labelled OUT writes such folders from real videos",
        ) from error


def _label(row: Mapping[str, int]) -> Label:
    return Label(str(row["kind"]), int(row["frame"]), int(row["start_frame"]), int(row["end_frame"]))


def make(folder: Path, count: int) -> Iterator[Progress]:
    """Write videos joined from drawn shots, with cuts, flashes and all kinds of transitions, and their labels.json."""
    labels = {}
    for number in range(count):
        yield Progress("making videos", number, count, None)
        reel = drawn(number)
        path = folder / f"drawn-{number}.mp4"
        write_video(path, reel.frames(), FPS)
        labels[path.name] = {"num_frames": reel.num_frames, "labels": [label.to_dict() for label in reel.labels]}
    (folder / "labels.json").write_text(json.dumps(labels))


def drawn(seed: int) -> Reel:
    """A reel of drawn shots, with one of each kind of transition."""
    rng = np.random.default_rng(seed)

    def shot() -> Frames:
        return drawn_shot(rng, int(rng.integers(44, 60)))

    reel = Reel()
    reel.cut(shot())
    reel.cut(shot())
    reel.flash(20, 2, 0.95)
    reel.cut(shot())
    reel.dissolve(shot(), 14)
    reel.cut(shot())
    reel.flash(36, 12, 0.9, period=4)
    reel.wipe(shot(), 18, list(WIPES)[seed % len(WIPES)])
    reel.fade(shot(), 10, 4, 255 * (seed % 2))
    reel.cut(shot())
    return reel


def drawn_shot(rng: np.random.Generator, length: int, height: int = HEIGHT, width: int = WIDTH) -> Frames:
    """Blurred blots of a few colours that drift past the camera: (T, H, W, 3)."""
    margin = 2 * length
    picture = np.empty((height, width + margin, 3), np.float32)
    picture[:] = rng.uniform(30, 220, 3)
    y, x = np.ogrid[:height, : width + margin]
    for _ in range(24):
        radius = rng.uniform(0.06, 0.3) * height
        away = (y - rng.uniform(0, height)) ** 2 + (x - rng.uniform(0, width + margin)) ** 2
        cover = np.clip((radius**2 - away) / radius**2 * 4, 0, 1)[..., None]
        picture += (rng.uniform(0, 255, 3) - picture) * cover
    speed = rng.uniform(0, 2)
    starts = (np.arange(length) * speed).astype(int)
    picture = picture.clip(4, 251).astype(np.uint8)
    grain = rng.integers(0, 8, (height, width, 3), np.uint8)
    # the grain of a camera: another one on each frame
    return np.stack(
        [picture[:, start : start + width] - 4 + np.roll(grain, 7 * start + n) for n, start in enumerate(starts)]
    )
