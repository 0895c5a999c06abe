"""Captions from a model of transformers on this machine: whatever turns images and text into text."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opensora_core import assets
from opensora_core.assets.search import BUNDLED_FOLDER
from opensora_core.config import Config
from opensora_core.curation.captions.prompt import ask, grid, introduced, places
from opensora_core.curation.captions.protocol import Shown, Words
from opensora_core.errors import CheckpointError, ConfigError, UsageError, WeightsError
from opensora_core.media.pixels import Frames

OWN_FILE = "osora.json"
"""What a model that is made for this wants: `frames`, `at`, `prompt`, `max_tokens`, `layout`."""

BUNDLED_CAPTIONER = BUNDLED_FOLDER / "captioner"

_MAX_TOKENS = 220
_GRID_TYPES = ("llava", "llava_next", "vipllava")
"""Types that were trained on one picture at a time, and so do better with the frames in one."""

_ONE_PICTURE = (
    *("blip-2", "instructblip", "git", "paligemma", "kosmos-2", "vision-encoder-decoder", "pix2struct", "florence2"),
)
"""Types that take no more than one picture."""

_BY_PIL = ("qwen2_vl", "qwen2_5_vl")
"""Types whose processor asks for torchvision, and whose pictures can be prepared without."""

_BATCH = {"cuda": 8, "mps": 2, "cpu": 4}


@dataclass(frozen=True)
class _Inputs:
    clips: Sequence[Shown]
    tensors: Any


class Local:
    """A model in a folder, or a repository of the hub.

    Its own code is never run: what transformers does not know by itself is refused.

    Args:
        config: `caption.model` is a folder or `hf:owner/repo`.

    Raises:
        UsageError: there is no such folder, or a library is missing.
        CheckpointError: it holds something else.
        ConfigError, InputError, DeviceError: settings that cannot be.
    """

    is_local = True
    lanes = 1

    def __init__(self, config: Config) -> None:
        from opensora_core.components import resolve_device, resolve_dtype  # torch comes with it

        wanted = config.caption
        self._config, self._runtime = wanted, config.runtime
        self._word = self.word(wanted.model)
        device = resolve_device(config.runtime.device)
        resolve_dtype(config.runtime.dtype, device)
        if wanted.quantise != "none":
            _require_quantisation()
        if wanted.batch_size < 0 or wanted.max_tokens < 0 or wanted.temperature < 0:
            raise ConfigError(
                f"caption.batch_size = {wanted.batch_size}, caption.max_tokens = {wanted.max_tokens}, "
                f"caption.temperature = {wanted.temperature}: none of them is negative"
            )
        self.batch_size = wanted.batch_size or _BATCH[device.type]
        self._folder: Path | None = None
        found = assets.find(self._word, kind="text")
        self._look_at(found.path if found else None)
        self._model: Any = None
        self._processor: Any = None

    def word(self, word: str) -> str:
        """What is asked of the assets."""
        if word.startswith("hf:"):
            return word
        path = Path(word.removeprefix("local:")).expanduser()
        if not path.is_dir():
            owner, _, repo = word.partition("/")
            is_repo = owner and repo and "/" not in repo and not word.startswith((".", "~"))
            raise UsageError(
                f"there is no folder {path} with a captioner",
                f"a repository of the hub is written hf:{word}"
                if is_repo
                else "or openai:NAME, tiny, labels, sidecars",
            )
        return str(path.absolute())

    def _look_at(self, folder: Path | None) -> None:
        """Learn what the folder says of itself; an absent one says nothing yet."""
        self._folder = folder
        own: dict[str, Any] = {}
        self._type = ""
        if folder is not None:
            self._type = _type_of(folder)
            own = _own_settings(folder)
        self.at = places(self._config, own.get("at") or ())
        if not self._config.frames and not self._config.at and own.get("frames") and not own.get("at"):
            self.at = tuple(float(x) for x in np.linspace(0.2, 0.8, int(own["frames"])).round(4))
        self._max_tokens = self._config.max_tokens or int(own.get("max_tokens") or _MAX_TOKENS)
        layout: str = self._config.layout
        if layout == "auto":
            usual = "grid" if self._type in (*_GRID_TYPES, *_ONE_PICTURE, "") else "separate"
            layout = own.get("layout", "separate") if own else usual
        if layout == "separate" and self._type in _ONE_PICTURE and len(self.at) > 1:
            raise UsageError(
                f"a model of type {self._type} takes one picture, not {len(self.at)}", "--layout grid, or --frames 1"
            )
        self._is_grid = layout == "grid"
        if own.get("prompt") and not self._config.prompt:
            self._prompt = str(own["prompt"])
        else:
            self._prompt = introduced(ask(self._config), len(self.at), grid=self._is_grid)

    @property
    def about(self) -> str:
        """The model, its type and where it runs."""
        kind = self._type or "not on this machine yet"
        frames = f"{len(self.at)} frames {'in one picture' if self._is_grid else 'each'}"
        return f"{self._config.model} ({kind}), {frames}"

    @property
    def facts(self) -> dict[str, str]:
        """What captions depend on. Batches and devices are none of it."""
        wanted = self._config
        return {
            "model": wanted.model if wanted.model.startswith("hf:") else self._word,
            "prompt": self._prompt,
            "layout": "grid" if self._is_grid else "separate",
            "temperature": f"{wanted.temperature:g}",
            "seed": str(wanted.seed if wanted.temperature else 0),
            "max_tokens": str(self._max_tokens),
            "quantise": wanted.quantise,
        }

    def fetch(self, is_offline: bool) -> Iterator[tuple[str, int, int]]:
        """Get the weights, if they are not here; see `Captioner`.

        Raises:
            WeightsError: they cannot be had.
        """
        if self._folder is None:
            yield self._word, 0, 0
            self._look_at(assets.locate(self._word, kind="text", offline=is_offline).path)

    def load(self, device: str) -> None:
        """Read the weights and what prepares pictures and words for them.

        Raises:
            CheckpointError: they are torn, do not fit, or need a library that is not here.
        """
        import torch
        import transformers

        from opensora_core.components import is_out_of_memory, resolve_dtype
        from opensora_core.text.loading import _quiet as quiet

        assert self._folder is not None
        self._processor = _processor(self._folder, self._type)
        place = torch.device(device)
        options: dict[str, Any] = {"dtype": resolve_dtype(self._runtime.dtype, place)}
        if self._config.quantise != "none":
            options["device_map"] = {"": place}
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_8bit=self._config.quantise == "8bit",
                load_in_4bit=self._config.quantise == "4bit",
                bnb_4bit_compute_dtype=options["dtype"],
            )
        try:
            with quiet(transformers):
                model, info = transformers.AutoModelForImageTextToText.from_pretrained(
                    self._folder,
                    local_files_only=True,
                    weights_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **options,
                )
        except MemoryError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"the captioner in {self._folder} cannot be read: {_first_line(error)}", _cure(error, self._folder)
            ) from error
        if lost := sorted(str(key) for kind in ("missing", "mismatched") for key in info[f"{kind}_keys"]):
            raise CheckpointError(
                f"the weights in {self._folder} do not fit: {len(lost)} are missing, such as {', '.join(lost[:3])}",
                "its weights and its config.json must belong together: fetch both again",
            )
        model = model.eval().requires_grad_(False)
        self._model = model if "device_map" in options else model.to(place)
        self._device = place
        generation = self._model.generation_config
        tokenizer = self._processor.tokenizer
        if generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id
        # what a repository samples with is not what was asked for
        generation.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None)

    def prepare(self, clips: Sequence[Shown]) -> _Inputs:
        """Pictures and words as tensors, padded on the left."""
        pictures: list[Frames] = []
        for shown in clips:
            pictures += [grid(shown.frames)] if self._is_grid and len(shown.frames) > 1 else shown.frames
        text = _conversation(self._processor, self._prompt, len(pictures) // len(clips))
        tensors = self._processor(
            images=[Image.fromarray(picture) for picture in pictures],
            text=[text] * len(clips),
            padding=True,
            return_tensors="pt",
        )
        return _Inputs(clips, tensors)

    def describe(self, prepared: _Inputs, should_stop: Callable[[], bool]) -> list[Words]:
        """Write a caption for each clip of a batch; a batch that is too large for the memory is halved."""
        import torch

        from opensora_core.components import is_out_of_memory

        try:
            with torch.inference_mode():
                return self._generate(prepared, should_stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        clips = prepared.clips
        if len(clips) == 1:
            return [Words("", "describing it takes more memory than there is", failed=True)]
        middle = len(clips) // 2
        halves = (clips[:middle], clips[middle:])
        return [words for half in halves for words in self.describe(self.prepare(half), should_stop)]

    def _generate(self, prepared: _Inputs, should_stop: Callable[[], bool]) -> list[Words]:
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        dtype = next(p.dtype for p in self._model.parameters() if p.is_floating_point())
        inputs = {
            name: value.to(self._device, dtype if value.is_floating_point() else None)
            for name, value in prepared.tensors.items()
            if isinstance(value, torch.Tensor)
        }
        length = inputs["input_ids"].shape[1]

        def stopping(ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((len(ids),), should_stop(), device=ids.device, dtype=torch.bool)

        drawing = []
        if self._config.temperature > 0:
            names = [shown.clip.id for shown in prepared.clips]
            drawing.append(_Draw(names, self._config.seed, self._config.temperature))
        written = self._model.generate(
            **inputs,
            max_new_tokens=self._max_tokens,
            stopping_criteria=StoppingCriteriaList([stopping]),
            logits_processor=LogitsProcessorList(drawing),
        )[:, length:]
        tokenizer = self._processor.tokenizer
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        ends = {self._model.generation_config.pad_token_id, tokenizer.pad_token_id}
        counts_out = [sum(token not in ends for token in row) for row in written.tolist()]
        counts_in = inputs["attention_mask"].sum(1).tolist()
        return [
            Words(text.strip(), "" if text.strip() else "the model said nothing", False, int(read), wrote)
            for text, read, wrote in zip(texts, counts_in, counts_out, strict=True)
        ]


class Bundled(Local):
    """The captioner that ships: it knows the procedural world and nothing else."""

    def word(self, word: str) -> str:
        """Its folder.

        Raises:
            WeightsError: this installation has none.
        """
        if word != "tiny":
            raise UsageError(f"--model {word} is not tiny", "tiny has no variants")
        if not (BUNDLED_CAPTIONER / "config.json").is_file():
            raise WeightsError(
                f"this installation has no bundled captioner: {BUNDLED_CAPTIONER} is not there",
                "name another with --model: hf:owner/repo, a folder, or openai:NAME with --base-url",
            )
        return str(BUNDLED_CAPTIONER)


class _Draw:
    """Sampling that depends on the clip and not on its batch: the likeliest word after Gumbel noise of its own.

    argmax(logits / temperature + Gumbel noise) is a draw from softmax(logits / temperature) (Gumbel 1954).
    """

    def __init__(self, names: Sequence[str], seed: int, temperature: float) -> None:
        self._temperature = temperature
        self._generators = [
            np.random.default_rng(list(hashlib.sha256(f"{seed}\0{name}".encode()).digest())) for name in names
        ]

    def __call__(self, ids: Any, scores: Any) -> Any:
        import torch

        noise = np.stack([generator.gumbel(size=scores.shape[1]) for generator in self._generators])
        return scores.float() / self._temperature + torch.from_numpy(noise).to(scores.device, torch.float32)


def _type_of(folder: Path) -> str:
    """The type of model in a folder.

    Raises:
        CheckpointError: it holds none that turns images and text into text.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = found["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"no captioner in {folder}: it has no config.json that names a model_type",
            "name a folder in transformers' layout, such as a download of hf:llava-hf/llava-v1.6-mistral-7b-hf",
        ) from None
    from transformers.models.auto import modeling_auto

    if name not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        told = "; its own code would be needed, which is never run" if "auto_map" in found else ""
        raise CheckpointError(
            f"{folder} holds a model of type {name}, which does not turn images and text into text{told}",
            "LLaVA, LLaVA-NeXT, LLaVA-OneVision and Qwen-VL do, among others",
        )
    return str(name)


def _own_settings(folder: Path) -> dict[str, Any]:
    path = folder / OWN_FILE
    if not path.is_file():
        return {}
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
        at = own.get("at") or []
        is_sound = all(0 <= float(share) <= 1 for share in at) and int(own.get("frames") or len(at) or 1) > 0
        is_sound &= own.get("layout", "separate") in ("separate", "grid") and int(own.get("max_tokens") or 1) > 0
    except (OSError, ValueError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise CheckpointError(f"{path} cannot be read", "it holds frames, at, prompt, max_tokens and layout")
    return dict(own)


def _processor(folder: Path, model_type: str) -> Any:
    import transformers

    from opensora_core.text.loading import _quiet as quiet

    has_torchvision = importlib.util.find_spec("torchvision") is not None
    try:
        with quiet(transformers):
            if model_type in _BY_PIL and not has_torchvision:
                return PilProcessor(folder)
            processor = transformers.AutoProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        if not has_torchvision and "orchvision" in str(error):
            raise CheckpointError(
                f"preparing pictures for a model of type {model_type} takes torchvision, which is not installed",
                "pip install torchvision, the build that goes with this torch; LLaVA and LLaVA-NeXT do without",
            ) from error
        raise CheckpointError(
            f"the processor in {folder} cannot be read: {_first_line(error)}", _cure(error, folder)
        ) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not hasattr(processor, "image_processor"):
        raise CheckpointError(f"{folder} has no processor for pictures and words", f"fetch {folder} again")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


class PilProcessor:
    """The processor of Qwen2-VL and Qwen2.5-VL without torchvision: Pillow's image processor, and the tokenizer.

    Source: `Qwen2VLProcessor.__call__` of transformers: a place for a picture is repeated once for each of its merged
    patches.
    """

    image_token = "<|image_pad|>"

    def __init__(self, folder: Path) -> None:
        import transformers

        self.image_processor = transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, backend="pil"
        )
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.tokenizer.padding_side = "left"
        self.chat_template = self.tokenizer.chat_template
        for name in ("chat_template.jinja", "chat_template.json"):
            if self.chat_template is None and (folder / name).is_file():
                text = (folder / name).read_text(encoding="utf-8")
                self.chat_template = json.loads(text)["chat_template"] if name.endswith(".json") else text

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        """The words of a conversation."""
        return str(self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options))

    def __call__(self, images: Any, text: Sequence[str], padding: bool, return_tensors: str) -> dict[str, Any]:
        """Tensors of pictures, and of the words of as many conversations."""
        seen = self.image_processor(images=images, return_tensors=return_tensors)
        merged = self.image_processor.merge_size**2
        counts = [math.prod(size) // merged for size in seen["image_grid_thw"].tolist()]
        texts = []
        for words in text:
            head, *rest = words.split(self.image_token)
            for tail in rest:
                head += self.image_token * counts.pop(0) + tail
            texts.append(head)
        read = self.tokenizer(texts, padding=padding, return_tensors=return_tensors)
        kinds = (read["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image_token)).int()
        return {**read, **seen, "mm_token_type_ids": kinds}


def _conversation(processor: Any, prompt: str, num_pictures: int) -> str:
    """The words of one request, with a place for every picture."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if template:
        content = [*({"type": "image"} for _ in range(num_pictures)), {"type": "text", "text": prompt}]
        with suppress(TypeError, ValueError):
            return str(
                processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
                )
            )
    token = getattr(processor, "image_token", None) or "<image>"
    if template is None and str(token) in prompt:
        return prompt
    return f"USER: {str(token) * num_pictures}\n{prompt} ASSISTANT:"


def _require_quantisation() -> None:
    """Check that what transformers quantises with is here.

    Raises:
        UsageError: names what to install.
    """
    for name in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"caption.quantise takes {name}, which is not installed",
                "pip install 'osora[8bit]' accelerate, or leave --quantise out",
            )


def _cure(error: Exception, folder: Path) -> str:
    if isinstance(error, ImportError):
        return "install what it names, or choose another model"
    return f"delete {folder} and fetch it again"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
