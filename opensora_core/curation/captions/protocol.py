"""What a captioner is: something that is shown frames of clips and says what they show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from opensora_core.media.pixels import Frames

if TYPE_CHECKING:
    from opensora_core.data.manifest import Clip  # torch comes with it, which who decodes does without


@dataclass(frozen=True)
class Shown:
    """A clip as a captioner sees it.

    Attributes:
        index: its row in the manifest.
        clip: the row.
        frames: each (H, W, 3) uint8 RGB, in the order of time; none for captioners that look at nothing.
        camera: how the camera moves, as a sentence; empty where that is unknown or was not asked for.
    """

    index: int
    clip: Clip
    frames: Sequence[Frames] = ()
    camera: str = ""


@dataclass(frozen=True)
class Words:
    """What a captioner says of a clip.

    Attributes:
        text: the caption; empty where there is none.
        reason: why there is none.
        failed: the captioner is to blame and not the clip, so that trying again may help.
        tokens_in: that it read, where it counts them.
        tokens_out: that it wrote.
    """

    text: str
    reason: str = ""
    failed: bool = False
    tokens_in: int = 0
    tokens_out: int = 0


class Captioner(Protocol):
    """Describes clips. Making one checks all that can be checked at once; `fetch` and `load` do what takes time.

    Attributes:
        about: what it is, in words.
        at: shares 0..1 of a clip's length, whose frames are shown; empty where it looks at nothing.
        batch_size: clips that it describes together.
        lanes: batches that it can have in work at the same time.
        is_local: it computes on this machine, in as many processes as there are devices for.
        facts: name -> value of all that its captions depend on.
    """

    @property
    def about(self) -> str: ...  # noqa: D102
    @property
    def at(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def lanes(self) -> int: ...  # noqa: D102
    @property
    def is_local(self) -> bool: ...  # noqa: D102
    @property
    def facts(self) -> dict[str, str]: ...  # noqa: D102

    def fetch(self, is_offline: bool) -> Iterator[tuple[str, int, int]]:
        """Get what is not on this machine yet. What the captioner says of itself may change by it.

        Yields:
            What is fetched, bytes that are here, and bytes in all; 0 and 0 where that is unknown.

        Raises:
            WeightsError: it cannot be had.
        """
        ...

    def load(self, device: str) -> None:
        """Get ready, on a device such as `cuda:1`. Called once, in the process that describes.

        Raises:
            OsoraError: it cannot be had.
        """
        ...

    def prepare(self, clips: Sequence[Shown]) -> Any:
        """Make of clips what `describe` takes. Called on another thread, while the batch before is described."""
        ...

    def describe(self, prepared: Any, should_stop: Callable[[], bool]) -> list[Words]:
        """Describe the clips of a batch, in their order.

        Args:
            prepared: what `prepare` returned.
            should_stop: asked now and then; once it is true, whatever is returned is not used.

        Raises:
            OsoraError: nothing more can be described, whatever the clip.
        """
        ...
