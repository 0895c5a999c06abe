"""The sizes of batches, and which clip goes to which."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora_core.data import Bucket, Pace, at_rate, choose_bucket, evenly_spaced, parse_buckets, published_indices
from opensora_core.errors import ConfigError

PATCH = (1, 16, 16)


EVERY_FRAME = Pace(1)


def parse(text: str, main: tuple[int, int, int] = (16, 256, 256), **options: Any) -> list[Bucket]:
    return parse_buckets(text, main=main, **{"batch_size": 8, "tokens_per_batch": 0, "patch": PATCH} | options)


def choose(buckets: str, pace: Pace = EVERY_FRAME, **clip: Any) -> str:
    """The chosen bucket, or the reason."""
    found = parse(buckets)
    known = {"num_frames": 100, "fps": 24.0, "height": 256, "width": 256, "max_upscale": 1.0}
    index, reason = choose_bucket(found, pace, **known | clip)
    assert (index >= 0) == (reason == "")
    return str(found[index]) if index >= 0 else reason


# ---------------------------------------------------------------------- the setting


@pytest.mark.parametrize("text", ["16x256x256 1x512x512:32", "16x256x256,1x512x512:32", " 16x256x256 ,  1x512x512:32,"])
def test_sizes_are_parted_by_spaces_or_commas(text: str) -> None:
    assert parse(text) == [Bucket(16, 256, 256, 8), Bucket(1, 512, 512, 32)]


@pytest.mark.parametrize("text", ["", "  "])
def test_nothing_is_the_size_of_the_video(text: str) -> None:
    assert parse(text, main=(4, 32, 48), batch_size=3) == [Bucket(4, 32, 48, 3)]
    assert parse(text, main=(4, 32, 48), batch_size=3, tokens_per_batch=50) == [Bucket(4, 32, 48, 2)]


def test_a_batch_has_as_many_tokens_as_one_of_the_main_size() -> None:
    sizes = "16x256x256 8x256x256 1x256x256 16x512x512 16x192x336 300x512x512"
    assert [bucket.batch_size for bucket in parse(sizes)] == [8, 16, 128, 2, 8, 1]
    assert [bucket.batch_size for bucket in parse(sizes, tokens_per_batch=4096 * 3)] == [3, 6, 48, 1, 3, 1]
    # frames that a patch is not filled by take a token all the same
    assert [bucket.batch_size for bucket in parse("5x256x256 6x256x256", patch=(2, 16, 16))] == [21, 21]
    assert parse("1x512x512:3", tokens_per_batch=10**9)[0].batch_size == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("16x256", "'16x256' is no size"),
        ("16x256x256 big", "'big' is no size"),
        ("16x256x256:", "'16x256x256:' is no size"),
        ("16x256x256:-1", "'16x256x256:-1' is no size"),
        ("auto 16x256x256", "'auto' is no size"),
        ("-1x256x256", "'-1x256x256' is no size"),
        ("16x250x256", "16x250x256 is no multiple of patches of 16x16 pixels"),
        ("16x256x8", "16x256x8 is no multiple"),
        ("16x256x256:0", "16x256x256:0 is empty"),
        ("0x256x256", "0x256x256 is empty"),
        ("16x0x256", "16x0x256 is empty"),
        ("16x256x256 8x256x256 16x256x256:4", "16x256x256 is named twice"),
    ],
)
def test_what_is_no_size_is_named(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.message.startswith("data.buckets: ") and told in caught.value.message and caught.value.hint


def test_a_video_that_the_patches_do_not_divide_is_not_blamed_on_the_buckets() -> None:
    with pytest.raises(ConfigError, match=r"^video: 16x250x256 is no multiple"):
        parse("", main=(16, 250, 256))


def test_auto_has_the_usual_aspect_ratios() -> None:
    assert [str(bucket) for bucket in parse("auto")] == [
        "16x192x336",
        "16x224x288",
        "16x256x256",
        "16x288x224",
        "16x336x192",
    ]


@given(st.integers(8, 80), st.integers(8, 80), st.sampled_from([(1, 16, 16), (2, 8, 8), (1, 16, 32)]))
def test_auto_makes_different_sizes_of_about_one_area(rows: int, columns: int, patch: tuple[int, int, int]) -> None:
    main = (4, rows * patch[1], columns * patch[2])
    found = parse("auto", main=main, patch=patch)
    assert len(set(map(str, found))) == len(found) >= 3
    tokens = 2 * 8 * rows * columns if patch[0] == 2 else 4 * 8 * rows * columns
    for bucket in found:
        assert bucket.num_frames == 4 and bucket.height % patch[1] == 0 and bucket.width % patch[2] == 0
        assert bucket.height * bucket.width == pytest.approx(main[1] * main[2], rel=0.2)
        each = math.ceil(4 / patch[0]) * (bucket.height // patch[1]) * (bucket.width // patch[2])
        assert each * bucket.batch_size <= tokens < each * (bucket.batch_size + 1)
    ratios = [bucket.height / bucket.width for bucket in found]
    assert ratios == sorted(ratios) and ratios[0] < 0.75 and ratios[-1] > 1.33


# ---------------------------------------------------------------------- the choice


def test_most_frames_come_first() -> None:
    sizes = "1x512x512 8x256x256 16x128x128"
    assert choose(sizes, num_frames=100, height=512, width=512) == "16x128x128"
    assert choose(sizes, num_frames=15, height=512, width=512) == "8x256x256"
    assert choose(sizes, num_frames=7, height=512, width=512) == "1x512x512"


@pytest.mark.parametrize(
    ("height", "width", "chosen"),
    [(360, 640, "16x192x336"), (640, 360, "16x336x192"), (500, 510, "16x256x256"), (480, 640, "16x224x288")],
)
def test_then_what_cuts_least_away(height: int, width: int, chosen: str) -> None:
    names = [str(bucket) for bucket in parse("auto")]
    for order in itertools.islice(itertools.permutations(names), 0, 120, 7):
        assert choose(" ".join(order), height=height, width=width) == chosen


def test_then_the_most_pixels() -> None:
    assert choose("4x128x128 4x256x256 4x64x64", height=256, width=256) == "4x256x256"
    assert choose("4x256x256 4x64x64 4x128x128", height=255, width=255) == "4x128x128"
    assert choose("4x256x256 4x128x128", height=255, width=255, max_upscale=1.25) == "4x256x256"


@pytest.mark.parametrize(("side", "fits"), [(204, False), (205, True), (256, True), (4000, True)])
def test_a_clip_may_be_a_little_smaller_than_its_bucket(side: int, fits: bool) -> None:
    for height, width in ((side, 4000), (4000, side), (side, side)):
        found = choose("4x256x256", height=height, width=width, max_upscale=1.25)
        assert found == ("4x256x256" if fits else f"too small: {height}x{width}")


def test_reasons_say_what_is_missing() -> None:
    assert choose("16x256x256 8x256x256", Pace(3), num_frames=21) == "too short: 21 frames, 22 are needed"
    assert choose("16x256x256 1x512x512", num_frames=9, height=300, width=300) == "too small: 300x300"
    assert choose("16x256x256", num_frames=9, height=1, width=1) == "too short: 9 frames, 16 are needed"


# ---------------------------------------------------------------------- the pace


@pytest.mark.parametrize(
    ("pace", "num_frames", "fps", "span"),
    [
        (Pace(3), 16, 60.0, 46),
        (Pace(3), 1, None, 1),
        (Pace(1), 16, None, 16),
        (Pace(3, fps=8.0), 16, 24.0, 46),
        (Pace(3, fps=8.0), 16, 60.0, 114),
        (Pace(3, fps=8.0), 16, None, 16),
        (Pace(3, fps=8.0), 1, 60.0, 1),
        (Pace(3, fps=25 / 3), 16, 25.0, 46),
        (Pace(3, fps=8.0), 16, 24.0000001, 46),
        (Pace(3, squeeze=True), 16, 24.0, 16),
    ],
)
def test_a_span_is_what_the_frames_reach_over(pace: Pace, num_frames: int, fps: float | None, span: int) -> None:
    assert pace.span(num_frames, fps) == span


@given(
    st.sampled_from([Pace(3), Pace(1), Pace(3, fps=8.0), Pace(3, fps=25 / 3), Pace(4, squeeze=True)]),
    st.integers(1, 40),
    st.one_of(st.floats(5, 120), st.sampled_from([24.0, 25.0, 30000 / 1001])),
)
def test_a_clip_of_the_span_can_be_read_and_a_shorter_one_cannot(pace: Pace, num_frames: int, fps: float) -> None:
    def take(total: int) -> list[int]:
        if pace.squeeze:
            return published_indices(total, num_frames, pace.frame_interval, random.Random(0))
        if pace.fps:
            return at_rate(total, num_frames, fps, pace.fps, random.Random(0))
        return evenly_spaced(total, num_frames, pace.frame_interval, random.Random(0))

    span = pace.span(num_frames, fps)
    assert take(span)[-1] == span - 1 and take(span)[0] == 0
    with pytest.raises(Exception, match=r"the video|a video"):
        take(span - 1)
