"""The room offers what it says, and brings torch only to those who need it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from opensora_core import data


def test_every_name_is_there():
    assert {name for names in data._HOMES.values() for name in names} == set(data.__all__)
    for name in data.__all__:
        assert getattr(data, name).__name__ == name
        assert name in dir(data)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        data.nothing_like_it  # noqa: B018


def test_a_manifest_is_read_without_torch():
    code = "from opensora_core.data import read_manifest; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
