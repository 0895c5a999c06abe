"""The table holds together; words are found on the disk or on a hub, and missed quickly where no hub answers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from opensora_core import assets
from opensora_core.assets import ASSETS, fetch, find, hub, locate
from opensora_core.assets.search import Wanted
from opensora_core.errors import UsageError, WeightsError
from opensora_core.presets import PRESETS, preset

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """As much of a hub as its client asks for, and a few ways to misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.cut: list[int] = []  # of the next answers to GET, how many bytes come before the line goes dead
        self.html = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        tree = re.fullmatch(r"/api/models/(.+)/(?:revision|tree)/([^/?]+)(?:\?.*)?", self.path)
        if tree:
            repo = tree[1] + "/"
            names = [name.removeprefix(repo) for name in self.server.files if name.startswith(repo)]
            body = json.dumps(
                [{"type": "file", "path": name, "size": 1, "oid": "x"} for name in names]
                if "/tree/" in self.path
                else {"id": tree[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            ).encode()
            self.reply(200, body, with_body=with_body)
            return
        content = self.server.files.get(re.sub(r"/resolve/[^/]+/", "/", self.path).lstrip("/"))
        if content is None:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
            return
        if self.server.html:
            self.reply(200, b"<html>", {"Content-Type": "text/html"}, with_body=with_body)
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        if start and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            self.reply(206, content[int(start[1]) :], headers, with_body=with_body)
        else:
            self.reply(200, content, headers, with_body=with_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.server.cut and status in (200, 206):
            self.wfile.write(body[: self.server.cut.pop(0)])
            self.close_connection = True
        elif with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this machine's own caches, and no network."""
    for name in (
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OSORA_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    return tmp_path


# the table ---------------------------------------------------------------------------------------------------------


def test_presets_name_weights_of_the_table_and_of_the_right_kind():
    for name in PRESETS:
        config = preset(name)
        for word, kind in ((config.model.weights, "model"), (config.vae.weights, "vae"), (config.text.weights, "text")):
            assert word in ("", "bundled") or ASSETS[word].kind == kind, (name, word)


def test_entries_of_the_table_are_complete():
    for name, asset in ASSETS.items():
        assert name == asset.name
        assert asset.licence
        assert asset.size_bytes > 10**6
        assert len(asset.about) < 80
        if asset.kind == "model":
            assert asset.preset in PRESETS
            assert PRESETS[asset.preset]
        assert bool(asset.repo) + bool(asset.url) + (name == "bundled") == 1
        assert asset.url == "" or asset.url.endswith("/" + asset.file_name)


def test_published_names_that_presets_do_not_use_are_there_too():
    others = {"opensora-v1-16x256x256", "pixart-sam-256", "sd-vae-ft-mse"}
    assert others <= set(ASSETS)
    assert ASSETS["opensora-v1-hq-16x512x512"].files == ("OpenSora-v1-HQ-16x512x512.pth",)
    assert ASSETS["opensora-v1-16x256x256"].files == ("OpenSora-v1-16x256x256.pth",)


# on the disk ---------------------------------------------------------------------------------------------------------


def test_a_path_is_itself(tmp_path, monkeypatch):
    (tmp_path / "pixart-512").write_text("")
    monkeypatch.chdir(tmp_path)
    assert locate("./pixart-512", kind="model").path == Path("./pixart-512")
    assert locate(str(tmp_path), kind="vae").path == tmp_path
    assert find("pixart-512", kind="model") is None  # a name of the table wins over a file beside us


@pytest.mark.parametrize(
    "word", ["opensora-v1-hq-16x256", "./nowhere", "weights.pth", "hf:owner", "hf:../../etc/passwd"]
)
def test_unknown_words_are_usage_errors(word):
    with pytest.raises(UsageError):
        locate(word, kind="model")


def test_nearest_names_of_the_right_kind_are_offered():
    with pytest.raises(UsageError) as caught:
        locate("opensora-v1-hq-16x25", kind="model")
    assert "'opensora-v1-hq-16x256x256'" in caught.value.hint
    with pytest.raises(UsageError, match="not weights of kind 'model'") as caught:
        locate("sd-vae-ft-ema", kind="model")
    assert "opensora-v1-16x256x256" in caught.value.hint


def test_what_was_put_by_hand_is_found(places):
    by_hand = places / "weights" / "PixArt-XL-2-512x512.pth"
    by_hand.parent.mkdir()
    by_hand.write_text("")
    found = locate("pixart-512", kind="model", offline=True)
    assert (found.path, found.asset) == (by_hand, ASSETS["pixart-512"])
    (places / "weights" / "sd-vae-ft-ema").mkdir()
    assert locate("sd-vae-ft-ema", kind="vae").path == places / "weights" / "sd-vae-ft-ema"
    (places / "weights" / "owner--repo").mkdir()
    assert locate("hf:owner/repo", kind="vae").path == places / "weights" / "owner--repo"


# what cannot be had --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-name.invalid", "https://127.0.0.1:9"])
@pytest.mark.parametrize("word", ["opensora-v1-hq-16x512x512", "hf:owner/repo"])
def test_an_unreachable_hub_is_an_error_within_five_seconds(word, endpoint, monkeypatch, places):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    start = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        locate(word, kind="model")
    assert time.monotonic() - start < 5
    text = caught.value.message + caught.value.hint
    for part in (str(places / "weights"), str(places / "hf" / "hub"), endpoint, "cannot be reached", "OSORA_WEIGHTS"):
        assert part in text
    if word in ASSETS:
        assert "OpenSora-v1-HQ-16x512x512.pth" in caught.value.message
        assert f"{endpoint}/hpcai-tech/Open-Sora/resolve/main/OpenSora-v1-HQ-16x512x512.pth" in caught.value.hint


def test_a_server_that_never_answers_is_given_up(monkeypatch, places):
    import socket

    monkeypatch.setattr(fetch, "_PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(WeightsError, match="timed out"):
            locate("pixart-256", kind="model")


def test_a_resolver_that_hangs_is_given_up(monkeypatch):
    import socket

    release = threading.Event()
    monkeypatch.setattr(fetch, "_PROBE_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(5) and [])
    with pytest.raises(fetch.Unavailable, match="timed out"):
        fetch.probe("http://slow.example")
    release.set()


@pytest.mark.parametrize("by_variable", [False, True])
def test_an_offline_run_asks_nobody(by_variable, server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    if by_variable:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="offline run"):
        locate("pixart-256", kind="model", offline=not by_variable)
    assert server.requests == []


def test_weights_that_are_no_part_of_the_repository_are_named(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(WeightsError, match="no such file"):
        locate("pixart-256", kind="model")


# what can ------------------------------------------------------------------------------------------------------------


def test_a_file_comes_from_the_hub_and_then_from_its_cache(server, monkeypatch, places):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files["PixArt-alpha/PixArt-alpha/PixArt-XL-2-256x256.pth"] = b"weights" * 1000
    seen: list[tuple[int, int]] = []
    found = locate("pixart-256", kind="model", on_progress=lambda done, total: seen.append((done, total)))
    assert found.path.read_bytes() == b"weights" * 1000
    assert found.path.is_relative_to(places / "hf" / "hub")
    assert seen[-1] == (7000, 7000)
    server.requests.clear()
    assert locate("pixart-256", kind="model", offline=True).path == found.path
    assert locate("pixart-256", kind="model").path == found.path
    assert server.requests == []


def test_a_folder_takes_the_file_that_there_is(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for name in ("config.json", "diffusion_pytorch_model.bin"):
        server.files[f"stabilityai/sd-vae-ft-mse/{name}"] = name.encode()
    folder = locate("sd-vae-ft-mse", kind="vae").path
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.bin"]
    assert locate("sd-vae-ft-mse", kind="vae", offline=True).path == folder


@pytest.mark.parametrize(("kind", "folder"), [("model", "transformer"), ("vae", "vae")])
def test_of_a_pipeline_only_the_part_is_fetched(kind, folder, server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for part in ("transformer", "vae", "scheduler"):
        server.files[f"owner/pipe/{part}/config.json"] = b"{}"
        server.files[f"owner/pipe/{part}/model.safetensors"] = part.encode()
        server.files[f"owner/pipe/{part}/model.bin"] = part.encode()
    server.files["owner/pipe/model_index.json"] = b"{}"
    path = locate("hf:owner/pipe", kind=kind).path
    assert path.name == folder
    assert sorted(child.name for child in path.iterdir()) == ["config.json", "model.safetensors"]
    assert (path / "model.safetensors").read_text() == folder
    assert locate("hf:owner/pipe", kind=kind, offline=True).path == path


def test_a_named_file_of_a_repository_at_a_revision(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files["owner/repo/a.pth"] = b"a"
    server.files["owner/repo/b.pth"] = b"b"
    assert locate("hf:owner/repo/b.pth@v2", kind="model").path.read_text() == "b"
    assert any("/resolve/v2/b.pth" in path for _, path, _ in server.requests)
    with pytest.raises(UsageError, match=r"several models: a\.pth, b\.pth"):
        locate("hf:owner/repo", kind="model")


def test_an_export_of_ours_is_fetched_whole():
    names = ["README.md", "config.json", "manifest.json", "model.safetensors", "text/config.json", "vae/config.json"]
    assert hub.choose(names, hub.Place("o", "", "main"), "model") == names


def test_the_text_encoder_of_a_pipeline_comes_with_its_tokenizer(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    part = ["text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/spiece.model"]
    wanted = ["model_index.json", *part]
    for name in [*wanted, "transformer/config.json", "transformer/model.safetensors"]:
        server.files[f"owner/pipe/{name}"] = b"{}"
    folder = locate("hf:owner/pipe", kind="text").path
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == wanted
    assert locate("hf:owner/pipe", kind="text", offline=True).path == folder


def test_shards_are_taken_together_and_half_precision_copies_left():
    place = hub.Place("o/r", "", "main")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert hub.choose(["model.safetensors.index.json", *shards], place, "text") == [
        "model.safetensors.index.json",
        *shards,
    ]
    assert hub.choose(["a.fp16.safetensors", "a.safetensors"], place, "vae") == ["a.safetensors"]
    with pytest.raises(UsageError, match="no weights"):
        hub.choose(["README.md"], place, "model")


# plain downloads -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dit(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    asset = ASSETS["dit-xl-2-256"]
    server.files["dit.pt"] = os.urandom(100_000)
    digest = hashlib.sha256(server.files["dit.pt"]).hexdigest()
    monkeypatch.setitem(
        ASSETS, asset.name, assets.Asset(**{**vars(asset), "url": f"{server.url}/dit.pt", "sha256": digest})
    )
    return server


def test_a_download_goes_on_where_it_broke_off(dit, places):
    dit.cut = [30_000, 20_000]
    found = locate("dit-xl-2-256", kind="model")
    assert found.path == places / "weights" / "DiT-XL-2-256x256.pt"
    assert found.path.read_bytes() == dit.files["dit.pt"]
    assert [request[2] for request in dit.requests if request[0] == "GET"] == ["", "bytes=30000-", "bytes=50000-"]
    assert list(found.path.parent.iterdir()) == [found.path]


def test_a_file_that_changed_meanwhile_is_begun_anew(dit, places, monkeypatch):
    monkeypatch.setattr("opensora_core.net.client._FIRST_WAIT", 0.01)
    target = places / "weights" / "x.pt"
    dit.cut = [30_000] * 6
    dit.files["dit.pt"] = b"old" * 100_000
    with pytest.raises(fetch.Unavailable, match="broke off 6 times"):
        fetch.download(f"{dit.url}/dit.pt", target)
    assert not target.exists()
    dit.files["dit.pt"] = b"new" * 90_000
    fetch.download(f"{dit.url}/dit.pt", target)
    assert target.read_bytes() == b"new" * 90_000


def test_wrong_bytes_and_web_pages_never_become_the_file(dit, places):
    dit.html = True
    with pytest.raises(WeightsError, match="web page"):
        locate("dit-xl-2-256", kind="model")
    dit.html = False
    dit.files["dit.pt"] = b"something else"
    with pytest.raises(WeightsError, match="SHA-256"):
        locate("dit-xl-2-256", kind="model")
    del dit.files["dit.pt"]
    with pytest.raises(WeightsError, match="404"):
        locate("dit-xl-2-256", kind="model")
    assert not (places / "weights" / "DiT-XL-2-256x256.pt").exists()


def test_bundled_parts_lie_in_the_package():
    folder = Path(assets.__file__).parents[1] / "bundled"
    assert Wanted.parse("bundled", "model").path == folder
    assert Wanted.parse("bundled", "vae").path == folder / "vae"
    assert Wanted.parse("bundled", "text").path == folder / "text"
