"""Which clips of a manifest are trained on, and why the others are not."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opensora_core.data import Bucket, Clip, Manifest, Pace, read_manifest, write_clips
from opensora_core.data.survey import Looked, Survey, sort_into_buckets, survey
from opensora_core.files import sha256
from opensora_core.media import write_video

EVERY_OTHER = Pace(2)
BUCKETS = (Bucket(4, 32, 48, 2), Bucket(1, 32, 32, 8))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos and a picture, all of other bytes: 9 frames at 8, 5 frames at 16 frames per second."""
    folder = tmp_path_factory.mktemp("source")
    for name, num_frames, fps in (("long.mp4", 9, 8), ("short.mp4", 5, 16)):
        colours = np.random.default_rng(fps).integers(0, 255, (num_frames, 1, 1, 3), np.uint8)
        write_video(folder / name, np.broadcast_to(colours, (num_frames, 40, 56, 3)).copy(), fps)
    Image.new("RGB", (56, 40), "red").save(folder / "picture.png")
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return tmp_path


def look(
    clips: Iterable[Clip],
    folder: Path,
    *,
    pace: Pace = EVERY_OTHER,
    buckets: tuple[Bucket, ...] = BUCKETS,
    **options: Any,
) -> Survey:
    manifest = clips if isinstance(clips, Manifest) else Manifest.of(clips, folder=folder)
    looking = survey(manifest, buckets, pace, **{"max_upscale": 1.0, "need_caption": True, "num_threads": 2} | options)
    while True:
        try:
            next(looking)
        except StopIteration as end:
            found: Survey = end.value
            return found


def reasons(found: Survey) -> list[str]:
    return [clip.reason for clip in found.manifest]


def counted(path: Path, **fields: Any) -> Clip:
    """A row that needs no opening."""
    return Clip(path, **{"caption": "a", "num_frames": 9, "fps": 8.0, "width": 56, "height": 40} | fields)


def test_clips_without_counts_are_decoded(folder: Path) -> None:
    found = look([Clip(folder / name, "a") for name in ("long.mp4", "short.mp4", "picture.png")], folder)
    assert [(clip.num_frames, clip.fps, clip.width, clip.height) for clip in found.manifest] == [
        (9, pytest.approx(8), 56, 40),
        (5, pytest.approx(16), 56, 40),
        (1, 1, 56, 40),
    ]
    assert [clip.duration_seconds for clip in found.manifest] == pytest.approx([9 / 8, 5 / 16, 1])
    assert found.members == ((0,), (1, 2)) and found.num_usable == 3 and not found.reasons
    assert found.share_unreadable == 0 and list(found.rejects()) == []


def test_a_range_is_counted_as_a_clip_of_its_own(folder: Path) -> None:
    path = folder / "long.mp4"
    clips = [Clip(path, "a", start_seconds=0.25, end_seconds=0.75), Clip(path, "a", start_seconds=0.75)]
    found = look(clips, folder)
    assert [clip.num_frames for clip in found.manifest] == [4, 3] and found.members == ((), (0, 1))


def test_counts_of_a_row_are_trusted_and_the_file_is_not_opened(folder: Path) -> None:
    path = folder / "nonsense.mp4"
    path.write_bytes(b"nonsense")
    found = look([counted(path, num_frames=50)], folder)
    assert found.members == ((0,), ()) and found.manifest[0].num_frames == 50
    for lacking in ("num_frames", "width", "height"):
        assert look([counted(path, **{lacking: None})], folder).reasons == {"unreadable": 1}


def test_a_rate_is_looked_up_where_the_speed_depends_on_it(folder: Path) -> None:
    clip = counted(folder / "short.mp4", num_frames=5, fps=None)
    assert look([clip], folder).manifest[0].fps is None
    found = look([clip], folder, pace=Pace(2, fps=8.0))
    assert found.manifest[0].fps == pytest.approx(16) and found.members == ((), (0,))
    nonsense = folder / "nonsense.png"
    nonsense.write_bytes(b"nonsense")
    assert look([counted(nonsense, num_frames=1, fps=None)], folder, pace=Pace(2, fps=8.0)).members == ((), (0,))


def test_missing_and_broken_files_are_unreadable_and_nothing_else_suffers(folder: Path) -> None:
    torn = folder / "torn.mp4"
    torn.write_bytes((folder / "long.mp4").read_bytes()[:400])
    (folder / "a folder.mp4").mkdir()
    names = ("missing.mp4", "torn.mp4", "a folder.mp4", "x" * 300 + ".mp4", "long.mp4")
    found = look([Clip(folder / name, "a") for name in names], folder)
    assert found.reasons == {"unreadable": 4} and found.members == ((4,), ()) and found.share_unreadable == 0.8
    assert reasons(found)[0] == "unreadable: there is no such file"
    assert reasons(found)[1].startswith("unreadable: ") and "torn.mp4" in reasons(found)[1]
    assert [name for name, _ in found.rejects()] == list(names[:4])
    assert look([counted(folder / "missing.mp4")], folder).reasons == {"unreadable": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_file_that_may_not_be_read_is_unreadable(folder: Path) -> None:
    for name in ("one.mp4", "two.mp4"):  # of one size, so that they are compared
        (folder / name).write_bytes(b"0123")
        (folder / name).chmod(0)
    assert look([Clip(folder / name, "a") for name in ("one.mp4", "two.mp4")], folder).reasons == {"unreadable": 2}


@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_clips_without_words_are_left_out_unless_none_are_needed(caption: str | None, folder: Path) -> None:
    clips = [Clip(folder / "long.mp4", caption), Clip(folder / "missing.mp4", caption)]
    found = look(clips, folder)
    assert reasons(found) == ["no caption", "no caption"] and found.reasons == {"no caption": 2}
    assert look(clips, folder, need_caption=False).members == ((0,), ())


# ---------------------------------------------------------------------- copies


def test_the_same_range_of_the_same_file_is_a_copy(folder: Path) -> None:
    path = folder / "long.mp4"
    clips = [
        *(counted(path, caption=caption) for caption in "ab"),
        counted(folder / "sub" / ".." / "long.mp4"),
        *(counted(path, start_seconds=0.0, end_seconds=end) for end in (0.5, 1.0, 0.5)),
    ]
    found = look(clips, folder)
    assert reasons(found) == [
        "",
        "duplicate: the same as long.mp4",
        "duplicate: the same as long.mp4",
        "",
        "",
        "duplicate: the same as long.mp4#0-0.5",
    ]
    assert found.members == ((0, 3, 4), ()) and found.reasons == {"duplicate": 3}


def test_other_files_of_the_same_bytes_are_copies(folder: Path) -> None:
    for name in ("copy.mp4", "again.mp4"):
        shutil.copy(folder / "long.mp4", folder / name)
    other = bytearray((folder / "long.mp4").read_bytes())
    other[-1] ^= 1
    (folder / "other.mp4").write_bytes(other)  # of the same size
    clips = [counted(folder / name) for name in ("long.mp4", "other.mp4", "copy.mp4", "again.mp4", "short.mp4")]
    found = look(clips, folder)
    assert found.members == ((0, 1, 4), ())
    assert list(found.rejects()) == [(name, "duplicate: the same as long.mp4") for name in ("copy.mp4", "again.mp4")]
    ranges = [replace(clip, start_seconds=0.0, end_seconds=1.0 + number) for number, clip in enumerate(clips)]
    assert reasons(look(ranges, folder)) == [""] * 5


def test_a_known_sum_is_believed_and_not_computed(folder: Path) -> None:
    clips = [counted(folder / name, sha256=sums) for name, sums in (("long.mp4", "ab" * 32), ("short.mp4", "AB" * 32))]
    assert look(clips, folder).members == ((0,), ())
    different = [clips[0], counted(shutil.copy(folder / "long.mp4", folder / "copy.mp4"), sha256="cd" * 32)]
    assert look(different, folder).members == ((0, 1), ())


@pytest.mark.parametrize("known", [0, 1])
def test_a_copy_is_found_where_only_one_row_has_a_sum(known: int, folder: Path) -> None:
    shutil.copy(folder / "long.mp4", folder / "copy.mp4")
    clips = [counted(folder / name) for name in ("long.mp4", "copy.mp4")]
    clips[known] = replace(clips[known], sha256=sha256(clips[known].path))
    assert look(clips, folder).members == ((0,), ())


def test_a_row_that_is_left_out_does_not_take_its_copies_with_it(folder: Path) -> None:
    shutil.copy(folder / "long.mp4", folder / "copy.mp4")
    for first in (counted(folder / "long.mp4", status="rejected"), counted(folder / "long.mp4", caption=None)):
        for second in ("long.mp4", "copy.mp4"):
            assert look([first, counted(folder / second)], folder).members == ((1,), ())


# ---------------------------------------------------------------------- what was found before


def test_what_curation_decided_stands(folder: Path) -> None:
    clips = [
        counted(folder / "long.mp4", status="rejected", reason="too dark: 3 of 255"),
        counted(folder / "short.mp4", status="rejected"),
        counted(folder / "picture.png", status="ok", num_frames=1),
    ]
    found = look(clips, folder)
    assert [clip.status for clip in found.manifest] == ["rejected", "rejected", "ok"]
    assert reasons(found) == ["too dark: 3 of 255", "", ""]
    assert found.reasons == {"too dark": 1, "rejected": 1}
    assert dict(found.rejects()) == {"long.mp4": "too dark: 3 of 255", "short.mp4": "rejected"}


def test_what_a_survey_left_out_is_judged_anew_by_the_next(folder: Path) -> None:
    clips = [Clip(folder / name, "a") for name in ("long.mp4", "short.mp4", "late.mp4")]
    strict = look(clips, folder, buckets=BUCKETS[:1])
    assert strict.members == ((0,),) and strict.reasons == {"too short": 1, "unreadable": 1}
    assert reasons(strict)[1] == "too short: 5 frames, 7 are needed"
    shutil.copy(folder / "long.mp4", folder / "late.mp4")
    other = look(strict.manifest, folder, pace=Pace(1))
    assert other.members == ((0, 1), ()) and other.manifest[1].status == ""
    assert other.reasons == {"duplicate": 1}


def test_too_short_and_too_small_are_counted_apart(folder: Path) -> None:
    clips = [
        counted(folder / "long.mp4", num_frames=6),
        counted(folder / "short.mp4", width=47),
        counted(folder / "picture.png", height=31),
    ]
    found = look(clips, folder, buckets=BUCKETS[:1])
    assert found.reasons == {"too short": 1, "too small": 2}
    assert reasons(found)[1:] == ["too small: 40x47", "too small: 31x56"]
    assert look(clips, folder, buckets=BUCKETS[:1], max_upscale=1.05).reasons == {"too short": 1}


# ---------------------------------------------------------------------- the whole


def many(folder: Path) -> list[Clip]:
    """Clips of every kind, in an order that mixes those that are opened with those that are not."""
    clips: list[Clip] = []
    for number in range(30):
        name = ("long.mp4", "short.mp4", "picture.png")[number % 3]
        path = folder / f"{number}-{name}"
        path.write_bytes((folder / name).read_bytes() + (b"" if name == "picture.png" else bytes(number)))
        known: dict[str, Any] = {"num_frames": 6 + number, "fps": 24000 / 1001, "width": 56, "height": 40}
        clips.append(Clip(path, None if number % 7 == 6 else "a", **known if number % 4 == 0 else {}))
    clips[5] = replace(clips[5], path=folder / "missing.mp4")
    clips[9] = replace(clips[9], status="rejected", reason="blurred")
    return [*clips, clips[3], replace(clips[1], start_seconds=0.1)]


def test_the_result_does_not_depend_on_threads(folder: Path) -> None:
    clips = many(folder)
    found = [look(clips, folder, num_threads=count) for count in (1, 2, 7)]
    for other in found[1:]:
        assert list(other.manifest) == list(found[0].manifest)
        assert (other.members, other.reasons) == (found[0].members, found[0].reasons)
    assert found[0].reasons.keys() == {"unreadable", "no caption", "duplicate", "blurred"}
    assert sum(found[0].reasons.values()) + found[0].num_usable == len(clips)
    assert all(len(indices) > 3 and list(indices) == sorted(indices) for indices in found[0].members)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("pace", [Pace(2), Pace(2, fps=8.0), Pace(2, squeeze=True)])
def test_a_manifest_that_was_written_down_gives_the_same_buckets(suffix: str, pace: Pace, folder: Path) -> None:
    found = look(many(folder), folder, pace=pace)
    kept = folder / "run" / f"clips{suffix}"
    write_clips(found.manifest, kept)
    for path in folder.glob("*.*"):
        path.unlink()  # no file is looked at
    again = read_manifest(kept)
    assert sort_into_buckets(again, BUCKETS, pace, 1.0) == found.members
    assert list(again) == list(found.manifest)


def test_progress_is_told_and_whoever_stops_listening_is_not_kept_waiting(folder: Path) -> None:
    missing = [Clip(folder / f"{number}.mp4", "a") for number in range(200)]
    options = {"max_upscale": 1.0, "need_caption": True, "num_threads": 2}
    manifest = Manifest.of(missing, folder=folder)
    assert list(survey(manifest, BUCKETS, Pace(2), **options)) == [Looked(done, 200) for done in (64, 128, 192)]
    before = threading.active_count()
    looking = survey(manifest, BUCKETS, Pace(2), **options)
    next(looking)
    looking.close()
    assert threading.active_count() == before


def test_no_clips_are_no_clips(folder: Path) -> None:
    found = look([], folder)
    assert found.members == ((), ()) and found.num_usable == 0 and found.share_unreadable == 0
