"""Small videos with cuts, to be split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

COLOURS = ((200, 60, 40), (30, 160, 70), (40, 70, 210), (220, 200, 60), (120, 30, 140))


def write_scenes(path: Path, scenes: Sequence[int], *, seed: int = 0, fps: int = 25, gop: int = 12) -> None:
    """Write a video of scenes of so many frames, each a moving texture in a colour of its own."""
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "g": str(gop)})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        y, x = np.mgrid[0:64, 0:96]
        for number, length in enumerate(scenes):
            shift = random.uniform(0, 20, 2)
            colour = np.array(COLOURS[(number + seed) % len(COLOURS)])
            for frame in range(length):
                wave = 25 * np.sin((x + frame + shift[0]) / 6) * np.cos((y + shift[1]) / 5)
                picture = np.clip(colour + wave[..., None], 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
