"""Training a denoiser on a manifest of clips: the encoders at every step, or the cache of what they made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from opensora_core.data.dataset import Batches, ClipBatch
from opensora_core.diffusion.objective import Objective
from opensora_core.errors import TrainingError
from opensora_core.files import append_line
from opensora_core.lora import lora_state, save_lora
from opensora_core.models import LatentTransformer
from opensora_core.parallel.agreement import gathered, largest
from opensora_core.parallel.shards import whole
from opensora_core.runs import LORA_FOLDER, REJECTS_FILE
from opensora_core.tensors import Condition
from opensora_core.training.checkpoint import Also
from opensora_core.training.denoiser import POSTERIOR, DenoiserTask, tokens_and_flops
from opensora_core.training.ema import EMA
from opensora_core.training.encoders import Encoders
from opensora_core.training.events import Event, Facts, Rejected
from opensora_core.training.task import noise_at
from opensora_core.training.validation import Validation


class Rejects:
    """Counts clips that could not be read, writes each down once, and says when there are too many.

    Args:
        run: the folder of the run; what an earlier start wrote there counts.
        num_clips: of the data set.
        limit: the share of them that may be broken.
        writes: False for one that counts with another process, which writes.
    """

    def __init__(self, run: Path, num_clips: int, limit: float, *, writes: bool = True) -> None:
        self.path, self.num_clips, self.limit, self.writes = run / REJECTS_FILE, num_clips, limit, writes
        self.known: dict[str, str] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if row.get("broken"):
                    self.known[row["clip"]] = row["reason"]

    def add(self, clip: str, reason: str, *, broken: bool = True) -> Iterator[Event]:
        """Write a clip down; one that is not broken but unsuitable does not count.

        Raises:
            TrainingError: more clips are broken than may be.
        """
        if clip in self.known:
            return
        if self.writes:
            append_line(self.path, json.dumps({"clip": clip, "reason": reason, "broken": broken}, ensure_ascii=False))
        if not broken:
            return
        self.known[clip] = reason
        share = len(self.known) / max(self.num_clips, 1)
        yield Rejected(clip, reason, share)
        if share > self.limit:
            raise TrainingError(
                f"{len(self.known)} of {self.num_clips} clips cannot be read, {share:.1%}, and the limit is "
                f"{self.limit:.1%}; the last one: {clip}: {reason}",
                f"see {self.path}; mend or remove them, or allow more: --max-rejects {min(2 * share, 1):.2g}",
            )


class ClipsTask(DenoiserTask):
    """A denoiser on batches of clips.

    Args:
        model: the denoiser in training.
        objective: what it learns.
        source: makes the batches.
        encoders: turn them into latents and conditions.
        rejects: keeps account of broken clips.
        validation: looks at the weights on the way.
        dtype: of the arithmetic.
        lora: rank and alpha of the adapter that is trained in place of the weights; None trains the weights.
    """

    stays = (*DenoiserTask.stays, "encoders", "rejects", "validation")

    def __init__(
        self,
        model: LatentTransformer,
        objective: Objective,
        *,
        source: Batches,
        encoders: Encoders,
        rejects: Rejects,
        validation: Validation | None,
        dtype: torch.dtype,
        lora: tuple[int, float] | None = None,
    ) -> None:
        super().__init__(model, objective, dtype)
        self.source, self.encoders, self.rejects = source, encoders, rejects
        self.validation, self.lora = validation, lora

    def batch(self, step: int) -> ClipBatch:
        """This process's clips of a step."""
        return self.source.batch(step, self.share)

    def encoded(self, batch: ClipBatch, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """Latents drawn from the posterior, and conditions."""
        mean, std = self.encoders.moments(batch)
        places = self.share.places(len(mean) * self.share.size)
        noise = noise_at(places, tuple(mean.shape[1:]), generator, POSTERIOR)
        return mean + std * noise, self.encoders.condition(batch)

    def received(self, batch: ClipBatch) -> Iterator[Event]:
        """Tell which clips could not be read by any process.

        Raises:
            TrainingError: too many, or all of a bucket.
        """
        told, hopeless = batch.rejects, batch.is_hopeless
        if self.mesh.data.size > 1:
            trouble = torch.tensor(len(told) + hopeless)
            if not int(largest(self.mesh.data, trouble)):
                return
            found = gathered(self.mesh.data, (told, hopeless))
            told, hopeless = tuple(reject for each, _ in found for reject in each), any(end for _, end in found)
        for reject in told:
            yield from self.rejects.add(reject.clip, reject.reason)
        if hopeless:
            raise TrainingError("not one clip of a bucket can be read any more", f"see {self.rejects.path}")

    def facts(self, batch: ClipBatch) -> Facts:
        """What the report says of a batch."""
        if batch.moments is not None:
            latent = tuple(batch.moments[0].shape[1:])
        else:
            assert self.encoders.vae is not None
            bucket = batch.bucket
            latent = self.encoders.vae.latent_shape(bucket.num_frames, bucket.height, bucket.width)
        tokens, flops = tokens_and_flops(self.model, latent)
        seen = len(batch.ids) * self.draws
        return Facts(batch.ids, seen * tokens, seen * flops)

    def after(self, step: int, ema: EMA) -> Iterator[Event]:
        """Validate and sample, when it is time."""
        if self.validation is not None:
            yield from self.validation.after(step, ema, self)

    def state(self) -> dict[str, Tensor]:
        """Everything, or the adapter alone."""
        return super().state() if self.lora is None else lora_state(self.model)

    def also_save(self, ema: EMA) -> Also | None:
        """Of an adapter its averaged values, in the layout that others load."""
        if self.lora is None:
            return None
        rank, alpha = self.lora
        average = {name: whole(tensor).cpu().clone() for name, tensor in ema.shadow.items()}
        return lambda folder: save_lora(folder / LORA_FOLDER, average, rank, alpha)
