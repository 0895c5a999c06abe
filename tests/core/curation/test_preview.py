"""The picture of a source and the page of a run: they stand alone, and show nothing but what is there."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from opensora_core.curation.boundaries import Boundary, Detection
from opensora_core.curation.preview import KINDS, draw_sheet, write_page
from opensora_core.curation.scenes import TOO_SHORT, Gap

SVG = "{http://www.w3.org/2000/svg}"


def detection(num_frames: int, boundaries: list[Boundary], thumbnails: int = 4) -> Detection:
    frames = np.linspace(0, num_frames - 1, thumbnails).astype(np.int64) if thumbnails else np.zeros(0, np.int64)
    pictures = np.zeros((thumbnails, 36, 64, 3), np.uint8)
    pictures[:, :, :, 0] = (frames * 255 // max(num_frames - 1, 1))[:, None, None]
    return Detection(
        seconds=np.arange(num_frames) / 25 + 3.5,
        is_keyframe=np.zeros(num_frames, np.bool_),
        boundaries=tuple(boundaries),
        scores={"score": np.random.default_rng(0).random(num_frames).astype(np.float32)},
        thumbnails=pictures,
        thumbnail_frames=frames,
        width=64,
        height=36,
        fps=25.0,
        crop=None,
        damage="",
    )


def sheet(num_frames: int = 500, **options: int) -> ElementTree.Element:
    boundaries = [
        Boundary(200, 11.5, "cut", 200, 200, 3.0),
        Boundary(310, 15.9, "dissolve", 300, 320, 1.5),
    ]
    found = detection(num_frames, [item for item in boundaries if item.end_frame < num_frames], **options)
    text = draw_sheet(found, num_frames / 25 + 3.5, [(0, 200), (210, 300)], [Gap(200, 210, TOO_SHORT)])
    return ElementTree.fromstring(text)


def test_a_picture_shows_frames_cuts_scores_and_clips() -> None:
    picture = sheet()
    titles = [item.text for item in picture.iter(f"{SVG}title")]
    assert titles == [
        "cut at frame 200, 11.500 s, score 3",
        "dissolve at frame 310, 15.900 s, score 1.5, from frame 300 to 320",
        "clip 1: 8.00 s, frames 0 to 200",
        "clip 2: 3.60 s, frames 210 to 300",
        "too short: frames 200 to 210",
    ]
    fills = {item.get("fill") for item in picture.iter(f"{SVG}rect")}
    assert {KINDS["cut"], KINDS["dissolve"]} <= fills
    (line,) = picture.iter(f"{SVG}polyline")
    xs = [float(point.partition(",")[0]) for point in line.get("points", "").split()]
    assert xs == sorted(xs) and len(xs) == 500


def test_a_mark_is_where_the_cut_is_and_the_frames_are_of_its_shots() -> None:
    picture = sheet()
    mark = next(item for item in picture.iter(f"{SVG}rect") if item.get("fill") == KINDS["cut"])
    assert float(mark.get("x", 0)) + 1 == pytest.approx(1000 * 200 / 500, abs=0.1)
    (strip,) = picture.iter(f"{SVG}image")
    href = strip.get("href", "")
    image = Image.open(io.BytesIO(base64.b64decode(href.partition(",")[2])))
    red = np.asarray(image.convert("RGB"))[50, :, 0].astype(int)
    assert red[5] < 40 and red[-5] > 215 and red[len(red) // 2] > red[5]


def test_a_long_source_takes_several_lines() -> None:
    lines = {
        float(group.get("transform", "").split()[1][:-1])
        for group in sheet(25 * 90).iter(f"{SVG}g")
        if group.get("transform")
    }
    assert len(lines) == 3
    assert len(list(sheet(25 * 7200, thumbnails=8).iter(f"{SVG}image"))) <= 13


@pytest.mark.parametrize(("num_frames", "thumbnails"), [(1, 1), (2, 0), (3, 2)])
def test_the_shortest_sources_are_drawn_too(num_frames: int, thumbnails: int) -> None:
    found = detection(num_frames, [], thumbnails)
    ElementTree.fromstring(draw_sheet(found, num_frames / 25 + 3.5, [], [Gap(0, num_frames, TOO_SHORT)]))


class Links(HTMLParser):
    """Collects tags, and everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_page_escapes_names_and_fetches_nothing(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>&\"'\n\udce9.mp4"
    row = {"source": f"/v/{name}", "status": "rejected", "reason": "<b>torn</b>", "probe": None, "boundaries": []}
    probe = {"shown_width": 64, "shown_height": 36, "measured_fps": 25.0, "codec": "h264"}
    good = {**row, "source": "/v/walk.mp4", "status": "ok", "reason": "", "probe": probe}
    good |= {"start_seconds": 0.0, "end_seconds": 20.0}
    lost = {"what": "frames", "reason": "too short", "start_seconds": 1.0, "end_seconds": 1.4}
    picture = draw_sheet(detection(50, []), 5.5, [(0, 50)], [])
    sources = [(row, [], [], ""), (good, [{"duration_seconds": 2.0}], [lost], picture)]
    write_page(tmp_path / "p.html", sources, "1 clip <of> 2 sources")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert "script" not in links.tags and "b" not in links.tags
    assert all(link.startswith("data:image/jpeg;base64,") for link in links.fetched) and links.fetched
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    assert "&lt;script&gt;" in text and "\\x0a\\xdce9.mp4" in text
    assert "64 x 36, 25 fps" in text and "1 clip of 2.0 s" in text and "too short 0.4 s" in text
