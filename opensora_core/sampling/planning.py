"""What a run of sampling will do, with everything checked that can be checked before weights are loaded."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora_core import assets, parallel, world
from opensora_core.assets import Kind
from opensora_core.config import Config
from opensora_core.errors import ConfigError, InputError, ResourceError, UsageError
from opensora_core.files import existing, free_bytes, readable, require_space
from opensora_core.media import WRITERS, format_of
from opensora_core.sampling.sharing import sharing_of

DEFAULT_FOLDER = Path("samples")
MAX_CHARACTERS = 10_000
_SLUG_LENGTH = 60
_FILE_SUFFIXES = {".avi", ".mov", ".mkv", ".webm", ".m4v", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
_EXAMPLE = "a red ball rolling to the right over green grass"


@dataclass(frozen=True)
class Request:
    """One sample: which prompt (`index` of those given), the how-manieth of it, its own seed, and where it goes."""

    prompt: str
    index: int
    sample: int
    seed: int
    path: Path


@dataclass(frozen=True)
class Part:
    """Weights that the run needs; `path` is None where they are still to be downloaded, `size_bytes` where unknown."""

    kind: Kind
    name: str
    path: Path | None
    size_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """A run that can begin.

    Attributes:
        requests: one per file, in the order of the prompts.
        weights: what has to be on this disk, or come to it.
        sheet: where a contact sheet would go.
        gallery: the page that shows the samples of the folder; None for a single file.
        notices: what the user should know.
    """

    requests: tuple[Request, ...]
    weights: tuple[Part, ...]
    sheet: Path
    gallery: Path | None
    notices: tuple[str, ...]


def plan(
    config: Config,
    prompts: Sequence[str],
    output: Path | None = None,
    format: str | None = None,
    overwrite: bool = False,
    *,
    processes: int = 0,
) -> Plan:
    """Check a run and say what it will do; nothing is written and nothing large is loaded.

    Args:
        config: the settings.
        prompts: what to show, or classes by name or number.
        output: a file for a single sample, or a folder; None is `samples/`.
        format: mp4, gif, webp or png; None is what the suffix of `output` says, else mp4, or png for images.
        overwrite: replace files that are there.
        processes: that will share the work; 0 is as many as a launcher has started, or this one alone.

    Raises:
        InputError: a prompt, size, or output that cannot be used.
        UsageError, ConfigError, DeviceError: settings that cannot be carried out on this machine.
        WeightsError: weights that are missing in an offline run.
        ResourceError: no space or no permission where the files are to go.
    """
    notices: list[str] = []
    texts = [_checked(prompt, notices) for prompt in prompts]
    if not texts:
        raise InputError("there is no prompt", f"--prompt '{_EXAMPLE}'")
    _check_numbers(config)
    requests = _requests(config, _distinct(texts, notices), output, format)
    _check_outputs(config, requests, overwrite)
    notices += _shared(config, len(requests), processes or parallel.launched())
    weights = _weights(config)
    if config.model.weights == assets.BUNDLED:
        notices += _unknown_to_the_world(texts)
    _check_with_torch(config)
    folder = requests[0].path.parent
    is_file = output is not None and requests[0].path == output
    sheet = output.with_name(f"{output.stem}-sheet.png") if output and is_file else folder / "sheet.png"
    return Plan(
        requests=tuple(requests),
        weights=weights,
        sheet=_unused(sheet, overwrite),
        gallery=folder / "index.html" if len(requests) > 1 else None,
        notices=tuple(notices),
    )


# prompts --------------------------------------------------------------------------------------------------------------


def _checked(prompt: str, notices: list[str]) -> str:
    text = prompt.strip()
    if not text:
        raise InputError("a prompt is empty", f"say what to show: --prompt '{_EXAMPLE}'")
    if "\0" in text:
        raise InputError(f"the prompt {shortened(text)!r} has a NUL character in it", "prompts are plain text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the prompt {shortened(text)!r} is not UTF-8 text", "save it as UTF-8") from None
    if len(text) > MAX_CHARACTERS:
        notices.append(f"a prompt of {len(text):,} characters is cut at {MAX_CHARACTERS:,}: '{shortened(text)}'")
        text = text[:MAX_CHARACTERS].rstrip()
    return text


def _distinct(texts: list[str], notices: list[str]) -> list[str]:
    for text, count in Counter(texts).items():
        if count > 1:
            notices.append(
                f"'{shortened(text)}' is given {count} times and drawn once, since the same seed gives the same video; "
                "--num-samples draws others"
            )
    return list(dict.fromkeys(texts))


def _unknown_to_the_world(texts: list[str]) -> Iterator[str]:
    for text in dict.fromkeys(texts):
        if not world.parse(text):
            yield (
                f"the model that ships knows a small world of coloured shapes, and no word of '{shortened(text)}' "
                f"is in it; try '{_EXAMPLE}', or another --model"
            )


def shortened(text: str, length: int = 60) -> str:
    """The beginning of a prompt, for messages."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


# settings -------------------------------------------------------------------------------------------------------------


def _check_numbers(config: Config) -> None:
    at_least_one = {
        "--num-samples": config.sampling.num_samples,
        "--batch-size": config.sampling.batch_size,
        "--frames": config.video.num_frames,
        "--steps": config.sampling.steps,
    }
    for flag, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{flag} {value} is less than 1", f"{flag} 1 is the least")
    if config.sampling.seed < 0:
        raise ConfigError(f"--seed {config.sampling.seed} is negative", "a seed is 0 or more")
    if not 0 < config.video.fps <= 1000:
        raise ConfigError(f"{config.video.fps:g} frames per second cannot be shown", "--fps 8")
    if not config.model.weights:
        raise UsageError(
            "these settings name no weights, and a model of random ones draws noise",
            "--model NAME, PATH or hf:owner/repo",
        )


def _shared(config: Config, num_samples: int, processes: int) -> Iterator[str]:
    sharing = sharing_of(config, processes)
    if processes > 1:
        yield (
            f"{processes} processes share the work: data={sharing.data} x cfg={sharing.cfg} x "
            f"sequence={sharing.sequence}"
        )
    if sharing.data > num_samples:
        samples = "1 sample" if num_samples == 1 else f"{num_samples} samples"
        yield f"{samples} for {sharing.data} groups of processes: {sharing.data - num_samples} have nothing to draw"


def _check_with_torch(config: Config) -> None:
    """The checks that need torch, which is loaded only once everything else is known to be right."""
    import torch

    from opensora_core import components, diffusion
    from opensora_core.tensors import Condition

    if config.model.lora:
        components.find_lora(config.model.lora)
    device = components.resolve_device(config.runtime.device)
    components.resolve_dtype(config.runtime.dtype, device)
    nothing = torch.zeros(1, 1, 1, 1, 1)
    diffusion.sample(  # checks its arguments at the call, and computes only when iterated over
        lambda latents, timestep, condition: latents,
        nothing,
        Condition(nothing),
        objective=components.build_objective(config),
        sampler=config.sampling.sampler,
        steps=config.sampling.steps,
        draw_noise=lambda: nothing,
    )
    stride, patch = components.spatial_stride(config), config.model.patch_size
    if stride is not None:
        _check_size(config.video.height, config.video.width, stride * patch[1], stride * patch[2])
        # VAEs whose stride is known by now keep the number of frames
        _check_frames(config.video.num_frames, patch[0])


def _check_frames(num_frames: int, step: int) -> None:
    if num_frames % step:
        near = dict.fromkeys(str(n) for n in (num_frames // step * step, -(-num_frames // step) * step) if n)
        raise InputError(
            f"{num_frames} frames are not a multiple of {step}, the depth of this model's patches",
            f"--frames {' or '.join(near)}",
        )


def _check_size(height: int, width: int, rows: int, columns: int) -> None:
    if height % rows == 0 and width % columns == 0 and height > 0 and width > 0:
        return
    lower = (max(height // rows, 1) * rows, max(width // columns, 1) * columns)
    upper = (-(-height // rows) * rows, -(-width // columns) * columns)
    near = dict.fromkeys(f"{side[0]}x{side[1]}" for side in (lower, upper) if all(side))
    multiples = f"{rows}" if rows == columns else f"{rows} high and {columns} wide"
    raise InputError(
        f"the size {height}x{width} is not a multiple of {multiples}, which this model's patches and VAE need",
        f"--size {' or '.join(near)}",
    )


# files ----------------------------------------------------------------------------------------------------------------


def _requests(config: Config, texts: list[str], output: Path | None, format: str | None) -> list[Request]:
    seeds = [config.sampling.seed + sample for sample in range(config.sampling.num_samples)]
    if output is not None and _is_file(output):
        suffix = format_of(output, format)
        if len(texts) * len(seeds) > 1:
            raise InputError(
                f"{output} is one file, but {len(texts) * len(seeds)} samples are asked for",
                f"name a folder: --output {output.with_suffix('')}/ --format {suffix}",
            )
        return [Request(texts[0], 0, 0, seeds[0], output)]
    suffix = format or ("png" if config.video.num_frames == 1 else "mp4")
    folder = output or DEFAULT_FOLDER
    format_of(Path(f"sample.{suffix}"), format)
    names = _names(texts)
    return [
        Request(text, index, sample, seed, folder / f"{names[index]}-{seed}.{suffix}")
        for index, text in enumerate(texts)
        for sample, seed in enumerate(seeds)
    ]


def _is_file(output: Path) -> bool:
    """Whether an output is meant as a file: it is one, or has the suffix of a video or picture and is no folder."""
    if output.exists():
        return not output.is_dir()
    suffix = output.suffix.lower()
    return suffix.removeprefix(".") in WRITERS or suffix in _FILE_SUFFIXES


def _names(texts: list[str]) -> list[str]:
    """A name per prompt: its words, and a piece of its hash where the words alone would not tell it from others."""
    slugs = [slug(text) for text in texts]
    counts = Counter(slugs)
    return [
        name if counts[name] == 1 and not is_lossy(text) else f"{name}-{hash_of(text)[:8]}"
        for name, text in zip(slugs, texts, strict=True)
    ]


def slug(text: str) -> str:
    """The words of a prompt as part of a file name, in lower-case ASCII."""
    return _words(text)[:_SLUG_LENGTH].strip("-") or "sample"


def is_lossy(text: str) -> bool:
    """Whether a slug lacks letters or digits of the prompt: it was cut, or they are of another script."""
    letters = [character for character in unicodedata.normalize("NFKD", text) if character.isalnum()]
    words = _words(text)
    return not words or len(words) > _SLUG_LENGTH or len(words.replace("-", "")) < len(letters)


def _words(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def hash_of(text: str) -> str:
    """The SHA-256 of a prompt, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def _check_outputs(config: Config, requests: list[Request], overwrite: bool) -> None:
    there = [request.path for request in requests if request.path.exists()]
    if there and not overwrite:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise InputError(
            f"{there[0]}{others} exists already", "--overwrite replaces it; another --seed or --output keeps it"
        )
    for path in there:
        if not path.is_file():
            raise InputError(f"{path} is not a file", "another --output")
    folder = requests[0].path.parent
    base = existing(folder)
    if not base.is_dir():
        raise InputError(f"{base} is a file, where a folder is needed", "another --output")
    if not os.access(base, os.W_OK | os.X_OK):
        raise ResourceError(f"no permission to write into {base}", "another --output")
    # what a video of noise would take; others take less
    frames = config.video.num_frames * config.video.height * config.video.width * 3
    require_space(folder, len(requests) * frames // 4)


def _unused(path: Path, overwrite: bool) -> Path:
    """The path, or with a number where a file has the name that is not to be replaced."""
    numbered, number = path, 2
    while numbered.exists() and not overwrite:
        numbered, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return numbered


# weights --------------------------------------------------------------------------------------------------------------


def _weights(config: Config) -> tuple[Part, ...]:
    from opensora_core.components import word_of

    kinds: tuple[Kind, ...] = ("model", "vae", "text")
    return tuple(_part(config, kind, word) for kind in kinds if (word := word_of(config, kind)))


def _part(config: Config, kind: Kind, word: str) -> Part:
    found = assets.find(word, kind=kind)
    if found is not None:
        return Part(kind, word, found.path, _size(found.path, shallow=kind == "model"))
    if config.runtime.offline or word == assets.BUNDLED:
        assets.locate(word, kind=kind, offline=True)  # says what is missing, and how to put it in place
    size = assets.ASSETS[word].size_bytes if word in assets.ASSETS else None
    cache = assets.weights_folder()
    if size is not None and size > free_bytes(cache):
        raise ResourceError(
            f"no space left to download '{word}': needed about {readable(size)}, free {readable(free_bytes(cache))}",
            "free some space, or let HF_HOME and OSORA_WEIGHTS name another disk",
        )
    return Part(kind, word, None, size)


def _size(path: Path, shallow: bool) -> int:
    if path.is_file():
        return path.stat().st_size
    files = path.glob("*") if shallow else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
