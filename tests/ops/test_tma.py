"""Descriptors (TMA) or pointers, as a tensor's place in memory allows: the same results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral_triton import ops
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.tma import tma_can_read


def shifted(x: Tensor) -> Tensor:
    """The same values one element behind a place that TMA takes."""
    moved = x.new_full((x.numel() + 8,), float("nan"))[1 : 1 + x.numel()].view(x.shape)
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


@pytest.mark.parametrize("moved", ["gate_up_proj", "down_proj"])
def test_experts_of_shifted_weights(moved: str, device: torch.device) -> None:
    """Enough tokens for sorted groups. NaN stands before and behind the shifted weights."""
    args = OPS["expert_swiglu"].inputs({"T": 70, "H": 64, "I": 48, "E": 4, "K": 2}, torch.float16, device)
    want = ops.expert_swiglu(**args)
    got = ops.expert_swiglu(**args | {moved: shifted(args[moved])})
    assert torch.allclose(got, want, atol=float(want.abs().max()) * 2**-9)


def test_what_a_descriptor_takes() -> None:
    x = torch.empty(4, 64, dtype=torch.bfloat16)
    assert tma_can_read(x, "sm_90") and tma_can_read(x[:, 8:40], "sm_100")
    assert not any(tma_can_read(x, arch) for arch in ("sm_80", "sm_120", "gfx942"))
    for other in (x.float(), x[:, 1:], x.t(), x[:, :0], x[:1].expand(4, 64), x.new_empty(8, 4)):
        assert not tma_can_read(other, "sm_90")
