"""What a training run tells as it goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from opensora_core.notice import Notice
from opensora_core.parallel.fabric import Fabric

__all__ = [
    "CheckpointSaved",
    "Event",
    "Fabric",
    "Facts",
    "Notice",
    "Rejected",
    "Resumed",
    "Sampled",
    "Stage",
    "TrainProgress",
    "Validated",
    "Working",
]


@dataclass(frozen=True)
class Working:
    """Something that takes a while before the first step, or between two: clips counted, clips encoded."""

    task: str
    step: int
    total: int
    seconds_left: float | None = None


@dataclass(frozen=True)
class TrainProgress:
    """One row of the report.

    Attributes:
        part: what is trained.
        step: how many steps are done, of `total`.
        loss, lr, grad_norm, sample_ids: of this step.
        metrics: means since the last row.
        clips_per_second, tokens_per_second: since the last row.
        data_wait: share of the time since then that was spent waiting for data.
        mfu: share of the device's peak that the model's arithmetic reached; None where the peak is not known.
        peak_bytes: the most memory that the run has taken, on the GPU if there is one.
        seconds_left: until the last step.
    """

    part: str
    step: int
    total: int
    loss: float
    lr: float
    grad_norm: float
    sample_ids: tuple[str, ...]
    metrics: dict[str, float]
    clips_per_second: float
    tokens_per_second: float
    data_wait: float
    mfu: float | None
    peak_bytes: int
    seconds_left: float


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint that a run can resume from."""

    part: str
    step: int
    path: Path


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on; `damaged` tells of newer checkpoints that were not whole."""

    part: str
    step: int
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rejected:
    """A clip that cannot be read; the next one of the order took its place. `share` is of all clips, so far."""

    clip: str
    reason: str
    share: float


@dataclass(frozen=True)
class Validated:
    """Losses on fixed clips, noise and timesteps, of raw and averaged weights; per bin of timesteps, clean to noise."""

    step: int
    loss: float
    ema_loss: float
    bins: tuple[float, ...]
    ema_bins: tuple[float, ...]


@dataclass(frozen=True)
class Sampled:
    """What the averaged weights made of the validation prompts."""

    step: int
    paths: tuple[Path, ...]
    sheet: Path


@dataclass(frozen=True)
class Stage:
    """A stage of a recipe begins."""

    name: str
    number: int
    total: int
    folder: Path


@dataclass(frozen=True)
class Facts:
    """What the report says of a batch.

    Attributes:
        ids: of its samples, as they are called in the manifest.
        tokens: how many the model sees.
        flops: floating-point operations of the step, forward and backward; 0 where nobody counted.
    """

    ids: tuple[str, ...] = field(default=())
    tokens: int = 0
    flops: float = 0.0


Event = Notice | Working | TrainProgress | CheckpointSaved | Resumed | Rejected | Validated | Sampled | Stage | Fabric
