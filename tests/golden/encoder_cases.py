"""Golden cases of the encoder rooms: VAE, T5, CLIP, cleaning of captions."""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange

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


HANDLERS: dict[str, Callable[[Case], None]] = {
    "models.vae.VideoAutoencoderKL": video_autoencoder,
}
