"""route; gate_route, the gate's logits and their routing; rms_norm_gate_route, the residual add and norm before them.

T tokens, H hidden, E experts, K experts a token. PDL is set by `launch` (pdl.py).

The gate's kernel has one token a program against the whole gate: a tile of several tokens would have padding and keep
fewer SMs busy. So a token's bits never depend on the other tokens.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..launching.kernel_args import Rows
from ..launching.launch import LaunchConfig, launch, select_configs
from ..launching.pdl import pdl_wait
from ..operation.cases import operation, shapes
from ..operation.checks import INT32, RoutingWeights, Tokens, Within
from .norm import FusedNorm, NormWeight, apply_norm
from .tiles import power_of_2

TILE_BYTES = 65536  # of the gate that a program holds at once
SELECTED = tl.constexpr(-(2**63))  # less than any expert's key


@triton.jit
def _share(logits, largest):
    """The numerators of a softmax. An infinite maximum has none: the experts that have it share the weight."""
    undefined = (largest == float("inf")) | (largest == float("-inf"))
    return tl.where(undefined, (logits == largest).to(tl.float32), tl.exp(logits - largest))


@triton.jit
def _flip(bits):
    """The bits of fp32 -> int32 in the order of the numbers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def select_top_k(
    logits,  # [BLOCK_T, BLOCK_E] fp32
    E,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The TOP_K largest of each row -> weights, ids [BLOCK_T, BLOCK_K]."""
    offs_e = tl.arange(0, BLOCK_E)[None, :]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    logits = tl.where(logits == logits, logits, float("-inf"))
    # One integer orders an expert: by its logit, then by its id. So a selection is one reduction, and no two are equal.
    order = _flip(tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)).to(tl.int64)  # -0 equals 0
    keys = tl.where(offs_e < E, (order << 32) + (BLOCK_E - 1 - offs_e), SELECTED)
    best = tl.full((BLOCK_T, BLOCK_K), SELECTED, tl.int64)
    for k in tl.static_range(TOP_K):
        key = tl.max(keys, axis=1)[:, None]
        keys = tl.where(keys == key, SELECTED, keys)
        best = tl.where(offs_k == k, key, best)
    ids = BLOCK_E - 1 - (best & (BLOCK_E - 1)).to(tl.int32)
    values = tl.where(offs_k < TOP_K, _flip((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True), float("-inf"))
    largest = tl.max(values, axis=1)[:, None]
    shares = tl.where(offs_k < TOP_K, _share(values, largest), 0.0)
    total = tl.sum(shares, axis=1)
    if not RENORMALIZE:
        total = tl.sum(tl.where(offs_e < E, _share(logits, largest), 0.0), axis=1)
    return shares / total[:, None], ids


@triton.jit
def store_routes(weights_ptr, ids_ptr, weights, ids, offs_t, T, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_k = tl.arange(0, BLOCK_K)
    out = offs_t[:, None] * TOP_K + offs_k[None, :]
    mask = (offs_t < T)[:, None] & (offs_k < TOP_K)[None, :]
    tl.store(weights_ptr + out, weights, mask=mask)
    tl.store(ids_ptr + out, ids, mask=mask)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logits_ptr,  # [T, E]
    weights_ptr,  # [T, K] out, fp32
    ids_ptr,  # [T, K] out, int32
    T, E,
    stride_lt, stride_le,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    ptrs = logits_ptr + offs_t[:, None] * stride_lt + offs_e[None, :] * stride_le
    logits = tl.load(ptrs, mask=(offs_t < T)[:, None] & (offs_e < E)[None, :], other=0.0).to(tl.float32)
    weights, ids = select_top_k(logits, E, TOP_K, RENORMALIZE, BLOCK_T, BLOCK_E, BLOCK_K)
    store_routes(weights_ptr, ids_ptr, weights, ids, offs_t, T, TOP_K, BLOCK_K)


@triton.jit
def _load_gate(gate, offs_h, E, H: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load columns of the gate, [BLOCK_E, columns]."""
    offs_e = tl.arange(0, BLOCK_E)
    ptrs = gate.ptr + offs_e.to(tl.int64)[:, None] * gate.stride + offs_h[None, :]
    return tl.load(ptrs, mask=(offs_e < E)[:, None] & (offs_h < H)[None, :], other=0.0)


@triton.jit
def _load_sum(x_ptr, residual_ptr, offs_h, H: tl.constexpr):
    """Load columns of a row, the residual added: fp32 holding values rounded to x's dtype."""
    x = tl.load(x_ptr + offs_h, mask=offs_h < H, other=0.0)
    values = x.to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs_h, mask=offs_h < H, other=0.0)
        # The next layer reads the rounded sum, so the norm must use it, too.
        values = (values + residual.to(tl.float32)).to(x.dtype).to(tl.float32)
    return values


@triton.jit
def _store_and_square(total_ptr, values, offs_h, H: tl.constexpr):
    """Store columns of a row and return the sum of their squares."""
    tl.store(total_ptr + offs_h, values.to(total_ptr.dtype.element_ty), mask=offs_h < H)
    return tl.sum(values * values, axis=0)


@triton.jit
def _products(y_ptr, values, scale, gate, weight, offs_h, H: tl.constexpr):
    """Multiply columns of a row with the gate's -> [BLOCK_E]; with a norm, normalize and store them first."""
    if weight is not None:
        y = apply_norm(values, scale, weight, y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_h, y, mask=offs_h < H)
        values = y.to(tl.float32)
    return tl.sum(gate.to(tl.float32) * values[None, :], axis=1)


@triton.jit(do_not_specialize=["T"])
def gate_route_kernel(
    x,  # Rows [T, H]
    norm,  # FusedNorm of x + residual, or None
    gate,  # Rows [E, H]
    y_ptr,  # [T, H] out: that norm, or None
    logits_ptr,  # [T, E] out
    weights_ptr,  # [T, K] out, fp32
    ids_ptr,  # [T, K] out, int32
    T, E,
    H: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, PDL: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t, offs_h = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H)
    gate_tile = _load_gate(gate, offs_h, E, H, BLOCK_E)
    weight = None if norm is None else tl.load(norm.weight + offs_h, mask=offs_h < H, other=0.0)
    pdl_wait(PDL)
    x_row, residual, y = x.ptr + t * x.stride, None, y_ptr
    if norm is not None:
        residual, y = norm.residual + t * norm.stride, y_ptr + t * H
    values, scale = _load_sum(x_row, residual, offs_h, H), 1.0
    if norm is not None:
        total = norm.total_ptr + t * H
        squares = _store_and_square(total, values, offs_h, H)
        for h in range(BLOCK_H, H, BLOCK_H):
            squares += _store_and_square(total, _load_sum(x_row, residual, h + offs_h, H), h + offs_h, H)
        scale = tl.rsqrt(squares / H + norm.eps)
    acc = _products(y, values, scale, gate_tile, weight, offs_h, H)
    for h in range(BLOCK_H, H, BLOCK_H):
        columns = h + offs_h
        next_gate = _load_gate(gate, columns, E, H, BLOCK_E)
        norm_weight = None if norm is None else tl.load(norm.weight + columns, mask=columns < H, other=0.0)
        acc += _products(y, _load_sum(x_row, residual, columns, H), scale, next_gate, norm_weight, columns, H)
    logits, offs_e = acc[None, :].to(logits_ptr.dtype.element_ty), tl.arange(0, BLOCK_E)
    tl.store(logits_ptr + t * E + offs_e[None, :], logits, mask=(offs_e < E)[None, :])
    # Route by the rounded logits, which the caller receives.
    weights, ids = select_top_k(logits.to(tl.float32), E, TOP_K, RENORMALIZE, 1, BLOCK_E, BLOCK_K)
    store_routes(weights_ptr, ids_ptr, weights, ids, t + tl.arange(0, 1), T, TOP_K, BLOCK_K)


@dataclass(frozen=True)
class RouteSizes:
    T: int
    E: int
    K: int
    renormalize: bool = True


@dataclass(frozen=True)
class GateSizes:
    T: int
    H: int
    E: int
    K: int
    renormalize: bool = True


def configs(sizes: RouteSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """The tile does not depend on T, so a token's bits do not either."""
    block_e, block_k = power_of_2(sizes.E), power_of_2(sizes.K)
    block_t = power_of_2(1024 // block_e, high=128)
    tiles = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": block_k}
    return {"route_kernel": LaunchConfig(tiles, num_warps=4 if block_t * block_e >= 512 else 1)}


def gate_configs(sizes: GateSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """A tile holds as much of the gate as registers allow: all of Mixtral 8x7B's in 16 bits."""
    block_e = power_of_2(sizes.E)
    tiles = {"BLOCK_E": block_e, "BLOCK_H": power_of_2(sizes.H, high=max(16, TILE_BYTES // dtype.itemsize // block_e))}
    warps = power_of_2(block_e * tiles["BLOCK_H"] // 2048, high=16)
    return {"gate_route_kernel": LaunchConfig(tiles | {"BLOCK_K": power_of_2(sizes.K)}, num_warps=warps)}


Logits = Annotated[Tensor, "T E"]
Gate = Annotated[Tensor, "E H"]
TopK = Annotated[int, "K", Within(1, "E")]
Ids = Annotated[Tensor, "T K", INT32]


def _flops(case: RouteSizes | GateSizes) -> int:
    return case.T * case.E * (case.K + 4)


def _gate_flops(case: GateSizes) -> int:
    return _flops(case) + 2 * case.T * case.E * case.H


@operation(
    reference=reference.route,
    case=RouteSizes,
    flops=_flops,
    test_shapes=(
        *shapes(RouteSizes, "1 8 2, 67 8 2, 5 4 1, 9 6 6, 130 16 3, 3 1 1, 4 160 6"),
        *shapes(RouteSizes, "67 8 2, 4 160 6", renormalize=False),
    ),
    bench_shapes=(
        *shapes(RouteSizes, "1 8 2, 64 8 2, 4096 8 2"),
        *shapes(RouteSizes, "1 64 8, 4096 64 8", renormalize=False),  # of OLMoE-1B-7B
    ),
)
def route(logits: Logits, top_k: TopK, renormalize: bool = True) -> tuple[RoutingWeights, Ids]:
    """Select each token's experts: Softmax(TopK(logits)) (Jiang et al. 2024, section 2.1).

    logits       [T, E], fp32, bf16 or fp16; NaN counts as -inf
    top_k        K, in 1..E
    renormalize  False: TopK(Softmax(logits)), whose weights are those of the softmax over all experts (OLMoE,
                 Muennighoff et al. 2024, section 2)

    Returns routing weights fp32 [T, K], which sum to 1 with `renormalize`, and expert ids int32 [T, K]: larger logits
    first, ties to the lower id. Where the softmax is undefined, the infinite logits share equally. Raises ValueError
    for another shape or dtype, and for a top_k out of range.

    >>> ops.route(torch.tensor([[0.0, 3.0, 1.0]]), top_k=2)[1].tolist()
    [[1, 2]]
    """
    T, E = logits.shape
    weights, ids = _empty_routes(T, top_k, logits.device)
    sizes = RouteSizes(T, E, top_k, renormalize)
    config = select_configs(configs, sizes, logits.dtype, logits.device)["route_kernel"]
    launch(
        route_kernel,
        (triton.cdiv(T, config.constexprs["BLOCK_T"]),),
        config,
        logits_ptr=logits,
        weights_ptr=weights,
        ids_ptr=ids,
        T=T,
        E=E,
        stride_lt=logits.stride(0),
        stride_le=logits.stride(1),
        TOP_K=top_k,
        RENORMALIZE=renormalize,
    )
    return weights, ids


def _empty_routes(T: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    weights = torch.empty((T, K), dtype=torch.float32, device=device)
    return weights, torch.empty((T, K), dtype=torch.int32, device=device)


_GATE_FIELDS: dict[str, Any] = {
    "case": GateSizes,
    # Of the returned logits.
    "derived_outputs": lambda args, results: reference.route(results[-3], args["top_k"], args.get("renormalize", True)),
    "test_shapes": (
        *shapes(GateSizes, "1 128 8 2, 19 80 8 2, 33 300 16 3, 2 64 160 6, 3 64 1 1, 2 4200 8 2"),
        *shapes(GateSizes, "19 80 8 2", renormalize=False),
    ),
    "bench_shapes": (
        *(GateSizes(T, H, 8, 2) for T in (1, 64, 4096) for H in (4096, 6144)),
        *shapes(GateSizes, "1 2048 128 8, 4096 2048 128 8"),  # of Qwen3-30B-A3B
        *shapes(GateSizes, "1 2048 64 8", renormalize=False),  # of OLMoE-1B-7B
    ),
}


@operation(reference=reference.gate_route, flops=_gate_flops, **_GATE_FIELDS)
def gate_route(
    x: Tokens, gate: Gate, top_k: TopK, deterministic: bool = False, renormalize: bool = True
) -> tuple[Logits, RoutingWeights, Ids]:
    """Multiply tokens with the gate and select their experts (`route`), in one launch.

    x              [T, H], fp32, bf16 or fp16
    gate           [E, H] in x's dtype
    top_k          K, in 1..E
    deterministic  read by the torch backend alone: this kernel's bits of a token never depend on the others
    renormalize    as in `route`

    Returns logits [T, E] in x's dtype, routing weights fp32 [T, K] and expert ids int32 [T, K]. Raises ValueError for
    another shape, dtype or device.

    >>> logits, routing_weights, ids = ops.gate_route(torch.randn(3, 64), torch.randn(8, 64), top_k=2)
    """
    return _launch_gate(x, gate, top_k, renormalize)


@operation(
    reference=reference.rms_norm_gate_route,
    flops=lambda case: _gate_flops(case) + 5 * case.T * case.H,
    **_GATE_FIELDS,
)
def rms_norm_gate_route(
    x: Tokens,
    residual: Tokens,
    weight: NormWeight,
    eps: float,
    gate: Gate,
    top_k: TopK,
    deterministic: bool = False,
    renormalize: bool = True,
) -> tuple[Tokens, Tokens, Logits, RoutingWeights, Ids]:
    """Add the residual, normalize the sum (`rms_norm`), and route the norm (`gate_route`), in one launch.

    x, residual    [T, H], fp32, bf16 or fp16
    weight         [H] of the norm, in x's dtype; eps above 0
    gate           [E, H] in x's dtype; top_k in 1..E
    deterministic, renormalize  as in `gate_route`

    Returns the norm y and the sum [T, H], logits [T, E], routing weights fp32 [T, K] and expert ids int32 [T, K].
    Raises ValueError for another shape, dtype or device.

    >>> x, weight, gate = torch.randn(3, 64), torch.randn(64), torch.randn(8, 64)
    >>> y, total, logits, routing_weights, ids = ops.rms_norm_gate_route(x, x, weight, 1e-5, gate, top_k=2)
    """
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return y, total, *_launch_gate(x, gate, top_k, renormalize, y, FusedNorm.of(residual, weight, total, eps))


def _launch_gate(
    x: Tensor, gate: Tensor, top_k: int, renormalize: bool, y: Tensor | None = None, norm: FusedNorm | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    (T, H), E = x.shape, len(gate)
    logits = torch.empty((T, E), dtype=x.dtype, device=x.device)
    weights, ids = _empty_routes(T, top_k, x.device)
    sizes = GateSizes(T, H, E, top_k, renormalize)
    config = select_configs(gate_configs, sizes, x.dtype, x.device)["gate_route_kernel"]
    launch(
        gate_route_kernel,
        (T,),
        config,
        x=Rows.of(x),
        norm=norm,
        gate=Rows.of(gate),
        y_ptr=y,
        logits_ptr=logits,
        weights_ptr=weights,
        ids_ptr=ids,
        T=T,
        E=E,
        H=H,
        TOP_K=top_k,
        RENORMALIZE=renormalize,
    )
    return logits, weights, ids
