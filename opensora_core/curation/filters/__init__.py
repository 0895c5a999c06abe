"""Clips are measured, and those beyond a limit are left out of the manifest, each with a reason.

`FILTERS` says what there is; `score` measures a clip, `judge` holds scores against limits, `apply` does both for a
manifest and `explain` says why.
"""

from __future__ import annotations

from opensora_core.curation.filters.copies import Index
from opensora_core.curation.filters.explaining import explain, why
from opensora_core.curation.filters.look import Filter, Place
from opensora_core.curation.filters.report import write_report
from opensora_core.curation.filters.scoring import STATE, score
from opensora_core.curation.filters.sift import (
    REPORT_FILE,
    apply,
    examine,
    measure_first,
    saved_settings,
    sift,
    unfilter,
)
from opensora_core.curation.filters.table import FILTERS, Reason, Verdict, check, judge, limits_of

__all__ = [
    "FILTERS",
    "REPORT_FILE",
    "STATE",
    "Filter",
    "Index",
    "Place",
    "Reason",
    "Verdict",
    "apply",
    "check",
    "examine",
    "explain",
    "judge",
    "limits_of",
    "measure_first",
    "saved_settings",
    "score",
    "sift",
    "unfilter",
    "why",
    "write_report",
]
