"""One golden case: a folder of numbers recorded from the published release, with its own tolerance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """`config` holds the settings, `io` inputs `in.*`, intermediates `mid.*` and outputs, `weights` a state dict."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def io(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "weights.safetensors")

    def close(self, actual: Tensor, expected: Tensor | str, what: str = "") -> None:
        """Assert equality within the case's own tolerance; a string names an entry of `io`."""
        name = expected if isinstance(expected, str) else what
        expected = self.io[expected] if isinstance(expected, str) else expected
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
        tolerance = self.config["tolerance"]
        bounds = (0.0, 0.0) if tolerance.get("exact") else (tolerance["atol"], tolerance["rtol"])
        torch.testing.assert_close(
            actual,
            expected,
            atol=bounds[0],
            rtol=bounds[1],
            check_dtype=False,
            msg=lambda text: f"{self.folder.name} {name}: {text}",
        )
