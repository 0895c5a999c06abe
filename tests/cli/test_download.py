"""`osora download` as it is typed: what it shows, what it refuses, and what is left when it is killed at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opensora_cli.app import run
from tests.core.net.loopback import Handler, Loopback, running

PRIVATE = ("--set", "download.allow_private=true")
PIECE = 20_000


def mp4(number: int) -> bytes:
    return b"\0\0\0\x18ftypmp42" + bytes([number]) * 200_000


@pytest.fixture
def server() -> Iterator[Loopback]:
    with running() as server:
        yield server


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HF_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OSORA_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path


def slowly(content: bytes, etag: str, seconds: float) -> Any:
    """A file that takes its time, and that can be continued."""

    def page(handler: Handler) -> None:
        at = 0
        if handler.headers.get("If-Range") == etag:
            at = int(handler.headers["Range"][6:-1])
        headers = {"ETag": etag, "Content-Length": str(len(content) - at)}
        if at:
            headers["Content-Range"] = f"bytes {at}-{len(content) - 1}/{len(content)}"
        handler.reply(206 if at else 200, b"", headers)
        for start in range(at, len(content), PIECE):
            handler.wfile.write(content[start : start + PIECE])
            handler.wfile.flush()
            if handler.server.stopped.wait(seconds):
                return

    return page


def shelf(server: Loopback, folder: Path, seconds: float, count: int = 6) -> Path:
    for number in range(count):
        server.pages[f"/{number}.mp4"] = slowly(mp4(number), f'"{number}"', seconds)
    path = folder / "urls.txt"
    path.write_text("".join(f"{server.url}/{number}.mp4\n" for number in range(count)))
    return path


def start(*words: object, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "opensora_cli", "download", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,
    )


def wait_until(happened: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(capsys: pytest.CaptureFixture[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in capsys.readouterr().out.splitlines():
        event = json.loads(line)
        found.setdefault(event["event"], []).append(event)
    return found


# killed at any moment ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_9_loses_nothing_and_doubles_nothing(server: Loopback, tmp_path: Path) -> None:
    words = ("data", shelf(server, tmp_path, 0.05), "--output", tmp_path / "out", "--workers", 2, *PRIVATE)
    for number in range(3):
        before = len(server.requests)
        child = start(*words)
        wait_until(lambda before=before: len(server.requests) > before)
        time.sleep(0.2 + 0.3 * number)
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    ranged = [headers for _, _, headers in server.requests if "Range" in headers]
    assert ranged, "a part that had come is continued"
    child = start(*words)
    assert child.wait(120) == 0, child.communicate()
    manifest = rows(tmp_path / "out" / "manifest.jsonl")
    assert len(manifest) == 6
    assert {(tmp_path / "out" / row["path"]).read_bytes() for row in manifest} == {mp4(n) for n in range(6)}
    assert len(list((tmp_path / "out" / "files").iterdir())) == 6
    assert rows(tmp_path / "out" / "rejects.jsonl") == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_at_once_and_leaves_no_temporary_file(
    number: signal.Signals, code: int, server: Loopback, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    child = start("data", shelf(server, tmp_path, 0.2), "--output", output, "--workers", 2, *PRIVATE)
    wait_until(lambda: (output / ".download" / "parts").is_dir() and len(server.requests) > 1)
    began = time.monotonic()
    child.send_signal(number)
    assert child.wait(30) == code
    assert time.monotonic() - began < 10  # 5 s where nobody else computes
    left = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
    assert all(name.startswith(".") or name in ("manifest.jsonl", "rejects.jsonl") for name in left), left
    assert not list(output.glob(".osora-*"))
    assert b"Traceback" not in child.communicate()[1]


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_no_torn_file(server: Loopback, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    output = tmp_path / "out"
    child = start("data", shelf(server, tmp_path, 0), "--output", output, *PRIVATE, preexec_fn=limit)
    told = child.communicate(timeout=120)[1].decode()
    assert child.returncode == 1, told
    assert "no space left" in told
    assert "Traceback" not in told
    assert not list(output.glob("files/*"))
    assert not list(output.rglob("*.part"))
    assert run(["download", "data", str(tmp_path / "urls.txt"), "-o", str(output), *PRIVATE]) == 0


# what it shows and refuses -------------------------------------------------------------------------------------------


def test_data_is_told_as_it_comes(server: Loopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shelf(server, tmp_path, 0, count=2)
    path.write_text(path.read_text() + f"{server.url}/gone.mp4?token=s3cret\n")
    words = ["download", "data", str(path), "--output", str(tmp_path / "out"), *PRIVATE]
    assert run(words) == 0
    told = capsys.readouterr()
    assert "manifest" in told.out
    assert "answered 404" in told.err
    assert "s3cret" not in told.out + told.err
    assert run([*words, "--json"]) == 0
    found = events(capsys)
    assert found["data_done"][0]["num_before"] == 2
    assert found["item_failed"][0]["reason"].endswith("answered 404 Not Found")
    assert run([*words, "--dry-run", "--json"]) == 0
    assert events(capsys)["data_plan"][0]["done"] == 2


def test_weights_are_listed_with_what_is_known(capsys: pytest.CaptureFixture[str], places: Path) -> None:
    (places / "weights").mkdir()
    (places / "weights" / "PixArt-XL-2-256x256.pth").write_bytes(b"x" * 1000)
    assert run(["download", "--list", "--json"]) == 0
    items = {item["name"]: item for item in events(capsys)["weights_listed"][0]["items"]}
    assert items["pixart-256"]["path"].endswith("PixArt-XL-2-256x256.pth")
    assert items["pixart-256"]["size_bytes"] == 1000
    assert items["dit-xl-2-256"]["path"] is None
    assert items["t5-v1_1-xxl"]["licence"] == "Apache-2.0"
    assert run(["download", "--list", "pixart-512", "hf:a/b"]) == 0
    out = capsys.readouterr().out
    assert "about 2.4 GB" in out
    assert "unknown" in out


def test_a_folder_that_weights_were_brought_to_is_listed_and_checked(
    capsys: pytest.CaptureFixture[str], places: Path
) -> None:
    folder = places / "stick"
    folder.mkdir()
    (folder / "PixArt-XL-2-256x256.pth").write_bytes(b"x")
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'x').hexdigest()}  PixArt-XL-2-256x256.pth\n")
    assert run(["download", "--list", "--to", str(folder), "--json"]) == 0
    items = {item["name"]: item["path"] for item in events(capsys)["weights_listed"][0]["items"]}
    assert items["pixart-256"] == str(folder / "PixArt-XL-2-256x256.pth")
    assert items["pixart-512"] is None
    assert run(["download", "--verify", "--to", str(folder), "--json"]) == 0
    assert {item["name"]: item["status"] for item in events(capsys)["weights_verified"]}["pixart-256"] == "whole"


def test_a_hub_that_is_not_there_is_said_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    assert run(["download", "data", "hf:a/b"]) == 1
    assert time.monotonic() - began < 3
    assert "cannot be reached" in capsys.readouterr().err


def test_what_a_run_needs_is_planned_with_sizes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["download", "--all-for", "sample", "--preset", "16x256x256", "--dry-run", "--json"]) in (0, 1)
    plan = events(capsys)["weights_plan"][0]
    assert [item["kind"] for item in plan["items"]] == ["model", "vae", "text"]
    assert plan["missing_bytes"] > 20e9
    assert plan["free_bytes"] > 0


def test_a_damaged_file_ends_with_1(capsys: pytest.CaptureFixture[str], places: Path) -> None:
    (places / "weights").mkdir()
    (places / "weights" / "PixArt-XL-2-256x256.pth").write_bytes(b"x")
    assert run(["download", "pixart-256", "--verify"]) == 0
    assert "unknown" in capsys.readouterr().out
    (places / "weights" / "SHA256SUMS").write_text(f"{'0' * 64}  PixArt-XL-2-256x256.pth\n")
    assert run(["download", "--verify"]) == 1
    assert "osora download pixart-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["data"],
        ["data", "nonsense"],
        ["data", "pexels"],
        ["data", "world"],
        ["data", "world", "--limit", "0"],
        ["data", "world", "--limit", "3", "--query", "x"],
        ["data", "world", "more", "--limit", "3"],
        ["data", "urls.txt", "--to", "x"],
        ["pixart-256", "--query", "x"],
        ["data", "hd-vg-130m"],
        ["data", "nowhere.csv"],
        ["data", "world", "--limit", "1", "--workers", "0"],
        ["data", "imagenet"],
        ["t5-v1_1-xx"],
        ["pixart-256", "--preset", "16x256x256"],
        ["data", "world", "--limit", "1", "--preset", "16x256x256"],
        ["data", "urls.txt", "--set", "runtime.offline=true"],
        ["--list", "--from", "x"],
        ["--verify", "--dry-run"],
    ],
)
def test_what_makes_no_sense_ends_with_2(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["download", *words]) == 2
    told = capsys.readouterr().err
    assert "error: " in told
    assert "hint: " in told


def test_weights_that_cannot_be_had_end_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run(["download", "sd-vae-ft-ema"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert run(["download", "sd-vae-ft-ema", "--offline"]) == 1


def test_settings_are_reached(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["download", "--max-rate", "2.5", "--workers", "7", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "max_bytes_per_second = 2500000.0" in out
    assert "workers = 7" in out
