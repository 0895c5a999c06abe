"""The table of published weights.

`size_bytes` is computed from the parameter counts of `docs/weights.md` (four bytes each) and therefore about right, not
exact. `revision` pins a commit where one is known for certain; none is yet, and "main" says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["model", "vae", "text"]


@dataclass(frozen=True)
class Asset:
    """One set of published weights.

    Attributes:
        name: what `--model` and presets call it.
        about: what it is for, in a line.
        kind: the part that it is.
        repo: of the Hugging Face hub; empty for weights that lie at `url`.
        files: paths in the repository. One is located as a file, several as their folder; `a|b` is a, or b where the
            repository has no a.
        licence: of the weights.
        size_bytes: approximate, see above.
        preset: the settings that the weights were made with, for a model.
        revision: commit, tag or branch.
        url: of a file that is on no hub.
        sha256: of the file, where it is known.
    """

    name: str
    about: str
    kind: Kind
    files: tuple[str, ...]
    licence: str
    size_bytes: int
    repo: str = ""
    preset: str = ""
    revision: str = "main"
    url: str = ""
    sha256: str = ""

    @property
    def file_name(self) -> str:
        """What the file, or for several of them their folder, is called when it is put in place by hand."""
        return self.files[0].rpartition("/")[2] if len(self.files) == 1 else self.name


BUNDLED = "bundled"

_STDIT, _PIXART, _PIXART_MS = 759_620_768, 610_856_096, 611_349_152
_DIT, _LATTE, _LATTE_1 = 674_834_720, 673_799_072, 1_057_246_880
_VAE, _T5, _CLIP = 83_653_863, 4_762_310_656, 151_277_313
_FP32 = 4


def _open_sora(name: str, about: str, preset: str) -> Asset:
    size = name.removeprefix("opensora-v1-").replace("hq", "HQ")
    return Asset(
        name,
        about,
        "model",
        (f"OpenSora-v1-{size}.pth",),
        "Apache-2.0",
        _STDIT * _FP32,
        repo="hpcai-tech/Open-Sora",
        preset=preset,
    )


def _dit(side: int) -> Asset:
    file = f"DiT-XL-2-{side}x{side}.pt"
    return Asset(
        f"dit-xl-2-{side}",
        f"DiT-XL/2, ImageNet classes at {side}x{side}",
        "model",
        (file,),
        "CC-BY-NC-4.0",
        _DIT * _FP32,
        preset=f"dit-1x{side}x{side}-class",
        url=f"https://dl.fbaipublicfiles.com/DiT/models/{file}",
    )


def _pixart(name: str, file: str, about: str, preset: str, parameters: int = _PIXART) -> Asset:
    return Asset(
        name,
        about,
        "model",
        (file,),
        "CreativeML Open RAIL++-M",
        parameters * _FP32,
        repo="PixArt-alpha/PixArt-alpha",
        preset=preset,
    )


def _autoencoder(name: str, about: str) -> Asset:
    files = ("config.json", "diffusion_pytorch_model.safetensors|diffusion_pytorch_model.bin")
    return Asset(name, about, "vae", files, "MIT", _VAE * _FP32, repo=f"stabilityai/{name}")


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            BUNDLED,
            "the model that ships: coloured shapes in an invented world",
            "model",
            (),
            "Apache-2.0",
            16_000_000,
            preset="tiny",
        ),
        _open_sora("opensora-v1-16x256x256", "Open-Sora 1.0, stage 1: 366,000 videos", "16x256x256"),
        _open_sora("opensora-v1-hq-16x256x256", "Open-Sora 1.0, stage 2: fine-tuned on 20,000 videos", "16x256x256"),
        _open_sora("opensora-v1-hq-16x512x512", "Open-Sora 1.0, stage 3: 512x512", "16x512x512"),
        _dit(256),
        _dit(512),
        Asset(
            "latte-xl-2-ucf101",
            "Latte-XL/2, UCF101 classes at 16x256x256",
            "model",
            ("ucf101.pt",),
            "Apache-2.0",
            _LATTE * _FP32,
            repo="maxin-cn/Latte",
            preset="latte-16x256x256-class",
        ),
        Asset(
            "latte-1",
            "Latte-1, text to video at 16x512x512",
            "model",
            (
                "transformer/config.json",
                "transformer/diffusion_pytorch_model.safetensors|transformer/diffusion_pytorch_model.bin",
            ),
            "Apache-2.0",
            _LATTE_1 * _FP32,
            repo="maxin-cn/Latte-1",
            preset="latte-1-16x512x512",
        ),
        _pixart("pixart-256", "PixArt-XL-2-256x256.pth", "PixArt-alpha, images of 256x256", "pixart-1x256x256"),
        _pixart("pixart-sam-256", "PixArt-XL-2-SAM-256x256.pth", "PixArt-alpha, trained on SAM", "pixart-1x256x256"),
        _pixart("pixart-512", "PixArt-XL-2-512x512.pth", "PixArt-alpha, images of 512x512", "pixart-1x512x512"),
        _pixart(
            "pixart-1024-ms",
            "PixArt-XL-2-1024-MS.pth",
            "PixArt-alpha, a megapixel of any shape",
            "pixart-1x1024-ms",
            _PIXART_MS,
        ),
        _autoencoder("sd-vae-ft-ema", "Stable Diffusion's autoencoder, fine-tuned, averaged weights"),
        _autoencoder("sd-vae-ft-mse", "Stable Diffusion's autoencoder, fine-tuned further for smoother pictures"),
        Asset(
            "t5-v1_1-xxl",
            "T5 v1.1 XXL, the text encoder of Open-Sora and PixArt",
            "text",
            (
                "config.json",
                "special_tokens_map.json",
                "spiece.model",
                "tokenizer_config.json",
                "pytorch_model.bin.index.json",
                "pytorch_model-00001-of-00002.bin",
                "pytorch_model-00002-of-00002.bin",
            ),
            "Apache-2.0",
            _T5 * _FP32,
            repo="DeepFloyd/t5-v1_1-xxl",
        ),
        Asset(
            "clip-vit-b-32",
            "CLIP ViT-B/32, the text encoder of text-conditioned DiT and Latte",
            "text",
            (
                "config.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.json",
                "merges.txt",
                "tokenizer.json",
                "model.safetensors|pytorch_model.bin",
            ),
            "MIT",
            _CLIP * _FP32,
            repo="openai/clip-vit-base-patch32",
        ),
    )
}
