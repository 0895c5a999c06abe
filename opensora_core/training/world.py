"""Training every part of the tiny model on the procedural world: autoencoder, text encoder, denoiser.

A batch is rendered where it is needed, as a function of (seed, part, step): there is no data set to store or to lose.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora_core import world
from opensora_core.diffusion.objective import Objective
from opensora_core.tensors import Condition
from opensora_core.text.protocol import TextEncoder
from opensora_core.training.loop import step_seed
from opensora_core.vae.patch import PatchVAE


def _clips(seed: int, part: str, step: int, count: int) -> Iterator[tuple[world.Scene, np.random.Generator]]:
    """Scenes of the training split with the generator that draws the rest of each clip."""
    salt = int.from_bytes(part.encode()[:4].ljust(4))
    for index in range(count):
        rng = np.random.default_rng([seed, salt, step, index])
        yield world.draw_scene(rng, split="train"), rng


def to_tensor(frames: np.ndarray) -> Tensor:
    """Frames (..., T, H, W, 3) uint8 -> video (..., 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -4).float().div_(127.5).sub_(1)


class AutoencoderTask:
    """Train a `PatchVAE` on single frames: Gaussian likelihood, a little L1 for edges, a weak pull to the prior."""

    name = "vae"

    def __init__(self, vae: PatchVAE, *, batch_size: int, seed: int, frames_per_clip: int = 4) -> None:
        self.module: nn.Module = vae
        self.vae = vae
        self.batch_size, self.seed, self.frames_per_clip = batch_size, seed, frames_per_clip

    def batch(self, step: int) -> Tensor:
        """Frames (N, 3, H, W) of `batch_size` clips."""
        frames = []
        for scene, rng in _clips(self.seed, self.name, step, self.batch_size):
            chosen = rng.choice(world.NUM_FRAMES, self.frames_per_clip, replace=False)
            frames.append(world.render(scene, rng)[chosen])
        return to_tensor(np.concatenate(frames)[:, None]).squeeze(2)

    def losses(self, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The evidence bound of a fixed pixel deviation, and the PSNR for the report.

        The weight of the KL term is twice the square of that deviation, which is 46 dB below the range of a pixel.
        """
        device = next(self.vae.parameters()).device
        batch = batch.to(device)
        mean, log_variance = self.vae.posterior(batch)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        output = self.vae.reconstruct(mean + (0.5 * log_variance).exp() * noise)
        mse = F.mse_loss(output, batch)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / batch.numel()
        loss = mse + 0.02 * F.l1_loss(output, batch) + 2e-4 * kl
        return {"loss": loss, "kl": kl.detach(), "psnr": -10 * torch.log10(mse.detach() / 4)}

    @torch.no_grad()
    def measure_statistics(self, num_batches: int = 8) -> None:
        """Set the mean and deviation of the latents, per channel, which the denoiser relies on."""
        means = torch.cat([self.vae.posterior(self.batch(10**9 + n))[0] for n in range(num_batches)])
        self.vae.latents_mean = means.mean(dim=(0, 2, 3)).tolist()
        self.vae.latents_std = means.std(dim=(0, 2, 3)).tolist()


class _Reader(nn.Module):
    """A text encoder with one linear head per attribute of the world, on the mean over the caption's tokens."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        # one class more than there are values: the caption does not say
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, len(values) + 1) for name, values in world.ATTRIBUTES.items()}
        )

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {name: head(pooled) for name, head in self.heads.items()}


class TextTask:
    """Train a T5 encoder to read captions: what does this one say about each attribute of the scene?

    Published models stand on a text encoder that was trained before them; this gives the tiny one the same footing, so
    that the denoiser meets embeddings in which what a caption says is already told apart.
    """

    name = "text"

    def __init__(self, folder: Path, *, batch_size: int, seed: int, max_length: int) -> None:
        from transformers import PreTrainedTokenizerFast, T5EncoderModel

        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.encoder: Any = T5EncoderModel.from_pretrained(folder)
        self.module: nn.Module = _Reader(self.encoder, self.encoder.config.d_model)
        self.batch_size, self.seed, self.max_length = batch_size, seed, max_length

    def batch(self, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Token ids and mask (B, L), and the class of every attribute (B,)."""
        texts: list[str] = []
        labels: dict[str, list[int]] = {name: [] for name in world.ATTRIBUTES}
        for scene, rng in _clips(self.seed, self.name, step, self.batch_size):
            texts.append(world.caption(scene, rng))
            said = world.parse(texts[-1])
            for name, values in world.ATTRIBUTES.items():
                labels[name].append(values.index(said[name]) if name in said else len(values))
        encoded = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return encoded.input_ids, encoded.attention_mask, {name: torch.tensor(ids) for name, ids in labels.items()}

    def losses(self, batch: tuple[Tensor, Tensor, dict[str, Tensor]], generator: torch.Generator) -> dict[str, Tensor]:
        """Cross entropy summed over attributes, and the share of captions read without a mistake."""
        device = next(self.module.parameters()).device
        ids, mask, labels = batch[0].to(device), batch[1].to(device), {k: v.to(device) for k, v in batch[2].items()}
        logits = self.module(ids, mask)
        loss = torch.stack([F.cross_entropy(logits[name], labels[name]) for name in logits]).sum()
        right = torch.stack([logits[name].argmax(-1) == labels[name] for name in logits]).all(0)
        return {"loss": loss, "read": right.float().mean()}


def make_text_encoder(folder: Path, *, width: int, max_length: int, seed: int, num_captions: int = 20_000) -> None:
    """Train a tokenizer on captions of the world and save it with a fresh T5 encoder of that width into `folder`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    printable = [chr(code) for code in range(33, 127)]  # so that a typing mistake still has tokens
    trainer = trainers.UnigramTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=printable,
        show_progress=False,
    )
    captions = (world.caption(scene, rng) for scene, rng in _clips(seed, "tokens", 0, num_captions))
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )
    torch.manual_seed(seed)  # transformers initialises from the global state
    config = T5Config(
        vocab_size=len(wrapped),
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
        tie_word_embeddings=False,
    )
    T5EncoderModel(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


class DenoiserTask:
    """Train a denoiser on latents and caption embeddings of freshly rendered clips."""

    name = "model"

    def __init__(
        self,
        model: nn.Module,
        vae: PatchVAE,
        text_encoder: TextEncoder,
        objective: Objective,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.module: nn.Module = model
        self.model: Any = model
        self.vae, self.text_encoder, self.objective = vae, text_encoder, objective
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int) -> tuple[Tensor, Condition]:
        """Latents (B, C, T, h, w), drawn from the posterior, and embedded captions; made on the worker's CPU."""
        frames, captions = [], []
        for scene, rng in _clips(self.seed, self.name, step, self.batch_size):
            captions.append(world.caption(scene, rng))
            frames.append(world.render(scene, rng))
        with torch.no_grad():
            video = to_tensor(np.stack(frames))
            shape = self.vae.latent_shape(*video.shape[2:])
            noise = torch.randn(len(video), *shape, generator=torch.Generator().manual_seed(step_seed(self.seed, step)))
            return self.vae.encode(video, noise), self.text_encoder.encode(captions)

    def losses(self, batch: tuple[Tensor, Condition], generator: torch.Generator) -> dict[str, Tensor]:
        """The objective's loss with captions dropped at the model's own rate."""
        device = next(self.model.parameters()).device
        latents, condition = batch[0].to(device), batch[1].to(device)
        dropped = torch.rand(len(latents), generator=generator, device=device) < self.model.caption_dropout
        condition = self.model.replace_captions(condition, dropped)
        timestep = self.objective.draw_timesteps(len(latents), generator)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        return {
            name: values.mean()
            for name, values in self.objective.losses(self.model, latents, timestep, noise, condition).items()
        }
