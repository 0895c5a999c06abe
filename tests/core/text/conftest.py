"""Tiny random text models with tokenizers trained on a handful of captions, saved as their publishers save them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

CAPTIONS = [
    "a red ball rolls over green grass",
    "A blue cube on the sand at night",
    "it snows on the sea",
    "一只猫在奔跑",
]


def unigram() -> object:
    """A lower-casing Unigram tokenizer that ends a text with </s>, as the bundled one does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def save_t5(folder: Path, vocab_size: int) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=vocab_size, **sizes, feed_forward_proj="gated-gelu")).save_pretrained(folder)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose tokenizer is one tokenizer.json."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = unigram()
    save_t5(folder, tokenizer.get_vocab_size())  # type: ignore[attr-defined]
    tokenizer.save(str(folder / "tokenizer.json"))  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="session")
def deepfloyd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 as DeepFloyd publishes it: spiece.model, tokenizer_config.json, pickled weights."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("deepfloyd")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS[:3] * 5),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    save_t5(folder, 160)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP, image tower included, with vocab.json and merges.txt."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(vocab_size=560, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False),
    )
    bpe.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    for letter in alphabet:
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    start, end = len(vocabulary), len(vocabulary) + 1
    vocabulary |= {"<|startoftext|>": start, "<|endoftext|>": end}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**widths, "vocab_size": end + 1, "max_position_embeddings": 24, "bos_token_id": start, "eos_token_id": end}
    vision = {**widths, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return folder
