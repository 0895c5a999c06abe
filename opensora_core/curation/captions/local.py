"""Captions from a model of transformers on this machine: whatever turns images and text into text."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opensora_core import assets
from opensora_core.assets.search import BUNDLED_FOLDER
from opensora_core.config import Config
from opensora_core.curation.captions.folder import GRID_TYPES, ONE_PICTURE, cure, first_line, own_settings, type_of
from opensora_core.curation.captions.processor import conversation, load_processor
from opensora_core.curation.captions.prompt import ask, grid, introduced, places
from opensora_core.curation.captions.protocol import Shown, Words
from opensora_core.errors import CheckpointError, ConfigError, UsageError, WeightsError, nearest
from opensora_core.media.pixels import Frames

BUNDLED_CAPTIONER = BUNDLED_FOLDER / "captioner"

_MAX_TOKENS = 220
_BATCH = {"cuda": 8, "mps": 2, "cpu": 4}


@dataclass(frozen=True)
class _Inputs:
    """Clips as the model takes them, or why its processor does not."""

    clips: Sequence[Shown]
    tensors: Any
    reason: str = ""


def _never() -> bool:
    return False


class _Halted(Exception):  # noqa: N818 - the way out of a model
    """The words are no longer wanted."""


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
        self._should_stop: Callable[[], bool] = _never  # no lambda: it is sent to other processes
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
                else nearest(word, ("tiny", "labels", "sidecars", "openai:NAME", "hf:OWNER/REPO")),
            )
        return str(path.absolute())

    def _look_at(self, folder: Path | None) -> None:
        """Learn what the folder says of itself; an absent one says nothing yet."""
        self._folder = folder
        own: dict[str, Any] = {}
        self._type = ""
        if folder is not None:
            self._type = type_of(folder)
            own = own_settings(folder)
        self.at = places(self._config, own.get("at") or ())
        if not self._config.frames and not self._config.at and own.get("frames") and not own.get("at"):
            self.at = tuple(float(x) for x in np.linspace(0.2, 0.8, int(own["frames"])).round(4))
        self._max_tokens = self._config.max_tokens or int(own.get("max_tokens") or _MAX_TOKENS)
        layout: str = self._config.layout
        if layout == "auto":
            usual = "grid" if self._type in (*GRID_TYPES, *ONE_PICTURE, "") else "separate"
            layout = own.get("layout", "separate") if own else usual
        if layout == "separate" and self._type in ONE_PICTURE and len(self.at) > 1:
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
    def _name(self) -> str:
        return self._word

    @property
    def facts(self) -> dict[str, str]:
        """What captions depend on. Batches and devices are none of it."""
        wanted = self._config
        return {
            "model": self._name,
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
        from opensora_core.text.loading import quiet

        assert self._folder is not None
        self._processor = load_processor(self._folder, self._type)
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
                f"the captioner in {self._folder} cannot be read: {first_line(error)}", cure(error, self._folder)
            ) from error
        if lost := sorted(str(key) for kind in ("missing", "mismatched") for key in info[f"{kind}_keys"]):
            raise CheckpointError(
                f"the weights in {self._folder} do not fit: {len(lost)} are missing, such as {', '.join(lost[:3])}",
                "its weights and its config.json must belong together: fetch both again",
            )
        model = model.eval().requires_grad_(False)
        self._model = model if "device_map" in options else model.to(place)
        self._device = place
        for layers in (module for module in model.modules() if isinstance(module, torch.nn.ModuleList)):
            for layer in layers:
                layer.register_forward_pre_hook(self._halt)
        generation = self._model.generation_config
        tokenizer = self._processor.tokenizer
        if generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id
        # what a repository samples with is not what was asked for
        generation.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None)

    def _halt(self, *_: Any) -> None:
        """Leave the model between two layers: a word may take longer than anybody waits who has pressed Ctrl-C.

        A thread that is still in there when the interpreter ends takes the process down with SIGABRT.
        """
        if self._should_stop():
            raise _Halted

    def prepare(self, clips: Sequence[Shown]) -> _Inputs:
        """Pictures and words as tensors, padded on the left."""
        pictures: list[Frames] = []
        for shown in clips:
            pictures += [grid(shown.frames)] if self._is_grid and len(shown.frames) > 1 else shown.frames
        text = conversation(self._processor, self._prompt, len(pictures) // len(clips))
        try:
            tensors = self._processor(
                images=[Image.fromarray(picture) for picture in pictures],
                text=[text] * len(clips),
                padding=True,
                return_tensors="pt",
            )
        except (ValueError, TypeError, IndexError, KeyError) as error:  # such as a picture that is far too narrow
            return _Inputs(clips, None, f"the model's processor refuses it: {first_line(error)}")
        return _Inputs(clips, tensors)

    def describe(self, prepared: _Inputs, should_stop: Callable[[], bool]) -> list[Words]:
        """Write a caption for each clip of a batch; one that is refused, or too large for the memory, is halved."""
        import torch

        from opensora_core.components import is_out_of_memory

        self._should_stop = should_stop
        reason = prepared.reason or "describing it takes more memory than there is"
        if not prepared.reason:
            try:
                with torch.inference_mode():
                    return self._generate(prepared, should_stop)
            except _Halted:
                return [Words("", "stopped", failed=True)] * len(prepared.clips)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        clips = prepared.clips
        if len(clips) == 1 or should_stop():
            return [Words("", reason, failed=True)] * len(clips)
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

    @property
    def _name(self) -> str:
        return "tiny"  # wherever it is installed


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
