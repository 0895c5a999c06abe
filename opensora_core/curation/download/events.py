"""What `osora download data` is asked, and what it tells as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opensora_core.net import DownloadProgress
from opensora_core.notice import Notice


@dataclass(frozen=True)
class DataRequest:
    """What to get, and where to.

    Attributes:
        source: a name of `SOURCES`, `hf:owner/dataset`, or the path of a list of links.
        output: the folder.
        inputs: more lists, or the archives of a source that is published as such: paths or links.
        metadata: of a source that is published as such.
        query: of a source that is searched.
        min_height: in pixels, of a source that offers several sizes; 0 takes the largest.
        limit: of items; None is all.
    """

    source: str
    output: Path
    inputs: tuple[str, ...] = ()
    metadata: Path | None = None
    query: str = ""
    min_height: int = 0
    limit: int | None = None


@dataclass(frozen=True)
class ItemFailed:
    """Something could not be had; the next run tries it again."""

    source: str
    reason: str


@dataclass(frozen=True)
class DataPlan:
    """What a run would do.

    Attributes:
        source: what is asked for.
        output: the folder.
        total: items that the source has; None where only the network knows.
        done: of them, here already.
        free_bytes: of the output's disk.
        doing: in words.
    """

    source: str
    output: Path
    total: int | None
    done: int
    free_bytes: int
    doing: str


@dataclass(frozen=True)
class DataDone:
    """What there is now.

    Attributes:
        output: the folder.
        manifest: of all that lies in it, of earlier runs too.
        num_new: items of this run.
        num_before: that were here already.
        num_duplicates: whose content was here already under another name.
        num_failed: that could not be had.
        num_bytes: of the new files.
        num_rows: of the manifest.
        seconds: of wall time.
    """

    output: Path
    manifest: Path
    num_new: int
    num_before: int
    num_duplicates: int
    num_failed: int
    num_bytes: int
    num_rows: int
    seconds: float


Event = Notice | DownloadProgress | ItemFailed | DataPlan | DataDone
