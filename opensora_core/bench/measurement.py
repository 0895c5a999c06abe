"""What every suite yields."""

from __future__ import annotations

from dataclasses import dataclass

from opensora_core.sampling import Notice, Progress


@dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        case: what was measured, such as a split of the prompts.
        metric: which property of it.
        value: the number, in `unit`; shares are in 0..1.
        count: how many observations it stands on.
    """

    case: str
    metric: str
    value: float
    unit: str
    count: int


Event = Measurement | Notice | Progress
