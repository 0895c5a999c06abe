"""The run: the text encoder reads all prompts and is freed, the denoiser draws, the VAE turns latents into pixels."""

from __future__ import annotations

import gc
import json
import queue
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from opensora_core import __version__, components, diffusion
from opensora_core.assets import Kind
from opensora_core.config import Config
from opensora_core.errors import OsoraError, ResourceError
from opensora_core.files import append_line, readable
from opensora_core.media import to_uint8, write_contact_sheet, write_gallery, write_video
from opensora_core.media.gallery import Exhibit
from opensora_core.media.pixels import Frames
from opensora_core.models import LatentTransformer
from opensora_core.sampling.events import Done, Event, Gallery, Loading, Notice, Progress, Saved, Sheet
from opensora_core.sampling.planning import Plan, Request, shortened
from opensora_core.sampling.steady import NoiseSource, SteadyDenoiser, steady_layers
from opensora_core.tensors import Condition
from opensora_core.vae import VideoVAE

T = TypeVar("T")

RECORDS = "samples.jsonl"
_PARTS: dict[Kind, str] = {"text": "text encoder", "vae": "VAE", "model": "model"}


def sample(config: Config, plan: Plan, *, sheet: bool = False) -> Iterator[Event]:
    """Draw the samples of a plan and write them; each file is whole or absent.

    Args:
        config: the settings that the plan was made of.
        plan: what to draw, and where to put it.
        sheet: also write a contact sheet.

    Raises:
        WeightsError, CheckpointError: weights that are missing, torn or of another model.
        InputError: a class that the model does not know, or a size that it cannot make.
        ResourceError: out of memory (with flags that help), out of disk space, no permission.
    """
    start = time.monotonic()
    for notice in plan.notices:
        yield Notice(notice)
    with _advice(config):
        yield from _draw(config, plan, sheet)
    yield Done(len(plan.requests), time.monotonic() - start)


def _draw(config: Config, plan: Plan, sheet: bool) -> Iterator[Event]:
    device = components.resolve_device(config.runtime.device)
    components.tune_allocator(device)
    for part in plan.weights:
        if part.path is None:
            yield from _download(config, part.kind)

    captions = yield from _read_prompts(config, plan)

    yield Loading(_PARTS["vae"])
    vae = components.build_vae(config)
    shape = vae.latent_shape(config.video.num_frames, config.video.height, config.video.width)
    writer = _Writer(config, keep_frames=sheet)
    batches = _batches(plan.requests, config.sampling.batch_size)
    if config.runtime.offload:  # one part at a time in memory, from the first to the last
        del vae
        _free()
        drawer = yield from _load_drawer(config, captions, shape, device)
        drawn: list[tuple[Request, Tensor]] = []
        for batch in batches:
            latents = yield from drawer.draw(batch)
            drawn += zip(batch, latents.cpu(), strict=True)
        del drawer
        _free()
        yield Loading(_PARTS["vae"])
        yield from writer.write(components.build_vae(config), drawn)
    else:
        drawer = yield from _load_drawer(config, captions, shape, device)
        for batch in batches:
            latents = yield from drawer.draw(batch)
            yield from writer.write(vae, list(zip(batch, latents, strict=True)))
    yield from writer.finish(plan, sheet)


# loading --------------------------------------------------------------------------------------------------------------


def _download(config: Config, kind: Kind) -> Iterator[Event]:
    """Download a part in a thread of its own, and tell how far it is."""
    news: queue.Queue[tuple[int, int] | None] = queue.Queue()
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            components.locate(config, kind, lambda done, total: news.put((done, total)))
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)
        news.put(None)

    name = components.word_of(config, kind)
    yield Loading(_PARTS[kind], name)
    threading.Thread(target=work, daemon=True).start()
    told = 0.0
    while (item := news.get()) is not None:
        if time.monotonic() - told > 0.5:
            told, (done, total) = time.monotonic(), item
            yield Loading(_PARTS[kind], f"{name}, {readable(done)}" + (f" of {readable(total)}" if total else ""))
    if outcome[0] is not None:
        raise outcome[0]


def _free() -> None:
    """Give memory back that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# prompts --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Captions:
    """What the text encoder made of each prompt, on the CPU; `empty` is (L, E), of the empty caption."""

    of: Mapping[str, Condition]
    empty: Tensor | None


def _read_prompts(config: Config, plan: Plan) -> Generator[Event, None, _Captions]:
    """Encode every prompt by itself, so that none depends on the others; the encoder is gone when this returns."""
    yield Loading(_PARTS["text"])
    encoder = components.build_text_encoder(config)
    prompts = list(dict.fromkeys(request.prompt for request in plan.requests))
    for prompt in prompts:
        if (count := encoder.count_tokens(prompt)) > encoder.max_length:
            yield Notice(
                f"the prompt has {count} tokens, of which the model reads the first {encoder.max_length}: "
                f"'{shortened(prompt)}'"
            )
    with torch.no_grad():
        of = {prompt: encoder.encode([prompt]).to("cpu") for prompt in prompts}
        empty = None if config.text.kind == "class" else encoder.encode([""]).to("cpu").tokens[0]
    del encoder
    _free()
    return _Captions(of, empty)


# drawing --------------------------------------------------------------------------------------------------------------


def _batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def _load_drawer(
    config: Config, captions: _Captions, shape: tuple[int, int, int, int], device: torch.device
) -> Generator[Event, None, _Drawer]:
    yield Loading(_PARTS["model"])
    notes: list[str] = []
    model = components.build_model(config, captions.empty, notes.append)
    for note in notes:
        yield Notice(note)
    model.x_embedder.grid(torch.empty(1, *shape, device="meta"))  # raises where the size does not divide
    if config.runtime.compile:
        model.compile()
    if config.sampling.batch_invariant:
        steady_layers(model)
    return _Drawer(config, model, captions, shape, device)


class _Drawer:
    """Draws latents, batch by batch."""

    def __init__(
        self,
        config: Config,
        model: LatentTransformer,
        captions: _Captions,
        shape: tuple[int, int, int, int],
        device: torch.device,
    ) -> None:
        self.config, self.model, self.captions, self.shape, self.device = config, model, captions, shape, device
        self.steady = SteadyDenoiser(model) if config.sampling.batch_invariant else None
        self.objective = components.build_objective(config)

    def draw(self, batch: Sequence[Request]) -> Generator[Event, None, Tensor]:
        """Draw the latents (B, C, T, h, w) of a batch."""
        settings = self.config.sampling
        condition = self.condition(batch)
        draw_noise = NoiseSource([(request.prompt, request.seed) for request in batch], self.shape, self.device)
        steps = diffusion.sample(
            self.model if self.steady is None else self.steady.of(len(batch)),
            draw_noise(),
            condition,
            self.model.null_condition(condition) if settings.guidance != 1 else None,
            objective=self.objective,
            sampler=settings.sampler,
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_channels=settings.guidance_channels,
            draw_noise=draw_noise,
        )
        title = batch[0].prompt if len(batch) == 1 else f"{batch[0].prompt} (and {len(batch) - 1} more)"
        begin = time.monotonic()
        yield Progress(title, 0, settings.steps, None)
        latents = torch.empty(0)
        for step in _without_gradients(steps):
            latents, done = step.latents, step.index + 1
            yield Progress(title, done, step.total, (time.monotonic() - begin) / done * (step.total - done))
        if not latents.isfinite().all():
            raise OsoraError(
                "the model's numbers grew beyond what the dtype holds, so there is nothing to show",
                "--dtype fp32, or bf16; or a lower --guidance",
            )
        return latents

    def condition(self, batch: Sequence[Request]) -> Condition:
        """The captions of a batch, on the device."""
        condition = Condition.cat([self.captions.of[request.prompt] for request in batch])
        if self.config.model.family == "pixart-ms":  # it is told the size in pixels
            size = torch.tensor([[self.config.video.height, self.config.video.width]], dtype=torch.float32)
            condition = replace(condition, size=size.repeat(len(batch), 1))
        return condition.to(self.device, components.resolve_dtype(self.config.runtime.dtype, self.device))


def _without_gradients(steps: Iterator[T]) -> Iterator[T]:
    """Compute each step without gradients, and leave the mode as it was while the caller has the word."""
    while True:
        with torch.no_grad():
            step = next(steps, None)
        if step is None:
            return
        yield step


# writing --------------------------------------------------------------------------------------------------------------


class _Writer:
    """Decodes latents and writes files, with what is known of each in the file and in `samples.jsonl`."""

    def __init__(self, config: Config, *, keep_frames: bool) -> None:
        self.config = config
        self.keep_frames = keep_frames
        self.shown: list[tuple[str, Frames]] = []
        self.last = time.monotonic()

    def write(self, vae: VideoVAE, drawn: Sequence[tuple[Request, Tensor]]) -> Iterator[Event]:
        """Decode and write samples, one at a time."""
        device = components.resolve_device(self.config.runtime.device)
        dtype = components.vae_dtype(self.config, device)
        share = (time.monotonic() - self.last) / len(drawn)
        for request, latents in drawn:
            begin = time.monotonic()
            with torch.no_grad():
                frames = to_uint8(vae.decode(latents[None].to(device, dtype))[0])
            facts = self.facts(request, frames)
            write_video(
                request.path, frames, self.config.video.fps, {name: str(value) for name, value in facts.items()}
            )
            seconds = share + time.monotonic() - begin
            record = {"file": request.path.name, **facts, "seconds": round(seconds, 3)}
            append_line(request.path.parent / RECORDS, json.dumps(record, ensure_ascii=False))
            if self.keep_frames:
                self.shown.append((f"{request.prompt}  ·  seed {request.seed}", frames))
            yield Saved(request.path, request.prompt, request.seed, seconds)
        self.last = time.monotonic()

    def facts(self, request: Request, frames: Frames) -> dict[str, Any]:
        """What made a sample; the same for the same command, so no times and no machine."""
        config = self.config
        lora = {"lora": config.model.lora, "lora_scale": config.model.lora_scale} if config.model.lora else {}
        return {
            "prompt": request.prompt,
            "model": config.model.weights,
            **lora,
            "seed": request.seed,
            "steps": config.sampling.steps,
            "sampler": config.sampling.sampler,
            "guidance": config.sampling.guidance,
            "size": f"{frames.shape[1]}x{frames.shape[2]}",
            "frames": len(frames),
            "fps": config.video.fps,
            "version": __version__,
        }

    def finish(self, plan: Plan, sheet: bool) -> Iterator[Event]:
        """Write what shows all samples together."""
        if sheet:
            write_contact_sheet(self.shown, plan.sheet)
            yield Sheet(plan.sheet)
        if plan.gallery is not None:
            if write_gallery(plan.gallery, _exhibits(plan)):
                yield Gallery(plan.gallery)
            else:
                yield Notice(f"{plan.gallery} is not a gallery of ours, so it is left as it is")


def _exhibits(plan: Plan) -> list[Exhibit]:
    """Everything in the folder that the records know, with what is known last; this run's samples first."""
    folder = plan.requests[0].path.parent
    known: dict[str, dict[str, Any]] = {}
    for line in (folder / RECORDS).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            known[str(record["file"])] = record
        except (ValueError, KeyError, TypeError):
            continue  # a line that somebody edited; its file is just not shown
    ours = [request.path.name for request in plan.requests]
    exhibits = []
    for name in dict.fromkeys([*ours, *known]):
        path = folder / name
        if name in known and path.parent == folder and path.is_file():
            facts = {fact: str(value) for fact, value in known[name].items() if fact not in ("file", "prompt")}
            exhibits.append(Exhibit(path, str(known[name].get("prompt", "")), facts))
    return exhibits


# what can go wrong ----------------------------------------------------------------------------------------------------


@contextmanager
def _advice(config: Config) -> Iterator[None]:
    """Turn running out of memory into an error that says which flags would help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own OutOfMemoryError is a RuntimeError
        if not components.is_out_of_memory(error):
            raise
        video = config.video
        advice = [
            (config.sampling.batch_size > 1, "--batch-size 1"),
            (not config.runtime.offload, "--offload"),
            (config.runtime.dtype in ("auto", "fp32"), "--dtype bf16"),
            (config.vae.micro_batch > 1, "--set vae.micro_batch=1"),
            (video.num_frames > 1, f"--frames {max(video.num_frames // 2, 1)}"),
            (True, f"--size {video.height // 2}x{video.width // 2}"),
            (not config.vae.tiling, "--set vae.tiling=true"),
        ]
        flags = [flag for helps, flag in advice if helps]
        device = components.resolve_device(config.runtime.device)
        raise ResourceError(f"out of memory on {device}", "what makes it smaller: " + ", ".join(flags)) from error
