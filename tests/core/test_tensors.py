"""The condition: selecting, joining and casting samples."""

from __future__ import annotations

import torch

from opensora_core.tensors import Condition


def test_selecting_and_joining_are_inverse() -> None:
    whole = Condition(torch.randn(3, 4, 2), torch.ones(3, 4, dtype=torch.bool), torch.rand(3, 2))
    again = Condition.cat([whole[:1], whole[torch.tensor([1, 2])]])
    assert len(again) == 3
    for name in ("tokens", "mask", "size"):
        torch.testing.assert_close(getattr(again, name), getattr(whole, name))


def test_casting_leaves_labels_and_sizes_alone() -> None:
    labels = Condition(torch.tensor([1, 1000]), size=torch.tensor([[257.0, 1023.0]] * 2)).to(dtype=torch.bfloat16)
    assert labels.tokens.dtype == torch.int64
    assert labels.size is not None and labels.size[0, 1] == 1023
    assert Condition(torch.randn(1, 2, 2)).to(dtype=torch.bfloat16).tokens.dtype == torch.bfloat16
