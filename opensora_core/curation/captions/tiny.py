"""The captioner that ships, as a model: a very small LLaVA that has seen nothing but the procedural world.

It is a `LlavaForConditionalGeneration` in a folder like any other, so whatever loads a LLaVA loads it; `osora.json`
beside it says which frames it wants to see and what it is asked. `world.py` trains it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opensora_core import world
from opensora_core.errors import InputError
from opensora_core.files import replacing_folder, write_bytes

PROMPT = "describe"
SETTINGS_FILE = "osora.json"
AT = (0.02, 0.6, 0.98)
"""Shares of a clip. They are one and a half hops and then one hop apart, so that no moment of a hop looks like a climb,
and reach from end to end, where any move is longest."""

MAX_TOKENS = 32
IMAGE, END = "<image>", "<end>"
WIDTH = 96
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
_PAD, _UNKNOWN = "<pad>", "<unk>"
_PATCH = 8
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)

Frames = NDArray[np.uint8]


def build() -> tuple[Any, Any]:
    """A `LlavaForConditionalGeneration` with random weights from the global generator, and its `LlavaProcessor`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = [_PAD, END, _UNKNOWN, IMAGE, PROMPT, *_words()]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # words with one space between them
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=END,
        unk_token=_UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    side = {"height": world.SIZE, "width": world.SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size=side, crop_size=side, do_center_crop=False, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
        ),
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=_TEMPLATE,
    )
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=world.SIZE,
            patch_size=_PATCH,
            projection_dim=WIDTH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=1024,
            # fast enough to tell frames 65 tokens apart: at the usual 10000 left and right stay mixed up for long
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            tie_word_embeddings=True,
            **ids,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(world.SIZE // _PATCH) ** 2 + 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(max_new_tokens=MAX_TOKENS, do_sample=False, **ids)
    return model, processor


def _words() -> list[str]:
    """Every word of the captions, sorted."""
    plain = {name: values[0] for name, values in world.ATTRIBUTES.items()}
    captions = [
        world.canonical_caption(world.Scene(**{**plain, name: value}))  # type: ignore[arg-type]
        for name, values in world.ATTRIBUTES.items()
        for value in values
    ]
    return sorted({word for caption in captions for word in caption.split()})


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write the model in half precision, its processor and `osora.json`; the folder is whole or absent.

    The config asks for fp32 on loading: half precision is for the size of the package, and slow on a CPU.

    Raises:
        ResourceError: the file system refuses it.
    """
    from safetensors.torch import load_file, save_file

    with replacing_folder(folder) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
        weights = part / "model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
        weights.chmod(0o644)  # safetensors makes it private; it is part of a package
        settings = {"frames": len(AT), "at": list(AT), "prompt": PROMPT, "max_tokens": MAX_TOKENS}
        write_bytes(part / SETTINGS_FILE, (json.dumps(settings) + "\n").encode())


def load(folder: Path) -> tuple[Any, Any]:
    """The model and the processor of a folder, by the classes that load any model of this kind.

    Raises:
        InputError: no captioner of ours there.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (folder / SETTINGS_FILE).is_file():
        raise InputError(f"{folder} has no captioner", f"python -m opensora_core.curation.captions.world {folder}")
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    return AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval(), processor


@torch.no_grad()
def describe(model: Any, processor: Any, clips: Sequence[Frames]) -> list[str]:
    """Caption clips, each (T, H, W, 3) uint8 of any length and size."""
    if not clips:
        return []
    images = [[clip[round(at * (len(clip) - 1))] for at in AT] for clip in clips]
    text = IMAGE * len(AT) + PROMPT
    inputs = processor(images=images, text=[text] * len(clips), return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    told: list[str] = processor.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return told
