"""`Config` -> built parts. The only place that knows all rooms; everything above works with what it returns.

Every builder takes the whole `Config`, finds the weights that it names, and returns a part on its device, frozen and in
eval mode.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_core import assets, diffusion, models, runs, text, vae
from opensora_core.assets import Located, Progress
from opensora_core.config import Config, read_settings, with_settings
from opensora_core.diffusion import Objective
from opensora_core.errors import CheckpointError, ConfigError, DeviceError, UsageError, WeightsError
from opensora_core.files import MANIFEST, verify_manifest
from opensora_core.lora import is_lora, merge_lora
from opensora_core.models import LatentTransformer, convert, load
from opensora_core.models.convert import NULL_CAPTION
from opensora_core.parallel import place
from opensora_core.parallel.shards import Stored
from opensora_core.text import TextEncoder
from opensora_core.vae import VideoVAE
from opensora_core.weights import Weights, read_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# where to compute -----------------------------------------------------------------------------------------------------


def resolve_device(name: str = "auto") -> torch.device:
    """The device of a name; `auto` is the first GPU, else Apple's, else the CPU.

    Of the processes of a run on one machine each gets another GPU.

    Raises:
        DeviceError: it is not there; those that are get listed.
    """
    available = devices()
    if name == "auto":
        return torch.device("cuda:0" if "cuda:0" in available else available[0])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        reason = "" if torch.version.cuda or not wanted.startswith("cuda") else ": torch has no CUDA here"
        raise DeviceError(f"there is no device '{name}'{reason}", f"--device {' or '.join(available)}, or auto")
    return place(torch.device(wanted))


def devices() -> list[str]:
    """The devices of this machine, best first."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; `auto` is bf16 on CUDA, where it is fast, else fp32.

    Raises:
        ConfigError: an unknown name, or fp16 on a CPU, which computes it at a thousandth of the speed of fp32.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype '{name}'", f"known: {', '.join(DTYPES)}")
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 on a CPU runs at about 0.2 GFLOP/s, hundreds of times slower than fp32", "--dtype bf16")
    return DTYPES[name]


def vae_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype that pixels are computed in: bf16 has eight bits, which would show, so there it is fp32."""
    dtype = resolve_dtype(config.runtime.dtype, device)
    return torch.float32 if dtype is torch.bfloat16 else dtype


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or this machine has no memory left."""
    texts = ("out of memory", "DefaultCPUAllocator", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def tune_allocator(device: torch.device) -> None:
    """Let the C library keep large blocks that a CPU run frees, instead of returning each and faulting it in again."""
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: how much may lie free at the top of the heap
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: from where on a block gets a mapping of its own


# parts ----------------------------------------------------------------------------------------------------------------


def build_text_encoder(config: Config) -> TextEncoder:
    """The text encoder, on its device.

    Raises:
        WeightsError, CheckpointError: weights that are missing or do not fit.
        ConfigError, DeviceError: settings that contradict each other or this machine.
    """
    device = resolve_device(config.runtime.device)
    name = config.text.dtype if config.text.dtype != "auto" else config.runtime.dtype
    path = None
    if config.text.weights:
        path = locate(config, "text").path
    return text.load_text_encoder(
        config.text.kind,
        path,
        max_length=text_length(config),
        cleaning=config.text.cleaning,
        dtype=resolve_dtype(name, device),
        device=device,
        num_classes=config.model.num_classes,
    )


def text_length(config: Config) -> int:
    """The tokens that a caption is cut at: what the model attends to, or what goes into its pooled vector."""
    return config.model.caption_length if config.model.condition == "text" else config.text.max_length


def build_vae(config: Config) -> VideoVAE:
    """The video autoencoder, on its device.

    Raises:
        WeightsError, CheckpointError: weights that are missing or do not fit.
        ConfigError, DeviceError: settings that contradict each other or this machine.
    """
    device = resolve_device(config.runtime.device)
    return vae.load_vae(
        config.vae.kind,
        locate(config, "vae").path,
        scaling_factor=config.vae.scaling_factor,
        micro_batch=config.vae.micro_batch,
        sample_posterior=config.vae.sample_posterior,
        slicing=config.vae.slicing,
        tiling=config.vae.tiling,
        dtype=vae_dtype(config, device),
        device=device,
    )


def build_model(
    config: Config, null_caption: Tensor | None = None, on_notice: Callable[[str], None] | None = None
) -> LatentTransformer:
    """The denoiser with its weights, on its device.

    Args:
        config: `model.weights` names them; empty gives random ones, which only training and benchmarks want.
            `model.lora` names an adapter that is merged into them.
        null_caption: (L, E), the text encoder's embedding of the empty caption, for weights that were published without
            a null caption of their own (the layouts of diffusers).
        on_notice: told what the user should know about the files.

    Raises:
        WeightsError, CheckpointError: weights that are missing, or of another architecture, which is named.
        ConfigError, DeviceError: settings that contradict each other or this machine.
    """
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.runtime.dtype, device)
    if not config.model.weights:
        return empty_model(config).to(device, dtype).eval().requires_grad_(False)
    path = locate(config, "model").path
    lora = find_lora(config.model.lora) if config.model.lora else None
    if base := _adapted(path):  # a run that trained an adapter: what it was trained for, then the adapter
        alone = {"model.weights": base["model.weights"], "model.lora": "", "model.lora_scale": 1.0}
        model = build_model(with_settings(config, {**alone, "runtime.dtype": "fp32"}), null_caption, on_notice)
        own = Path(base["model.lora"])
        if lora is not None and not lora.samefile(own):
            merge_lora(model, own)  # the one that was named comes on top
        lora = lora or own
    else:
        model = _load_model(config, path, null_caption, on_notice)
    if lora is not None:
        merge_lora(model.float(), lora, config.model.lora_scale)
    return model.to(device, dtype).eval().requires_grad_(False)


def _load_model(
    config: Config, path: Path, null_caption: Tensor | None, on_notice: Callable[[str], None] | None
) -> LatentTransformer:
    weights = read_denoiser(path)
    try:
        converted = convert(weights.state, config.model.family)
        with torch.device("meta"):
            model = empty_model(config)
        load(model, converted.state, absent=converted.absent)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", error.hint) from error
    if weights.note and on_notice is not None:
        on_notice(weights.note)
    if converted.absent:
        if null_caption is None:
            raise WeightsError(
                f"{path} has no null caption", "guidance needs the text encoder's: --set text.weights=..."
            )
        model.set_null_caption(null_caption)
    return model


def find_lora(word: str) -> Path:
    """The folder of the adapter that a path names: itself, one beside a checkpoint's weights, or a run's newest.

    Raises:
        UsageError: there is no adapter.
        CheckpointError: a run of which no checkpoint is whole.
    """
    path = Path(word).expanduser()
    for folder in (path, path / runs.LORA_FOLDER):
        if is_lora(folder):
            return folder
    checkpoint = runs.newest_checkpoint(path)
    if checkpoint is not None and is_lora(checkpoint / runs.LORA_FOLDER):
        return checkpoint / runs.LORA_FOLDER
    raise UsageError(
        f"there is no adapter in {word}", "name a folder with an adapter_config.json, or a run that trained one"
    )


def build_initial_model(
    config: Config, null_caption: Callable[[], Tensor] | None = None, on_notice: Callable[[str], None] | None = None
) -> LatentTransformer:
    """The denoiser that a training run starts from, in fp32 on its device: fresh weights, or those of `train.init`.

    An STDiT starts from PixArt as well; position tables are computed for the size at hand, whatever the weights had.

    Args:
        config: the settings.
        null_caption: makes what `build_model` takes, if it is needed.
        on_notice: told what the user should know about the files.

    Raises:
        WeightsError, CheckpointError: weights that are missing, or of another architecture, which is named.
    """
    device = resolve_device(config.runtime.device)
    torch.manual_seed(config.train.seed)
    model = empty_model(config)
    if not config.train.init:
        return model.to(device)
    path = locate(with_settings(config, {"model.weights": config.train.init}), "model").path
    if base := _adapted(path):
        merged = build_model(
            with_settings(config, {**base, "runtime.dtype": "fp32"}), null_caption and null_caption(), on_notice
        )
        return merged.train().requires_grad_(True)
    weights = read_denoiser(path)
    try:
        converted = convert(weights.state, models.guess_family(weights.state))
        if config.model.family.startswith("stdit") and models.guess_family(weights.state) == "pixart":
            models.init_from_image(model, converted.state)
        else:
            converted = convert(weights.state, config.model.family)
            state, absent = converted.state, converted.absent
            if ("y_embedder.embedding_table.weight" in state) != (config.model.condition == "class"):
                # DiT's classes as a start for captions, or the other way round: what reads them is learned anew
                state = {key: value for key, value in state.items() if not key.startswith("y_embedder.")}
                absent = [key for key in model.state_dict() if key.startswith("y_embedder.")]
            load(model, state, absent=absent)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", error.hint) from error
    if weights.note and on_notice is not None:
        on_notice(weights.note)
    if NULL_CAPTION in converted.absent:
        if null_caption is None:
            raise WeightsError(
                f"{path} has no null caption", "captions are dropped for the text encoder's: --set text.weights=..."
            )
        model.set_null_caption(null_caption())
    return model.to(device)


def read_denoiser(path: Path) -> Weights:
    """Read the weights of a denoiser: a file or folder, a run of ours, or one of Open-Sora 1.0's trainer.

    Of a run of ours it is the average in the newest whole checkpoint; of theirs `ema.pt`, or the shards in `model/`.

    Raises:
        CheckpointError: no weights there, or torn ones.
    """
    if runs.is_run(path):
        path = _checkpoint_of(path)
    if runs.is_checkpoint(path):
        stored = Stored(path)
        return Weights(stored.read("weights") | stored.read("ema"))
    if (path / "running_states.json").is_file():
        return read_weights(path / "ema.pt" if (path / "ema.pt").is_file() else path / "model")
    return read_weights(path)


def _checkpoint_of(run: Path) -> Path:
    checkpoint = runs.newest_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(f"the run {run} has no checkpoint of a denoiser yet", f"osora train --resume {run}")
    return checkpoint


def _adapted(path: Path) -> dict[str, str] | None:
    """What to build for a checkpoint of an adapter; None for anything else."""
    if not (runs.is_checkpoint(path) and (path / runs.LORA_FOLDER).is_dir()):
        return None
    init = read_settings(path / runs.CONFIG_FILE)["train.init"]
    return {"model.weights": init, "model.lora": str(path / runs.LORA_FOLDER)}


def empty_model(config: Config) -> LatentTransformer:
    """The denoiser with the weights that a training run starts from, in fp32 on the CPU (or the default device)."""
    settings = {item.name: getattr(config.model, item.name) for item in dataclasses.fields(config.model)}
    return models.build(settings.pop("family"), **settings, recompute=config.train.recompute)


def build_objective(config: Config) -> Objective:
    """What the denoiser was, or is to be, trained to predict.

    Raises:
        ConfigError: an unknown objective or schedule.
    """
    settings = config.diffusion
    if settings.objective == "iddpm":
        return diffusion.IDDPM(settings.noise_schedule, settings.diffusion_steps, learn_sigma=config.model.learn_sigma)
    return diffusion.RectifiedFlow(settings.timestep_sampling, settings.timestep_shift)


# weights --------------------------------------------------------------------------------------------------------------


def word_of(config: Config, kind: assets.Kind) -> str:
    """What the settings call the weights of a part; for a folder that we exported, its own parts."""
    word = {"model": config.model.weights, "vae": config.vae.weights, "text": config.text.weights}[kind]
    model = config.model.weights
    if kind == "model" or word != assets.BUNDLED or model in ("", assets.BUNDLED):
        return word
    # an export of ours says "bundled" of its parts, which lie beside it
    if model.startswith("hf:"):
        path, at, revision = model.partition("@")
        return "/".join([*path.split("/")[:2], kind]) + at + revision
    folder = Path(model).expanduser()
    if runs.is_checkpoint(folder):
        folder = folder.resolve().parents[1]
    part = (folder if folder.is_dir() else folder.parent) / kind
    return str(part) if part.is_dir() else word


def locate(config: Config, kind: assets.Kind, on_progress: Progress | None = None) -> Located:
    """Find the weights of a part, or download them, and check those that came with a manifest, once.

    Of a run of ours it is the newest whole checkpoint.

    Raises:
        UsageError: no such name, file or folder.
        WeightsError: they cannot be had.
        CheckpointError: a file of ours that is damaged or missing; it is named.
    """
    word = word_of(config, kind)
    if not word:
        raise UsageError(f"no weights are named for the {kind}", f"--set {kind}.weights=NAME, PATH or hf:owner/repo")
    found = assets.locate(word, kind=kind, offline=config.runtime.offline, on_progress=on_progress)
    if kind == "model" and (runs.is_run(found.path) or runs.is_checkpoint(found.path)):
        return dataclasses.replace(found, path=_checkpoint_of(found.path))
    folder = found.path if kind == "model" and found.path.is_dir() else found.path.parent
    if (folder / MANIFEST).is_file():
        verify_manifest(folder, "" if kind == "model" else found.path.name)
    return found


def spatial_stride(config: Config) -> int | None:
    """Pixels per latent position along a side, if that can be told before the VAE is loaded."""
    found = assets.find(word_of(config, "vae"), kind="vae")
    if found is None:
        return None
    folder = found.path if (found.path / "config.json").is_file() else found.path / "vae"
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "patch" in settings:
            return int(settings["patch"])
        if config.vae.kind in ("kl", "temporal-decoder"):
            return int(2 ** (len(settings["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # loading it will tell what is wrong
    return None
