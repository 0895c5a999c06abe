"""What the filters measure, on clips whose scores are known."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora_core.config import FilterConfig
from opensora_core.curation.filters import FILTERS, Place, check, explain, judge, score
from opensora_core.curation.filters.look import places
from opensora_core.curation.filters.text import east_boxes
from opensora_core.errors import CheckpointError, ConfigError, InputError, UsageError, WeightsError

from .drawn import blurred, letterboxed, moving, still, write

DEFAULT = FilterConfig()


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("clips")
    clips = {
        "slow": moving(1),
        "fast": moving(4),
        "still": still(),
        "black": np.zeros((16, 144, 256, 3), np.uint8),
        "white": np.full((16, 144, 256, 3), 255, np.uint8),
        "boxed": letterboxed(moving(1)),
    }
    return {name: score(write(folder / f"{name}.mp4", frames), DEFAULT) for name, frames in clips.items()}


def test_motion_is_told_in_pixels_of_a_picture_256_wide(scores: dict[str, dict[str, float]]) -> None:
    assert scores["slow"]["motion"] == pytest.approx(1, abs=0.15)
    assert scores["fast"]["motion"] == pytest.approx(4, abs=0.6)
    assert scores["still"]["motion"] < 0.05 and scores["black"]["motion"] == 0


def test_motion_does_not_depend_on_the_size(tmp_path: Path) -> None:
    large = write(tmp_path / "large.mp4", moving(2), size=(288, 512))
    assert score(large, DEFAULT)["motion"] == pytest.approx(2, abs=0.3)


def test_vectors_tell_the_same_motion(tmp_path: Path, scores: dict[str, dict[str, float]]) -> None:
    fast = write(tmp_path / "fast.mp4", moving(4))
    assert score(fast, FilterConfig(motion="vectors"))["motion"] == pytest.approx(scores["fast"]["motion"], rel=0.2)


def test_what_does_not_move_is_still(scores: dict[str, dict[str, float]]) -> None:
    assert scores["still"]["still"] == scores["black"]["still"] == 1
    assert scores["slow"]["still"] == 0


def test_blur_takes_sharpness_away(tmp_path: Path) -> None:
    sharp = moving(1, fineness=1, num_frames=4)
    found = [
        score(write(tmp_path / f"{number}.mp4", frames), DEFAULT)["sharpness"]
        for number, frames in enumerate((sharp, blurred(sharp, 1.0), blurred(sharp)))
    ]
    assert found[1] < 0.5 * found[0] and found[2] < 0.1 * found[0]


def test_exposure_is_that_of_the_picture_within_bars(scores: dict[str, dict[str, float]]) -> None:
    assert scores["black"]["dark"] == scores["white"]["bright"] == 1
    assert scores["boxed"]["dark"] == pytest.approx(scores["slow"]["dark"], abs=0.02)
    assert scores["boxed"]["bars"] == pytest.approx(48 / 144, abs=0.02) and scores["slow"]["bars"] == 0


def test_a_picture_has_no_scores_of_motion(tmp_path: Path) -> None:
    Image.fromarray(still(1)[0]).save(tmp_path / "a.png")
    found = score(tmp_path / "a.png", FilterConfig(min_motion=5))
    assert {"motion", "still"}.isdisjoint(found) and found["sharpness"] > 0
    assert not judge(found, FilterConfig(min_motion=5))


def test_a_range_is_scored_by_its_own_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", np.concatenate([still(25), moving(3, num_frames=25)]))
    assert score(Place(path, 25, end_seconds=1.0), DEFAULT)["still"] == 1
    assert score(Place(path, 25, start_seconds=1.0), DEFAULT)["motion"] == pytest.approx(3, abs=0.5)


def test_broken_clips_have_a_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving())
    with pytest.raises(InputError, match="16 frames"):
        score(Place(path, 99), DEFAULT)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError):
        score(path, DEFAULT)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 16, 17, 1000])
def test_places_are_pairs_within_the_clip(num_frames: int) -> None:
    found = places(num_frames, 8)
    assert found == sorted(set(found)) and 0 <= found[0] <= found[-1] < num_frames
    assert num_frames < 17 or len(found) == 16


def test_every_limit_is_a_setting_and_every_setting_of_a_limit_has_a_filter() -> None:
    limits = [name for item in FILTERS.values() for name in item.limits]
    known = [item.name for item in fields(FilterConfig) if item.name.startswith(("min_", "max_"))]
    assert sorted(limits) == sorted(known)
    assert all(name.startswith("min_") == (name == item.least) for item in FILTERS.values() for name in item.limits)


def test_reasons_say_score_and_limit() -> None:
    settings = FilterConfig(min_motion=0.3, max_motion=20)
    (reason,) = judge({"motion": 0.12, "dark": 0.5}, settings)
    assert str(reason) == "motion 0.12 pixels per frame of a picture 256 wide is below filter.min_motion = 0.3"
    (reason,) = judge({"motion": 25, "dark": 0.5}, settings)
    assert "is above filter.max_motion = 20" in str(reason)
    assert not judge({"motion": 0.3}, settings) and not judge({"motion": 0.0}, FilterConfig())


def test_a_row_is_explained_by_every_limit() -> None:
    row = {"path": "a.mp4", "scores": {"motion": 0.1, "start_score": 3.0}}
    found = explain(row, FilterConfig(min_motion=0.3))
    assert not found.is_kept and "below filter.min_motion" in found.reason
    by_setting = {item.setting: item for item in found.verdicts}
    assert not by_setting["min_motion"].is_kept and by_setting["max_motion"].is_kept
    assert by_setting["min_aesthetic"].value is None and "clip_model" in by_setting["min_aesthetic"].note


@pytest.mark.parametrize(
    "settings",
    [
        FilterConfig(min_motion=-1),
        FilterConfig(max_dark=3),
        FilterConfig(min_motion=3, max_motion=2),
        FilterConfig(min_copy_bits=40),
        FilterConfig(max_copy_similarity=0.99),
        FilterConfig(max_copy_similarity=0.5, clip_model="x"),
        FilterConfig(aesthetic_weights="x"),
        FilterConfig(frames=0),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: FilterConfig) -> None:
    with pytest.raises(ConfigError):
        check(settings)


def test_models_that_are_not_there_say_what_to_get(tmp_path: Path) -> None:
    clip = write(tmp_path / "a.mp4", moving(num_frames=4))
    with pytest.raises(WeightsError, match="clip_model"):
        score(clip, FilterConfig(clip_model=str(tmp_path / "none")))
    with pytest.raises(WeightsError, match="text_model") as found:
        score(clip, FilterConfig(text_model="none.pb"))
    assert "EAST" in found.value.hint
    (tmp_path / "torn.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="OpenCV cannot read"):
        score(clip, FilterConfig(text_model=str(tmp_path / "torn.onnx")))


def _field(number: int, content: bytes | int) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(content, bytes):
        return _varint(number << 3 | 2) + _varint(len(content)) + content
    return _varint(number << 3) + _varint(content)


def _varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + _varint(value >> 7) if value > 127 else bytes([value])


def _white_detector() -> bytes:
    """A network in ONNX that is sure of text where the picture is white: a sigmoid of a 1x1 convolution."""

    def tensor(name: bytes, shape: list[int], values: list[float]) -> bytes:
        dims = b"".join(_field(1, size) for size in shape)
        return dims + _field(2, 1) + _field(8, name) + _field(9, np.array(values, "<f4").tobytes())

    def value(name: bytes, shape: list[int]) -> bytes:
        dims = b"".join(_field(1, _field(1, size)) for size in shape)
        return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))

    conv = b"".join(_field(1, name) for name in (b"x", b"w", b"b")) + _field(2, b"h") + _field(4, b"Conv")
    sigmoid = _field(1, b"h") + _field(2, b"y") + _field(4, b"Sigmoid")
    weights = tensor(b"w", [1, 3, 1, 1], [20.0] * 3), tensor(b"b", [1], [-20.0])
    shapes = _field(11, value(b"x", [1, 3, 128, 256])) + _field(12, value(b"y", [1, 1, 128, 256]))
    nodes = _field(1, conv) + _field(1, sigmoid) + _field(2, b"g") + b"".join(_field(5, item) for item in weights)
    return _field(1, 8) + _field(7, nodes + shapes) + _field(8, _field(1, b"") + _field(2, 13))


def test_text_is_measured_by_a_network_of_opencv(tmp_path: Path) -> None:
    (tmp_path / "white.onnx").write_bytes(_white_detector())
    settings = FilterConfig(text_model=str(tmp_path / "white.onnx"), max_text=0.1)
    plain = moving(num_frames=4) // 2
    plain = np.concatenate([plain, plain[:, :16] * 0], axis=1)[:, :128]
    titled = plain.copy()
    titled[:, 40:80, 60:200] = 255
    found = [score(write(tmp_path / f"{n}.mp4", frames), settings) for n, frames in enumerate((plain, titled))]
    assert found[0]["text"] == 0 and found[1]["text"] == pytest.approx(0.61, abs=0.05)
    assert [reason.setting for reason in judge(found[1], settings)] == ["max_text"]


def test_boxes_of_east_are_where_its_maps_say() -> None:
    scores, geometry = np.zeros((1, 8, 8), np.float32), np.zeros((5, 8, 8), np.float32)
    scores[0, 2, 3] = 0.9
    geometry[:, 2, 3] = 4, 8, 4, 6, 0  # up, right, down, left, angle
    (box,) = east_boxes(scores, geometry)
    assert np.allclose(box, [(6, 4), (20, 4), (20, 12), (6, 12)])
    geometry[4] = np.pi / 2
    (box,) = east_boxes(scores, geometry)
    assert np.allclose(np.ptp(box, axis=0), (8, 14), atol=1e-5)


def test_easyocr_is_asked_for_by_name(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    try:
        import easyocr  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match="not installed"):
            score(write(tmp_path / "a.mp4", moving(num_frames=4)), FilterConfig(text_model="easyocr"))
