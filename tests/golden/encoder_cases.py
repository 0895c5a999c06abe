"""Golden cases of the encoder rooms: VAE, T5, CLIP, cleaning of captions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange

from opensora_core.text.cleaning import clean_as_published, clean_once_as_published
from opensora_core.text.clip import ClipEncoder
from opensora_core.text.t5 import T5Encoder
from opensora_core.vae.kl import FrameVAE
from tests.golden.case import Case


def video_autoencoder(case: Case) -> None:
    from diffusers import AutoencoderKL

    config, io = case.config, case.io
    model = AutoencoderKL(**config["diffusers_config"]).eval()
    model.load_state_dict(case.weights)
    video = io["x"]
    folded = {"b": len(video), "t": video.shape[2]}
    noise = rearrange(io["noise"], "(b t) c h w -> b c t h w", **folded)
    mean = rearrange(io["posterior.mean"], "(b t) c h w -> b c t h w", **folded)
    std = rearrange(io["posterior.logvar"], "(b t) c h w -> b c t h w", **folded).mul(0.5).exp()
    for micro_batch in (1, 2, 128):
        vae = FrameVAE(model, scaling_factor=config["scaling"], micro_batch=micro_batch)
        case.close(vae.encode(video) / config["scaling"], mean, "posterior.mean")
        case.close((vae.encode(video, noise) - vae.encode(video)) / config["scaling"], std * noise, "posterior.std")
        case.close(vae.encode(video, noise), "latent")
        case.close(vae.decode(io["latent"]), "decoded")
    for name, size in config.items():
        if name.startswith("latent_size_of_"):
            frames, height, width = (int(side) for side in name.removeprefix("latent_size_of_").split("x"))
            assert list(vae.latent_shape(frames, height, width)[1:]) == size


def t5(case: Case) -> None:
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(**case.config["config"])).eval()
    missing, unexpected = model.load_state_dict(case.weights, strict=False)
    assert not unexpected and all("embed_tokens" in name for name in missing)  # the tied copy may be left out
    mask = case.io["attention_mask"]
    encoder = T5Encoder(model, tokenizer=None, max_length=mask.shape[1], clean=str)
    condition = encoder.encode_ids(case.io["input_ids"], mask)
    case.close(condition.tokens, "last_hidden_state")
    assert condition.mask is not None and torch.equal(condition.mask, mask.bool())


def clip(case: Case) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**case.config["config"])).eval()
    names = model.state_dict().keys()
    # transformers 5 dropped the `text_model.` level of the names; cases may have been recorded with either
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    model.load_state_dict({prefix + name.removeprefix("text_model."): value for name, value in case.weights.items()})
    ids = case.io["input_ids"]
    encoder = ClipEncoder(model, tokenizer=None, max_length=ids.shape[1], clean=str)
    condition = encoder.encode_ids(ids)
    case.close(condition.tokens[:, 0], "pooler_output")
    assert condition.mask is None
    case.close(model(ids).last_hidden_state, "last_hidden_state")


def text_cleaning(case: Case) -> None:
    for pair in case.config["pairs"]:
        assert clean_as_published(pair["input"]) == pair["cleaned"], pair["input"]
        if "cleaned_once" in pair:
            assert clean_once_as_published(pair["input"]) == pair["cleaned_once"], pair["input"]


HANDLERS: dict[str, Callable[[Case], None]] = {
    "models.vae.VideoAutoencoderKL": video_autoencoder,
    "transformers.T5EncoderModel as used by T5Embedder": t5,
    "transformers.CLIPTextModel as used by ClipEncoder": clip,
    "T5Embedder.text_preprocessing": text_cleaning,
}
