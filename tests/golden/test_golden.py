"""Every golden case is dispatched on its `upstream` field to the handler of the room that re-implements it."""

from __future__ import annotations

from collections.abc import Callable

from tests.golden import data_cases, diffusion_cases, encoder_cases, model_cases, training_cases
from tests.golden.case import Case

HANDLERS: dict[str, Callable[[Case], None]] = {
    **model_cases.HANDLERS,
    **diffusion_cases.HANDLERS,
    **encoder_cases.HANDLERS,
    **data_cases.HANDLERS,
    **training_cases.HANDLERS,
}


def test_case(case: Case) -> None:
    upstream = case.config["upstream"]
    assert upstream in HANDLERS, f"no handler for '{upstream}' of {case.folder}"
    HANDLERS[upstream](case)
