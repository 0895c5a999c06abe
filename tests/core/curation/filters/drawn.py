"""Clips whose scores are known, for they were drawn that way."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
HEIGHT, WIDTH = 144, 256


def texture(seed: int = 0, *, fineness: int = 3, height: int = HEIGHT, width: int = 3 * WIDTH) -> Frames:
    """A picture (H, W, 3) of soft blobs."""
    noise = np.random.default_rng(seed).uniform(0, 255, (height, width, 3)).astype(np.float32)
    soft = cv2.GaussianBlur(noise, (0, 0), fineness)
    return np.asarray(cv2.normalize(soft, None, 10, 235, cv2.NORM_MINMAX), np.uint8)  # type: ignore[call-overload]


def moving(speed: int = 2, *, seed: int = 0, num_frames: int = 16, fineness: int = 3) -> Frames:
    """(T, H, W, 3) a texture that moves by `speed` pixels per frame."""
    wide = texture(seed, fineness=fineness)
    return np.stack([wide[:, speed * number : speed * number + WIDTH] for number in range(num_frames)])


def still(num_frames: int = 16) -> Frames:
    """(T, H, W, 3) nothing moves."""
    return np.repeat(texture()[None, :, :WIDTH], num_frames, axis=0)


def blurred(frames: Frames, sigma: float = 3.0) -> Frames:
    """The same out of focus."""
    return np.stack([np.asarray(cv2.GaussianBlur(frame, (0, 0), sigma), np.uint8) for frame in frames])


def letterboxed(frames: Frames, bar: int = 24) -> Frames:
    """The same with black bars of `bar` rows above and below."""
    boxed = frames.copy()
    boxed[:, :bar] = boxed[:, -bar:] = 0
    return boxed


def write(
    path: Path, frames: Frames, *, crf: int = 12, size: tuple[int, int] | None = None, codec: str = "libx264"
) -> Path:
    """Write frames as a video, resized to (height, width) if that is given."""
    height, width = size or (frames.shape[1], frames.shape[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": str(crf), "preset": "ultrafast", "x264-params": "bframes=0:threads=1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options if codec == "libx264" else {"crf": str(crf)})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            resized = np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(resized, format="rgb24")))
        container.mux(stream.encode(None))
    return path
