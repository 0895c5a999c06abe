"""Weights are brought where runs find them, from a hub, a link, a folder or a mirror, and checked by their sums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora_core import assets
from opensora_core.assets import ASSETS, WeightsRequest, fetch_weights, find, plan_weights, verify_weights
from opensora_core.assets.holdings import Word
from opensora_core.config import DownloadConfig
from opensora_core.errors import CheckpointError, InputError, ResourceError, UsageError, WeightsError
from opensora_core.net import client as client_module
from opensora_core.presets import preset
from tests.core.net.loopback import Loopback, file, running

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VAE = ("sd-vae-ft-mse", "vae")
VAE_REPO = "stabilityai/sd-vae-ft-mse"
PIXART = ("pixart-256", "model")
DIT = ("dit-xl-2-256", "model")


class Hub:
    """As much of a hub as is asked for: metadata of files, their bytes, and what a repository holds."""

    def __init__(self, server: Loopback) -> None:
        self.server = server
        self.files: dict[str, bytes] = {}

    def add(self, repo: str, name: str, content: bytes, *, is_lfs: bool = True, sent: bytes | None = None) -> None:
        digest = hashlib.sha256(content).hexdigest()
        if not is_lfs:
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        page = file(content if sent is None else sent, etag=f'"{digest}"', headers={"X-Repo-Commit": COMMIT})
        for revision in ("main", COMMIT):
            self.server.pages[f"/{repo}/resolve/{revision}/{name}"] = page
        self.files[name] = content
        listing = json.dumps({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]}).encode()
        self.server.pages[f"/api/models/{repo}/revision/main"] = lambda handler: handler.reply(200, listing)
        tree = json.dumps([{"type": "file", "path": n, "size": 1, "oid": "x"} for n in self.files]).encode()
        self.server.pages[f"/api/models/{repo}/tree/main"] = lambda handler: handler.reply(200, tree)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OSORA_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.01)
    for name, asset in ASSETS.items():  # the sizes of real ones would not fit everywhere
        monkeypatch.setitem(ASSETS, name, assets.Asset(**{**vars(asset), "size_bytes": 5000}))
    return tmp_path


@pytest.fixture
def server() -> Iterator[Loopback]:
    with running() as server:
        yield server


@pytest.fixture
def hub(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    hub = Hub(server)
    hub.add("stabilityai/sd-vae-ft-mse", "config.json", b"{}", is_lfs=False)
    hub.add("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.bin", b"vae" * 1000)
    hub.add("PixArt-alpha/PixArt-alpha", "PixArt-XL-2-256x256.pth", b"pixart" * 1000)
    return hub


def bring(*words: Word, **request: object) -> dict[str, assets.WeightsReady]:
    events = fetch_weights(DownloadConfig(workers=2), WeightsRequest(words, **request))
    return {event.name: event for event in events if isinstance(event, assets.WeightsReady)}


def statuses(*words: Word, folder: Path | None = None) -> list[str]:
    return [event.status for event in verify_weights(words, folder)]


def test_what_is_downloaded_is_what_runs_find(hub, places):
    ready = bring(VAE, PIXART)
    for name, kind in (VAE, PIXART):
        assert ready[name].is_new
        assert ready[name].path == find(name, kind=kind).path
        assert ready[name].path.is_relative_to(places / "hf" / "hub")
    assert (ready[VAE[0]].path / "diffusion_pytorch_model.bin").read_bytes() == b"vae" * 1000
    hub.server.requests.clear()
    assert not bring(VAE, PIXART)[VAE[0]].is_new
    assert hub.server.requests == []


def test_a_folder_of_ones_own_is_one_that_runs_know(hub, places, monkeypatch):
    folder = places / "own"
    ready = bring(VAE, PIXART, to=folder)
    assert ready[PIXART[0]].path == folder / "PixArt-XL-2-256x256.pth"
    assert sorted(path.name for path in ready[VAE[0]].path.iterdir()) == ["config.json", "diffusion_pytorch_model.bin"]
    assert find(*PIXART[:1], kind="model") is None
    monkeypatch.setenv("OSORA_WEIGHTS", str(folder))
    assert find("pixart-256", kind="model").path == ready[PIXART[0]].path
    assert find("sd-vae-ft-mse", kind="vae").path == folder / "sd-vae-ft-mse"
    assert list(folder.rglob("*.part*")) == []


def test_a_machine_without_a_network_gets_a_copy(hub, places, monkeypatch):
    bring(VAE, to=places / "stick")
    bring(PIXART)  # into the cache, which is a folder to copy from as well
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(places / "other"))
    hub.server.requests.clear()
    assert bring(VAE, source=str(places / "stick"))[VAE[0]].path == places / "weights" / "sd-vae-ft-mse"
    assert bring(PIXART, source=str(places / "hf"))[PIXART[0]].path.read_bytes() == b"pixart" * 1000
    assert hub.server.requests == []
    assert statuses(VAE, PIXART) == ["whole", "whole"]
    with pytest.raises(InputError, match="no folder"):
        bring(DIT, source=str(places / "nowhere"))
    with pytest.raises(WeightsError, match="it is not in"):
        bring(DIT, source=str(places / "stick"))


def test_a_folder_is_only_there_when_it_is_whole(hub, places, monkeypatch):
    monkeypatch.setenv("OSORA_WEIGHTS", str(places / "own"))
    weights = hub.server.pages.pop(f"/{VAE_REPO}/resolve/{COMMIT}/diffusion_pytorch_model.bin")
    for to in (places / "own", None):
        with pytest.raises(WeightsError, match="cannot be had"):
            bring(VAE, to=to)
        assert find(*VAE[:1], kind="vae") is None
    hub.server.pages[f"/{VAE_REPO}/resolve/{COMMIT}/diffusion_pytorch_model.bin"] = weights
    hub.server.requests.clear()
    assert bring(VAE, to=places / "own")[VAE[0]].is_new
    assert not any("config.json" in path for _, path, _ in hub.server.requests)  # which had come
    assert statuses(VAE, folder=places / "own") == ["whole"]
    assert [path.name for path in (places / "own").iterdir() if path.name.startswith(".")] == []


def test_what_has_begun_to_come_needs_no_more_space(hub, places):
    blobs = places / "hf" / "hub" / "models--PixArt-alpha--PixArt-alpha" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "x.osora.part").write_bytes(bytes(4000))
    assert plan_weights(WeightsRequest((PIXART,))).missing_bytes == 1000


def test_a_mirror_cannot_name_files_outside(hub, places):
    names = ["config.json", "model.safetensors", "manifest.json", "../../evil.json"]
    for name in names:
        hub.add("some/model", name, b"{}")
    for to in (None, places / "own"):
        with pytest.raises(WeightsError, match="leads out of its folder"):
            bring(("hf:some/model", "model"), to=to)
    assert not list(places.rglob("evil.json"))


def test_a_repository_is_copied_from_a_cache(hub, places, monkeypatch):
    word = ("hf:stabilityai/sd-vae-ft-mse", "vae")
    hub.files.pop("PixArt-XL-2-256x256.pth")
    hub.add("stabilityai/sd-vae-ft-mse", "config.json", b"{}", is_lfs=False)
    bring(word)
    monkeypatch.setenv("HF_HOME", str(places / "other"))
    found = bring(word, source=str(places / "hf"))[word[0]].path
    assert (found / "diffusion_pytorch_model.bin").read_bytes() == b"vae" * 1000


def test_a_damaged_copy_is_not_taken(hub, places):
    bring(PIXART, to=places / "stick")
    (places / "stick" / "PixArt-XL-2-256x256.pth").write_bytes(b"pixarT" * 1000)
    with pytest.raises(WeightsError, match="damaged"):
        bring(PIXART, source=str(places / "stick"))
    assert not (places / "weights" / "PixArt-XL-2-256x256.pth").exists()


def test_a_mirror_stands_for_the_hub_for_this_time(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert bring(PIXART, source=hub.server.url)[PIXART[0]].is_new
    assert os.environ["HF_ENDPOINT"] == "http://127.0.0.1:9"


def test_weights_on_no_hub_come_by_their_link(server, places, monkeypatch):
    monkeypatch.setitem(ASSETS, DIT[0], assets.Asset(**{**vars(ASSETS[DIT[0]]), "url": f"{server.url}/d.pt"}))
    server.pages["/d.pt"] = file(b"dit" * 1000, cuts=[1000])
    assert bring(DIT)[DIT[0]].path.read_bytes() == b"dit" * 1000
    assert (places / "weights" / "SHA256SUMS").read_text().endswith("  DiT-XL-2-256x256.pt\n")
    assert statuses(DIT) == ["whole"]


def test_bytes_that_are_not_the_hubs_never_become_weights(hub, places):
    hub.add("PixArt-alpha/PixArt-alpha", "PixArt-XL-2-256x256.pth", b"pixart" * 1000, sent=b"PIXART" * 1000)
    for to in (None, places / "own"):
        with pytest.raises(WeightsError, match="SHA-256"):
            bring(PIXART, to=to)
    assert find("pixart-256", kind="model") is None
    assert not (places / "own" / "PixArt-XL-2-256x256.pth").exists()


def test_some_that_cannot_be_had_do_not_keep_the_others(hub):
    with pytest.raises(WeightsError, match="pixart-512 cannot be had"):
        bring(("pixart-512", "model"), PIXART)
    assert find("pixart-256", kind="model") is not None


def test_a_flipped_bit_is_found(hub, places):
    bring(VAE)
    bring(PIXART, to=places / "weights")
    assert statuses(VAE, PIXART, ("pixart-512", "model")) == ["whole", "whole", "missing"]
    for path in (
        places / "weights" / "PixArt-XL-2-256x256.pth",
        find("sd-vae-ft-mse", kind="vae").path / "config.json",
    ):
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.resolve().write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        statuses(VAE, PIXART)
    events = verify_weights([VAE, PIXART])
    assert [next(events).status, next(events).status] == ["damaged", "damaged"]


def test_what_has_no_sum_is_said_to_have_none(places):
    (places / "weights").mkdir()
    (places / "weights" / "PixArt-XL-2-256x256.pth").write_bytes(b"x")
    assert statuses(PIXART) == ["unknown"]


def test_a_plan_asks_nobody_and_knows_the_disk(hub, monkeypatch):
    plan = plan_weights(WeightsRequest((VAE, PIXART, ("bundled", "model"))))
    assert [item.path is None for item in plan.items] == [True, True, False]
    assert plan.missing_bytes == 10_000
    assert plan.free_bytes > 0
    assert hub.server.requests == []
    monkeypatch.setattr("opensora_core.files.free_bytes", lambda path: 100)
    with pytest.raises(ResourceError, match="no space left"):
        bring(VAE)


def test_a_run_needs_its_model_and_encoders():
    config = preset("16x512x512")
    names = [word for word, _ in assets.needed_words(config, "sample")]
    assert names == [config.model.weights, config.vae.weights, config.text.weights]
    assert [kind for _, kind in assets.needed_words(config, "train")][-2:] == ["vae", "text"]


def test_unknown_names_are_said_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        bring(("pixart-25", "model"))
    assert "pixart-256" in caught.value.hint


def test_a_repository_by_its_address(hub, places):
    word = ("hf:stabilityai/sd-vae-ft-mse", "vae")
    hub.files.pop("PixArt-XL-2-256x256.pth")
    hub.add("stabilityai/sd-vae-ft-mse", "config.json", b"{}", is_lfs=False)
    assert bring(word)[word[0]].path == find(word[0], kind="vae").path


def test_offline_runs_fetch_nothing(hub):
    with pytest.raises(WeightsError, match="offline"):
        list(fetch_weights(DownloadConfig(), WeightsRequest((PIXART,)), offline=True))
    assert hub.server.requests == []
