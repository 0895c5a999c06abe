"""From data to weights: `train` yields events, `examine` says what it would do, `export` makes a model of a run."""

from opensora_core.training.events import (
    CheckpointSaved,
    Event,
    Fabric,
    Notice,
    Rejected,
    Resumed,
    Sampled,
    Stage,
    TrainProgress,
    Validated,
    Working,
)
from opensora_core.training.export import check_export, export
from opensora_core.training.preflight import Checkup, examine
from opensora_core.training.recipe import Chapter, read_recipe, train_recipe
from opensora_core.training.run import fill_cache, train

__all__ = [
    "Chapter",
    "CheckpointSaved",
    "Checkup",
    "Event",
    "Fabric",
    "Notice",
    "Rejected",
    "Resumed",
    "Sampled",
    "Stage",
    "TrainProgress",
    "Validated",
    "Working",
    "check_export",
    "examine",
    "export",
    "fill_cache",
    "read_recipe",
    "train",
    "train_recipe",
]
