"""Files of weights are read whatever their layout; nothing in them runs, and nothing torn gets through."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from opensora_core import files
from opensora_core.errors import CheckpointError
from opensora_core.weights import read_weights


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 8, generator=generator) for name in ("a.weight", "b.weight")}


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def same(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    torch.save(state(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def test_a_pickle_is_kept_as_safetensors_and_read_from_there(pth, monkeypatch):
    assert same(read_weights(pth).state, state())
    assert sorted(path.name for path in pth.parent.iterdir()) == ["model.pth", "model.safetensors"]
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the pickle was read again"))
    assert same(read_weights(pth).state, state())


def test_a_pickle_that_changed_is_converted_again(pth):
    read_weights(pth)
    torch.save(state(1), pth)
    os.utime(pth, ns=(1, 1))
    assert same(read_weights(pth).state, state(1))
    assert same(read_weights(pth).state, state(1))


def test_a_file_of_somebody_else_is_left_alone(pth):
    save_file(state(7), pth.with_suffix(".safetensors"))
    assert same(read_weights(pth).state, state())
    assert same(read_weights(pth.with_suffix(".safetensors")).state, state(7))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"state_dict": tensors, "epoch": 3, "args": argparse.Namespace(lr=1)},
        lambda tensors: {"model": {"a.weight": torch.zeros(1)}, "ema": tensors, "opt": {"state": {}}},
    ],
)
def test_containers_are_unwrapped_the_same_both_times(wrap, tmp_path):
    torch.save(wrap(state()), tmp_path / "x.pt")
    assert same(read_weights(tmp_path / "x.pt").state, state())
    assert same(read_weights(tmp_path / "x.pt").state, state())


def test_tied_tensors_views_and_half_precision_survive(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"a": whole, "tied": whole, "view": whole[1], "turned": whole.T, "half": whole.bfloat16()}
    torch.save(tensors, tmp_path / "x.bin")
    read_weights(tmp_path / "x.bin")
    assert (tmp_path / "x.safetensors").exists()
    again = read_weights(tmp_path / "x.bin").state
    assert same(again, tensors)
    assert again["half"].dtype == torch.bfloat16


def test_the_format_before_zip_is_read(tmp_path):
    torch.save(state(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "x.pth").state, state())


def test_where_nothing_can_be_kept_a_note_says_so(pth, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    weights = read_weights(pth)
    assert same(weights.state, state())
    assert "model.safetensors could not be kept" in weights.note
    assert list(pth.parent.iterdir()) == [pth]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_put_together(suffix, tmp_path):
    parts = {f"model-0000{number}-of-00002.{suffix}": {key: state()[key]} for number, key in enumerate(state(), 1)}
    for name, part in parts.items():
        save_file(part, tmp_path / name) if suffix == "safetensors" else torch.save(part, tmp_path / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / f"model.{suffix}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    assert same(read_weights(tmp_path).state, state())
    next(iter(tmp_path.glob("*-00002.*"))).unlink()
    with pytest.raises(CheckpointError, match="names the shard"):
        read_weights(tmp_path)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "inside").mkdir()
    save_file(state(), tmp_path / "secret.safetensors")
    index = tmp_path / "inside" / "model.safetensors.index.json"
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="names the shard"):
            read_weights(tmp_path / "inside")


def test_of_a_folder_the_one_model_is_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no weights, but config\.json"):
        read_weights(tmp_path)
    save_file(state(1), tmp_path / "first.safetensors")
    assert same(read_weights(tmp_path).state, state(1))
    save_file(state(2), tmp_path / "second.safetensors")
    with pytest.raises(CheckpointError, match="several models"):
        read_weights(tmp_path)
    save_file(state(3), tmp_path / "diffusion_pytorch_model.safetensors")
    assert same(read_weights(tmp_path).state, state(3))


class Evil:
    """Touches a canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.canary}",))


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.ckpt", "x.safetensors"])
@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_pickle_never_runs(name, container, tmp_path):
    canary = tmp_path / "canary"
    content = {**state(), "evil": Evil(canary)}
    path = tmp_path / name
    if container == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(CheckpointError, match=r"refused|cannot be read") as caught:
        read_weights(path)
    assert str(path) in caught.value.message
    assert "weights_only" not in caught.value.message
    assert not canary.exists()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_truncated_files_web_pages_and_others_are_named(pth):
    whole = pth.read_bytes()
    save_file(state(), pth.with_name("y.safetensors"))
    safe = pth.with_name("y.safetensors").read_bytes()
    pth.with_name("y.safetensors").unlink()
    for content, suffix, reason in [
        (b"", ".pth", "is empty"),
        (whole[: len(whole) // 2], ".pth", "torn"),
        (whole[:-1], ".pth", "torn"),
        (b"<!doctype html><html>", ".pth", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", ".bin", "git-lfs"),
        (pickle.dumps([1, 2]), ".pt", "refused"),
        (_saved([1, 2]), ".pt", "holds a list, not weights"),
        (safe[: len(safe) // 2], ".safetensors", "torn"),
        (b"<html>", ".safetensors", "torn"),
        (b"x", ".onnx", "no file of weights"),
    ]:
        path = pth.with_name(f"bad{suffix}")
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason) as caught:
            read_weights(path)
        assert str(path) in caught.value.message
        path.unlink()
    assert list(pth.parent.iterdir()) == [pth]


def test_an_archive_that_unpacks_to_more_is_refused_before_it_is_read(pth, monkeypatch):
    bomb = pth.with_name("bomb.pth")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the bomb was opened"))
    with pytest.raises(CheckpointError, match="compressed archive"):
        read_weights(bomb)


def test_a_manifest_finds_every_damaged_or_missing_file(tmp_path):
    (tmp_path / "vae").mkdir()
    for name in ("model.safetensors", "vae/config.json"):
        (tmp_path / name).write_bytes(name.encode() * 10)
    with pytest.raises(CheckpointError, match="never finished"):
        files.verify_manifest(tmp_path)
    files.write_manifest(tmp_path)
    files.verify_manifest(tmp_path)
    for name in ("model.safetensors", "vae/config.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            files.verify_manifest(tmp_path)
        part, other = ("vae", "") if "/" in name else ("", "vae")
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            files.verify_manifest(tmp_path, part)
        files.verify_manifest(tmp_path, other)
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            files.verify_manifest(tmp_path)
        (tmp_path / name).write_bytes(content)
