"""Looking at a model in training: losses on fixed clips, noise and timesteps, and samples of fixed prompts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from opensora_core import diffusion
from opensora_core.config import Config
from opensora_core.data.dataset import ClipBatch, ClipReader
from opensora_core.errors import InputError
from opensora_core.media import to_uint8, write_contact_sheet, write_video
from opensora_core.parallel.agreement import spread
from opensora_core.tensors import Condition
from opensora_core.training.corpus import Corpus
from opensora_core.training.denoiser import DenoiserTask
from opensora_core.training.ema import EMA
from opensora_core.training.encoders import Parts
from opensora_core.training.events import Event, Notice, Sampled, Validated, Working
from opensora_core.training.task import step_seed
from opensora_core.vae import VideoVAE

T = TypeVar("T")

SAMPLES = "samples"
MOST_PROMPTS = 4  # captions of held-out clips that are sampled where no prompts are given


@dataclass(frozen=True)
class Fixed:
    """Clips of one size with everything that is drawn for them: latents, noise (B, C, T, h, w) and conditions."""

    latents: Tensor
    noise: Tensor
    condition: Condition


class Validation:
    """Measures and samples every so many steps, from randomness of its own: a run with it equals one without.

    Args:
        config: `validation`, `sampling` and `video` settings.
        run: samples go to `samples/step-N/` below it.
        clips: held-out clips, on the CPU; empty measures nothing.
        prompts: what is sampled, with its condition, on the CPU.
        vae: decodes samples; None samples nothing.
        shape: (C, T, h, w) of a sample's latents.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        *,
        clips: Sequence[Fixed],
        prompts: Sequence[tuple[str, Condition]],
        vae: VideoVAE | None,
        shape: tuple[int, int, int, int],
    ) -> None:
        self.config, self.run, self.clips = config, run, clips
        self.prompts, self.vae, self.shape = prompts, vae, shape

    def after(self, step: int, ema: EMA, task: DenoiserTask) -> Iterator[Event]:
        """Do what is due after a step."""
        settings, is_last = self.config.validation, step == self.config.train.max_steps
        if self.clips and settings.every and (step % settings.every == 0 or is_last):
            yield from self._measure(step, ema, task)
        if self.prompts and settings.sample_every and (step % settings.sample_every == 0 or is_last):
            yield from self._sample(step, ema, task)

    def _measure(self, step: int, ema: EMA, task: DenoiserTask) -> Iterator[Event]:
        task.model.eval()
        raw = yield from self._bins(task, "validating the weights")
        with ema.applied():
            average = yield from self._bins(task, "validating their average")
        task.model.train()
        yield Validated(step, sum(raw) / len(raw), sum(average) / len(average), raw, average)

    def _bins(self, task: DenoiserTask, title: str) -> Generator[Event, None, tuple[float, ...]]:
        """The mean loss in each bin of timesteps, from clean to noise."""
        count = self.config.validation.num_bins
        device, ends = task.mesh.device, list(accumulate(len(fixed.latents) for fixed in self.clips))

        def losses_of(number: int) -> list[float]:
            fixed, found = self.clips[number], []
            for index in range(count):
                # low-discrepancy places within the bin, the same at every validation
                places = torch.arange(ends[number] - len(fixed.latents), ends[number], dtype=torch.float64)
                timestep = (index + places * 0.6180339887498949 % 1) / count * task.objective.num_timesteps
                drawn = task.objective.draw_timesteps(1, torch.Generator().manual_seed(0))
                with torch.no_grad():
                    losses = task.objective.losses(
                        task.denoise,
                        fixed.latents.to(device),
                        timestep.to(device, drawn.dtype),
                        fixed.noise.to(device),
                        fixed.condition.to(device),
                    )
                found.append(float(losses["loss"].sum()))
            return found

        rows = yield from _shared(task, title, list(range(len(self.clips))), losses_of)
        return tuple(sum(column) / ends[-1] for column in zip(*rows, strict=True))

    def _sample(self, step: int, ema: EMA, task: DenoiserTask) -> Iterator[Event]:
        assert self.vae is not None
        folder = self.run / SAMPLES / f"step-{step}"
        suffix = "png" if self.config.video.num_frames == 1 else "mp4"
        shown, paths = [], []
        task.model.eval()
        with ema.applied():
            videos = yield from _shared(
                task,
                "sampling",
                list(range(len(self.prompts))),
                lambda number: to_uint8(self._draw(task, self.prompts[number][1], number)),
            )
        task.model.train()
        if not task.mesh.is_first:
            return
        for number, ((prompt, _), frames) in enumerate(zip(self.prompts, videos, strict=True)):
            path = folder / f"{number}.{suffix}"
            write_video(path, frames, self.config.video.fps, {"prompt": prompt, "step": str(step)})
            shown.append((prompt, frames))
            paths.append(path)
        write_contact_sheet(shown, folder / "sheet.png")
        yield Sampled(step, tuple(paths), folder / "sheet.png")

    @torch.no_grad()
    def _draw(self, task: DenoiserTask, condition: Condition, number: int) -> Tensor:
        """One video (3, T, H, W), from the same noise at every step of the training."""
        settings = self.config.sampling
        device = task.mesh.device
        generator = torch.Generator().manual_seed(settings.seed + number)

        def draw_noise() -> Tensor:
            return torch.randn(1, *self.shape, generator=generator).to(device)

        condition = condition.to(device)
        latents = torch.empty(0)
        for step in diffusion.sample(
            task.denoise,
            draw_noise(),
            condition,
            task.model.null_condition(condition) if settings.guidance != 1 else None,
            objective=task.objective,
            sampler=settings.sampler,
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_channels=settings.guidance_channels,
            draw_noise=draw_noise,
        ):
            latents = step.latents
        assert self.vae is not None
        return self.vae.decode(latents)[0]


def _shared(
    task: DenoiserTask, title: str, items: list[int], function: Callable[[int], T]
) -> Generator[Event, None, list[T]]:
    """Apply a function to items that the groups of processes share; a round of them is a step of the progress."""
    found: list[T] = []
    for start in range(0, len(items), task.mesh.data.size):
        yield Working(title, start, len(items))
        found += spread(task.mesh.data, items[start : start + task.mesh.data.size], function)
    return found


def prepare_validation(
    config: Config, run: Path, corpus: Corpus, reader: ClipReader, parts: Parts
) -> Generator[Event, None, Validation | None]:
    """Read and encode what is looked at on the way; None where nothing is to be."""
    settings, video = config.validation, config.video
    if not (settings.every or settings.sample_every):
        return None
    encoders = parts.encoders()
    clips: list[Fixed] = []
    captions: list[str] = []
    own = replace(reader, manifest=corpus.validation, flip="never")
    chosen = [(number, index) for number, indices in enumerate(corpus.held_out) for index in indices]
    for place, (number, index) in enumerate(chosen):
        yield Working("encoding the validation clips", place, len(chosen))
        clip, bucket = corpus.validation[index], corpus.buckets[number]
        captions.append(clip.caption or "")
        if settings.every:
            pixels = own.read(clip, bucket, own.choose(clip, bucket, 0, index))
            batch = ClipBatch(bucket, (clip.id,), (clip.caption or "",), pixels=pixels[None])
            generator = torch.Generator(parts.device).manual_seed(step_seed(config.train.seed + 1, place))
            latents, condition = encoders.encode(batch, generator)
            noise = torch.randn(latents.shape, generator=generator, device=parts.device)
            clips.append(Fixed(latents.cpu(), noise.cpu(), condition.to("cpu")))
    if settings.every and not clips:
        yield Notice("there are too few clips to hold one out, so nothing is validated; --set validation.data=MANIFEST")
    prompts = prompts_of(settings.prompts) or [text for text in dict.fromkeys(captions) if text][:MOST_PROMPTS]
    if settings.sample_every and not prompts:
        yield Notice("there is no prompt to sample; --set validation.prompts='first|second', or a file of them")
    conditions = [encoders.conditions([prompt], video.height, video.width).to("cpu") for prompt in prompts]
    shape = parts.vae.latent_shape(video.num_frames, video.height, video.width)
    shown = list(zip(prompts, conditions, strict=True))
    return Validation(config, run, clips=clips, prompts=shown, vae=parts.vae, shape=shape)


def prompts_of(text: str) -> list[str]:
    """The prompts of `validation.prompts`: a file with one a line, or words parted by `|`.

    Raises:
        InputError: the file is not text.
    """
    try:
        if text and Path(text).is_file():
            text = Path(text).read_text(encoding="utf-8").replace("\n", "|")
    except UnicodeDecodeError as error:
        raise InputError(f"{text} is not UTF-8: {error.reason} at byte {error.start}", "prompts are text") from None
    except (OSError, ValueError):
        pass  # prompts, and no name that a file can have
    return [prompt.strip() for prompt in text.split("|") if prompt.strip()]
