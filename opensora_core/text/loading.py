"""Reading transformers' text models and tokenizers from a local folder, strictly and quietly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opensora_core.errors import CheckpointError, WeightsError

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")


def load_text_model(
    path: Path, class_name: str, *, model_types: tuple[str, ...], dtype: torch.dtype, device: torch.device | str
) -> Any:
    """Read a text model from a folder, or from the `text_encoder` folder of a diffusers pipeline.

    Args:
        path: the folder.
        class_name: the class of transformers to build; towers of the checkpoint that it has no use for are left out.
        model_types: what `model_type` in the folder's `config.json` may be.
        dtype: of the weights, but for those that transformers keeps in float32.
        device: where to put them.

    Returns:
        The model, frozen and in eval mode.

    Raises:
        WeightsError: there is no such folder.
        CheckpointError: it holds another model, or weights that are torn or do not fit.
    """
    folder = _part(path, "text_encoder")
    _check_type(folder, model_types)

    import transformers

    try:
        with quiet(transformers):
            model, info = getattr(transformers, class_name).from_pretrained(
                folder, dtype=dtype, local_files_only=True, weights_only=True, output_loading_info=True
            )
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the {class_name} in {folder} cannot be read: {_first_line(error)}", f"delete {folder} and fetch it again"
        ) from error
    for kind in ("missing", "mismatched"):
        if keys := sorted(str(key) for key in info[f"{kind}_keys"]):
            more = ", ..." if len(keys) > 10 else ""
            raise CheckpointError(
                f"the weights in {folder} do not fit {class_name}: {len(keys)} {kind}: {', '.join(keys[:10])}{more}",
                "its weights and its config.json must belong together: fetch both again",
            )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Any:
    """Read the tokenizer of a folder, or of the `tokenizer` folder of a diffusers pipeline.

    Raises:
        CheckpointError: there is none, it is torn, or it does not mark the end of a text.
    """
    folder = _part(path, "tokenizer")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make up an empty one
        raise CheckpointError(f"no tokenizer in {folder}", f"put {' or '.join(TOKENIZER_FILES)} there")

    import transformers

    try:
        with quiet(transformers):
            # a tokenizer.json says all there is to say; AutoTokenizer would put T5's usual normaliser in its place
            exact = (folder / "tokenizer.json").is_file()
            kind = transformers.PreTrainedTokenizerFast if exact else transformers.AutoTokenizer
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
            if tokenizer.pad_token is None and "<pad>" in tokenizer.get_vocab():
                tokenizer.pad_token = "<pad>"
            empty = tokenizer("").input_ids
    except Exception as error:
        raise CheckpointError(
            f"no tokenizer could be read from {folder}: {_first_line(error)}",
            f"delete {folder} and fetch it again",
        ) from error
    if not empty or tokenizer.pad_token_id is None:
        lacks = "no padding token" if empty else "no token for the end of a text, so an empty caption would be nothing"
        raise CheckpointError(
            f"the tokenizer in {folder} has {lacks}", "it is not the one that the model was made with"
        )
    return tokenizer


def _part(path: Path, name: str) -> Path:
    return path / name if (path / "model_index.json").is_file() else path


def _check_type(folder: Path, model_types: tuple[str, ...]) -> None:
    wanted = " or ".join(model_types)
    if not folder.is_dir():
        raise WeightsError(f"no text encoder at {folder}: not a folder", "name a folder with --set text.weights=DIR")
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except OSError:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"no text encoder in {folder}: it has no config.json, but {held}",
            "name a folder in transformers' layout with --set text.weights=DIR",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"no text encoder in {folder}: its config.json names no model_type",
            "name a folder in transformers' layout with --set text.weights=DIR",
        ) from None
    if found not in model_types:
        raise CheckpointError(
            f"{folder} holds a model of type {found}, not {wanted}", "choose the kind of encoder with --set text.kind"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from drawing progress bars and from reporting what is checked here anyway."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
