from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opensora_core.bench.joined import Label
from opensora_core.bench.split import Count, drawn, drawn_shot, read_labels
from opensora_core.curation.boundaries import DETECTORS, Detection, detect, read_boundaries
from opensora_core.curation.boundaries.curves import Meter, Wipe
from opensora_core.curation.boundaries.shots import AutoOptions, decide
from opensora_core.errors import ConfigError, InputError
from opensora_core.media import write_video
from opensora_core.media.glance import Chunk
from tests.core.curation import labelled
from tests.core.curation.labelled import VIDEOS, Recipe, build, write

needs_videos = pytest.mark.skipif(not VIDEOS.exists(), reason="needs ../shared/videos")


@pytest.fixture(scope="module")
def reel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Label]]:
    path, made = tmp_path_factory.mktemp("reel") / "reel.mp4", drawn(0)
    write_video(path, made.frames(), 25)
    return path, made.labels


def _two_shots(path: Path, recipe: Recipe | None = None) -> Path:
    rng = np.random.default_rng(5)
    frames = np.concatenate([drawn_shot(rng, 30, 90, 160), drawn_shot(rng, 30, 90, 160)])
    write(path, frames, recipe or Recipe(width=160, height=90))
    return path


def test_all_kinds_of_transitions_are_found_and_no_flash(reel: tuple[Path, list[Label]]) -> None:
    path, labels = reel
    found = detect(path)
    wanted = [label for label in labels if label.kind != "flash"]
    assert [item.kind for item in found.boundaries] == [label.kind for label in wanted]
    for item, label in zip(found.boundaries, wanted, strict=True):
        assert abs(item.frame - label.frame) <= (0 if label.kind == "cut" else 4)
        assert item.start_frame <= label.start_frame + 2 and item.end_frame >= label.end_frame - 2
        assert item.seconds == found.seconds[item.frame]
        assert item.score >= 1
    assert set(found.thumbnail_frames) >= {item.frame for item in found.boundaries if item.kind == "cut"}
    assert len(found.thumbnails) == len(found.thumbnail_frames)
    assert all(len(curve) == len(found.seconds) for curve in found.scores.values())


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_counts_frames_and_takes_options(name: str, tmp_path: Path) -> None:
    path = _two_shots(tmp_path / "v.mp4")
    told: list[float] = []
    found = detect(path, name, on_progress=told.append)
    assert len(found.scores["score"]) == len(found.seconds) == 60
    if name != "threshold":  # which looks for fades alone
        assert [item.frame for item in found.boundaries] == [30]
    assert told[-1] == 1
    option = {"auto": "threshold", "adaptive": "adaptive_threshold"}.get(name, "threshold")
    assert not detect(path, name, options={option: 1.99 if name in ("histogram", "hash") else 250.0}).boundaries
    with pytest.raises(ConfigError, match="no option 'treshold'"):
        detect(path, name, options={"treshold": 1.0})


@pytest.mark.parametrize("detector", ["auto", "content"])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(variable=True, start=1.5, width=160, height=90),
        Recipe(".ts", "mpeg2video", (), width=160, height=90),
        Recipe(".avi", "mpeg4", (), width=160, height=90),
        Recipe(".webm", "libvpx-vp9", (("deadline", "realtime"), ("cpu-used", "8")), width=160, height=90),
    ],
    ids=["variable", "ts", "avi", "vp9"],
)
def test_numbers_and_times_are_exact_in_every_container(tmp_path: Path, recipe: Recipe, detector: str) -> None:
    found = detect(_two_shots(tmp_path / f"v{recipe.suffix}", recipe), detector)
    (cut,) = found.boundaries
    assert (cut.frame, len(found.seconds)) == (30, 60)
    assert cut.seconds == found.seconds[30]
    assert not recipe.variable or found.seconds[0] == pytest.approx(1.5)


def test_the_fast_way_finds_cuts_on_and_between_keyframes(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    still = [np.repeat(drawn_shot(rng, 1, 90, 160), count, axis=0) for count in (70, 90, 80)]
    for number, options in enumerate(([("g", "250")], [("g", "12"), ("sc_threshold", "0")])):
        path = tmp_path / f"{number}.mp4"
        write(path, np.concatenate(still), Recipe(width=160, height=90, options=(*options, ("preset", "veryfast"))))
        found = detect(path, fast=True)
        assert [item.frame for item in found.boundaries] == [70, 160]
        np.testing.assert_array_equal(found.seconds, detect(path).seconds)
    with pytest.raises(ConfigError, match="every frame"):
        detect(path, "content", fast=True)


def test_a_file_of_one_frame_has_no_boundary(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 7):
        write_video(tmp_path / "v.mp4", drawn_shot(rng, count, 36, 64), 25)
        found = detect(tmp_path / "v.mp4")
        assert (len(found.seconds), found.boundaries) == (count, ())


def test_an_unknown_detector_is_refused() -> None:
    with pytest.raises(ConfigError, match="no detector 'contents'"):
        detect(Path("v.mp4"), "contents")


SECONDS = np.arange(100) / 25 + 7


def _read(tmp_path: Path, text: str) -> list[tuple[int, int, int, str]]:
    path = tmp_path / "scenes.txt"
    path.write_text(text)
    found = read_boundaries(path, SECONDS)
    assert all(item.seconds == SECONDS[item.frame] for item in found)
    return [(item.frame, item.start_frame, item.end_frame, item.kind) for item in found]


def test_scene_lists_of_pyscenedetect_are_read(tmp_path: Path) -> None:
    head = "Scene Number,Start Frame,Start Timecode,Start Time (seconds),End Frame\n"
    table = head + "1,1,00:00:00.000,0.000,40\n2,41,00:00:01.600,1.600,100\n"
    assert _read(tmp_path, table) == [(40, 40, 40, "cut")]
    assert _read(tmp_path, "Timecode List:,00:00:01.600\n" + table) == [(40, 40, 40, "cut")]
    assert _read(tmp_path, "Start Time (seconds)\n0.0\n1.6\n") == [(40, 40, 40, "cut")]
    with pytest.raises(InputError, match="frame 400"):
        _read(tmp_path, head + "1,401,,,\n")
    with pytest.raises(InputError, match="neither"):
        _read(tmp_path, head + "1,many,,,\n")


def test_scenes_and_predictions_of_transnet_are_read(tmp_path: Path) -> None:
    assert _read(tmp_path, "0 39\n40 59\n68 99\n") == [(40, 40, 40, "cut"), (64, 60, 68, "dissolve")]
    chance = np.zeros(100)
    chance[39], chance[60:68] = 0.9, 0.8
    rows = "\n".join(f"{value:.6f} {value:.6f}" for value in chance)
    assert _read(tmp_path, rows) == [(40, 40, 40, "cut"), (64, 60, 68, "dissolve")]
    for text, message in (
        ("0.5\n0.1\n", "2 frames"),
        ("0 39\n20 99\n", "before"),
        ("0 39\n40 120\n", "frame 120"),
        ("what", "no scene"),
        ("", "no list"),
        ("1 2 3", "no scene"),
    ):
        with pytest.raises(InputError, match=message):
            _read(tmp_path, text)


def _count(folder: Path) -> Count:
    count = Count()
    for path, labels in read_labels(folder).items():
        found: Detection = detect(path)
        assert not found.damage
        count.add(found.boundaries, labels)
    return count


@needs_videos
@pytest.mark.slow
@pytest.mark.parametrize("part", labelled.OURS)
def test_real_footage_meets_the_bars(part: str, tmp_path: Path) -> None:
    build(tmp_path, part)
    count = _count(tmp_path)
    assert count.f1 >= 0.985
    assert count.precision >= 0.97
    assert count.flashes_taken == 0
    found = sum(found for found, _ in count.gradual.values())
    assert found >= 0.75 * sum(total for _, total in count.gradual.values())
    assert count.gradual["wipe"][0] >= 0.75 * count.gradual["wipe"][1]


def test_a_transition_never_reaches_beyond_the_video() -> None:
    meter = Meter()
    plane = np.full((14, 36, 64), 90, np.uint8)
    meter.add(Chunk(0, np.arange(14) / 25, np.zeros(14, np.bool_), plane, np.stack([plane[:, :18, :32]] * 2, 1), None))
    slow = Wipe(11, 6, 0.1, (0.4, 0.5, 0.6))  # half of it over at frame 11 of 14, and 24 frames long
    found, _ = decide(replace(meter.finish(), wipes=[slow]), 25.0, AutoOptions())
    assert [(item.start, item.end) for item in found] == [(1, 13)]
