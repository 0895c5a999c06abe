"""Golden cases of the data room."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from opensora_core.data import epoch_order, fit_image, fit_video, normalise, published_crop, published_indices
from opensora_core.data.transforms import image_pixels
from opensora_core.errors import InputError
from tests.golden.case import Case


class Extreme(random.Random):
    """A generator that always draws the lowest, or always the highest, of the range it is asked for."""

    def __init__(self, highest: bool) -> None:
        super().__init__()
        self.highest = highest

    def randint(self, a: int, b: int) -> int:
        return b if self.highest else a


def check_frames(case: Case) -> None:
    names = ("total_frames", "num_frames", "frame_interval")
    for entry in case.config["cases"]:
        video: Any = [entry[name] for name in names]
        if not entry["accepted"]:
            with pytest.raises(InputError):
                published_indices(*video, random.Random(entry["python_random_seed"]))
            continue
        crop = published_crop(*video, random.Random(entry["python_random_seed"]))
        assert (crop.start, crop.stop) == (entry["begin"], entry["end"]), entry
        assert published_indices(*video, random.Random(entry["python_random_seed"])) == entry["indices"], entry
    for entry in case.config["begin_ranges"]:
        video = [entry[name] for name in names]
        if entry["total_frames"] >= entry["num_frames"]:
            assert published_crop(*video, Extreme(highest=False)).start == entry["begin_min"], entry
            assert published_crop(*video, Extreme(highest=True)).start == entry["begin_max"], entry


def check_order(case: Case) -> None:
    for entry in case.config["cases"]:
        settings = {"rank": entry["rank"], "world_size": entry["replicas"], "shuffle": entry["shuffle"]}
        settings |= {"epoch": entry["epoch"], "seed": entry.get("seed", 0)}
        assert len(epoch_order(entry["n"], **settings)) == entry["len_before"], entry
        rest = epoch_order(entry["n"], **settings, start=entry["start_index"])
        assert len(rest) == entry["len_after"], entry
        assert rest == entry["indices"], entry


def check_transforms(case: Case) -> None:
    for name, given in case.io.items():
        key, _, part = name.rpartition(".")
        if part != "in":
            continue
        if key.startswith("video"):
            for flip in (False, True):
                expected = f"{key}.flip{int(flip)}"
                case.close(fit_video(given, *case.io[expected].shape[-2:], flip=flip), expected)
        else:
            height, width, _ = case.io[f"{key}.crop_u8"].shape
            cropped = image_pixels(fit_image(Image.fromarray(given.numpy()), height, width))
            assert torch.equal(cropped.permute(1, 2, 0), case.io[f"{key}.crop_u8"]), key
            case.close(normalise(cropped), f"{key}.out")


def check_saved_pixels(case: Case) -> None:
    from opensora_core.media import to_uint8

    video = torch.from_numpy(to_uint8(case.io["video.in"]))
    assert torch.equal(video, case.io["video.u8_THWC"])
    image = torch.from_numpy(to_uint8(case.io["image.in"]))
    assert torch.equal(image[0], case.io["image.u8_HWC"])


HANDLERS: dict[str, Callable[[Case], None]] = {
    "TemporalRandomCrop + DatasetFromCSV.getitem": check_frames,
    "StatefulDistributedSampler": check_order,
    "datasets.get_transforms_video/get_transforms_image": check_transforms,
    "datasets.utils.save_sample": check_saved_pixels,
}
