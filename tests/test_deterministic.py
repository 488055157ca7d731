"""`deterministic=True`: the bits of a token, or of a sequence, do not depend on what else is in the batch."""

from __future__ import annotations

import pytest
import torch

from mixtral_triton import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("others", [1, 7, 64, 200])
def test_a_token_alone_and_among_others(others: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(shape, generator=generator).mul(0.2).to(device=device, dtype=dtype)
        for shape in ((1 + others, 64), (4, 96, 64), (4, 64, 48))
    )
    weights, ids = ops.route(torch.randn(1 + others, 4, generator=generator).to(device), 2)
    alone = ops.expert_swiglu(x[:1], gate_up, down, ids[:1], weights[:1], deterministic=True)
    among = ops.expert_swiglu(x, gate_up, down, ids, weights, deterministic=True)
    assert torch.equal(among[:1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "window"), [(1, None), (1, 70), (40, None), (40, 16)])
def test_a_sequence_alone_and_among_longer_ones(
    T: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, T, 4, 64, generator=generator).to(device=device, dtype=dtype)
    k, v = (torch.randn(3, 900, 2, 64, generator=generator).to(device=device, dtype=dtype) for _ in range(2))
    lengths = torch.tensor([300, 900, 41], device=device)
    among = ops.attention(q, k, v, window=window, lengths=lengths, deterministic=True)
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        alone = ops.attention(q[one], k[one, :length], v[one, :length], window=window, deterministic=True)
        assert torch.equal(among[one], alone)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_call_gives_the_same_bits(deterministic: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 2, 64, generator=generator).to(device) for n in (1, 600))
    first, again = (ops.attention(q, k, k, deterministic=deterministic) for _ in range(2))
    assert torch.equal(first, again)
