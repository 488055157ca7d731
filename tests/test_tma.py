"""Descriptors (TMA) or pointers, as a tensor's place in memory allows: the same results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral_triton import ops


def shifted(x: Tensor) -> Tensor:
    """The same values one element behind a place that TMA takes."""
    moved = x.new_empty(x.numel() + 8)[1 : 1 + x.numel()].view(x.shape)
    return moved.copy_(x)


@pytest.mark.parametrize("moved", ["", "q", "k", "v", "kv"])
def test_attention_of_shifted_tensors(moved: str, device: torch.device) -> None:
    """Enough keys for the loop without a mask. NaN before and behind those that count."""
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(1, 300, 1, 16, generator=generator).half().to(device) for name in "qkv"}
    for name in "kv":
        given[name][:, :3] = given[name][:, 290:] = float("nan")
    bounds = {name: torch.tensor([n], device=device) for name, n in (("starts", 3), ("lengths", 290))}
    want = ops.attention(**given, **bounds)
    got = ops.attention(**{name: shifted(x) if name in moved else x for name, x in given.items()}, **bounds)
    assert got.isfinite().all() and got.equal(want)
