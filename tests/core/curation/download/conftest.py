from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opensora_core.config import DownloadConfig, with_settings
from opensora_core.curation.download import DataRequest, download_data
from opensora_core.net import client as client_module
from tests.core.net.loopback import Loopback, running

Get = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.01)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with running() as server:
        yield server


@pytest.fixture
def get(tmp_path: Path) -> Get:
    """Download into `tmp_path / "out"`; gives the events."""

    def run(source: object, *inputs: object, settings: dict[str, Any] | None = None, **request: Any) -> list[Any]:
        config = with_settings(DownloadConfig(allow_private=True, workers=3), settings or {})
        words = tuple(map(str, inputs))
        return list(download_data(config, DataRequest(str(source), tmp_path / "out", words, **request)))

    return run


def table(folder: Path, name: str = "manifest.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def mp4(number: int) -> bytes:
    """What begins like a video; each is another one."""
    return b"\0\0\0\x18ftypmp42" + bytes([number]) * 5000
