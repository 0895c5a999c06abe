"""What makes tensors of pictures and words for a model: transformers' processors, with and without torchvision."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from opensora_core.curation.captions.folder import cure, first_line
from opensora_core.errors import CheckpointError

_BY_PIL = ("qwen2_vl", "qwen2_5_vl")
"""Types whose processor asks for torchvision, and whose pictures can be prepared without."""


def load_processor(folder: Path, model_type: str) -> Any:
    """The processor of a folder, that pads words on the left.

    Raises:
        CheckpointError: there is none, it is torn, or it takes a library that is not here.
    """
    import transformers

    from opensora_core.text.loading import quiet

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
                f"{how_to_install()}; LLaVA, LLaVA-NeXT, Qwen2-VL and Qwen2.5-VL do without",
            ) from error
        raise CheckpointError(
            f"the processor in {folder} cannot be read: {first_line(error)}", cure(error, folder)
        ) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not hasattr(processor, "image_processor"):
        raise CheckpointError(f"{folder} has no processor for pictures and words", f"fetch {folder} again")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def how_to_install() -> str:
    """A line that gets the torchvision of this torch, and leaves torch as it is.

    It must be of the same release and the same build; without saying so, pip may put another torch in the place of this
    one: that of CUDA, of gigabytes, on a machine that has none.
    """
    import torch

    release, _, build = torch.__version__.partition("+")
    source = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"pip install torchvision torch=={release}{source} (a plain one may put another build of torch in its place)"


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


def conversation(processor: Any, prompt: str, num_pictures: int) -> str:
    """The words of one request, with a place for every picture."""
    import jinja2  # torch comes with it

    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if template:
        content = [*({"type": "image"} for _ in range(num_pictures)), {"type": "text", "text": prompt}]
        # templates of models that know no lists of parts refuse them, each in its own way
        with suppress(TypeError, ValueError, jinja2.TemplateError):
            return str(
                processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
                )
            )
    token = getattr(processor, "image_token", None) or "<image>"
    if template is None and str(token) in prompt:
        return prompt
    return f"USER: {str(token) * num_pictures}\n{prompt} ASSISTANT:"
