"""Very small models of the real classes, with random weights, and clips for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from opensora_core.media import write_video

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
TEMPLATE = (
    "{% for m in messages %}USER: {% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
PINS = [[56, 112], [112, 56], [112, 112]]


def tokenizer(*special: str) -> Any:
    """One token per byte."""
    words = [*SPECIAL, *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": special[0]},
    )


def build(folder: Path, kind: str, width: int = 16) -> Path:
    """Save a LLaVA or LLaVA-NeXT with its processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    torch.manual_seed(0)
    words = tokenizer("<image>")
    parts = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    common: dict[str, Any] = {
        "vision_config": hf.CLIPVisionConfig(**parts, image_size=56, patch_size=14, projection_dim=width),
        "text_config": hf.LlamaConfig(
            **parts,
            vocab_size=len(words),
            num_key_value_heads=2,
            max_position_embeddings=8192,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        ),
        "image_token_index": words.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    pictures: dict[str, Any] = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    asked: dict[str, Any] = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
        "chat_template": TEMPLATE.replace("IMAGE", "<image>\n"),
    }
    if kind == "llava":
        model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**common))
        processor = hf.LlavaProcessor(CLIPImageProcessorPil(**pictures), words, **asked)
    else:
        model = hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(**common, image_grid_pinpoints=PINS))
        seen = LlavaNextImageProcessorPil(**pictures, image_grid_pinpoints=PINS)
        processor = hf.LlavaNextProcessor(seen, words, **asked)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_qwen(folder: Path) -> Path:
    """Save a Qwen2.5-VL with the files that its processor is made of."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    words = tokenizer("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    words.chat_template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    ids = dict(
        zip(
            ("image", "vision_start", "vision_end", "video"),
            words.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]),
            strict=True,
        )
    )
    model = hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 16,
                "patch_size": 14,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            text_config={
                "vocab_size": len(words),
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 8192,
                "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
                "pad_token_id": 1,
                "bos_token_id": 2,
                "eos_token_id": 3,
            },
            image_token_id=ids["image"],
            video_token_id=ids["video"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=ids["vision_end"],
        )
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112).save_pretrained(folder)
    return folder


def write_clips(folder: Path, count: int, size: tuple[int, int] = (32, 48), num_frames: int = 6) -> Path:
    """Write clips of noise, and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (num_frames, *size, 3), np.uint8)
        write_video(folder / f"{number:03d}.mp4", noise, fps=8.0)
        height, width = size
        rows.append(
            {"path": f"{number:03d}.mp4", "num_frames": num_frames, "fps": 8.0, "width": width, "height": height}
        )
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
