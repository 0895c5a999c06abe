"""Captions from a server that misbehaves in every way that RELIABILITY.md lists: none is lost."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opensora_core.config import Config, with_settings
from opensora_core.curation.captions import CaptionDone, CaptionRejected, CaptionRequest, build_captioner, caption
from opensora_core.curation.captions.protocol import Shown, Words
from opensora_core.data import Clip
from opensora_core.errors import ConfigError, OsoraError, UsageError

from .loopback import TEXT, Loopback, serving
from .small import rows_of, write_clips


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with serving() as state:
        yield state


def config_for(server: Loopback, **changes: Any) -> Config:
    settings = {"caption.model": "openai:small", "caption.base_url": server.url, "caption.workers": 1}
    return with_settings(Config(), settings | {f"caption.{name}": value for name, value in changes.items()})


def shown(number: int = 0) -> Shown:
    frames = np.random.default_rng(number).integers(0, 255, (3, 40, 60, 3), np.uint8)
    return Shown(number, Clip(Path(f"/clips/{number}.mp4")), list(frames))


def say(config: Config, should_stop: Any = lambda: False) -> Words:
    captioner = build_captioner(config)
    (words,) = captioner.describe(captioner.prepare([shown()]), should_stop)
    return words


def test_a_request_is_as_the_protocol_wants_it(server: Loopback) -> None:
    words = say(config_for(server, temperature=0.5, max_tokens=30))
    assert words == Words(TEXT, "", False, 100, 10)
    ((_, body, headers),) = server.seen
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("small", 0.5, 30)
    *pictures, text = body["messages"][0]["content"]
    assert "3 frames" in text["text"]
    assert len(pictures) == 3
    head, _, content = pictures[0]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (60, 40)
    assert headers["Authorization"] == "Bearer sk-very-secret"


def test_a_grid_is_one_picture(server: Loopback) -> None:
    say(config_for(server, layout="grid"))
    assert len(server.seen[0][1]["messages"][0]["content"]) == 2


@pytest.mark.parametrize("fault", ["429", "500", "503", "html", "half", "odd", "endless", "hang"])
def test_a_fault_that_passes_costs_no_caption(server: Loopback, fault: str) -> None:
    server.faults, server.hang_seconds = [fault, fault], 1.5
    assert say(config_for(server, request_seconds=0.5)).text == TEXT
    assert len(server.seen) == 3


def test_retry_after_is_obeyed(server: Loopback) -> None:
    server.faults = ["429 1"]
    assert say(config_for(server)).text == TEXT
    assert server.seen[1][0] - server.seen[0][0] >= 1.0


def test_a_fault_that_stays_is_tried_six_times_and_no_secret_is_told(server: Loopback) -> None:
    server.always = "500"
    words = say(config_for(server))
    assert len(server.seen) == 6
    assert words.failed
    assert "500" in words.reason
    assert "secret" not in words.reason


@pytest.mark.parametrize(("status", "told"), [("401", "401"), ("404", "404")])
def test_what_no_clip_can_change_ends_the_run(server: Loopback, status: str, told: str) -> None:
    server.always = status
    with pytest.raises(OsoraError, match=told) as refused:
        say(config_for(server))
    assert "secret" not in refused.value.message + refused.value.hint
    assert len(server.seen) == 1


def test_a_refused_clip_is_not_the_servers_fault(server: Loopback) -> None:
    server.always = "400"
    words = say(config_for(server))
    assert not words.text
    assert not words.failed
    assert len(server.seen) == 1


def test_waiting_ends_when_it_is_to_stop(server: Loopback) -> None:
    server.always, began = "429 60", time.monotonic()
    say(config_for(server), lambda: time.monotonic() - began > 0.3)
    assert time.monotonic() - began < 2


def test_requests_are_spread_over_the_minute(server: Loopback) -> None:
    captioner = build_captioner(config_for(server, requests_per_minute=100))
    for _ in range(2):
        captioner.describe(captioner.prepare([shown()]), lambda: False)
    assert server.seen[1][0] - server.seen[0][0] >= 0.4


def test_what_cannot_be_asked_is_refused(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="names no model"):
        build_captioner(with_settings(config_for(server), {"caption.model": "openai:"}))
    with pytest.raises(UsageError, match="no address"):
        build_captioner(config_for(server, base_url="localhost:80"))
    with pytest.raises(ConfigError, match="requests = 0"):
        build_captioner(config_for(server, requests=0))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="wants a key"):
        build_captioner(config_for(server, base_url=""))


def test_no_caption_is_lost_among_all_faults(server: Loopback, tmp_path: Path) -> None:
    manifest = write_clips(tmp_path, 12)
    server.faults = ["429 0", "500", "html", "half", "503", "odd", "500", "429", "hang"]
    server.hang_seconds = 1.5
    config = config_for(server, requests=4, request_seconds=1.0, price_in=2.0, price_out=10.0)
    *_, done = caption(config, CaptionRequest(manifest))
    assert isinstance(done, CaptionDone)
    assert (done.captioned, done.rejected) == (12, {})
    assert done.cost == pytest.approx((1200 * 2 + 120 * 10) / 1e6)
    assert [row["path"] for row in rows_of(done.output)] == [f"{number:03d}.mp4" for number in range(12)]
    assert 2 <= server.most_at_once <= 4


def test_a_dead_server_ends_the_run_and_marks_no_clip(server: Loopback, tmp_path: Path) -> None:
    manifest = write_clips(tmp_path, 12)
    server.always = "500"
    with pytest.raises(OsoraError, match=r"failed on \d+ clips one after the other: .*500"):
        list(caption(config_for(server, requests=4, retries=0), CaptionRequest(manifest)))
    assert not rows_of(tmp_path / "captions.rejects.jsonl")
    server.always = ""
    *_, done = caption(config_for(server), CaptionRequest(manifest))
    assert done.captioned == 12


def test_where_nothing_ever_came_of_a_server_no_clip_is_marked(server: Loopback, tmp_path: Path) -> None:
    manifest = write_clips(tmp_path, 2)
    server.always = "500"
    with pytest.raises(OsoraError, match=r"failed on \d clips? one after the other"):
        list(caption(config_for(server, retries=0), CaptionRequest(manifest)))
    server.always = ""
    *_, done = caption(config_for(server), CaptionRequest(manifest))
    assert isinstance(done, CaptionDone) and done.captioned == 2


def test_a_login_in_the_address_is_never_told(server: Loopback) -> None:
    address = server.url.replace("http://", "http://bob:hunter2@")
    server.always = "404"
    with pytest.raises(OsoraError) as refused:
        say(config_for(server, base_url=address))
    with pytest.raises(UsageError) as odd:
        build_captioner(config_for(server, base_url="bob:hunter2@localhost/v1"))
    for error in (refused.value, odd.value):
        assert "hunter2" not in error.message + error.hint
    assert "hunter2" not in build_captioner(config_for(server, base_url=address)).about


def test_a_clip_that_fails_is_kept_with_its_reason_and_tried_again(server: Loopback, tmp_path: Path) -> None:
    manifest = write_clips(tmp_path, 4)
    server.faults = ["400", "500"]
    config = config_for(server, requests=1, retries=0)
    events = list(caption(config, CaptionRequest(manifest)))
    told = {event.status for event in events if isinstance(event, CaptionRejected)}
    assert told == {"rejected", "failed"}
    rejects = rows_of(tmp_path / "captions.rejects.jsonl")
    assert {(row["status"], "500" in row["reason"]) for row in rejects} == {("rejected", False), ("failed", True)}
    *_, again = caption(config, CaptionRequest(manifest))
    assert (again.captioned, again.finished_before, sum(again.rejected.values())) == (0, 2, 2)
    *_, last = caption(config, CaptionRequest(manifest, retry_failed=True))
    assert (last.captioned, last.rejects) == (2, None)
    assert len(rows_of(last.output)) == 4
    assert not (tmp_path / "captions.rejects.jsonl").exists()
