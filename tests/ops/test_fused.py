"""Fused operations are compared with the operations that they are made of."""

from __future__ import annotations

import pytest
import torch

from mixtral_triton import ops
from mixtral_triton.kernels.linear import SKINNY_M
from mixtral_triton.kernels.op import Shape
from tests.support.calls import copies, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "deterministic"), [(0, False), (5, False), (5, True), (70, False)])
def test_experts_with_the_next_norm(T: int, deterministic: bool, dtype: torch.dtype, device: torch.device) -> None:
    sizes = {"T": T, "H": 48, "I": 40, "E": 4, "K": 2}
    args = inputs("experts_add_rms_norm", sizes, device, dtype)
    norm = {name: args[name] for name in ("residual", "norm_weight", "eps")}
    layer = {name: value for name, value in args.items() if name not in norm}
    experts = ops.expert_swiglu(**layer, deterministic=deterministic)
    want = ops.rms_norm(experts, norm["norm_weight"], norm["eps"], residual=norm["residual"])
    got = ops.experts_add_rms_norm(**args, deterministic=deterministic)
    assert got[1].equal(want[1])  # the sum is the same operation, element by element
    # A GPU's threads may split the sum of the norm differently.
    assert torch.allclose(got[0], want[0], rtol=2 * torch.finfo(dtype).eps) if T else got[0].shape == (0, 48)


@pytest.mark.parametrize("T", [0, 1, 19])
def test_gate_route_routes_by_its_logits(T: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(n, 64, generator=generator).bfloat16().to(device) for n in (T, 8))
    logits, weights, ids = ops.gate_route(x, gate, 2)
    assert torch.allclose(logits.float(), x.float() @ gate.float().T, rtol=2**-8, atol=1e-3)
    want_weights, want_ids = ops.route(logits, 2)
    assert ids.equal(want_ids) and torch.allclose(weights, want_weights, rtol=1e-6)


@pytest.mark.parametrize("rows", [(), (SKINNY_M,), (SKINNY_M + 1,), (2, 3, 4), (0,)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_linear_keeps_leading_dimensions(rows: tuple[int, ...], deterministic: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*n, 48, generator=generator).to(device) for n in (rows, (33,)))
    got = ops.linear(x, weight, deterministic)
    assert got.shape == (*rows, 33)
    assert torch.allclose(got, torch.nn.functional.linear(x, weight), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("C", "window", "past", "new"),
    [
        (600, 0, [0, 1, 300, 598], [1, 1, 1, 1]),  # several splits, the first of them with no key but the new one
        (600, 600, [599, 600, 5000, 7], [1, 1, 1, 0]),
        (16, 16, [3, 16, 40, 15], [1, 0, 1, 1]),
        (64, 5, [0, 4, 5, 63], [0, 1, 1, 1]),
    ],
)
def test_attention_of_a_decode_step_equals_its_parts(
    C: int, window: int, past: list[int], new: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    """The parts are rotation, append and attention. A row without a new token is padding, and finite."""
    sizes = Shape(B=4, T=1, Hq=4, Hkv=2, D=32, C=C, window=window, past=0)
    args = inputs("rope_append_attention", sizes, device, dtype)
    args |= {"past": torch.tensor(past, device=device), "new": torch.tensor(new, device=device)}
    parts = copies(args)
    got = ops.rope_append_attention(**args)
    q, k = ops.rope(*(parts[name] for name in ("q", "k", "cos", "sin")), parts["past"][:, None])
    cache = [parts[name] for name in ("k_cache", "v_cache", "past", "new")]
    ops.append(k, parts["v"], *cache)
    want = ops.cached_attention(q, None, None, *cache, window)
    assert got.isfinite().all()
    atol = 2 * torch.finfo(dtype).eps * float(want.abs().max()) + 2e-6
    for a, b in ((got, want), *((args[name], parts[name]) for name in ("k_cache", "v_cache"))):
        assert torch.allclose(a, b, rtol=0.0, atol=atol)
