"""Copies are found whatever became of them, and what only looks a little alike is not one."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from opensora_core.config import FilterConfig
from opensora_core.curation.filters import Index
from opensora_core.curation.filters.copies import bits_of, fingerprint, most_bits, picture_hash, signature
from opensora_core.curation.filters.look import Place, look_at
from opensora_core.errors import InputError

from .drawn import blurred, moving, write

VIDEOS = Path(__file__).parents[5] / "shared" / "videos"
SIZE = 320


def code_of(path: Path, num_frames: int | None = None) -> int:
    return signature(look_at(Place(path, num_frames), FilterConfig()))


def random_codes(count: int, seed: int = 0) -> list[int]:
    random = np.random.default_rng(seed)
    return [int.from_bytes(random.bytes(SIZE // 8), "big") for _ in range(count)]


def changed(code: int, num_bits: int, seed: int) -> int:
    places = np.random.default_rng(seed).choice(SIZE, num_bits, replace=False)
    return code ^ sum(1 << int(place) for place in places)


def test_copies_of_another_quality_and_size_are_near(tmp_path: Path) -> None:
    first = code_of(write(tmp_path / "a.mp4", moving()))
    for number, changes in enumerate(({"crf": 36}, {"size": (72, 128)}, {"size": (288, 512), "crf": 30})):
        copy = code_of(write(tmp_path / f"{number}.mp4", moving(), **changes))  # type: ignore[arg-type]
        assert (first ^ copy).bit_count() <= most_bits(FilterConfig(min_copy_bits=4)), changes
    assert (first ^ code_of(write(tmp_path / "b.mp4", blurred(moving())))).bit_count() < 20
    assert (first ^ code_of(write(tmp_path / "c.mp4", moving(seed=1)))).bit_count() > 80


def test_a_picture_with_nothing_in_it_has_no_hash() -> None:
    assert picture_hash(np.full((64, 64), 90, np.uint8)) == 0
    assert picture_hash(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)) != 0


@pytest.mark.parametrize("most", [0, 19, 20, 39, 45])
def test_the_index_misses_nothing(most: int) -> None:
    codes = random_codes(300)
    near = [changed(code, (number * 7) % (most + 6), number) for number, code in enumerate(codes)]
    index = Index(most)
    for number, code in enumerate(codes):
        index.add(code, number)
    for query in near:
        plain = [((query ^ code).bit_count(), number) for number, code in enumerate(codes)]
        assert list(index.near(query)) == [item for item in plain if item[0] <= most]


def test_pictures_with_nothing_in_them_do_not_hide_copies() -> None:
    index, code = Index(19), random_codes(1)[0]
    flat = code & ~((1 << 128) - 1)  # two of five pictures
    index.add(flat, 0)
    assert [bits for bits, _ in index.near(flat ^ (1 << 140) ^ (1 << 300))] == [2]
    assert not list(index.near(0))


@pytest.mark.slow
def test_a_hundred_thousand_clips_are_indexed_in_seconds() -> None:
    codes, index = random_codes(100_000), Index(19)
    began = time.perf_counter()
    for number, code in enumerate(codes):
        assert not list(index.near(code))
        index.add(code, number)
    assert time.perf_counter() - began < 60
    sample = np.random.default_rng(1).choice(len(codes), 50, replace=False)
    for number in sample.tolist():
        query = changed(codes[number], 15, number)
        plain = [(bits, other) for other, code in enumerate(codes) if (bits := (query ^ code).bit_count()) <= 19]
        assert list(index.near(query)) == plain == [(15, number)]


def test_fingerprints_of_like_embeddings_are_near() -> None:
    random = np.random.default_rng(0)
    most, found = bits_of(0.97), []
    for _ in range(200):
        one, noise = random.standard_normal((2, 512))
        noise -= one * (one @ noise) / (one @ one)
        other = 0.97 * one / np.linalg.norm(one) + np.sqrt(1 - 0.97**2) * noise / np.linalg.norm(noise)
        found.append((fingerprint(one.astype(np.float32)) ^ fingerprint(other.astype(np.float32))).bit_count())
    assert np.mean(np.array(found) <= most) > 0.98 and most < 60


@pytest.mark.slow
@pytest.mark.skipif(not VIDEOS.is_dir(), reason="the videos are not here")
def test_real_videos_are_no_copies_of_each_other() -> None:
    codes = {}
    for path in sorted(VIDEOS.iterdir()):
        if path.suffix in (".mp4", ".mkv", ".webm") and path.stat().st_size < 2_000_000:
            try:
                codes[path.name] = code_of(path)
            except InputError:
                continue
    most = most_bits(FilterConfig(min_copy_bits=4))
    names = sorted(name for name, code in codes.items() if code)
    pairs = {
        (one, other)
        for number, one in enumerate(names)
        for other in names[number + 1 :]
        if (codes[one] ^ codes[other]).bit_count() <= most
    }
    assert len(names) > 20
    assert pairs <= TWINS, pairs - TWINS


TWINS = {
    ("mdn_flower.mp4", "mdn_flower.webm"),
    ("mdn_crystal.mp4", "mdn_crystal.webm"),
    ("tc_h264_10bits.mp4", "tc_h265_10bits.mp4"),
}
"""Videos that are the same in two formats."""


def test_a_code_that_is_nearly_empty_is_compared_with_all() -> None:
    index, code = Index(19), 0x0123_4567_89AB_CDEF  # one picture of five shows something
    index.add(code, 7)
    flipped = code ^ 0x001F_001F_001F_000F  # five bits of each part but one: 19 of 64
    assert list(index.near(flipped)) == [(19, 7)]
