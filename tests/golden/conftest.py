"""`pytest tests/golden --fixtures DIR` runs every case folder under DIR; the default is the copy beside this file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.case import Case

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fixtures", type=Path, default=HERE / "fixtures", help="a folder of golden case folders")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        root: Path = metafunc.config.getoption("--fixtures", default=HERE / "fixtures")
        folders = sorted(path.parent for path in root.rglob("config.json"))
        metafunc.parametrize("case", [Case(folder) for folder in folders], ids=lambda case: case.folder.name)
