"""One pass over a clip: what is looked at, what changes, what the codec says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora_core.errors import InputError
from opensora_core.media import Limits, read_frames
from opensora_core.media.motion import watch
from tests.core.curation.filters.drawn import letterboxed, moving, still, write

from .synthetic import write_numbered


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("motion") / "clip.mp4", moving(3, num_frames=24))


def test_frames_are_those_that_a_loader_reads(clip: Path) -> None:
    seen = watch(clip, [0, 5, 23], side=4096)
    assert (seen.num_frames, seen.height, seen.width) == (24, 144, 256)
    assert (seen.pictures == read_frames(clip, [0, 5, 23])).all()
    assert watch(clip, [0], side=64).pictures.shape == (1, 36, 64, 3)


def test_a_range_of_a_file_has_frames_of_its_own(clip: Path) -> None:
    seen = watch(clip, [0, 1], side=4096, start_seconds=0.4, end_seconds=0.6)
    assert seen.num_frames == 5 and len(seen.changes) == 4
    assert (seen.pictures == read_frames(clip, [10, 11])).all()


def test_what_stands_still_does_not_change(clip: Path, tmp_path: Path) -> None:
    frozen = watch(write(tmp_path / "still.mp4", still(), crf=28), [0], side=64)
    assert frozen.changes.max() < 0.002
    assert watch(clip, [0], side=64).changes.min() > 0.5


def test_vectors_of_the_codec_tell_how_far_the_picture_moves(clip: Path) -> None:
    seen = watch(clip, [0], side=64, vectors=True)
    assert len(seen.vectors) >= 20
    assert seen.vectors.mean() * 256 == pytest.approx(3, abs=0.3)
    assert not len(watch(clip, [0], side=64).vectors)


def test_vectors_across_b_frames_are_told_per_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(2, num_frames=24), codec="mpeg4")
    assert watch(path, [0], side=64, vectors=True).vectors.mean() * 256 == pytest.approx(2, abs=0.4)


def test_a_codec_without_vectors_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.webm"
    write_numbered(path, 8, codec="libvpx", b_frames=0)
    assert not len(watch(path, [0], side=64, vectors=True).vectors)


def test_bars_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", letterboxed(moving()))
    assert watch(path, [0, 8], side=448).crop == (24, 0, 96, 256)


def test_a_picture_has_no_time(tmp_path: Path) -> None:
    Image.fromarray(still(1)[0]).save(tmp_path / "a.png")
    seen = watch(tmp_path / "a.png", [0], side=64)
    assert not seen.has_time and not len(seen.changes) and seen.pictures.shape == (1, 36, 64, 3)


def test_what_cannot_be_seen_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which has 24 frames"):
        watch(clip, [24], side=64)
    with pytest.raises(InputError, match="max_frames=3"):
        watch(clip, [0], side=64, limits=Limits(max_frames=3))
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(clip.read_bytes()[:500])
    with pytest.raises(InputError, match="cannot read"):
        watch(torn, [0], side=64)


def test_the_result_is_the_same_every_time(clip: Path) -> None:
    one, other = (watch(clip, [0, 9], side=200, vectors=True) for _ in range(2))
    for name in ("pictures", "changes", "vectors"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
