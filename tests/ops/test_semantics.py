"""The semantics of `mixtral_triton.ops` that the contract states, compared with short fp64 loops."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import ops
from mixtral_triton.kernels.ops.cache_args import rope_tables
from mixtral_triton.kernels.ops.linear import SKINNY_M
from tests.support.calls import randn

NAN, INF = math.nan, math.inf
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_close(got: Tensor, want: Tensor, rtol: float = 2e-6) -> None:
    """Compare up to rtol of the largest value."""
    assert got.shape == want.shape
    if want.numel():
        got, want = got.double().cpu(), want.double().cpu()
        assert torch.isfinite(got).all()
        assert (got - want).abs().max() <= rtol * want.abs().max().clamp(min=1e-30)


def expected_route(row: list[float], top_k: int) -> tuple[list[float], list[int]]:
    values = [-INF if math.isnan(value) else value for value in row]
    ids = sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]
    top = values[ids[0]]  # the denominator of the softmax over all cancels
    shares = [float(values[e] == top) if math.isinf(top) else math.exp(values[e] - top) for e in ids]
    return [share / sum(shares) for share in shares], ids


def check_route(logits: Tensor, top_k: int) -> None:
    weights, ids = ops.route(logits, top_k)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert weights.shape == ids.shape == (len(logits), top_k)
    for row, got_weights, got_ids in zip(logits.double().tolist(), weights.tolist(), ids.tolist(), strict=True):
        want_weights, want_ids = expected_route(row, top_k)
        assert got_ids == want_ids and got_weights == pytest.approx(want_weights, abs=2e-6)


SPECIAL = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, 1.0, -3.5, 0.25, 88.0, -1e30, 3e38, -3e38, 1e-40])
ROWS = [
    [NAN] * 6,
    [-INF] * 6,
    [NAN, -INF] * 3,
    [0.0, -0.0] * 3,
    [INF] * 3 + [2.0, NAN, -INF],
    [NAN] + [-INF] * 4 + [3.0],
]


@pytest.mark.parametrize("dtype", FLOATS)
def test_route_of_special_rows_and_sizes(dtype: torch.dtype, device: torch.device) -> None:
    """Rows of special values, drawn at random and chosen, and random ones among them."""
    drawn = SPECIAL[torch.randint(len(SPECIAL), (300, 6), generator=torch.Generator().manual_seed(0))]
    rows = torch.cat(
        (torch.tensor(ROWS), drawn, drawn.where(drawn.isfinite() & (drawn.abs() < 90), randn(300, 6, scale=9)))
    )
    for top_k in range(1, 7):
        check_route(rows.to(device, dtype), top_k)
    for T, E, top_k in ((0, 8, 2), (1, 1, 1), (300, 8, 2), (70, 5, 5), (90, 9, 4), (3, 257, 7)):
        check_route(randn(T, E, scale=3).to(device, dtype), top_k)


def expected_attention(q, k, v, window=None, causal=True, scale=None, starts=None, lengths=None, sinks=None):
    q, k, v = (x.double().cpu() for x in (q, k, v))
    (B, T, Hq, D), (S, Hkv) = q.shape, k.shape[1:3]
    out, limited = torch.zeros_like(q), window is not None and window > 0
    for b in range(B):
        start, end = 0 if starts is None else int(starts[b]), S if lengths is None else int(lengths[b])
        for t in range(T):
            i = end - T + t
            keys = [j for j in range(S) if start <= j < end and (j <= i or not causal)]
            if limited:
                keys = [j for j in keys if (i - window < j if causal else abs(i - j) <= window // 2)]
            for h in range(Hq if keys else 0):
                scores = k[b, keys, h // (Hq // Hkv)] @ q[b, t, h] * (D**-0.5 if scale is None else scale)
                denominator = scores.exp().sum() + (0.0 if sinks is None else sinks[h].exp())
                out[b, t, h] = scores.exp() / denominator @ v[b, keys, h // (Hq // Hkv)]
    return out


def check_attention(shape: tuple[int, ...], device: Any, dtype: torch.dtype = torch.int32, **options: Any) -> None:
    """shape (B, T, S, Hq, Hkv, D). Keys and values outside [starts, lengths) are NaN."""
    B, T, S, Hq, Hkv, D = shape
    q, k, v = randn(B, T, Hq, D), randn(B, S, Hkv, D, seed=1), randn(B, S, Hkv, D, seed=2)
    bounds = {key: torch.tensor(options[key], dtype=dtype) for key in ("starts", "lengths") if key in options}
    bounds |= {"sinks": torch.tensor(options["sinks"])} if "sinks" in options else {}
    for b, (start, end) in enumerate(zip(options.get("starts", [0] * B), options.get("lengths", [S] * B), strict=True)):
        for x in (k, v):
            x[b, :start], x[b, end:] = NAN, NAN
    want = expected_attention(q, k, v, **options | bounds)
    on_device = {key: value.to(device) for key, value in bounds.items()}
    check_close(ops.attention(q.to(device), k.to(device), v.to(device), **options | on_device), want, 4e-6)


HEADS = ((4, 1), (4, 2), (3, 3))  # MQA, GQA, MHA
DIMS = (64, 80, 96, 128)
SIZES = ((37, 37), (1, 37), (5, 37), (37, 9), (7, 2))  # T, S
WINDOWS = [{"window": n, "causal": c} for n in (None, 0, -1, 1, 2, 3, 8, 40, 2**31 - 1) for c in (True, False)]
# Sequences are empty or full, with starts at and beyond lengths, and with T > lengths.
BOUNDS = [
    {"starts": [0, 0, 4, 6, 9, 19, 0], "lengths": [0, 20, 4, 17, 7, 20, 2]},
    {"starts": [0, 7]},
    {"lengths": [0, 7]},
]
KINDS = [{}, {"window": 3}, {"causal": False}, {"causal": False, "window": 5}]
SINKS = ((37, 37), (1, 600), (3, 40))  # T, S
EMPTY = ((2, 0, 5), (2, 3, 0), (2, 30, 0), (2, 0, 0), (0, 1, 5), (0, 3, 5))  # B, T, S
ATTENTION: list[tuple[tuple[int, ...], dict[str, Any]]] = [  # B, T, S, Hq, Hkv, D
    *(((1, T, S, *heads, D), {"window": 9}) for (T, S), heads, D in product(((20, 20), (1, 50)), HEADS, DIMS)),
    *(((1, *sizes, 2, 1, 16), options) for sizes in SIZES for options in WINDOWS),
    *(((*sizes, 4, 2, 16), {"causal": causal}) for sizes in EMPTY for causal in (True, False)),
    *(
        ((len(next(iter(bounds.values()))), T, 20, 2, 1, 16), kind | bounds | {"dtype": dtype})
        for bounds, kind, T, dtype in product(BOUNDS, KINDS, (1, 3, 21), (torch.int32, torch.int64))
    ),
    ((1, 1, 700, 4, 1, 16), {}),
    ((2, 1, 700, 4, 1, 16), {"starts": [0, 650], "lengths": [700, 700]}),
    ((3, 1, 600, 2, 2, 80), {"starts": [0, 1, 0], "lengths": [0, 2, 513]}),
    ((1, 2, 900, 2, 1, 16), {"window": 530}),
    ((2, 3, 600, 4, 1, 16), {"window": 300, "starts": [590, 0], "lengths": [600, 1]}),
    ((1, 1, 40, 20, 1, 16), {"window": 7}),
    ((1, 5, 300, 8, 2, 16), {"lengths": [290]}),
    ((1, 20, 300, 2, 1, 16), {"window": 33}),
    ((1, 35, 200, 2, 1, 16), {"window": 100}),  # tiles visible to all, some and none of the rows
    ((1, 1, 20, 2, 1, 64), {"scale": 0.07}),
    ((1, 20, 20, 2, 1, 64), {"scale": 3}),
    # Of no weight, as one key has, and of nearly all weight; with splits, which all but one lack it.
    *(((2, T, S, 4, 2, 16), {"sinks": [-math.inf, 0.5, 9.0, -3.0], **kind}) for T, S in SINKS for kind in KINDS),
    *(((2, T, 20, 4, 2, 16), {"sinks": [0.0, 1.0, 2.0, 3.0], "lengths": [0, 7]}) for T in (1, 21)),
    # Splits without keys, whose sinks are of no weight.
    ((2, 1, 600, 4, 2, 16), {"sinks": [-math.inf, 0.5, 9.0, -3.0], "lengths": [7, 600]}),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("shape", "options"), ATTENTION, ids=str)
def test_attention(shape: tuple[int, ...], options: dict[str, Any], device: torch.device) -> None:
    B, T, S = shape[:3]  # a causal call with more queries than keys needs lengths
    check_attention(shape, device, **({"lengths": [S] * B} if T > S else {}) | options)


def test_attention_raises_value_error_for_the_layout_of_sdpa(device: torch.device) -> None:
    """[B, heads, T, D]: the eight heads of q read as tokens, more than the two heads of k."""
    q, k = torch.zeros(1, 8, 5, 16, device=device), torch.zeros(1, 2, 5, 16, device=device)
    with pytest.raises(ValueError, match=r"attention: argument 'q' is of 8 tokens, .* k: .* \[B, T, heads, D\]"):
        ops.attention(q, k, k)
    with pytest.raises(ValueError, match="lengths"):
        torch.ops.mixtral_triton.attention(q.to("meta"), k.to("meta"), k.to("meta"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("new", (1, 11, 13))
def test_padding_of_a_chunk_does_not_reach_other_rows(new: int, dtype: torch.dtype, device: torch.device) -> None:
    """With 15 keys a CPU's product in bf16 reads one element beyond a row, which was a NaN of padding."""
    q, k, v = (randn(2, 14, heads, 32, seed=heads).to(device, dtype) for heads in (2, 1, 3))
    ring = torch.zeros(2, 2, 1, 1, 32, device=device, dtype=dtype)
    bounds = (torch.full((2,), n, dtype=torch.int32, device=device) for n in (13, new))
    got = ops.cached_attention(q, k, v[:, :, :1], *ring, *bounds, window=1)[:, :new]
    check_close(got, v[:, :new, :1].expand_as(got), rtol=2**-8)  # with a window of 1 a token attends to itself


@pytest.mark.parametrize("theta", (1e4, 1e6))
def test_rotary_tables_are_within_fp32_of_the_angles(theta: float, device: torch.device) -> None:
    """Of every position, beyond those that bf16 holds exactly."""
    P, D = 4200, 32
    frequencies = theta ** -(torch.arange(0, D, 2).double() / D)
    angles = torch.arange(P).double()[:, None] * frequencies
    limits = angles * (4 + math.log(theta)) * 2.0**-24 + 2.0**-22  # angles and log(theta) in fp32
    for table, want in zip(rope_tables(theta, P, D, device), (angles.cos(), angles.sin()), strict=True):
        assert table.dtype == torch.float32 and ((table.double().cpu() - want).abs() <= limits).all()


@pytest.mark.parametrize("positions", (torch.int32, torch.int64))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("D", "Hq", "Hkv"), [(64, 4, 1), (80, 6, 2), (128, 3, 3), (2, 1, 1)])
def test_rope(D: int, Hq: int, Hkv: int, dtype: torch.dtype, positions: torch.dtype, device: torch.device) -> None:
    """Half-split pairs, the rotation in fp32, one rounding: at most half a unit in the last place."""
    angles, where = randn(11, D // 2, scale=3), torch.tensor([[10, 0, 3, 3], [7, 1, 9, 2]])
    q, k = randn(2, 4, Hq, D, seed=1).to(dtype), randn(2, 4, Hkv, D, seed=2).to(dtype)
    cos, sin = angles.cos(), angles.sin()
    out = ops.rope(*(x.to(device) for x in (q, k, cos, sin, where.to(positions))))
    c, s = cos.double()[where][:, :, None], sin.double()[where][:, :, None]
    for got, x in zip(out, (q, k), strict=True):
        a, b = x.double()[..., : D // 2], x.double()[..., D // 2 :]
        want = torch.cat((a * c - b * s, b * c + a * s), -1)
        assert got.dtype == dtype and got.shape == x.shape
        # The rounding to `dtype`, and the fp32 sums, which may cancel.
        limit = want.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 3e-7 * x.abs().max().double()
        assert ((got.double().cpu() - want).abs() <= limit).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(4000,), (3, 700), (2, 3, 33), (1, 1), (0, 8), (2, 0, 8)], ids=str)
def test_rms_norm_casts_before_the_weight(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, weight, eps = randn(*shape).to(dtype), randn(shape[-1], seed=1).to(dtype), 0.25
    got = ops.rms_norm(x.to(device), weight.to(device), eps)
    assert got.dtype == dtype and got.shape == x.shape
    want = (x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()).to(dtype) * weight
    check_close(got, want, 2 * torch.finfo(dtype).eps)
    if dtype != torch.float32:  # fp32 and fp64 rarely round to different sides; the other order does for 1 in 4
        assert (got.cpu() != want).sum() <= 0.01 * want.numel() + 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7, 40), (1, 3, 513), (0, 8)], ids=str)
def test_rms_norm_with_residual(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, residual, weight = (randn(*s, seed=i).to(device, dtype) for i, s in enumerate((shape, shape, shape[-1:])))
    y, total = ops.rms_norm(x, weight, 1e-5, residual=residual)
    assert total.dtype == dtype and torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(total, weight, 1e-5))  # the norm is that of the rounded sum


def expected_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The gate's rows are in front of up's."""
    x, gate_up, down, weights = (a.double().cpu() for a in (x, gate_up, down, weights))
    out, I = torch.zeros_like(x), down.shape[2]
    for t, row in enumerate(ids.tolist()):
        for expert, weight in zip(row, weights[t], strict=True):
            gate, up = gate_up[expert, :I] @ x[t], gate_up[expert, I:] @ x[t]
            out[t] += weight * (down[expert] @ (gate * torch.sigmoid(gate) * up))
    return out


def expert_inputs(T: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
    H, I = 24, 20
    gate_up, down = randn(E, 2 * I, H, seed=1), randn(E, H, I, seed=2)
    return randn(T, H), gate_up * H**-0.5, down * I**-0.5


@pytest.mark.parametrize("T", (40, 65))
def test_experts_are_added_in_fp32(T: int, device: torch.device) -> None:
    """Of four equal experts with weights 1 and 3/256, a sum in bf16 is more than a unit of 2^-8 off, all in one way."""
    x, gate_up, down = (each.bfloat16() for each in expert_inputs(T, 1))
    gate_up, down = gate_up.expand(4, -1, -1), down.expand(4, -1, -1)
    ids, weights = torch.arange(4).expand(T, 4).int(), torch.tensor([1.0, *[1 / 256] * 3]).expand(T, 4)
    want = expected_swiglu(x, gate_up, down, ids, weights)
    got = ops.expert_swiglu(*(each.contiguous().to(device) for each in (x, gate_up, down, ids, weights)))
    signed_error = (got.double().cpu() - want) * want.sign()
    assert abs(float(signed_error.sum() / want.abs().sum())) < 2**-8 / 8


@pytest.mark.parametrize("T", (1, 40, 65))
def test_routing_weights_of_16_bits_are_those_of_fp32(T: int, device: torch.device) -> None:
    x, gate_up, down = (each.bfloat16().to(device) for each in expert_inputs(T, 4))
    ids, weights = torch.tensor([[3, 1]] * T).to(device), randn(T, 2, seed=3).softmax(-1).bfloat16().to(device)
    got = ops.expert_swiglu(x, gate_up, down, ids, weights)
    assert torch.equal(got, ops.expert_swiglu(x, gate_up, down, ids, weights.float()))
    with pytest.raises(ValueError, match="'weights' is float16, needs float32 or bfloat16"):
        ops.expert_swiglu(x, gate_up, down, ids, weights.half())


@pytest.mark.parametrize("T", (1, 40, 65))
@pytest.mark.parametrize("row", [[3, 3], [2, 0], [1, 1]], ids=str)
def test_unused_experts_may_hold_nan(T: int, row: list[int], device: torch.device) -> None:
    """All tokens use the experts of `row`, which may repeat one; the rest hold NaN and inf."""
    x, gate_up, down = expert_inputs(T, 5)
    ids, weights = torch.tensor([row] * T), randn(T, 2, seed=3).softmax(-1)
    for expert in set(range(5)) - set(row):
        gate_up[expert], down[expert] = NAN, (NAN, INF)[expert % 2]
    want = expected_swiglu(x, gate_up, down, ids, weights)
    check_close(ops.expert_swiglu(*(a.to(device) for a in (x, gate_up, down, ids, weights))), want, 4e-6)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize(("T", "K", "E"), [(0, 2, 3), (1, 1, 1), (50, 2, 8), (700, 3, 5), (4, 2, 100)])
def test_sort_by_expert_is_stable(T: int, K: int, E: int, dtype: torch.dtype, device: torch.device) -> None:
    ids = torch.randint(E, (T, K), generator=torch.Generator().manual_seed(0)).to(dtype)  # repeats in a row too
    order, offsets = ops.sort_by_expert(ids.to(device), E)
    flat = ids.flatten().tolist()
    assert order.dtype == offsets.dtype == torch.int32
    assert order.tolist() == sorted(range(T * K), key=lambda slot: flat[slot])
    assert offsets.tolist() == [sum(i < e for i in flat) for e in range(E + 1)]


@pytest.mark.parametrize("rows", [(), (SKINNY_M,), (SKINNY_M + 1,), (2, 3, 4), (0,), (1100,)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_linear_keeps_leading_dimensions(rows: tuple[int, ...], deterministic: bool, device: torch.device) -> None:
    x, weight = randn(*rows, 48).to(device), randn(33, 48, seed=1).to(device)
    got = ops.linear(x, weight, deterministic)
    assert got.shape == (*rows, 33)
    assert torch.allclose(got, x @ weight.T, atol=1e-5)
    with torch.autocast(device.type, torch.bfloat16):
        assert ops.linear(x, weight, deterministic).dtype == torch.float32


@pytest.mark.interpreted
@pytest.mark.usefixtures("unguarded")
def test_threads_compute_what_each_computes_alone() -> None:
    """The interpreter's state is global to the process."""
    args = [randn(*shape).bfloat16() for shape in ((3, 64), (48, 64))]
    want = ops.linear(*args)
    with ThreadPoolExecutor(4) as pool:
        assert all(got.equal(want) for got in pool.map(lambda _: ops.linear(*args), range(24)))
