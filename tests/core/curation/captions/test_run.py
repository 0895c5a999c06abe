"""The job: every clip gets one row, in the order of the manifest, whatever happens on the way."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opensora_core.config import Config, with_settings
from opensora_core.curation.captions import CaptionDone, CaptionPlan, CaptionRequest, caption, examine
from opensora_core.curation.captions.ledger import whole_lines
from opensora_core.data import read_manifest
from opensora_core.errors import ConfigError, InputError, ResourceError, UsageError
from opensora_core.media import write_video
from opensora_core.runs import only_writer

from .loopback import TEXT, Loopback, serving
from .small import build, rows_of, write_clips


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving() as state:
        yield state


def config_for(model: str = "sidecars", **changes: Any) -> Config:
    settings = {"caption.model": model, "caption.workers": 1, "runtime.device": "cpu"}
    return with_settings(Config(), settings | {f"caption.{name}": value for name, value in changes.items()})


def run(config: Config, source: Path, **asked: Any) -> CaptionDone:
    *_, done = caption(config, CaptionRequest(source, **asked))
    assert isinstance(done, CaptionDone)
    return done


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A manifest of 6 files that are no videos, since nobody looks at them, with captions beside all but one."""
    rows = []
    for number in range(6):
        (tmp_path / f"{number}.mp4").write_bytes(b"")
        if number != 3:
            (tmp_path / f"{number}.txt").write_text(f"The video shows clip {number}.\n")
        rows.append({"path": f"{number}.mp4", "num_frames": 10 + number, "scores": {"aesthetic": number / 2}})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def test_rows_keep_their_columns_and_order(beside: Path) -> None:
    done = run(config_for(), beside)
    assert done.output == beside.parent / "captions.jsonl"
    assert rows_of(done.output)[3] == {
        "path": "4.mp4",
        "caption": "The video shows clip 4.",
        "num_frames": 14,
        "scores": {"aesthetic": 2.0},
    }
    assert [row["path"] for row in rows_of(done.output)] == [f"{number}.mp4" for number in (0, 1, 2, 4, 5)]
    (reject,) = rows_of(done.rejects or Path())
    assert (reject["path"], reject["status"]) == ("3.mp4", "rejected")
    assert "neither 3.txt nor 3.json" in reject["reason"]
    assert read_manifest(done.output)[0].caption == "The video shows clip 0."


def test_captions_are_cleaned_when_asked(beside: Path) -> None:
    assert rows_of(run(config_for(clean=True), beside).output)[0]["caption"] == "Clip 0."


def test_sidecars_of_json_and_labels_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "clips" / "ApplyEyeMakeup"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"{name}.mp4").write_bytes(b"")
        (tmp_path / "m.jsonl").open("a").write(json.dumps({"path": f"clips/ApplyEyeMakeup/{name}.mp4"}) + "\n")
    (folder / "a.json").write_text('{"caption": "a face"}')
    (folder / "b.mp4.json").write_text('{"title": "a brush", "caption": 3}')
    told = run(config_for("sidecars"), tmp_path / "m.jsonl", output=tmp_path / "s.jsonl").output
    assert [row["caption"] for row in rows_of(told)] == ["a face", "a brush"]
    told = run(config_for("labels"), tmp_path / "m.jsonl", output=tmp_path / "l.jsonl").output
    assert [row["caption"] for row in rows_of(told)] == ["Apply Eye Makeup"] * 2


def test_captions_that_are_there_are_kept_unless_it_is_done_anew(beside: Path) -> None:
    rows = rows_of(beside)
    rows[1]["caption"] = "mine"
    rows[2] |= {"status": "left out", "reason": "too dark"}
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(config_for(), beside)
    assert (done.captioned, done.kept, done.passed) == (3, 1, 1)
    assert [row.get("caption", "-")[:4] for row in rows_of(done.output)] == ["The ", "mine", "-", "The ", "The "]
    again = run(config_for(), beside, redo=True)
    assert (again.captioned, again.kept, again.finished_before) == (4, 0, 0)
    assert rows_of(again.output)[1]["caption"] == "The video shows clip 1."
    assert run(config_for(), beside).captioned == 0


def test_other_settings_do_not_mix_into_an_output(beside: Path) -> None:
    run(config_for(), beside)
    with pytest.raises(UsageError, match="clean was False and is True"):
        run(config_for(clean=True), beside)
    assert run(config_for(clean=True), beside, redo=True).captioned == 5


def test_a_clip_named_twice_is_described_once_and_written_twice(beside: Path) -> None:
    beside.write_text(beside.read_text() + json.dumps({"path": "0.mp4", "num_frames": 99}) + "\n")
    done = run(config_for(), beside)
    assert done.captioned == 5
    assert [row["num_frames"] for row in rows_of(done.output) if row["path"] == "0.mp4"] == [10, 99]


def test_what_an_earlier_step_left_out_and_no_longer_does_is_described(beside: Path) -> None:
    rows = rows_of(beside)
    rows[2] |= {"status": "rejected", "reason": "too dark"}
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(config_for(), beside).passed == 1
    del rows[2]["status"], rows[2]["reason"]
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(config_for(), beside)
    assert (done.captioned, done.passed) == (1, 0)
    assert [row["caption"][-2:] for row in rows_of(done.output)] == [f"{number}." for number in (0, 1, 2, 4, 5)]


def test_several_captions_of_one_clip_are_all_kept(beside: Path) -> None:
    words = ["", "a cat", "", "a dog"]
    rows = [{"path": "0.mp4", **({"caption": word} if word else {})} for word in words]
    rows.append({"path": "1.mp4"})
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        done = run(config_for(), beside)
        assert done.kept == 2
        told = [row["caption"] for row in rows_of(done.output)]
        assert told == ["a cat", "a cat", "a cat", "a dog", "The video shows clip 1."], "what is known is not asked"
    assert done.captioned == 0


def test_what_another_run_is_writing_beside_it_is_left_alone(beside: Path) -> None:
    part = beside.parent / ".osora-0123456789ab.part"
    part.write_bytes(b"half")
    dead = beside.parent / ".captions.jsonl" / ".osora-0123456789ab.part"
    dead.parent.mkdir()
    dead.write_bytes(b"half")
    run(config_for(), beside)
    assert part.exists()
    assert not dead.exists()


def test_rejects_of_another_manifest_are_not_thrown_away(beside: Path) -> None:
    rows = rows_of(beside)
    run(config_for(), beside)
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    for retry_failed in (False, True):
        done = run(config_for(), beside, retry_failed=retry_failed)
        assert [row["path"] for row in rows_of(beside.parent / "captions.rejects.jsonl")] == ["3.mp4"]
        assert done.rejected == {}


def test_the_rejects_never_stand_on_what_is_read_or_on_other_files(beside: Path) -> None:
    source = beside.rename(beside.parent / "c.rejects.jsonl")
    before = source.read_bytes()
    with pytest.raises(UsageError, match="is what is read"):
        run(config_for(), source, output=beside.parent / "c.jsonl")
    with pytest.raises(UsageError, match="how the rejects"):
        run(config_for(), source, output=beside.parent / "d.rejects.jsonl")
    (beside.parent / "e.rejects.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="no caption run made it"):
        run(config_for(), source, output=beside.parent / "e.jsonl")
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["workers", "side", "price_out", "clip_seconds", "gpus"])
def test_numbers_that_cannot_be_are_refused(beside: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"caption.{name} = -1"):
        run(config_for(**{name: -1}), beside)


def test_a_pipe_is_not_waited_for(beside: Path) -> None:
    os.mkfifo(beside.parent / "3.txt")
    assert run(config_for(), beside).captioned == 5


def test_a_captioner_with_much_to_say_does_not_fill_the_memory(tmp_path: Path) -> None:
    """More clips are unseen than the belt holds, before anybody listens."""
    from opensora_core.curation.captions import Words
    from opensora_core.curation.captions.frames import Unseen
    from opensora_core.curation.captions.lanes import Described, Lanes
    from opensora_core.curation.captions.protocol import Shown
    from opensora_core.data import Clip

    class Slow:
        batch_size, lanes, is_local = 4, 1, True

        def load(self, device: str) -> None:
            time.sleep(0.3)

        def prepare(self, clips: list[Shown]) -> list[Shown]:
            return clips

        def describe(self, clips: list[Shown], should_stop: Any) -> list[Words]:
            return [Words("x")] * len(clips)

    clip = Clip(tmp_path / "a.mp4")
    source = [Unseen(number, clip, "torn") if number < 900 else Shown(number, clip) for number in range(2000)]
    lanes = Lanes(Slow(), ["cpu"], source)  # type: ignore[arg-type]
    lanes.start()
    heard, most, end = 0, 0, time.monotonic() + 20
    while heard < 2000 and time.monotonic() < end:
        words = lanes.listen(0.5)
        most = max(most, len(words))
        heard += sum(len(word.clips) if isinstance(word, Described) else isinstance(word, Unseen) for word in words)
    lanes.close()
    assert heard == 2000
    assert most <= 257


def test_a_torn_line_is_mended_and_nothing_else_is_done_again(beside: Path) -> None:
    output = run(config_for(), beside).output
    whole = output.read_bytes()
    for cut in (1, 20, len(whole) - whole.rindex(b"\n", 0, -1) - 2):
        output.write_bytes(whole[:-cut])
        done = run(config_for(), beside)
        assert (done.captioned, done.finished_before) == (1, 4)
        assert output.read_bytes() == whole
    output.write_bytes(whole.replace(b'{"path": "1', b'["path": "1'))
    with pytest.raises(UsageError, match="row 2: not a row of ours"):
        run(config_for(), beside)


def test_rows_of_another_manifest_are_not_thrown_away(beside: Path) -> None:
    output = run(config_for(), beside).output
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows_of(beside)[4:]))
    run(config_for(), beside)
    assert sorted(row["path"] for row in rows_of(output)) == [f"{number}.mp4" for number in (0, 1, 2, 4, 5)]


def test_files_of_others_are_left_alone(beside: Path) -> None:
    foreign = beside.parent / "captions.jsonl"
    foreign.write_text('{"path": "x.mp4"}\n')
    for redo in (False, True):
        with pytest.raises(UsageError, match="no caption run made it"):
            run(config_for(), beside, redo=redo)
    assert foreign.read_text() == '{"path": "x.mp4"}\n'
    with pytest.raises(UsageError, match="is what is read"):
        run(config_for(), beside, output=beside)
    with pytest.raises(UsageError, match="JSON lines"):
        run(config_for(), beside, output=beside.parent / "c.csv")
    assert not (beside.parent / ".c.csv").exists()
    with pytest.raises(ConfigError, match="gpus = 2 says nothing"):
        run(config_for(gpus=2), beside)


def test_two_runs_do_not_write_one_output(beside: Path) -> None:
    with only_writer(beside.parent / ".captions.jsonl"), pytest.raises(UsageError, match="in use by process"):
        run(config_for(), beside)


def test_a_full_disk_tears_nothing(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opensora_core.curation.captions import ledger

    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    output = beside.parent / "captions.jsonl"
    monkeypatch.setattr(ledger.os, "fsync", full)
    for limit in range(1, 12):  # noqa: B007 - read by `full`
        calls.clear()
        try:
            run(config_for(), beside, retry_failed=True)
        except ResourceError as error:
            assert "no space left" in error.message
        else:
            break
        content = output.read_bytes() if output.exists() else b""
        assert sum(len(text) for _, text, _ in whole_lines(output)) == len(content)
        assert not list(beside.parent.glob(".osora-*"))
    assert limit > 4
    assert len(rows_of(output)) == 5


def test_what_would_be_done_is_told_and_nothing_written(beside: Path, server: Loopback) -> None:
    before = sorted(beside.parent.iterdir())
    config = config_for("openai:small", base_url=server.url, price_out=10.0, max_tokens=100)
    (plan,) = examine(config, CaptionRequest(beside))
    assert isinstance(plan, CaptionPlan)
    assert (plan.clips, plan.todo, plan.tokens) == (6, 6, 600)
    assert plan.cost == pytest.approx(0.006)
    assert "Describe this clip" in plan.prompt
    assert sorted(beside.parent.iterdir()) == before
    assert not server.seen


def test_hostile_files_are_rejected_with_their_reasons(tmp_path: Path, server: Loopback) -> None:
    manifest = write_clips(tmp_path, 3)
    (tmp_path / "000.mp4").write_bytes(b"no video")
    (tmp_path / "001.mp4").write_bytes((tmp_path / "001.mp4").read_bytes()[:300])
    with manifest.open("a") as file:
        file.write('{"path": "gone.mp4"}\n')
    done = run(config_for("openai:small", base_url=server.url), manifest, preview=9)
    assert done.captioned == 1
    assert len(rows_of(done.rejects or Path())) == 3
    page = (done.preview or Path()).read_text()
    assert page.count("<article>") == 4
    assert page.count("data:image/jpeg") == 3
    assert TEXT in page
    assert "no such video file" in page


def test_the_page_shows_small_pictures_and_says_what_is_missing(tmp_path: Path, server: Loopback) -> None:
    manifest = write_clips(tmp_path, 2, size=(360, 640))
    (tmp_path / "001.mp4").write_bytes(b"no video")
    page = (
        run(config_for("openai:small", base_url=server.url, side=0), manifest, preview=2).preview or Path()
    ).read_text()
    pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in re.findall(r'base64,([^"]+)"', page)]
    assert [picture.size for picture in pictures] == [(320, 180)] * 3
    assert 'class="reason"' in page.partition("001.mp4")[2]


def test_captions_that_no_manifest_can_hold_are_mended_or_left_out(tmp_path: Path, server: Loopback) -> None:
    manifest = write_clips(tmp_path, 1)
    server.text = "A\x00 cat\x1b \ud800sits.\r\nIt\tpurrs."
    done = run(config_for("openai:small", base_url=server.url), manifest)
    assert read_manifest(done.output)[0].caption == "A cat sits.\r\nIt\tpurrs."
    server.text = "." * 30_000
    with pytest.raises(InputError, match="30000 characters"):
        run(config_for("openai:small", base_url=server.url, clean=True), manifest, redo=True)


def test_captions_of_another_language_are_left_out(tmp_path: Path, server: Loopback) -> None:
    manifest = write_clips(tmp_path, 1)
    server.text = "Ein Hund läuft über die Straße und der Mann ist nicht zu sehen."
    with pytest.raises(InputError, match="language 'de', not 'en'"):
        run(config_for("openai:small", base_url=server.url, language="en"), manifest)


def test_the_camera_is_said(tmp_path: Path, server: Loopback) -> None:
    rough = np.random.default_rng(0).integers(0, 255, (18, 48, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.stack([rough[:, 4 * step : 4 * step + 256] for step in range(24)])
    write_video(tmp_path / "pan.mp4", frames, fps=24.0)
    done = run(config_for("openai:small", base_url=server.url, camera=True), tmp_path / "pan.mp4")
    assert rows_of(done.output)[0]["caption"] == f"{TEXT} The camera pans right."


def command(manifest: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "opensora_cli", "caption", str(manifest), "--set", "caption.workers=1", *words]


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_again_and_again_nothing_is_lost_or_doubled(tmp_path: Path, server: Loopback) -> None:
    manifest, server.delay_seconds = write_clips(tmp_path, 20), 0.1
    words = command(manifest, "--model", "openai:small", "--base-url", server.url, "--requests", "2")
    output = tmp_path / "captions.jsonl"
    for count in (3, 9, 15):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for_rows(output, count, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    assert [row["path"] for row in rows_of(output)] == [f"{number:03d}.mp4" for number in range(20)]
    assert all(row["caption"] == TEXT for row in rows_of(output))
    assert len(server.seen) <= 20 + 3 * 8, "what was in work is asked again, and nothing else"
    assert not list(tmp_path.glob(".osora-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_stops_when_it_is_told_to(tmp_path: Path, server: Loopback, number: int, code: int) -> None:
    manifest, server.delay_seconds = write_clips(tmp_path, 12), 0.2
    words = command(manifest, "--model", "openai:small", "--base-url", server.url, "--requests", "1")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_rows(tmp_path / "captions.jsonl", 2, process)
    began = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert process.returncode == code, said
    assert 2 <= len(rows_of(tmp_path / "captions.jsonl")) < 12


@pytest.mark.slow
def test_it_stops_in_the_middle_of_a_word(tmp_path: Path) -> None:
    """A batch is in the model for many seconds, and the interpreter must not end while it is."""
    manifest, model = write_clips(tmp_path, 8), build(tmp_path / "model", "llava", width=512)
    words = ["--model", str(model), "--frames", "32", "--layout", "separate", "--batch-size", "8", "--device", "cpu"]
    process = subprocess.Popen(command(manifest, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_rows(tmp_path / ".captions.jsonl" / "settings.json", 1, process)
    time.sleep(2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert process.returncode == 130, said


@pytest.mark.slow
def test_several_processes_share_the_clips(tmp_path: Path) -> None:
    manifest, model = write_clips(tmp_path, 8), build(tmp_path / "model", "llava")
    captions = []
    for count in (1, 2):
        output = tmp_path / f"{count}.jsonl"
        words = ["--model", str(model), "--max-tokens", "8", "--batch-size", "2", "--device", "cpu", "--json"]
        words += ["--gpus", str(count), "--output", str(output)]
        told = subprocess.run(command(manifest, *words), check=False, capture_output=True, timeout=250, text=True)
        assert told.returncode == 0, told.stdout
        assert json.loads(told.stdout.splitlines()[-1])["captioned"] == 8
        captions.append([row["caption"] for row in rows_of(output)])
    assert captions[0] == captions[1]


@pytest.mark.slow
def test_the_model_is_kept_busy(tmp_path: Path) -> None:
    """At most a tenth of the time is spent outside of it; here with room for a machine that does much else."""
    manifest, model = write_clips(tmp_path, 96, size=(64, 96)), build(tmp_path / "model", "llava", width=128)
    done = run(config_for(str(model), max_tokens=100, batch_size=8), manifest)
    assert done.captioned + sum(done.rejected.values()) == 96, "noise may be nothing but control characters"
    assert done.outside < 0.25
