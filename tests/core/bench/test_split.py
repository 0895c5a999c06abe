import json
from pathlib import Path

import pytest

from opensora_core.bench.joined import Label
from opensora_core.bench.measurement import Measurement
from opensora_core.bench.split import Count, measure
from opensora_core.config import Config
from opensora_core.curation.boundaries import Boundary
from opensora_core.errors import InputError


def _boundary(frame: int, kind: str = "cut") -> Boundary:
    return Boundary(frame, frame / 25, kind, frame, frame, 1.0)  # type: ignore[arg-type]


def test_each_boundary_counts_for_one_label() -> None:
    labels = [
        Label("cut", 10, 10, 10),
        Label("cut", 12, 12, 12),
        Label("dissolve", 50, 45, 55),
        Label("flash", 80, 80, 82),
    ]
    count = Count()
    count.add([_boundary(11), _boundary(47), _boundary(83), _boundary(200, "wipe")], labels)
    assert (count.cuts, count.cuts_found, count.false, count.false_cuts) == (2, 1, 2, 1)
    assert (count.gradual["dissolve"], count.flashes_taken) == ([1, 1], 1)
    assert count.precision == 2 / 4
    assert count.f1 == 2 * 1 / (2 + 1 + 1)


@pytest.mark.slow
def test_the_drawn_set_is_measured() -> None:
    found = {(row.case, row.metric): row.value for row in measure(Config(), quick=True) if isinstance(row, Measurement)}
    assert found["auto", "F1 of hard cuts"] == 1
    assert found["auto", "flashes taken for boundaries"] == 0
    assert found["auto", "CPU time against content"] > 0
    spent = {how: found[f"cut {how}", "CPU time against detection alone"] for how in ("copy", "smart", "exact")}
    assert 1 < spent["copy"] < spent["smart"] < 1.2 * spent["exact"]
    assert found["cut exact", "frames copied"] == 0 < found["cut smart", "frames copied"] <= 1


def test_a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels\.json"):
        list(measure(Config(), source=tmp_path))
    (tmp_path / "labels.json").write_text(json.dumps({"v.mp4": []}))
    with pytest.raises(InputError, match=r"labels\.json"):
        list(measure(Config(), source=tmp_path))
