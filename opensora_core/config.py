"""Settings: frozen, torch-free groups. One dotted path (`train.lr`) names a setting in flags, `--set` and files alike.

A value is stored once: what can be derived (the fps of a sample, the size of a latent) is derived.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from opensora_core.errors import ConfigError, InputError, nearest

T = TypeVar("T")

RENAMED = {"train.steps": "train.max_steps"}
"""Settings that files of earlier releases hold under another name."""


@dataclass(frozen=True)
class VideoConfig:
    """The video that is trained on or sampled. `source_fps / frame_interval` is the fps of a sample."""

    num_frames: int = 16
    height: int = 256
    width: int = 256
    frame_interval: int = 3
    source_fps: float = 24.0

    @property
    def fps(self) -> float:
        """Frames per second of a sample."""
        return self.source_fps / self.frame_interval


@dataclass(frozen=True)
class ModelConfig:
    """The denoiser. `weights` is a name of the assets table, a path, `hf:owner/repo`, or empty for random ones."""

    family: str = "stdit"
    weights: str = ""
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    learn_sigma: bool = True
    condition: Literal["text", "pooled", "class"] = "text"
    caption_channels: int = 4096
    caption_length: int = 120
    num_classes: int = 0
    caption_dropout: float = 0.1
    temporal_positions: bool = True
    space_scale: float = 1.0
    time_scale: float = 1.0
    frame_positions: Literal["published", "stream"] = "published"  # STDiT: where frames are told apart
    base_size: int = 0  # PixArt: side in patches of the square grid that positions are rescaled to; 0 = int(sqrt(S))
    qk_norm: bool = False
    attention: str = "auto"
    lora: str = ""  # a folder or run with an adapter, merged into the weights for sampling
    lora_scale: float = 1.0


@dataclass(frozen=True)
class VAEConfig:
    """The video autoencoder. A scaling factor of 0 means the one that the weights were published with."""

    kind: str = "kl"
    weights: str = "sd-vae-ft-ema"
    scaling_factor: float = 0.0
    micro_batch: int = 16
    sample_posterior: bool = True
    slicing: bool = False
    tiling: bool = False


@dataclass(frozen=True)
class TextConfig:
    """The text encoder. `cleaning` is `published` (Open-Sora 1.0's rules) or `plain` (keeps every script)."""

    kind: Literal["t5", "t5-pooled", "clip", "class"] = "t5"
    weights: str = "t5-v1_1-xxl"
    max_length: int = 0  # tokens that a pooled caption is cut at; 0 is all that the encoder was built for
    cleaning: Literal["published", "plain"] = "published"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


@dataclass(frozen=True)
class DiffusionConfig:
    """The objective a model was trained with."""

    objective: Literal["iddpm", "rectified-flow"] = "iddpm"
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    diffusion_steps: int = 1000
    timestep_sampling: Literal["uniform", "logit-normal"] = "uniform"
    timestep_shift: float = 1.0


@dataclass(frozen=True)
class SamplingConfig:
    """How a sample is drawn."""

    sampler: str = "iddpm"
    steps: int = 100
    guidance: float = 7.0
    guidance_channels: Literal["all", "first-three"] = "all"
    seed: int = 42
    num_samples: int = 1
    batch_size: int = 1
    batch_invariant: bool = True  # a sample has the same bits in every batch, for what that costs on the device


@dataclass(frozen=True)
class DataConfig:
    """Which clips are learned from, and what becomes of their frames.

    `source` is a manifest, a folder of clips or `world`. `buckets` lists the sizes that clips are brought to, such as
    `16x256x256 16x192x336 1x512x512:32` (frames x height x width, and a batch size where the token budget is not to
    decide), or `auto` for the usual aspect ratios; empty is the one size of `video`.
    """

    source: str = ""
    frame_choice: Literal["interval", "fps", "published"] = "interval"
    resize: Literal["antialiased", "published"] = "antialiased"
    flip: Literal["unless-sided", "never", "always"] = (
        "unless-sided"  # half of the clips: unless a caption names a side, or always
    )
    buckets: str = ""
    tokens_per_batch: int = 0  # 0 is what train.batch_size clips of the size of `video` have
    max_upscale: float = 1.25  # how much smaller than its bucket a clip may be
    max_rejects: float = 0.05  # the share of broken clips beyond which a run stops
    allow_no_caption: bool = False
    decode_threads: int = 1
    cache: str = ""  # a folder for VAE moments and caption embeddings; empty encodes at every step
    cache_variants: int = 1  # choices of frames that are kept per clip
    cache_dtype: Literal["fp16", "fp32"] = "fp16"


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. `lr` is AdamW's; matrices under `optimizer = "muon"` use `muon_lr`.

    `init` names the weights to start from, as `--model` does; empty starts from nothing.
    """

    init: str = ""
    max_steps: int = 1000
    vae_steps: int = 2000  # of the parts that come before the denoiser when everything is trained from nothing
    decoder_steps: int = 0  # more of them for the autoencoder's decoder alone, which leaves latents as they are
    text_steps: int = 1000
    batch_size: int = 8
    draws: int = 1  # noises and timesteps that each clip of a batch is seen with; cheaper than more clips
    accumulate: int = 1  # parts that a batch is computed in, one after the other
    optimizer: Literal["adamw", "adamw-8bit", "muon"] = "adamw"
    lr: float = 2e-5
    muon_lr: float = 0.02
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Literal["linear", "cosine"] = "linear"
    decay_fraction: float = 0.0  # the last part of the run, in which the learning rate falls to zero
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    trainable: Literal["all", "temporal-only", "all-but-text"] = "all"
    lora_rank: int = 0  # above 0 trains an adapter of that rank instead of the weights
    lora_alpha: float = 0.0  # its weight times its rank; 0 is the rank itself
    recompute: float = 0.0  # share of the blocks that recompute their activations: time for memory
    seed: int = 42
    num_workers: int = 1
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    async_checkpoints: bool = False  # write them while the training goes on, from a copy in memory
    wandb: str = ""  # a project of Weights & Biases to report to


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured and shown on the way: fixed clips, noise and timesteps; prompts, one a line or parted by `|`."""

    every: int = 0
    data: str = ""  # clips of their own; empty holds some of the training data out
    num_clips: int = 16
    num_bins: int = 5
    sample_every: int = 0
    prompts: str = ""  # empty takes the captions of the validation clips


@dataclass(frozen=True)
class SplitConfig:
    """How videos are split into clips, and what a source may cost before it is given up.

    `detector_options` lists the detector's own settings, such as `threshold=27 min_content=15`.
    """

    detector: str = "auto"
    detector_options: str = ""
    fast: bool = False  # look closely only where keyframes hint at a change
    min_seconds: float = 1.0
    max_seconds: float = 5.0  # 0 leaves scenes whole
    trim: int = 0  # frames that are dropped on both sides of a boundary
    cut: Literal["exact", "copy", "smart", "none"] = "exact"
    fps: float = 0.0  # 0 keeps the source's
    short_side: int = 512  # of re-encoded clips, which are never enlarged; 0 keeps the source's
    crop_black_bars: bool = False
    audio: bool = True
    codec: str = "libx264"
    codec_preset: str = "veryfast"
    crf: int = 18
    fast_decode: bool = False  # clips that decode faster and are larger
    engine: Literal["local", "ray"] = "local"  # processes of this machine, or workers of a Ray cluster
    ray_address: str = ""  # of the cluster, HOST:PORT or auto; empty starts one on this machine
    workers: int = 0  # processes; 0 is one per core
    decode_threads: int = 1  # of one process
    stall_seconds: float = 60.0  # in which nothing of a source is read, after which it is given up
    source_seconds: float = 21600.0  # of wall time that a source may take
    source_bytes: int = 2**31  # of memory that a process may take for it
    source_frames: int = 2_000_000  # that a source may have
    source_pixels: int = 8192 * 4320  # of one frame


@dataclass(frozen=True)
class DownloadConfig:
    """How much is fetched at a time, and what a server may do before it is given up.

    `columns` maps the columns of a list or of metadata: `link=url start=begin end=stop caption=text`; with `fps=...`
    start and end are frames.
    """

    workers: int = 4  # downloads at a time
    max_bytes_per_second: float = 0.0  # of all of them together; 0 is no limit
    min_bytes_per_second: float = 1000.0  # of each, below which it is given up
    window_seconds: float = 10.0  # that this is the mean of
    connect_seconds: float = 10.0
    answer_seconds: float = 20.0  # from a request to the end of the answer's header
    stall_seconds: float = 8.0  # between two bytes
    patience_seconds: float = 45.0  # of trouble without a gain, after which a file is given up
    max_wait_seconds: float = 20.0  # that a server's Retry-After is obeyed for
    max_retries: int = 5
    file_seconds: float = 0.0  # of a file; 0 is no limit
    file_bytes: int = 2**40  # of a file
    allow_private: bool = False  # addresses of this machine and of local networks, in lists and redirects
    columns: str = ""
    pexels_url: str = "https://api.pexels.com"
    youtube_height: int = 720  # the largest that is asked for
    youtube_whole: bool = False  # whole videos, with ranges in the manifest, even where sections could be fetched
    youtube_archive: str = ""  # yt-dlp's list of what is at hand elsewhere: left out, and added to
    cookies: str = ""  # a file in Netscape's format, for YouTube; never a browser's own
    archive_bytes: int = 2**41  # that an archive may unpack to
    archive_files: int = 10_000_000  # that it may hold
    archive_ratio: float = 200.0  # how much larger a file may become by unpacking
    seed: int = 0  # of the world's scenes


@dataclass(frozen=True)
class FilterConfig:
    """Limits beyond which clips are left out, 0 being none, and what it takes to measure them; see docs/filters.md.

    Scores that need a model are measured where its path is set.
    """

    min_motion: float = 0.0  # pixels per frame, of a picture whose longer side has 256
    max_motion: float = 0.0
    max_still: float = 0.98  # share of frames that show what the one before showed
    min_sharpness: float = 0.0  # variance of the Laplacian, of a picture whose longer side has 448 at most
    max_dark: float = 0.98  # share of the picture that is black
    max_bright: float = 0.98  # share of the picture that is white
    max_bars: float = 0.0  # share of the picture that is black bars around it
    max_text: float = 0.0  # share of the picture that is covered by text
    min_aesthetic: float = 0.0  # 1 to 10
    min_similarity: float = 0.0  # cosine of caption and pictures
    min_copy_bits: float = 0.0  # bits of 64 that pictures of two clips must differ in, so that neither is a copy
    max_copy_similarity: float = 0.0  # cosine of two clips, beyond which one is a copy
    motion: Literal["flow", "vectors"] = "flow"  # vectors: those of the codec where it has some
    frames: int = 8  # places of a clip that are looked at closely
    clip_model: str = ""  # a folder with a CLIP in the layout of transformers
    aesthetic_weights: str = ""  # LAION's predictor for that CLIP
    text_model: str = ""  # EAST (.pb) or DB (.onnx) for OpenCV, or `easyocr`
    device: str = "auto"  # that models run on
    workers: int = 0  # processes; 0 is one per core
    clip_seconds: float = 600.0  # of wall time that a clip may take
    clip_bytes: int = 2**34  # of memory that a process may take for clips, models included


@dataclass(frozen=True)
class CaptionConfig:
    """What describes clips, and how it is asked.

    `model` is a folder or `hf:owner/repo` of any model of transformers that turns images and text into text,
    `openai:NAME` of the server at `base_url`, `tiny`, `labels` or `sidecars`.
    """

    model: str = "hf:llava-hf/llava-v1.6-mistral-7b-hf"
    base_url: str = ""  # of the server; empty takes OPENAI_BASE_URL
    frames: int = 0  # of a clip that are shown; 0 is what the model asks for, or 3
    at: str = ""  # where in the clip, such as `0.2 0.5 0.8`; empty spreads the frames
    layout: Literal["auto", "separate", "grid"] = "auto"  # images of their own, or one picture
    side: int = 672  # pixels that the longer side of a frame is shrunk to; 0 keeps it
    prompt: str = ""  # a file; empty is the model's own prompt, or ours
    batch_size: int = 0  # clips; 0 suits the device
    temperature: float = 0.0  # 0 takes the likeliest word
    max_tokens: int = 0  # of a caption; 0 is what the model asks for, or 220
    seed: int = 42
    quantise: Literal["none", "8bit", "4bit"] = "none"
    gpus: int = 1  # processes, each with the model on a device of its own
    requests: int = 8  # that the server is sent at a time
    requests_per_minute: int = 0  # 0 is no limit
    request_seconds: float = 120.0  # that an answer may take
    retries: int = 5  # of a request
    price_in: float = 0.0  # of a million tokens read, in whatever money, for the estimate
    price_out: float = 0.0  # of a million tokens written
    clean: bool = False  # take off openings such as `The video shows`, half sentences and repetitions
    camera: bool = False  # say how the camera moves, from optical flow
    language: str = ""  # such as `en`: captions that are clearly of another are left out
    engine: Literal["local", "ray"] = "local"  # processes of this machine, or workers of a Ray cluster
    ray_address: str = ""  # of the cluster, HOST:PORT or auto; empty starts one on this machine
    workers: int = 0  # processes that decode; 0 is one per core, four at most; of a cluster, four for each of gpus
    stall_seconds: float = 20.0  # in which nothing of a clip is read, after which it is given up
    clip_seconds: float = 120.0  # of wall time that reading a clip may take
    clip_bytes: int = 2**30  # of memory that reading a clip may take


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a run share its work; how many there are is for the launcher to say (`--gpus`, `--nodes`).

    What the sizes leave over shares the samples: as copies (`sharding = "replicate"`), or as owners of parts of the
    state (`zero2`: gradients and optimizer; `zero3`: the weights as well; `hybrid`: zero3 within a machine).
    """

    engine: Literal["torch", "colossalai"] = "torch"
    sequence: int = 0  # processes that share the frames of a sample; 0 is one in training, and all that is left else
    cfg: int = 1  # 2 computes the two halves of guidance on different processes
    data: int = 0  # groups of processes that draw different samples; 0 is what the others leave
    sharding: Literal["replicate", "zero2", "zero3", "hybrid"] = "zero3"
    plugin: Literal["", "ddp", "zero1", "zero2", "hybrid", "gemini"] = ""  # colossalai's way to shard; empty is zero2
    text: Literal["each", "shard", "broadcast"] = "each"  # where the text encoder is: shard over a machine, or on one
    timeout_seconds: float = 600.0  # that processes wait for each other, after which the run ends
    lost_seconds: float = 20.0  # without a sign of life, after which a process is given up and the run ends


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how the arithmetic runs."""

    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    offload: bool = False
    offline: bool = False


@dataclass(frozen=True)
class Config:
    """All settings of a run; saved with every checkpoint."""

    video: VideoConfig = field(default_factory=VideoConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def iterate(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) for every leaf setting, in the order of definition."""
    for item in fields(config):
        value = getattr(config, item.name)
        path = f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from iterate(value, f"{path}.")
        else:
            yield path, value


def with_settings(config: T, changes: Mapping[str, Any]) -> T:
    """Return a copy with some settings changed.

    Args:
        config: a `Config` or one of its groups.
        changes: dotted path -> value. A string is parsed as the setting's type, so words of a shell work as they are.

    Raises:
        ConfigError: an unknown path (the nearest one is offered) or a value of the wrong kind.
    """
    known = dict(iterate(config))
    for path, value in changes.items():
        if path not in known:
            raise ConfigError(f"unknown setting '{path}'", nearest(path, known))
        config = _replace(config, path.split("."), value, path)
    return config


def _replace(group: Any, names: list[str], value: Any, path: str) -> Any:
    head, *rest = names
    if rest:
        changed = _replace(getattr(group, head), rest, value, path)
    else:
        changed = _coerce(value, typing.get_type_hints(type(group))[head], path)
    return dataclasses.replace(group, **{head: changed})


def _coerce(value: Any, kind: Any, path: str) -> Any:
    """Turn a value, or a word of a shell, into the type of its setting."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in arguments:
            raise ConfigError(f"{path} = {value!r} is not one of {', '.join(map(str, arguments))}")
    elif typing.get_origin(kind) is tuple:
        parts = value.replace("x", ",").split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or len(parts) != len(arguments):
            raise ConfigError(f"{path} = {value!r} is not {len(arguments)} values", f"for example {path}=1,2,2")
        value = tuple(_coerce(part, item, path) for part, item in zip(parts, arguments, strict=True))
    elif kind is bool:
        value = _boolean(value, path)
    elif kind in (int, float):
        value = _number(value, kind, path)
    elif not isinstance(value, str):
        raise ConfigError(f"{path} = {value!r} is not text")
    return value


def _boolean(value: Any, path: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    found = value if isinstance(value, bool) else words.get(str(value).lower())
    if found is None:
        raise ConfigError(f"{path} = {value!r} is neither true nor false")
    return found


def _number(value: Any, kind: type[int] | type[float], path: str) -> int | float:
    try:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError
        number = kind(value)
        if number != float(value):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(f"{path} = {value!r} is not {'an integer' if kind is int else 'a finite number'}") from None
    return number


def parse_settings(words: list[str]) -> dict[str, str]:
    """Parse `path=value` words, as given to `--set`.

    Raises:
        ConfigError: a word without an equals sign.
    """
    changes = {}
    for word in words:
        path, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--set {word!r} has no '='", "write --set train.lr=1e-4")
        changes[path.strip()] = value.strip()
    return changes


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def read_settings(path: Path) -> dict[str, Any]:
    """Read a TOML or JSON file of settings (a `--config`, or the one saved with a checkpoint) as dotted paths.

    Raises:
        InputError: the file cannot be read.
        ConfigError: it is neither TOML nor JSON, or not a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read settings from {path}: {error}") from None
    try:
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is not a table of settings")
    return {RENAMED.get(name, name): value for name, value in flatten(tree).items()}


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain tables, ready for JSON; `with_settings(Config(), flatten(to_dict(c))) == c`."""
    return dataclasses.asdict(config)


def to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """TOML text that `read_settings` reads back; with `origins`, a comment says where each value came from."""
    lines: list[str] = []
    for group in fields(config):
        lines.append(f"[{group.name}]")
        for name, value in iterate(getattr(config, group.name)):
            line = f"{name} = {json.dumps(value)}"
            origin = (origins or {}).get(f"{group.name}.{name}")
            lines.append(f"{line}  # {origin}" if origin else line)
        lines.append("")
    return "\n".join(lines)
