"""Train the captioner that ships on the procedural world, and measure it.

    python -m opensora_core.curation.captions.world OUT --steps 2500
    python -m opensora_core.curation.captions.world OUT --measure
    python -m opensora_core.curation.captions.world OUT --videos samples/

Three stages share the steps. *Eyes*: the vision tower alone, under heads that read every attribute off its summary of
each frame and are thrown away; such a step costs half of one of the whole model, and says more about what there is to
see. *Words*: projector and language model on what the tower, now frozen, sees. *Both*: everything, gently.

Every batch is rendered where it is needed, as a function of (seed, step), and roughened the way codecs and generators
do it. Half of the scenes have one of the pairs that the generator's training leaves out: this model is asked what a
clip shows, and must not guess from what goes with what.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora_core import world
from opensora_core.curation.captions.tiny import (
    AT,
    END,
    IMAGE,
    PIXEL_MEAN,
    PIXEL_STD,
    PROMPT,
    WIDTH,
    Frames,
    build,
    describe,
    load,
    save,
)
from opensora_core.errors import InputError, OsoraError
from opensora_core.media import read_video, write_video

FRAMES = tuple(round(at * (world.NUM_FRAMES - 1)) for at in AT)
STAGES = {"eyes": 0.6, "words": 0.32, "both": 0.08}
"""What is trained, with its share of the steps."""

_PEAK = {"eyes": 1.0, "words": 1.0, "both": 0.4}


@dataclass(frozen=True)
class Trained:
    """Where a training is: over the last steps, the loss, and the share of attributes read right.

    While words are trained these are read off captions led word by word, which flatters; `everything`, the share of
    captions without a wrong word, is what greedy decoding would get right.
    """

    step: int
    stage: str
    loss: float
    right: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """The share of clips of a split whose caption says an attribute right."""

    split: str
    attribute: str
    share: float
    num_clips: int


class _Heads(nn.Module):
    """What a vision tower must say, and is thrown away: the attributes from each frame, the motion from all of them.

    They are read both off the class token, which the language model is to find things in, and off the mean of the
    patches, which teaches the tower sooner.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        names = [name for name in world.ATTRIBUTES if name != "motion"]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.plain = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, len(world.ATTRIBUTES[name])) for name in names}) for _ in range(2)
        )
        self.motion = nn.ModuleList(
            nn.Sequential(
                nn.Linear(len(FRAMES) * width, width), nn.GELU(), nn.Linear(width, len(world.ATTRIBUTES["motion"]))
            )
            for _ in range(2)
        )

    def forward(self, hidden: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Hidden states (B, T, 1 + S, D) and classes (B,) -> the loss, and the share right by the class token."""
        loss = hidden.new_zeros(())
        right: dict[str, float] = {}
        for part, summary in ((1, hidden[:, :, 1:].mean(2)), (0, hidden[:, :, 0])):
            vectors = self.norms[part](summary)
            for name, classes in labels.items():
                if name == "motion":
                    logits, target = self.motion[part](vectors.flatten(1)), classes
                else:
                    logits = self.plain[part][name](vectors).flatten(0, 1)  # type: ignore[index]
                    target = classes.repeat_interleave(len(FRAMES))
                loss = loss + F.cross_entropy(logits, target)
                right[name] = (logits.argmax(1) == target).float().mean().item()
        return loss, right


# what it sees ---------------------------------------------------------------------------------------------------------


class _Batches(torch.utils.data.Dataset[tuple[Tensor, dict[str, Tensor], list[str]]]):
    """Batch number N: pixels (B, T, 3, H, W) as the processor makes them, classes (B,) by attribute, captions."""

    def __init__(self, seed: int, steps: int, batch_size: int) -> None:
        self.seed, self.steps, self.batch_size = seed, steps, batch_size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, dict[str, Tensor], list[str]]:
        if step >= self.steps:
            raise IndexError(step)
        rng = np.random.default_rng([self.seed, step])
        scenes = [world.draw_scene(rng, "held-out" if index % 2 else "seen") for index in range(self.batch_size)]
        clips = []
        for scene in scenes:
            # one frame off the mark now and then: readers round differently, and clips have other lengths
            chosen = np.clip(np.array(FRAMES) + rng.integers(-1, 2, len(FRAMES)), 0, world.NUM_FRAMES - 1)
            clips.append(world.render(scene, rng)[chosen])
        pixels = torch.from_numpy(np.stack(clips)).movedim(-1, 2).float()
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        labels = {
            name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
            for name, values in world.ATTRIBUTES.items()
        }
        captions = [world.canonical_caption(scene) for scene in scenes]
        return _roughened(pixels, generator).div_(255).sub_(PIXEL_MEAN).div_(PIXEL_STD), labels, captions


def _roughened(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """What codecs and generators do to pictures (B, T, 3, H, W) in 0..255: coarse chroma, blur, tints, noise."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(len(pixels), *shape, 1, 1, generator=generator)

    flat = pixels.flatten(0, 1)
    luma = (flat * torch.tensor([0.21, 0.72, 0.07]).view(3, 1, 1)).sum(1, keepdim=True)
    chroma = F.interpolate(F.avg_pool2d(flat - luma, 2), scale_factor=2, mode="bilinear", align_corners=False)
    coarse = (luma + chroma).view_as(pixels)
    soft = F.avg_pool2d(flat, 3, 1, 1, count_include_pad=False).view_as(pixels)
    pixels = torch.where(draw(1, 1) < 0.7, coarse, pixels)
    pixels = torch.lerp(pixels, soft, (draw(1, 1) - 0.5).clamp(min=0))
    pixels = pixels * (1 + 0.16 * (draw(1, 3) - 0.5)) + 16 * (draw(1, 3) - 0.5)
    noise = torch.randn(pixels.shape, generator=generator)
    return (pixels + 6 * draw(1, 1) ** 2 * noise).clamp_(0, 255)


# training -------------------------------------------------------------------------------------------------------------


def train(
    folder: Path,
    *,
    steps: int,
    batch_size: int = 24,
    seed: int = 0,
    stages: Collection[str] = STAGES,
    start: Path | None = None,
    workers: int = 1,
    report_every: int = 50,
) -> Iterator[Trained]:
    """Train the captioner from nothing, and leave it in a folder.

    Args:
        folder: gets the model, its processor and `osora.json`; replaced at the end of each stage.
        steps: of all stages together.
        batch_size: clips per step.
        seed: of weights, clips and orders.
        stages: which, of `STAGES`.
        start: a captioner to go on from.
        workers: processes that render.
        report_every: steps between reports.

    Yields:
        A report every so many steps and at the end of a stage.

    Raises:
        InputError: `start` is no captioner.
        ResourceError: the folder cannot be written.
    """
    torch.manual_seed(seed)
    model, processor = build()
    if start is not None:
        model.load_state_dict(load(start)[0].state_dict())
    model.train()
    shares = {stage: STAGES[stage] for stage in STAGES if stage in stages}
    heads = _Heads(WIDTH)
    loader = torch.utils.data.DataLoader(
        _Batches(seed, steps, batch_size), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    batches = iter(loader)
    step = 0
    for stage, share in shares.items():
        last = steps if stage == list(shares)[-1] else step + round(steps * share / sum(shares.values()))
        fitting = _Fitting(model, heads, processor.tokenizer, stage, last - step)
        recent: list[tuple[float, dict[str, float]]] = []
        while step < last:
            recent.append(fitting.step(*next(batches)))
            step += 1
            if step % report_every == 0 or step == last:
                names = recent[0][1]
                yield Trained(
                    step,
                    stage,
                    float(np.mean([loss for loss, _ in recent])),
                    {name: float(np.mean([right[name] for _, right in recent])) for name in names},
                )
                recent = []
        save(model, processor, folder)


class _Fitting:
    """One stage of the training: which parameters move, how fast, and towards what."""

    def __init__(self, model: Any, heads: _Heads, tokenizer: Any, stage: str, steps: int) -> None:
        self.model, self.heads, self.tokenizer, self.stage, self.steps = model, heads, tokenizer, stage, steps
        self.done = 0
        model.requires_grad_(True)
        if stage == "eyes":
            model.requires_grad_(False)
            model.model.vision_tower.requires_grad_(True)
        elif stage == "words":
            model.model.vision_tower.requires_grad_(False)
        moving = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [parameter for name, parameter in moving if parameter.ndim == 2 and ".layers." in name]
        taken = {id(parameter) for parameter in matrices}
        others = [parameter for _, parameter in moving if id(parameter) not in taken]
        if stage == "eyes":
            others += heads.parameters()
        peak = _PEAK[stage]
        self.optimizers: list[torch.optim.Optimizer] = [
            _Muon(matrices, lr=0.02 * peak),
            torch.optim.AdamW(others, lr=2e-3 * peak, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        self.peaks = [0.02 * peak, 2e-3 * peak]

    def step(
        self, pixels: Tensor, labels: dict[str, Tensor], captions: Sequence[str]
    ) -> tuple[float, dict[str, float]]:
        """Learn from a batch; the loss, and the shares that were right before it did."""
        warm_up = max(1, min(50, self.steps // 4))
        factor = min((self.done + 1) / warm_up, (self.steps - self.done) / max(1, self.steps - warm_up), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        if self.stage == "eyes":
            hidden = self.model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-1]
            loss, right = self.heads(hidden.unflatten(0, pixels.shape[:2]), labels)
        else:
            loss, right = self._told(pixels, captions)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        return loss.item(), right

    def _told(self, pixels: Tensor, captions: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
        """Cross entropy of the captions after frames and prompt, per attribute, and what would be read right of it."""
        rng = np.random.default_rng([self.done])
        prompt = _question(rng) if rng.random() < 0.5 else (IMAGE * len(FRAMES) + PROMPT)
        patches = self.model.config.image_seq_length
        before = self.tokenizer(prompt.replace(IMAGE, IMAGE * patches), add_special_tokens=False).input_ids
        after = self.tokenizer(
            [f"{caption}{END}" for caption in captions], padding=True, padding_side="right", return_tensors="pt"
        ).input_ids
        asked = torch.tensor(before).expand(len(captions), -1)
        logits = self.model(
            input_ids=torch.cat([asked, after[:, :-1]], dim=1),
            pixel_values=pixels.flatten(0, 1),
            logits_to_keep=after.shape[1],
            use_cache=False,
        ).logits
        counts = after != self.tokenizer.pad_token_id
        loss = F.cross_entropy(logits[counts], after[counts], reduction="sum")
        # greedy decoding takes these words up to the first that is wrong
        said = self.tokenizer.batch_decode(logits.argmax(-1).where(counts, self.tokenizer.pad_token_id))
        is_whole = ((logits.argmax(-1) == after) | ~counts).all(1).float().mean().item()
        read = [(world.parse(caption), world.parse(guess)) for caption, guess in zip(captions, said, strict=True)]
        right = {name: float(np.mean([meant[name] == told.get(name) for meant, told in read])) for name in read[0][0]}
        right["everything"] = is_whole
        return loss / len(captions) / len(world.ATTRIBUTES), right


def _question(rng: np.random.Generator) -> str:
    """Frames with words around them that the model does not know, as templates and prompts of others have them."""
    before, between, after = (" ?" * int(rng.integers(limit)) for limit in (4, 2, 12))
    return f"{before} {(IMAGE + between) * len(FRAMES)}{after} {PROMPT if rng.random() < 0.5 else '?'}"


class _Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) in fp32, all matrices of one shape at once.

    This model has dozens of matrices, each so small that the calls cost more than the arithmetic.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.momenta: dict[torch.Size, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every matrix against its orthogonalised momentum."""
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in self.param_groups[0]["params"]:
            shapes.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in shapes.items():
            gradient = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
            momentum = self.momenta.setdefault(shape, torch.zeros_like(gradient)).lerp_(gradient, 0.05)
            update = gradient.lerp(momentum, 0.95)
            is_tall = shape[0] > shape[1]
            update = update.mT if is_tall else update
            update = update / update.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):
                gram = update @ update.mT
                update = 3.4445 * update + (-4.775 * gram + 2.0315 * gram @ gram) @ update
            update = update.mT if is_tall else update
            scale = self.param_groups[0]["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
            for parameter, change in zip(parameters, update, strict=True):
                parameter.sub_(change, alpha=scale)


# measuring ------------------------------------------------------------------------------------------------------------


def measure(folder: Path, *, clips: int = 240, seed: int = 10**6, batch_size: int = 24) -> Iterator[Measured]:
    """Caption freshly drawn clips of both splits, written as files and read back, and compare with what they show.

    Args:
        folder: has the captioner.
        clips: how many of each split.
        seed: of the clips; training draws from other ones.
        batch_size: clips at a time.

    Raises:
        InputError: no captioner there.
    """
    model, processor = load(folder)
    for number, split in enumerate(("seen", "held-out")):
        rng = np.random.default_rng([seed, number])
        scenes = [world.draw_scene(rng, split) for _ in range(clips)]  # type: ignore[arg-type]
        told: list[str] = []
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "clip.mp4"
            for first in range(0, clips, batch_size):
                batch = []
                for scene in scenes[first : first + batch_size]:
                    write_video(path, world.render(scene, rng), world.FPS)
                    batch.append(read_video(path).frames)
                told += describe(model, processor, batch)
        yield from score(split, scenes, told)


def compare(folder: Path, videos: Path, *, batch_size: int = 24) -> Iterator[Measured]:
    """Caption videos of the world whose scenes nobody knows, such as samples, and compare with the world's verifier.

    Args:
        folder: has the captioner.
        videos: has .mp4 files of the world's size; those in which the verifier finds no object are left out.
        batch_size: clips at a time.

    Raises:
        InputError: no captioner or no such video there, or one that cannot be read.
    """
    model, processor = load(folder)
    scenes: list[world.Scene] = []
    told: list[str] = []
    clips: list[Frames] = []
    for path in sorted(videos.glob("*.mp4")):
        clip = read_video(path).frames
        if clip.shape[1:3] == (world.SIZE, world.SIZE) and len(seen := world.verify(clip)) == len(world.ATTRIBUTES):
            scenes.append(world.Scene(**seen))  # type: ignore[arg-type]
            clips.append(clip)
    if not clips:
        raise InputError(f"{videos} has no .mp4 of the world", f"osora sample --prompt 'a red ball' --output {videos}")
    for first in range(0, len(clips), batch_size):
        told += describe(model, processor, clips[first : first + batch_size])
    yield from score("videos", scenes, told)


def score(split: str, scenes: Sequence[world.Scene], told: Sequence[str]) -> Iterator[Measured]:
    """The share of captions that say each attribute right, and that say everything right."""
    right = [
        {name: world.parse(caption).get(name) == value for name, value in asdict(scene).items()}
        for scene, caption in zip(scenes, told, strict=True)
    ]
    for name in world.ATTRIBUTES:
        yield Measured(split, name, float(np.mean([clip[name] for clip in right])), len(right))
    yield Measured(split, "everything", float(np.mean([all(clip.values()) for clip in right])), len(right))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or measure from the command line, with one JSON object per line about it."""
    parser = argparse.ArgumentParser(prog="python -m opensora_core.curation.captions.world", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the captioner is, or is to be")
    parser.add_argument("--steps", type=int, default=2500, help="of training, all stages together")
    parser.add_argument("--batch-size", type=int, default=24, help="clips per step")
    parser.add_argument("--seed", type=int, default=0, help="of weights and clips")
    parser.add_argument("--start", type=Path, help="a captioner to go on from, instead of random weights")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="which to go through")
    parser.add_argument("--measure", action="store_true", help="measure what is there instead of training")
    parser.add_argument("--clips", type=int, default=240, help="of each split, to measure with")
    parser.add_argument("--videos", type=Path, help="a folder of samples to caption and compare with the verifier")
    chosen = parser.parse_args(arguments)
    events: Iterator[Trained | Measured]
    if chosen.videos:
        events = compare(chosen.folder, chosen.videos)
    elif chosen.measure:
        events = measure(chosen.folder, clips=chosen.clips)
    else:
        events = train(
            chosen.folder,
            steps=chosen.steps,
            batch_size=chosen.batch_size,
            seed=chosen.seed,
            stages=chosen.stages,
            start=chosen.start,
        )
    try:
        for event in events:
            sys.stdout.write(json.dumps(asdict(event)) + "\n")
            sys.stdout.flush()
    except OsoraError as error:
        parser.exit(error.exit_code, f"error: {error.message}\n{error.hint}\n")


if __name__ == "__main__":
    main()
