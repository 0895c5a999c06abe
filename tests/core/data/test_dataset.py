"""Clips become batches: frames drawn and fitted as asked for, and what stands in for those that are broken."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from opensora_core.data import (
    Batches,
    BatchOrder,
    Bucket,
    CachedClips,
    Choice,
    Clip,
    ClipBatch,
    ClipReader,
    Manifest,
    Pace,
    fit_video,
)
from opensora_core.data.cache import Cache
from opensora_core.data.keys import caption_key
from opensora_core.errors import InputError
from opensora_core.media import read_frames
from opensora_core.tensors import Condition
from tests.core.media.synthetic import numbers, picture, write_numbered

VIDEO, IMAGE = Bucket(4, 48, 64, 3), Bucket(1, 36, 48, 2)
NUM_CLIPS = 5


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Clips of 20 numbered frames at 25 frames per second, 72 x 96; the last one is a picture that shows a 5."""
    folder = tmp_path_factory.mktemp("clips")
    clips = []
    for number in range(NUM_CLIPS):
        path = folder / f"{number}.mp4"
        write_numbered(path, 20, options={"crf": "10"})
        clips.append(Clip(path, f"clip {number}", num_frames=20, fps=25.0, width=96, height=72))
    Image.fromarray(picture(5)).save(folder / "5.png")
    clips.append(Clip(folder / "5.png", "a picture", num_frames=1, fps=1.0, width=96, height=72))
    return Manifest.of(clips, folder=folder)


def reader(manifest: Manifest, **options: Any) -> ClipReader:
    known: dict[str, Any] = {
        "buckets": (VIDEO, IMAGE),
        "pace": Pace(3),
        "resize": "antialiased",
        "flip": "unless-sided",
        "seed": 1,
    }
    return ClipReader(manifest, **known | options)


def batches(manifest: Manifest, members: tuple[range, range] = (range(NUM_CLIPS), range(0)), **options: Any) -> Batches:
    return Batches(reader(manifest, **options), BatchOrder(members, [VIDEO.batch_size, IMAGE.batch_size], 1))


def equal(one: ClipBatch, other: ClipBatch) -> bool:
    assert one.pixels is not None and other.pixels is not None
    return replace(one, pixels=None) == replace(other, pixels=None) and torch.equal(one.pixels, other.pixels)


def without(manifest: Manifest, broken: set[int], folder: Path) -> Manifest:
    """The same clips with some of the files torn or gone."""
    clips = []
    for number, clip in enumerate(manifest):
        path = folder / clip.path.name
        if number not in broken:
            path.symlink_to(clip.path)
        elif number % 2:
            path.write_bytes(clip.path.read_bytes()[:500])
        clips.append(replace(clip, path=path))
    return Manifest.of(clips, folder=folder)


# ---------------------------------------------------------------------- what is drawn


def test_a_choice_is_a_function_of_seed_epoch_and_clip(manifest: Manifest) -> None:
    clip, seen = replace(manifest[0], num_frames=10_000), []
    for seed in (1, 2):
        for epoch in (0, 1, 11):
            for index in (0, 1, 10):
                random.seed(len(seen))
                choice = reader(manifest, seed=seed).choose(clip, VIDEO, epoch, index)
                assert choice == reader(manifest, seed=seed).choose(clip, VIDEO, epoch, index)
                seen.append(choice.indices)
    assert len(set(seen)) == len(seen)


def test_the_choice_of_a_clip_is_pinned(manifest: Manifest) -> None:
    """Caches and runs of an earlier release are gone on with."""
    choice = reader(manifest).choose(replace(manifest[0], num_frames=1000), VIDEO, 2, 3)
    assert (choice.indices, choice.flip) == ((544, 547, 550, 553), True)


def test_frames_are_exactly_apart_and_begin_anywhere(manifest: Manifest) -> None:
    begins = set()
    for epoch in range(80):
        begin, *rest = reader(manifest).choose(manifest[0], VIDEO, epoch, 0).indices
        assert rest == [begin + 3, begin + 6, begin + 9]
        begins.add(begin)
    assert begins == set(range(11))


def test_the_pace_decides_which_frames(manifest: Manifest) -> None:
    clip = replace(manifest[0], num_frames=10)
    assert reader(manifest, pace=Pace(3)).choose(clip, VIDEO, 0, 0).indices == (0, 3, 6, 9)
    assert reader(manifest, pace=Pace(3, squeeze=True)).choose(clip, VIDEO, 0, 0).indices == (0, 3, 6, 9)
    assert reader(manifest, pace=Pace(9, squeeze=True)).choose(clip, VIDEO, 0, 0).indices == (0, 3, 6, 9)
    fast = reader(manifest, pace=Pace(3, fps=12.5))
    assert np.diff(fast.choose(clip, VIDEO, 0, 0).indices).tolist() == [2, 2, 2]
    assert np.diff(fast.choose(replace(clip, fps=None), VIDEO, 0, 0).indices).tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="the video has 9"):
        reader(manifest).choose(replace(clip, num_frames=9), VIDEO, 0, 0)


def test_a_picture_is_any_frame_of_a_clip(manifest: Manifest) -> None:
    for pace in (Pace(3), Pace(3, squeeze=True), Pace(3, fps=8.0)):
        chosen = {reader(manifest, pace=pace).choose(manifest[0], IMAGE, epoch, 0).indices for epoch in range(200)}
        assert chosen == {(index,) for index in range(20)}


def share_of_flips(manifest: Manifest, caption: str | None, flip: str) -> float:
    clip = replace(manifest[0], caption=caption)
    return sum(reader(manifest, flip=flip).choose(clip, VIDEO, epoch, 0).flip for epoch in range(200)) / 200


@pytest.mark.parametrize(
    "caption",
    [
        "a car turns left",
        "Left of the house, a tree",
        "a Right-hand drive",
        "a lefthanded batter",
        "the right-handed one",
        "the LEFTMOST cup",
        "it moves rightwards.",
        "rightward",
        "turn_left",
        "swipe (right)",
        "left2",
        "un virage, left",
    ],
)
def test_a_clip_whose_caption_names_a_side_is_never_mirrored(caption: str, manifest: Manifest) -> None:
    assert share_of_flips(manifest, caption, "unless-sided") == 0
    assert share_of_flips(manifest, caption, "never") == 0
    assert 0.3 < share_of_flips(manifest, caption, "always") < 0.7


@pytest.mark.parametrize("caption", ["leftover rice", "a bright light", "upright", "cleft", "copyright", "", None])
def test_half_of_the_others_are(caption: str | None, manifest: Manifest) -> None:
    assert 0.3 < share_of_flips(manifest, caption, "unless-sided") < 0.7
    assert share_of_flips(manifest, caption, "never") == 0


def test_whether_it_is_mirrored_does_not_change_which_frames_are_drawn(manifest: Manifest) -> None:
    for epoch in range(20):
        chosen = [reader(manifest, flip=flip).choose(manifest[0], VIDEO, epoch, 0) for flip in ("never", "always")]
        assert chosen[0].indices == chosen[1].indices


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("resize", ["antialiased", "published"])
def test_the_frames_that_were_drawn_are_read(resize: str, manifest: Manifest) -> None:
    clips = reader(manifest, resize=resize)
    for epoch in range(3):
        choice = replace(clips.choose(manifest[0], VIDEO, epoch, 0), flip=False)
        pixels = clips.read(manifest[0], VIDEO, choice)[None]
        video = ClipBatch(VIDEO, ("a",), ("",), pixels=pixels).video(torch.device("cpu"))
        assert video.shape == (1, 3, 4, 48, 64) and video.dtype == torch.float32
        shown = ((video[0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255).numpy().astype(np.uint8)
        assert tuple(numbers(shown)) == choice.indices


def test_the_published_resize_is_that_of_the_published_code(manifest: Manifest) -> None:
    clips = reader(manifest, resize="published", flip="always")
    for epoch in range(4):
        choice = clips.choose(manifest[0], VIDEO, epoch, 0)
        frames = torch.from_numpy(read_frames(manifest[0].path, choice.indices)).permute(0, 3, 1, 2)
        expected = fit_video(frames, 48, 64, flip=choice.flip)
        found = clips.read(manifest[0], VIDEO, choice)
        assert found.shape == (4, 3, 48, 64) and found.dtype == torch.float32 and torch.equal(found, expected)


def test_the_antialiased_resize_is_that_of_the_media_room(manifest: Manifest) -> None:
    clips = reader(manifest, flip="always")
    flips = set()
    for epoch in range(6):
        choice = clips.choose(manifest[0], VIDEO, epoch, 0)
        expected = read_frames(manifest[0].path, choice.indices, height=48, width=64)
        found = clips.read(manifest[0], VIDEO, choice)
        assert found.shape == (4, 48, 64, 3) and found.dtype == torch.uint8
        assert np.array_equal(found.numpy(), expected[:, :, ::-1] if choice.flip else expected)
        flips.add(choice.flip)
    assert flips == {False, True}


@pytest.mark.parametrize("resize", ["antialiased", "published"])
def test_pictures_are_clips_of_one_frame(resize: str, manifest: Manifest) -> None:
    made = batches(manifest, (range(0), range(5, 6)), resize=resize)
    video = made.batch(3).video(torch.device("cpu"))
    assert video.shape == (2, 3, 1, 36, 48)
    upright = replace(made.reader.choose(manifest[5], IMAGE, 0, 5), flip=False)
    pixels = made.reader.read(manifest[5], IMAGE, upright)
    shown = pixels if resize == "antialiased" else ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).to(torch.uint8)
    assert numbers(shown.numpy()) == [5]


def test_both_kinds_of_pixels_become_the_same_video() -> None:
    pixels = torch.randint(0, 256, (2, 4, 6, 8, 3), dtype=torch.uint8)
    pixels[0, 0, 0, 0] = torch.tensor([0, 255, 51])
    fitted = torch.stack([fit_video(clip.movedim(-1, 1), 6, 8) for clip in pixels])
    videos = [ClipBatch(VIDEO, (), (), pixels=kind).video(torch.device("cpu")) for kind in (pixels, fitted)]
    for video in videos:
        assert video.shape == (2, 3, 4, 6, 8) and video.dtype == torch.float32 and video.abs().max() <= 1
        torch.testing.assert_close(video[0, :, 0, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    torch.testing.assert_close(*videos)


# ---------------------------------------------------------------------- batches


def test_a_batch_has_the_clips_of_its_step_in_their_order(manifest: Manifest) -> None:
    made = batches(manifest)
    for step in range(6):
        batch, slots = made.batch(step), made.order.batch(step)
        assert batch.ids == tuple(f"{slot.index}.mp4" for slot in slots)
        assert batch.captions == tuple(f"clip {slot.index}" for slot in slots)
        assert batch.bucket == VIDEO and not batch.rejects and not batch.is_hopeless
        assert batch.pixels is not None
        for slot, pixels in zip(slots, batch.pixels, strict=True):
            choice = made.reader.choose(manifest[slot.index], VIDEO, slot.epoch, slot.index)
            shown = pixels.flip(2) if choice.flip else pixels
            assert tuple(numbers(shown.numpy())) == choice.indices


def test_a_clip_without_words_has_an_empty_caption(manifest: Manifest) -> None:
    wordless = Manifest.of([replace(clip, caption=None) for clip in manifest], folder=manifest.folder)
    assert batches(wordless).batch(0).captions == ("", "", "")


def test_the_next_of_the_order_stands_in_for_a_broken_clip(manifest: Manifest, tmp_path: Path) -> None:
    made = batches(without(manifest, {1, 2}, tmp_path))
    told = set()
    for step in range(10):
        batch = made.batch(step)
        expected, rejected = [], []
        for slot in made.order.batch(step):
            while slot.index in (1, 2):
                rejected.append(f"{slot.index}.mp4")
                slot = made.order.next_in_order(slot)  # noqa: PLW2901
            expected.append(f"{slot.index}.mp4")
        assert batch.ids == tuple(expected) and not batch.is_hopeless
        assert [reject.clip for reject in batch.rejects] == list(dict.fromkeys(rejected))
        assert all(reject.clip in reject.reason for reject in batch.rejects)
        assert batch.pixels is not None and len(batch.pixels) == 3
        told.update(reject.clip for reject in batch.rejects)
    assert told == {"1.mp4", "2.mp4"}


def test_stand_ins_do_not_depend_on_what_was_asked_before(manifest: Manifest, tmp_path: Path) -> None:
    broken = without(manifest, {0, 1, 3}, tmp_path)
    forwards = [batches(broken).batch(step) for step in range(8)]
    wandering = batches(broken)
    for step in (7, 2, 5, 2, 0, 6, 1, 3, 4):
        assert equal(wandering.batch(step), forwards[step])


@pytest.mark.parametrize("whole", range(NUM_CLIPS))
def test_the_only_whole_clip_is_found_wherever_the_walk_begins(whole: int, manifest: Manifest, tmp_path: Path) -> None:
    made = batches(without(manifest, set(range(NUM_CLIPS)) - {whole}, tmp_path))
    for step in range(12):
        batch = made.batch(step)
        assert batch.ids == (f"{whole}.mp4",) * 3 and not batch.is_hopeless


def test_a_bucket_of_broken_clips_is_hopeless_and_the_others_are_not(manifest: Manifest, tmp_path: Path) -> None:
    made = batches(without(manifest, {0, 1, 2}, tmp_path), (range(3), range(3, 6)))
    for step in range(6):
        batch = made.batch(step)
        if batch.bucket == VIDEO:
            assert batch.is_hopeless and batch.ids == () and batch.pixels is None
            assert {reject.clip for reject in batch.rejects} == {"0.mp4", "1.mp4", "2.mp4"}
        else:
            assert not batch.is_hopeless and not batch.rejects and len(batch.ids) == 2
    assert {made.order.batch(step)[0].bucket for step in range(6)} == {0, 1}


class Steps(Dataset[ClipBatch]):
    """What a loader of a run reads."""

    def __init__(self, made: Batches, count: int) -> None:
        self.made, self.count = made, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> ClipBatch:
        return self.made.batch(step)


def test_batches_are_the_same_after_pickling(manifest: Manifest) -> None:
    made = batches(manifest, (range(4), range(4, 6)))
    copy = pickle.loads(pickle.dumps(made))
    assert all(equal(copy.batch(step), made.batch(step)) for step in range(4))


def test_workers_that_are_spawned_make_the_same_batches(manifest: Manifest) -> None:
    made = batches(manifest, (range(4), range(4, 6)))
    loader = DataLoader(Steps(made, 3), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert all(equal(batch, made.batch(step)) for step, batch in enumerate(loader))


# ---------------------------------------------------------------------- from the cache


def mark(number: int, choice: Choice) -> float:
    return 1000.0 * number + 2 * choice.indices[0] + choice.flip


def cached(manifest: Manifest, folder: Path, numbers: range, variants: int = 1) -> Batches:
    """Batches of moments that tell which clip and which choice of frames they are of."""
    made = batches(manifest)
    cache = Cache(folder, torch.float32)
    clips = CachedClips(cache, "vae", "text", [str(number) * 64 for number in range(len(manifest))], variants)
    for number in numbers:
        clip = manifest[number]
        for variant in range(variants):
            choice = made.reader.choose(clip, VIDEO, variant, number)
            moments = torch.full((1, 4, 4, 6, 8), mark(number, choice))
            cache.put_latents(clips.key(made.reader, clip, VIDEO, number, choice), moments, moments + 0.5)
        cache.put_caption(caption_key(clip.caption or "", "text"), Condition(torch.full((1, 2, 8), float(number))))
    cache.flush()
    return Batches(made.reader, made.order, clips)


def test_a_cached_batch_has_what_the_encoders_made_of_its_clips(manifest: Manifest, tmp_path: Path) -> None:
    made = pickle.loads(pickle.dumps(cached(manifest, tmp_path, range(NUM_CLIPS), variants=2)))
    for step in range(6):
        batch, slots = made.batch(step), made.order.batch(step)
        assert batch.pixels is None and batch.moments is not None and batch.condition is not None
        mean, std = batch.moments
        assert mean.shape == std.shape == (3, 4, 4, 6, 8) and batch.condition.tokens.shape == (3, 2, 8)
        choices = [made.reader.choose(manifest[slot.index], VIDEO, slot.epoch % 2, slot.index) for slot in slots]
        marks = [mark(slot.index, choice) for slot, choice in zip(slots, choices, strict=True)]
        assert mean[:, 0, 0, 0, 0].tolist() == marks
        assert torch.equal(std, mean + 0.5)
        assert batch.condition.tokens[:, 0, 0].tolist() == [slot.index for slot in slots]


def test_a_clip_that_the_cache_lacks_is_broken(manifest: Manifest, tmp_path: Path) -> None:
    made = cached(manifest, tmp_path, range(1, NUM_CLIPS))
    told = {reject for step in range(4) for reject in made.batch(step).rejects}
    assert {reject.clip for reject in told} == {"0.mp4"} and all("not in the cache" in reject.reason for reject in told)
    assert all("0.mp4" not in made.batch(step).ids for step in range(4))
    assert cached(manifest, tmp_path / "empty", range(0)).batch(0).is_hopeless
