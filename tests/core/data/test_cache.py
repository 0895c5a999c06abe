"""What the encoders made of clips comes back from disk, or is missing; never anything else."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opensora_core.data.cache import Cache, CacheSize
from opensora_core.data.keys import FileHashes, caption_key, clip_key, fingerprint
from opensora_core.errors import CheckpointError, ConfigError, InputError, ResourceError, WeightsError
from opensora_core.tensors import Condition

REPO = Path(__file__).parents[3]
SAMPLE: dict[str, Any] = {
    "content": "c" * 64,
    "start_seconds": None,
    "end_seconds": 4.5,
    "indices": (0, 3, 6),
    "flip": False,
    "height": 256,
    "width": 144,
    "resize": "antialiased",
    "vae": "v" * 64,
}


def key(number: int) -> str:
    return caption_key(str(number), "")


def moments(number: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    shape = shape or (4, 2, 3, 5)
    return torch.randn(1, *shape, generator=generator), torch.rand(1, *shape, generator=generator)


def text(number: int, length: int, padded: int = 12, width: int = 6) -> Condition:
    """A caption's condition with something in the padding, as T5 leaves it."""
    tokens = torch.randn(1, padded, width, generator=torch.Generator().manual_seed(number))
    return Condition(tokens, torch.arange(padded)[None] < length)


def filled(folder: Path, numbers: range, **options: Any) -> Cache:
    with Cache(folder, **options) as cache:
        for number in numbers:
            cache.put_latents(key(number), *moments(number))
    return cache


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def nothing_but_shards(folder: Path) -> bool:
    return all(path.is_dir() or path.suffix == ".safetensors" for path in folder.rglob("*"))


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.float32, 0.0)])
def test_latents_come_back_before_and_after_they_are_written(
    dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    cache = Cache(tmp_path, dtype)
    for number in range(5):
        cache.put_latents(key(number), *moments(number, 4, number + 1, 2, 2))
    assert not shards(tmp_path)
    for state in ("waiting", "written", "opened again"):
        if state == "written":
            cache.flush()
        opened = Cache(tmp_path, dtype) if state == "opened again" else cache
        assert not opened.notes
        for number in range(5):
            assert opened.has_latents(key(number)) and not opened.has_caption(key(number))
            for found, put in zip(opened.latents(key(number)), moments(number, 4, number + 1, 2, 2), strict=True):
                assert found.dtype == dtype and found.shape == put.shape
                torch.testing.assert_close(found.float(), put, atol=tolerance, rtol=tolerance)
    assert len(shards(tmp_path)) == 1 and nothing_but_shards(tmp_path)
    assert not cache.has_latents(key(5))
    with pytest.raises(CheckpointError, match=key(5)[:16]):
        cache.latents(key(5))


@pytest.mark.parametrize("length", [0, 1, 5, 12])
def test_a_caption_is_kept_without_its_padding_and_comes_back_with_it(length: int, tmp_path: Path) -> None:
    with Cache(tmp_path, torch.float32) as cache:
        cache.put_caption(key(0), text(0, length))
    (stored,) = (tensor for name, tensor in load_file(shards(tmp_path)[0]).items() if name.endswith(".tokens"))
    assert stored.shape == (length, 6)
    found, put = Cache(tmp_path, torch.float32).caption(key(0)), text(0, length)
    assert found.mask is not None and put.mask is not None and found.tokens.shape == put.tokens.shape
    assert torch.equal(found.mask, put.mask)
    assert torch.equal(found.tokens, put.tokens * put.mask[..., None])


def test_a_mask_may_hide_any_tokens(tmp_path: Path) -> None:
    mask = torch.tensor([[False, True, False, True, True, False]])
    with Cache(tmp_path, torch.float32) as cache:
        cache.put_caption(key(0), Condition(torch.ones(1, 6, 2), mask))
    found = Cache(tmp_path, torch.float32).caption(key(0))
    assert torch.equal(found.tokens[..., 0], mask.float())


@pytest.mark.parametrize("tokens", [torch.randn(1, 1, 8), torch.tensor([2**40]), torch.randn(1, 7, 8)])
def test_pooled_vectors_labels_and_captions_without_padding_have_no_mask(tokens: Tensor, tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        cache.put_caption(key(0), Condition(tokens))
    for found in (cache.caption(key(0)), Cache(tmp_path).caption(key(0))):
        assert found.mask is None and found.tokens.dtype in (torch.float16, torch.int64)
        torch.testing.assert_close(found.tokens.to(tokens.dtype), tokens, atol=2e-3, rtol=2e-3)


def test_a_batch_can_be_joined_from_entries_and_sees_what_the_model_saw(tmp_path: Path) -> None:
    with Cache(tmp_path, torch.float32) as cache:
        for number in range(3):
            cache.put_caption(key(number), text(number, 3 * number + 1))
    found = Condition.cat([cache.caption(key(number)) for number in range(3)])
    put = Condition.cat([text(number, 3 * number + 1) for number in range(3)])
    query = torch.randn(3, 1, 4, 6)

    def attend(condition: Condition) -> Tensor:
        assert condition.mask is not None
        tokens = condition.tokens[:, None]
        return torch.nn.functional.scaled_dot_product_attention(query, tokens, tokens, condition.mask[:, None, None])

    torch.testing.assert_close(attend(found), attend(put))


def test_what_is_stored_is_a_copy_and_keeps_no_batch_alive(tmp_path: Path) -> None:
    cache = Cache(tmp_path, torch.float32)
    batch = torch.zeros(64, 2, 1, 1, 1)
    cache.put_latents(key(0), batch[:1], batch[1:2])
    batch += 1
    mean, std = cache.latents(key(0))
    assert not mean.any() and not std.any()
    assert mean.untyped_storage().nbytes() == 8
    cache.flush()


def test_values_that_half_precision_lacks_are_refused(tmp_path: Path) -> None:
    mean, std = moments(0)
    with pytest.raises(ConfigError, match="7e\\+04") as caught:
        Cache(tmp_path).put_latents(key(0), mean.fill_(7e4), std)
    assert "data.cache_dtype=fp32" in caught.value.hint
    Cache(tmp_path, torch.float32).put_latents(key(0), mean, std)
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(ConfigError, match="not finite"):
            Cache(tmp_path, dtype).put_latents(key(0), mean * torch.nan, std)


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("content", "d" * 64),
        ("start_seconds", 0.5),
        ("end_seconds", None),
        ("indices", (0, 3, 7)),
        ("flip", True),
        ("height", 144),
        ("width", 256),
        ("resize", "published"),
        ("vae", "w" * 64),
    ],
)
def test_a_sample_taken_in_another_way_has_another_key(name: str, other: object) -> None:
    assert clip_key(**SAMPLE) == clip_key(**SAMPLE)
    assert clip_key(**SAMPLE | {name: other}) != clip_key(**SAMPLE)


def test_equal_values_of_other_types_have_the_same_key() -> None:
    alike = {"indices": list(torch.tensor([0, 3, 6]).numpy()), "flip": 0, "end_seconds": 4.5}
    assert clip_key(**SAMPLE | alike) == clip_key(**SAMPLE)
    assert clip_key(**SAMPLE | {"end_seconds": 4}) == clip_key(**SAMPLE | {"end_seconds": 4.0})


def test_captions_and_their_encoders_have_their_own_keys() -> None:
    words = ["", "a", "a ", "à", "\ud800"]
    assert len({caption_key(word, encoder) for word in words for encoder in ("", "a")}) == 10


def test_another_clip_in_the_same_file_is_not_found(tmp_path: Path) -> None:
    cache, clip = Cache(tmp_path / "cache"), tmp_path / "clip.mp4"

    def of_clip() -> str:
        return clip_key(**SAMPLE | {"content": cache.hashes.of(clip)})

    clip.write_bytes(b"one")
    cache.put_latents(of_clip(), *moments(0))
    assert cache.has_latents(of_clip())
    clip.write_bytes(b"two")
    assert not cache.has_latents(of_clip())
    clip.write_bytes(b"one")
    assert cache.has_latents(of_clip())
    assert cache.hashes.of(clip, known="as the manifest says") == "as the manifest says"


def encoder_folder(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "spiece.model").write_bytes(b"tokenizer")
    return folder


def test_an_encoder_is_known_by_its_content_and_settings_not_by_its_place(tmp_path: Path) -> None:
    first, second = encoder_folder(tmp_path / "a"), encoder_folder(tmp_path / "b")
    same = fingerprint(first, kind="t5", max_length=120, dtype="bf16")
    assert fingerprint(second, dtype="bf16", max_length=120, kind="t5") == same
    (second / "README.md").write_text("words")
    (second / ".cache").mkdir()
    (second / ".cache" / "etag.json").write_text("{}")
    assert fingerprint(second, kind="t5", max_length=120, dtype="bf16") == same
    assert fingerprint(first, kind="t5", max_length=77, dtype="bf16") != same
    for name in ("model.safetensors", "config.json", "sub/spiece.model"):
        kept = (second / name).read_bytes()
        (second / name).write_bytes(kept + b"!")
        assert fingerprint(second, kind="t5", max_length=120, dtype="bf16") != same, name
        (second / name).write_bytes(kept)
    assert fingerprint(second, kind="t5", max_length=120, dtype="bf16") == same


def test_of_a_pipeline_only_the_parts_that_are_used_count(tmp_path: Path) -> None:
    vae, pipeline = encoder_folder(tmp_path / "pipeline" / "vae"), tmp_path / "pipeline"
    (pipeline / "model_index.json").write_text("{}")
    before = fingerprint(pipeline, parts=("vae",))
    encoder_folder(pipeline / "transformer")
    assert fingerprint(pipeline, parts=("vae",)) == before
    (vae / "config.json").write_text("[]")
    assert fingerprint(pipeline, parts=("vae",)) != before


def test_files_and_encoders_without_files_have_fingerprints_too(tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.write_text("cat\n")
    before = fingerprint(names, kind="class")
    names.write_text("dog\n")
    assert len({before, fingerprint(names, kind="class"), fingerprint(None, kind="class")}) == 3
    for missing in (tmp_path / "missing", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(WeightsError, match=missing.name):
            fingerprint(missing)


# ---------------------------------------------------------------------- sums of files


def test_a_sum_is_remembered_across_processes_until_the_file_changes(tmp_path: Path) -> None:
    memory, file = tmp_path / "hashes.jsonl", tmp_path / "weights"

    def write(content: bytes, changed: int) -> None:
        file.write_bytes(content)
        os.utime(file, ns=(changed, changed))

    write(b"one", 10**18)
    first = FileHashes(memory).of(file)
    write(b"two", 10**18)  # not to be seen from outside: size and time are the same, so the file is not read again
    assert FileHashes(memory).of(file) == first
    write(b"two", 10**18 + 1)
    second = FileHashes(memory).of(file)
    assert second != first
    memory.write_bytes(memory.read_bytes() + b'["torn')
    write(b"three", 10**18)
    assert FileHashes(memory).of(file) not in (first, second)
    write(b"one", 10**18 + 1)
    assert FileHashes(memory).of(file) == second, "the sums before the torn line are known"
    with pytest.raises(InputError, match="missing"):
        FileHashes(memory).of(tmp_path / "missing")


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "clip"
    file.write_bytes(b"one")
    hashes = FileHashes(tmp_path / "hashes.jsonl")
    first, changed = hashes.of(file), file.stat().st_mtime_ns
    file.write_bytes(b"two")
    os.utime(file, ns=(changed, changed))
    assert hashes.of(file) != first
    assert not (tmp_path / "hashes.jsonl").exists()


# ---------------------------------------------------------------------- shards


def test_shards_are_written_when_they_are_full(tmp_path: Path) -> None:
    cache = Cache(tmp_path, torch.float32, shard_bytes=2 * 4 * 2 * 120)
    for number in range(6):
        assert len(shards(tmp_path)) == number // 2
        cache.put_latents(key(number), *moments(number))
    few = Cache(tmp_path / "few", shard_entries=3)
    for number in range(7):
        few.put_caption(key(number), Condition(torch.tensor([number])))
    assert len(shards(tmp_path / "few")) == 2
    assert [few.caption(key(number)).tokens.item() for number in range(7)] == list(range(7))


def test_putting_again_replaces(tmp_path: Path) -> None:
    cache = Cache(tmp_path, torch.float32)
    for number in (1, 2):
        for _ in range(2):
            cache.put_latents(key(0), *moments(number))
            assert torch.equal(cache.latents(key(0))[0], moments(number)[0])
        cache.flush()
        assert torch.equal(cache.latents(key(0))[0], moments(number)[0])
    assert cache.size.num_latents == 1 and len(shards(tmp_path)) == 2


def test_what_was_flushed_survives_a_kill_and_is_gone_on_from(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.core.data.test_cache import *\n"
        "cache = Cache(Path(sys.argv[1]), shard_entries=4)\n"
        "for number in range(10): cache.put_latents(key(number), *moments(number))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=REPO, timeout=60, check=False)
    assert done.returncode == -9
    cache = Cache(tmp_path)
    assert [cache.has_latents(key(number)) for number in range(10)] == [True] * 8 + [False] * 2
    with cache:
        for number in range(10):
            if not cache.has_latents(key(number)):
                cache.put_latents(key(number), *moments(number))
    assert Cache(tmp_path).size.num_latents == 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_loses_nothing_that_was_encoded(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), Cache(tmp_path) as cache:
        cache.put_latents(key(0), *moments(0))
        cache.put_caption(key(0), text(0, 3))
        raise error
    opened = Cache(tmp_path)
    assert opened.has_latents(key(0)) and opened.has_caption(key(0))


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.core.data.test_cache import *\n"
        "filled(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3])), shard_entries=5)"
    )
    words = [[sys.executable, "-c", script, tmp_path, *map(str, span)] for span in ((0, 40), (20, 60))]
    writers = [subprocess.Popen(word, cwd=REPO) for word in words]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    cache = Cache(tmp_path, shard_entries=5)
    assert not cache.notes and cache.size.num_latents == 60 and nothing_but_shards(tmp_path)
    assert len(shards(tmp_path)) == 12, "shards of the same entries have the same name"
    for number in range(60):
        assert torch.equal(cache.latents(key(number))[1], moments(number)[1].half())


def test_writers_of_other_values_under_one_key_write_two_shards(tmp_path: Path) -> None:
    first, second = (Cache(tmp_path, torch.float32) for _ in range(2))
    first.put_latents(key(0), *moments(1))
    second.put_latents(key(0), *moments(2, 4, 2, 1, 1))
    first.flush()
    second.flush()
    assert torch.equal(first.latents(key(0))[0], moments(1)[0])
    assert torch.equal(second.latents(key(0))[0], moments(2, 4, 2, 1, 1)[0])


def test_torn_and_foreign_shards_are_passed_over_with_a_note(tmp_path: Path) -> None:
    filled(tmp_path, range(12), shard_entries=2)
    torn, empty, half_a_header, longer, *_ = shards(tmp_path)
    torn.write_bytes(torn.read_bytes()[:-1])
    empty.write_bytes(b"")
    half_a_header.write_bytes(half_a_header.read_bytes()[:60])
    longer.write_bytes(longer.read_bytes() + b"!")
    folder = tmp_path / "latents"
    save_file({f"{key(50)}.mean": torch.zeros(1)}, folder / "foreign.safetensors")
    save_file({"weight": torch.zeros(1)}, folder / "marked.safetensors", {"osora-cache": "osora-cache 1 fp16 00000000"})
    (folder / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    (folder / "web.safetensors").write_bytes(b"<html>" * 9)
    (folder / ".osora-123.part").write_bytes(b"left by a kill")
    cache = Cache(tmp_path)
    assert len(cache.notes) == 8 and all(".safetensors" in note and "missing" in note for note in cache.notes)
    assert cache.size.num_latents == 4
    assert sum(cache.has_latents(key(number)) for number in range(12)) == 4 and not cache.has_latents(key(50))


def test_a_cache_of_one_precision_passes_over_the_other(tmp_path: Path) -> None:
    filled(tmp_path, range(3), dtype=torch.float16)
    other = Cache(tmp_path, torch.float32)
    assert not other.has_latents(key(0)) and "fp16, not fp32" in other.notes[0]
    filled(tmp_path, range(3), dtype=torch.float32)
    for dtype in (torch.float16, torch.float32):
        assert Cache(tmp_path, dtype).latents(key(0))[0].dtype == dtype


def test_damage_after_opening_is_told_with_the_name_of_the_shard(tmp_path: Path) -> None:
    cache = filled(tmp_path, range(2))
    (shard,) = shards(tmp_path)
    whole = shard.read_bytes()
    cache.latents(key(0))
    bit_rot = whole[:-1] + bytes([whole[-1] ^ 1])
    for opened in (cache, Cache(tmp_path)):
        last = max(key(0), key(1))
        for content in (bit_rot, whole[:-50], b""):
            shard.write_bytes(content)
            with pytest.raises(CheckpointError, match=shard.name) as caught:
                opened.latents(last)
            assert str(shard) in caught.value.hint
        shard.unlink()
        with pytest.raises(CheckpointError, match=shard.name):
            opened.latents(last)
        shard.write_bytes(whole)
        opened.latents(last)


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys; from pathlib import Path; from tests.core.data.test_cache import *\n"
        "cache = filled(Path(sys.argv[1]), range(3))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "mean, std = moments(9, 4, 16, 32, 32)\n"
        "try:\n"
        "    with cache: cache.put_latents(key(9), mean, std); cache.put_caption(key(9), text(9, 3))\n"
        "except ResourceError as error: print(error)\n"
        "try:\n"
        "    with cache: raise KeyError\n"
        "except KeyError as error: print(error.__notes__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=REPO, timeout=60, check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("no space left for") and "could not be kept: no space left" in done.stdout
    cache = Cache(tmp_path)
    assert not cache.notes and cache.size.num_latents == 3 and nothing_but_shards(tmp_path)
    cache.latents(key(2))


def test_a_file_where_the_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    cache = Cache(tmp_path / "cache")
    cache.put_latents(key(0), *moments(0))
    with pytest.raises(ResourceError, match="cannot write"):
        cache.flush()


# ---------------------------------------------------------------------- workers


class Latents(Dataset[Tensor]):
    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __getitem__(self, number: int) -> Tensor:
        return self.cache.latents(key(number))[0]

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_what_is_on_disk_and_what_is_not_yet(method: str, tmp_path: Path) -> None:
    filled(tmp_path, range(6), shard_entries=2)
    cache = Cache(tmp_path)
    cache.latents(key(0))
    for number in (6, 7):
        cache.put_latents(key(number), *moments(number))
    loader = DataLoader(Latents(cache), batch_size=None, num_workers=2, multiprocessing_context=method)
    for number, mean in enumerate(loader):
        assert torch.equal(mean, moments(number)[0].half())


def test_a_pickle_is_small_and_reads_on(tmp_path: Path) -> None:
    cache = filled(tmp_path, range(6))
    before = len(pickle.dumps(cache))
    cache.latents(key(0))
    copied = pickle.dumps(cache)
    assert len(copied) == before < 2000
    assert torch.equal(pickle.loads(copied).latents(key(5))[0], cache.latents(key(5))[0])


def test_many_shards_are_read_without_many_open_files_or_much_memory(tmp_path: Path) -> None:
    numbers = range(80)
    cache = filled(tmp_path, numbers, shard_entries=1)
    opened = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else None
    for number in numbers:
        assert torch.equal(cache.latents(key(number))[0], moments(number)[0].half())
    if opened is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == opened


# ---------------------------------------------------------------------- sizes


def test_a_clip_costs_its_two_moments_and_a_caption_its_tokens(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        assert cache.size == CacheSize(0, 0, 0, 0)
        for number in range(4):
            cache.put_latents(key(number), *moments(number, 4, 16, 32, 32))
            cache.put_caption(key(number), text(number, 60, padded=120, width=4096))
    size = cache.size
    assert size == Cache(tmp_path).size and size.num_latents == size.num_captions == 4
    latents, caption = size.latents_bytes / 4, size.captions_bytes / 4
    assert 0 < latents - 2 * 4 * 16 * 32 * 32 * 2 < 500
    assert 0 < caption - 60 * 4096 * 2 - 120 < 500
    header = json.loads((shard := shards(tmp_path)[0].read_bytes())[8 : 8 + int.from_bytes(shard[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16", "BOOL"}
