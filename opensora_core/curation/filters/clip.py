"""What a CLIP says of a clip: how beautiful it is, and whether its caption fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opensora_core.config import FilterConfig
from opensora_core.curation.filters.look import Filter, Look
from opensora_core.errors import CheckpointError, DeviceError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

_HINT = "for example a copy of openai/clip-vit-large-patch14: config.json, weights, tokenizer and preprocessor"
_NEEDS = "a CLIP: --set filter.clip_model=FOLDER"

Vector = NDArray[np.float32]


class ClipModel:
    """A CLIP of transformers.

    Args:
        folder: in its layout.
        device: to run on.

    Raises:
        WeightsError: there is no such folder.
        CheckpointError: it holds no CLIP, or one that is torn.
        DeviceError: the device is not there.
    """

    def __init__(self, folder: str, device: str) -> None:
        import torch
        import transformers

        if not (Path(folder) / "config.json").is_file():
            raise WeightsError(f"filter.clip_model = {folder!r} is no folder with a CLIP", _HINT)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            with _quietly(transformers):
                model = transformers.CLIPModel.from_pretrained(
                    folder, local_files_only=True, weights_only=True, dtype=torch.float32
                )
                # the slow one works with Pillow alone, and has the same bits on every machine
                self._processor: Any = transformers.CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"no CLIP can be read from {folder}: {str(error).splitlines()[0]}", _HINT) from error
        try:
            self._model: Any = model.eval().requires_grad_(False).to(device)
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(
                f"filter.device = {device}: {str(error).splitlines()[0]}", "--set filter.device=cpu"
            ) from (error)
        self.device = device

    def pictures(self, look: Look) -> Tensor:
        """Embeddings (N, E) of length 1 of a clip's places, kept with the look."""
        import torch

        if "clip" not in look.kept:
            chosen = [look.pictures[place] for place in look.firsts]
            pixels = self._processor(images=chosen, return_tensors="pt").pixel_values
            with torch.inference_mode():
                found = self._model.get_image_features(pixel_values=pixels.to(self.device))
            look.kept["clip"] = _unit(found)
        kept: Tensor = look.kept["clip"]
        return kept

    def words(self, caption: str) -> Tensor:
        """Embedding (E,) of length 1 of a caption, cut at what the model takes."""
        import torch

        batch = self._tokenizer([caption], truncation=True, max_length=self._max_length(), return_tensors="pt")
        with torch.inference_mode():
            found = self._model.get_text_features(
                input_ids=batch.input_ids.to(self.device), attention_mask=batch.attention_mask.to(self.device)
            )
        return _unit(found)[0]

    def _max_length(self) -> int:
        return int(self._model.config.text_config.max_position_embeddings)


def _unit(found: Any) -> Tensor:
    """Rows of length 1; newer transformers wrap what older ones return as it is."""
    import torch

    rows: Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
    return torch.nn.functional.normalize(rows.float(), dim=-1)


@contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Loading a part of a checkpoint is what we want, and no reason for a page of warnings."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@lru_cache(1)
def load_clip(folder: str, device: str) -> ClipModel:
    """The CLIP of a folder, read once."""
    return ClipModel(folder, device)


@lru_cache(1)
def load_predictor(path: str, device: str) -> list[tuple[Tensor, Tensor]]:
    """The layers (weight, bias) of LAION's aesthetic predictor: linear ones with nothing between them, or a single one.

    Raises:
        WeightsError: there is no such file.
        CheckpointError: it holds no such layers.
    """
    from opensora_core.weights import read_weights

    if not Path(path).is_file():
        raise WeightsError(
            f"filter.aesthetic_weights = {path!r} is no file",
            "for example sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor",
        )
    state = read_weights(Path(path)).state
    names = sorted(
        (name.removesuffix("weight") for name in state if name.endswith("weight")),
        key=lambda name: [int(part) for part in name.split(".") if part.isdecimal()],
    )
    layers = [
        (state[f"{name}weight"].float(), state[f"{name}bias"].float()) for name in names if f"{name}bias" in state
    ]
    shapes = [tuple(weight.shape) for weight, _ in layers]
    fits = all(before[0] == after[1] for before, after in pairwise(shapes))
    if not layers or any(len(shape) != 2 for shape in shapes) or shapes[-1][0] != 1 or not fits:
        raise CheckpointError(f"{path} holds no linear layers that end in one number: {shapes}", "see docs/filters.md")
    return [(weight.to(device), bias.to(device)) for weight, bias in layers]


def _aesthetic(look: Look, settings: FilterConfig) -> float | None:
    import torch

    clip = load_clip(settings.clip_model, settings.device)
    layers = load_predictor(settings.aesthetic_weights, clip.device)
    found = clip.pictures(look)
    if found.shape[1] != layers[0][0].shape[1]:
        raise CheckpointError(
            f"{settings.aesthetic_weights} takes embeddings of {layers[0][0].shape[1]} numbers, and those of "
            f"{settings.clip_model} have {found.shape[1]}",
            "LAION's predictor is for openai/clip-vit-large-patch14",
        )
    with torch.inference_mode():
        for weight, bias in layers:
            found = torch.nn.functional.linear(found, weight, bias)
    return float(found.mean())


def _similarity(look: Look, settings: FilterConfig) -> float | None:
    if not look.caption:
        return None
    clip = load_clip(settings.clip_model, settings.device)
    return float((clip.pictures(look) @ clip.words(look.caption)).mean())


def embedding(look: Look, settings: FilterConfig) -> Vector:
    """The mean (E,) of the embeddings of a clip, of length 1."""
    mean = load_clip(settings.clip_model, settings.device).pictures(look).mean(0)
    found: Vector = (mean / mean.norm()).cpu().numpy()
    return found


AESTHETIC = Filter(
    about="how much people would like the picture, by LAION's predictor",
    unit="of 10",
    measure=_aesthetic,
    least="min_aesthetic",
    is_on=lambda settings: bool(settings.clip_model and settings.aesthetic_weights),
    made_by=lambda settings: f"1 {settings.clip_model} {settings.aesthetic_weights} {settings.frames}",
    needs=f"{_NEEDS} and its predictor: --set filter.aesthetic_weights=FILE",
)
SIMILARITY = Filter(
    about="how well caption and pictures fit: their cosine, by CLIP",
    unit="of 1",
    measure=_similarity,
    least="min_similarity",
    is_on=lambda settings: bool(settings.clip_model),
    made_by=lambda settings: f"1 {settings.clip_model} {settings.frames}",
    needs=f"{_NEEDS}, and captions",
)
