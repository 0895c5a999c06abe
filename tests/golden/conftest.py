"""`pytest tests/golden --fixtures DIR` runs every case folder under DIR; the default is the copy beside this file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.case import Case

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest itself knows a `--fixtures` (list the fixture functions; also spelt `--funcargs`, which stays): ours takes
    # the name over, for which argparse needs to be told that the newcomer wins
    group = parser.getgroup("golden", "golden numbers")
    group._arggroup.conflict_handler = "resolve"
    group.addoption("--fixtures", dest="golden", type=Path, help="a folder of golden case folders")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        # the option is unknown when the whole suite runs: pytest reads it only from folders named on its command line
        root = metafunc.config.getoption("golden", default=None) or HERE / "fixtures"
        folders = sorted(path.parent for path in root.rglob("config.json"))
        assert folders, f"no golden case (a folder with a config.json) under {root}"
        metafunc.parametrize("case", [Case(folder) for folder in folders], ids=lambda case: case.folder.name)
