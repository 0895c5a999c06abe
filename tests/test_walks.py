"""The walks of a user through the command line, on real clips: from a folder to a model, and to its samples."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from opensora_cli.app import run
from opensora_core.media import read_frames, read_video
from tests.core.curation.captions.loopback import TEXT, serving
from tests.core.curation.captions.small import build, rows_of
from tests.core.net.loopback import file as page_of
from tests.core.net.loopback import running

VIDEOS = Path(__file__).parents[2] / "shared" / "videos"
CLASSES = {
    "WalkingAnimal": ("mdn_frog.mp4", "mdn_pig.mp4", "mdn_rabbit320.mp4", "mdn_elf.mp4"),
    "StillLife": ("mdn_flower.webm", "ocv_cup.mp4", "ocv_box.mp4", "mb_hevc.ts"),
}
SHRUNK = {
    "vae.kind": "patch",
    "vae.weights": "bundled",
    "text.weights": "bundled",
    "text.cleaning": "plain",
    "model.in_channels": 8,
    "model.caption_channels": 128,
    "model.caption_length": 48,
    "model.hidden_size": 64,
    "model.depth": 2,
    "model.num_heads": 4,
    "video.num_frames": 4,
    "video.height": 64,
    "video.width": 64,
    "train.batch_size": 2,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "sampling.steps": 3,
    "runtime.device": "cpu",
}
STAGE_2 = ["train", "--stage", "2", "--init", "", *(f"--set={name}={value}" for name, value in SHRUNK.items())]

pytestmark = pytest.mark.skipif(not VIDEOS.is_dir(), reason="the clips of shared/videos are not here")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Real clips in a folder per class; one of them is broken."""
    for name, files in CLASSES.items():
        (tmp_path / "classes" / name).mkdir(parents=True)
        for file in files:
            shutil.copy(VIDEOS / file, tmp_path / "classes" / name / file)
    (tmp_path / "classes/StillLife/torn.mp4").write_bytes((VIDEOS / "mdn_pig.mp4").read_bytes()[:20_000])
    return tmp_path / "classes"


def test_a_folder_of_classes_becomes_a_model(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, output = tmp_path / "clips.jsonl", tmp_path / "run"
    words = [*STAGE_2, "--max-rejects", "0.2"]
    assert run([*words, "--data", str(classes), "--dry-run", "--write-manifest", str(manifest)]) == 0
    assert "8 of 9" in capsys.readouterr().out
    counted = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert {row["caption"] for row in counted} == {"Walking Animal", "Still Life"}

    train = [*words, "--data", str(manifest), "--steps", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "opensora_cli", *train, "--output", str(output), "--json"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "checkpoint_saved":
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)

    assert run(["train", "--resume", str(output)]) == 0
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 8 and set(steps[-1]["sample_ids"]) <= {row["path"] for row in counted}
    rejected = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert [row["clip"] for row in rejected] == ["classes/StillLife/torn.mp4"]

    sample = ["sample", "--model", str(output), "--prompt", "Walking Animal", "--output", str(tmp_path / "out.mp4")]
    assert run(sample) == 0
    assert read_video(tmp_path / "out.mp4").frames.shape == (4, 64, 64, 3)


def test_a_folder_of_pictures_becomes_a_model_and_an_adapter(tmp_path: Path) -> None:
    for number, frame in enumerate(read_frames(VIDEOS / "ocv_box.mp4", range(0, 40, 10))):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a box, picture {number}")
    words = [*STAGE_2, "--set=video.num_frames=1", "--data", str(tmp_path), "--steps", "2"]
    assert run([*words, "--output", str(tmp_path / "run")]) == 0
    adapter = [*words, "--init", str(tmp_path / "run"), "--lora-rank", "2", "--output", str(tmp_path / "adapter")]
    assert run(adapter) == 0
    sample = ["sample", "--model", str(tmp_path / "run"), "--lora", str(tmp_path / "adapter"), "--prompt", "a box"]
    assert run([*sample, "--output", str(tmp_path / "box.png")]) == 0
    with Image.open(tmp_path / "box.png") as image:
        assert image.size == (64, 64)


def _killed_when(words: list[str], is_begun: Callable[[], bool]) -> None:
    """Run a command in a process group of its own, and kill all of it once something lies there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "opensora_cli", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not is_begun():
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


@pytest.mark.parametrize("captioner", [pytest.param("llava", marks=pytest.mark.slow), "server"])
def test_a_list_of_links_becomes_captioned_clips_though_every_step_is_killed(captioner: str, tmp_path: Path) -> None:
    raw, clips, captions = tmp_path / "raw", tmp_path / "clips", tmp_path / "clips" / "captions.jsonl"
    files = ("psd_testvideo.mp4", "mdn_elf.mp4", "skv_bikes.mp4", "mdn_frog.mp4")
    with running() as site, serving() as server:
        site.pages = {f"/{name}": page_of((VIDEOS / name).read_bytes()) for name in files}
        (tmp_path / "urls.txt").write_text("".join(f"{site.url}/{name}\n" for name in files))
        download = ["download", "data", str(tmp_path / "urls.txt"), "--output", str(raw), "--workers", "1"]
        download += ["--set=download.allow_private=true"]
        _killed_when(download, lambda: any((raw / "files").glob("*.mp4")))
        assert run(download) == 0
        fetched = rows_of(raw / "manifest.jsonl")
        assert len(fetched) == len({row["sha256"] for row in fetched}) == len(files)
        assert all(site.count(f"/{name}") <= 2 for name in files)  # HEAD or a second try; never all over again

        split = ["split", str(raw / "manifest.jsonl"), "--output", str(clips), "--short-side", "64", "--workers", "1"]
        split += ["--filter", "--set=filter.max_still=0.9"]
        _killed_when(split, lambda: any((clips / ".split/sources").glob("*.record")))
        assert run(split) == 0
        listed = rows_of(clips / "manifest.jsonl")
        assert {row["status"] for row in rows_of(clips / "sources.jsonl")} == {"ok"}
        assert len(listed) == len({row["path"] for row in listed}) > len(files)
        assert all(row["scores"]["still"] <= 0.9 for row in listed)

        if captioner == "llava":
            words = [
                "--model",
                str(build(tmp_path / "llava", "llava")),
                "--max-tokens",
                "8",
                "--batch-size",
                "2",
                "--device",
                "cpu",
            ]
        else:
            words = ["--model", "openai:small", "--base-url", server.url, "--requests", "1"]
            server.delay_seconds = 0.05
        caption = ["caption", str(clips / "manifest.jsonl"), *words]
        _killed_when(caption, lambda: captions.exists() and captions.read_bytes().count(b"\n") > 0)
        assert run(caption) == 0
        told = rows_of(captions)
        assert [row["path"] for row in told] == [row["path"] for row in listed]
        if captioner == "server":
            assert {row["caption"] for row in told} == {TEXT}
            assert len(server.seen) <= len(listed) + 2  # those in flight when it was killed are asked for again
        small = [f"--set=video.{name}={value}" for name, value in (("height", 48), ("width", 64), ("num_frames", 4))]
        train = [*STAGE_2, *small, "--data", str(captions), "--steps", "2", "--output", str(tmp_path / "run")]
        assert run([*train, "--set=train.batch_size=1"]) == 0
        steps = rows_of(tmp_path / "run/metrics.jsonl")
        assert set(steps[-1]["sample_ids"]) <= {row["path"] for row in told}
