"""Clips -> words: captioners, what is done to their captions, and the file that any number of runs complete.

`CAPTIONERS` is a table; a new captioner is a file and a line.
"""

from __future__ import annotations

from collections.abc import Callable

from opensora_core.config import Config
from opensora_core.curation.captions.beside import Labels, Sidecars
from opensora_core.curation.captions.events import (
    CaptionDone,
    CaptionPlan,
    CaptionProgress,
    CaptionRejected,
    Event,
)
from opensora_core.curation.captions.local import Bundled, Local
from opensora_core.curation.captions.protocol import Captioner, Shown, Words
from opensora_core.curation.captions.run import CaptionRequest, caption, examine
from opensora_core.curation.captions.server import Server

__all__ = [
    "CAPTIONERS",
    "CaptionDone",
    "CaptionPlan",
    "CaptionProgress",
    "CaptionRejected",
    "CaptionRequest",
    "Captioner",
    "Event",
    "Shown",
    "Words",
    "build_captioner",
    "caption",
    "examine",
]

CAPTIONERS: dict[str, Callable[[Config], Captioner]] = {
    "openai": Server,
    "tiny": Bundled,
    "labels": Labels,
    "sidecars": Sidecars,
    "local": Local,
}
"""Name -> what makes a captioner of the settings. `caption.model` is such a name, `openai:MODEL`, or for `local` a
folder or `hf:owner/repo`."""


def build_captioner(config: Config) -> Captioner:
    """The captioner that `caption.model` names; nothing is loaded yet.

    Raises:
        OsoraError: there is no such captioner, or it cannot do what the settings ask for.
    """
    name = config.caption.model.partition(":")[0]
    return CAPTIONERS[name if name in CAPTIONERS and name != "local" else "local"](config)
