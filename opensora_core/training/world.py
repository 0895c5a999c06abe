"""Training every part of the tiny model on the procedural world: autoencoder, text encoder, denoiser.

A batch is rendered where it is needed, as a function of (seed, part, step): there is no data set to store or to lose.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora_core import components, world
from opensora_core.config import Config, ParallelConfig, TrainConfig, with_settings
from opensora_core.data.order import Share
from opensora_core.diffusion.objective import Objective
from opensora_core.errors import InputError
from opensora_core.files import replacing_folder
from opensora_core.models import LatentTransformer
from opensora_core.parallel.agreement import by_first, first
from opensora_core.runs import CHECKPOINTS
from opensora_core.tensors import Condition
from opensora_core.text import TextEncoder, load_text_encoder
from opensora_core.text.t5 import pooled
from opensora_core.training.denoiser import POSTERIOR, DenoiserTask, fit_denoiser, prepare, tokens_and_flops
from opensora_core.training.events import Event, Facts
from opensora_core.training.loop import fit
from opensora_core.training.task import Crew, Task, noise_at, step_seed
from opensora_core.vae.patch import PatchVAE

_SHORTENED = 0.6
"""The share of captions, of those that the text encoder learns from, that words are left out of.

A caption always says colour and shape, and some pairs of them never occur: an encoder that reads whole captions only
learns to guess the one from the other, and reads a pair that it never saw as one that it did.
"""


def _clips(seed: int, part: str, step: int, places: range) -> Iterator[tuple[world.Scene, np.random.Generator]]:
    """Scenes of the training split at places of a batch, with the generator that draws the rest of each clip."""
    salt = int.from_bytes(part.encode()[:4].ljust(4))
    for index in places:
        rng = np.random.default_rng([seed, salt, step, index])
        yield world.draw_scene(rng, split="train"), rng


def _caption_in_part(scene: world.Scene, rng: np.random.Generator) -> str:
    """A caption of a scene, most with words left out; see `_SHORTENED`."""
    text = world.caption(scene, rng)
    if rng.random() >= _SHORTENED:
        return text
    kept = rng.uniform(0.2, 1)
    return " ".join(word for word in text.split(" ") if rng.random() < kept)


def to_tensor(frames: np.ndarray) -> Tensor:
    """Frames (..., T, H, W, 3) uint8 -> video (..., 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -4).float().div_(127.5).sub_(1)


class AutoencoderTask(Task):
    """Train a `PatchVAE` on single frames: Gaussian likelihood, a little L1 for edges, a weak pull to the prior."""

    name = "vae"
    stays = (*Task.stays, "vae")

    def __init__(self, vae: PatchVAE, *, batch_size: int, seed: int, frames_per_clip: int = 4) -> None:
        self.module: nn.Module = vae
        self.vae = vae
        self.called: Callable[..., Any] = _Autoencoding(vae)
        self.batch_size, self.seed, self.frames_per_clip = batch_size, seed, frames_per_clip

    @property
    def root(self) -> nn.Module:
        """What goes both ways through the autoencoder."""
        return _Autoencoding(self.vae)

    def batch(self, step: int) -> Tensor:
        """Frames (N, 3, H, W) of a share of `batch_size` clips."""
        frames = []
        for scene, rng in _clips(self.seed, self.name, step, self.share.places(self.batch_size)):
            chosen = rng.choice(world.NUM_FRAMES, self.frames_per_clip, replace=False)
            frames.append(world.render(scene, rng)[chosen])
        return to_tensor(np.concatenate(frames)[:, None]).squeeze(2)

    def losses(self, batch: Tensor, generator: torch.Generator, parts: int = 1) -> Iterator[dict[str, Tensor]]:
        """The evidence bound of a fixed pixel deviation, and the PSNR for the report.

        The weight of the KL term is twice the square of that deviation, which is 46 dB below the range of a pixel.
        """
        device = next(self.vae.parameters()).device
        batch = batch.to(device)
        shape = self.vae.latent_shape(1, *batch.shape[2:])
        places = self.share.places(len(batch) * self.share.size)
        noise = noise_at(places, (shape[0], *shape[2:]), generator, POSTERIOR)
        mean, log_variance, output = self.called(batch, noise)
        mse = F.mse_loss(output, batch)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / batch.numel()
        loss = mse + 0.02 * F.l1_loss(output, batch) + 2e-4 * kl
        yield {"loss": loss, "kl": kl.detach(), "psnr": -10 * torch.log10(mse.detach() / 4)}

    @torch.no_grad()
    def measure_statistics(self, num_batches: int = 8) -> None:
        """Set the mean and deviation of the latents, per channel, which the denoiser relies on."""
        means = torch.cat([self.vae.posterior(self.batch(10**9 + n))[0] for n in range(num_batches)])
        self.vae.latents_mean = means.mean(dim=(0, 2, 3)).tolist()
        self.vae.latents_std = means.std(dim=(0, 2, 3)).tolist()


class _Autoencoding(nn.Module):
    """Frames to latents, and back by way of a sample of them, in one call."""

    def __init__(self, vae: PatchVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) and (N, C, h, w) -> mean and log-variance (N, C, h, w), and frames again."""
        mean, log_variance = self.vae.posterior(frames)
        return mean, log_variance, self.vae.reconstruct(mean + (0.5 * log_variance).exp() * noise)


class DecoderTask(AutoencoderTask):
    """Train the decoder on, and leave the encoder as it is: latents, and what was trained on them, stay the same."""

    name = "decoder"

    def __init__(self, vae: PatchVAE, *, batch_size: int, seed: int, frames_per_clip: int = 4) -> None:
        super().__init__(vae, batch_size=batch_size, seed=seed, frames_per_clip=frames_per_clip)
        vae.encoder_blocks.requires_grad_(False)
        vae.decoder_blocks.requires_grad_(True)


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
        vectors = pooled(hidden, mask)
        return {name: head(vectors) for name, head in self.heads.items()}


class TextTask(Task):
    """Train a T5 encoder to read captions: what does this one say about each attribute of the scene?

    Published models stand on a text encoder that was trained before them; this gives the tiny one the same footing, so
    that the denoiser meets embeddings in which what a caption says is already told apart.
    """

    name = "text"
    stays = (*Task.stays, "encoder")

    def __init__(self, folder: Path, *, batch_size: int, seed: int, max_length: int) -> None:
        from transformers import PreTrainedTokenizerFast, T5EncoderModel

        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.encoder: Any = T5EncoderModel.from_pretrained(folder)
        self.module: nn.Module = _Reader(self.encoder, self.encoder.config.d_model)
        self.called: Callable[..., Any] = self.module
        self.batch_size, self.seed, self.max_length = batch_size, seed, max_length

    def batch(self, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Token ids and mask (B, L), and the class of every attribute (B,)."""
        texts: list[str] = []
        labels: dict[str, list[int]] = {name: [] for name in world.ATTRIBUTES}
        for scene, rng in _clips(self.seed, self.name, step, self.share.places(self.batch_size)):
            texts.append(text := _caption_in_part(scene, rng))
            said = world.parse(text)
            for name, values in world.ATTRIBUTES.items():
                labels[name].append(values.index(said[name]) if name in said else len(values))
        encoded = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return encoded.input_ids, encoded.attention_mask, {name: torch.tensor(ids) for name, ids in labels.items()}

    def losses(
        self, batch: tuple[Tensor, Tensor, dict[str, Tensor]], generator: torch.Generator, parts: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """Cross entropy summed over attributes, and the share of captions read without a mistake."""
        device = next(self.module.parameters()).device
        ids, mask, labels = batch[0].to(device), batch[1].to(device), {k: v.to(device) for k, v in batch[2].items()}
        logits = self.called(ids, mask)
        loss = torch.stack([F.cross_entropy(logits[name], labels[name]) for name in logits]).sum()
        right = torch.stack([logits[name].argmax(-1) == labels[name] for name in logits]).all(0)
        yield {"loss": loss, "read": right.float().mean()}


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
    captions = (world.caption(scene, rng) for scene, rng in _clips(seed, "tokens", 0, range(num_captions)))
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


Ids = tuple[str, ...]


class WorldTask(DenoiserTask):
    """Train a denoiser on latents and caption embeddings of freshly rendered clips."""

    def __init__(
        self,
        model: LatentTransformer,
        vae: PatchVAE,
        text_encoder: TextEncoder,
        objective: Objective,
        *,
        batch_size: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, objective, dtype)
        self.vae, self.text_encoder = vae, text_encoder
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int) -> tuple[Tensor, Condition, Ids]:
        """Latents (B, C, T, h, w), drawn from the posterior, embedded captions, and names; made on the worker's CPU."""
        frames, captions, places = [], [], self.share.places(self.batch_size)
        for scene, rng in _clips(self.seed, self.name, step, places):
            captions.append(world.caption(scene, rng))
            frames.append(world.render(scene, rng))
        with torch.no_grad():
            video = to_tensor(np.stack(frames))
            shape = self.vae.latent_shape(*video.shape[2:])
            generator = torch.Generator().manual_seed(step_seed(self.seed, step))
            latents = self.vae.encode(video, noise_at(places, shape, generator, POSTERIOR))
        ids = tuple(f"{world_id(step, index)}" for index in places)
        return latents, self.text_encoder.encode(captions), ids

    def encoded(self, batch: tuple[Tensor, Condition, Ids], generator: torch.Generator) -> tuple[Tensor, Condition]:
        """What the worker made, on the model's device."""
        device = next(self.model.parameters()).device
        return batch[0].to(device), batch[1].to(device)

    def facts(self, batch: tuple[Tensor, Condition, Ids]) -> Facts:
        """What the report says of a batch."""
        latents, _, ids = batch
        count, flops = tokens_and_flops(self.model, tuple(latents.shape[1:]))
        seen = len(ids) * self.draws
        return Facts(ids, count * seen, flops * seen)


def world_id(step: int, index: int) -> str:
    """The name of a clip that is rendered for a step."""
    return f"world-{step}-{index}"


# the run --------------------------------------------------------------------------------------------------------------


def check_world(config: Config) -> None:
    """Refuse settings that this data cannot train.

    Raises:
        InputError: another size, or other kinds of encoders.
    """
    size = (config.video.num_frames, config.video.height, config.video.width)
    if size != (world.NUM_FRAMES, world.SIZE, world.SIZE):
        raise InputError(f"the world is 16x64x64, not {'x'.join(map(str, size))}", "use --preset tiny")
    if config.vae.kind != "patch" or config.text.kind not in ("t5", "t5-pooled"):
        raise InputError(
            f"only a 'patch' VAE and a 't5' or 't5-pooled' text encoder are trained from nothing, "
            f"not '{config.vae.kind}' and '{config.text.kind}'",
            "use --preset tiny",
        )


def train_world(config: Config, output: Path, crew: Crew) -> Iterator[Event]:
    """Train autoencoder, text encoder and denoiser from nothing, one after the other.

    The processes share the batches of all three; those of a part that they cannot share equally are the first one's.

    Raises:
        TrainingError, CheckpointError, ResourceError, Stopped: see `fit`.
    """
    yield from _train_vae(config, output, crew)
    yield from _train_decoder(config, output, crew)
    yield from _train_text(config, output, crew)
    yield from _train_model(config, output, crew)


def _fit_part(task: Task, recipe: TrainConfig, output: Path, crew: Crew) -> Generator[Event, None, None]:
    """Train a part that is so small that everybody keeps all of it."""
    folder, parallel = output / CHECKPOINTS / task.name, ParallelConfig(sharding="replicate")
    if recipe.batch_size % crew.mesh.data.size:
        yield from by_first(crew.mesh, _only(fit(task, recipe, folder)))
    else:
        yield from fit(task, recipe, folder, crew=crew, parallel=parallel)


def _only(events: Iterator[Event]) -> Generator[Event, None, None]:
    yield from events


def _train_vae(config: Config, output: Path, crew: Crew) -> Iterator[Event]:
    if first(crew.mesh, (output / "vae").exists):
        return
    torch.manual_seed(config.train.seed)
    vae = PatchVAE(latent_channels=config.model.in_channels).to(crew.mesh.device)
    recipe = _recipe(config, max_steps=config.train.vae_steps, batch_size=12, warmup_steps=30)
    task = AutoencoderTask(vae, batch_size=recipe.batch_size, seed=recipe.seed)
    yield from _fit_part(task, recipe, output, crew)

    def keep() -> None:
        vae.cpu().eval()
        task.share = Share()
        task.measure_statistics()
        with replacing_folder(output / "vae") as folder:
            vae.save_pretrained(folder)

    first(crew.mesh, keep)


def _train_decoder(config: Config, output: Path, crew: Crew) -> Iterator[Event]:
    if not config.train.decoder_steps:
        return
    vae = PatchVAE.from_pretrained(output / "vae").to(crew.mesh.device)
    recipe = _recipe(
        config,
        max_steps=config.train.decoder_steps,
        batch_size=12,
        warmup_steps=30,
        lr=1e-3,
        muon_lr=config.train.muon_lr / 2,
    )
    task = DecoderTask(vae, batch_size=recipe.batch_size, seed=recipe.seed)
    yield from _fit_part(task, recipe, output, crew)  # at its end already, it just loads what it has

    def keep() -> None:
        with replacing_folder(output / "vae") as part:
            vae.cpu().save_pretrained(part)

    first(crew.mesh, keep)


def _train_text(config: Config, output: Path, crew: Crew) -> Iterator[Event]:
    if first(crew.mesh, (output / "text").exists):
        return
    start = output / CHECKPOINTS / "text-start"

    def begin() -> None:
        if start.exists():
            return
        with replacing_folder(start) as folder:
            make_text_encoder(
                folder,
                width=config.model.caption_channels,
                max_length=components.text_length(config),
                seed=config.train.seed,
            )

    first(crew.mesh, begin)
    recipe = _recipe(config, max_steps=config.train.text_steps, batch_size=128, warmup_steps=50)
    task = TextTask(start, batch_size=recipe.batch_size, seed=recipe.seed, max_length=components.text_length(config))
    task.module.to(crew.mesh.device)
    yield from _fit_part(task, recipe, output, crew)

    def keep() -> None:
        with replacing_folder(output / "text") as folder:
            task.encoder.cpu().save_pretrained(folder)
            task.tokenizer.save_pretrained(folder)

    first(crew.mesh, keep)


def _recipe(config: Config, **settings: float) -> TrainConfig:
    """How the parts before the denoiser are trained; only their lengths are settings."""
    return with_settings(config.train, {"lr": 2e-3, "accumulate": 1, **settings})


def _train_model(config: Config, output: Path, crew: Crew) -> Iterator[Event]:
    vae = PatchVAE.from_pretrained(output / "vae")
    text = load_text_encoder(
        config.text.kind,
        output / "text",
        max_length=components.text_length(config),
        cleaning=config.text.cleaning,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    dtype = components.resolve_dtype(config.runtime.dtype, crew.mesh.device)
    model = components.build_initial_model(config)
    prepare(model, config)
    task = WorldTask(
        model,
        vae,
        text,
        components.build_objective(config),
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        dtype=dtype,
    )
    yield from fit_denoiser(task, config, output / CHECKPOINTS, crew)
