"""gate_route, the gate's logits and their `route`; rms_norm_gate_route, the residual add and norm before them.

T tokens, H hidden, E experts, K experts a token. PDL is set by `launch` (pdl.py).

A gate of few experts, and deterministic mode, have one token a program against the whole gate: a tile of several tokens
would have padding and keep fewer SMs busy, and so a token's bits never depend on the other tokens. Of many experts a
program of few tokens has a part, and `route_kernel` selects; many tokens are tiles for tensor cores.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..launching.kernel_args import Rows
from ..launching.launch import LaunchConfig, launch, select_configs
from ..launching.pdl import pdl_wait
from ..operation.cases import operation, shapes
from ..operation.checks import RoutingWeights, Tokens
from .norm import FusedNorm, NormWeight, apply_norm
from .route import (
    ROUTERS,
    Bias,
    Ids,
    Logits,
    Router,
    TopGroups,
    TopK,
    check_router,
    configs,
    empty_routes,
    launch_route,
    route_flops,
    select_top_k,
    store_routes,
)
from .tiles import power_of_2

TILE_BYTES = 65536  # of the gate that a program holds at once
WHOLE = 49152  # weights of a gate that one program reads
PROGRAMS = 128  # that few tokens' parts of the gate make: about one an SM


class GateTile(NamedTuple):
    """A tile for many tokens in 16 bits, and 16 experts or more. No GPU has measured them."""

    T: int  # the fewest tokens
    BLOCK_T: int
    BLOCK_E: int  # experts of a program; as many as there are: it also selects
    BLOCK_H: int
    num_warps: int
    num_stages: int


class GateResults(NamedTuple):
    logits_ptr: Any  # [T, E]
    weights_ptr: Any  # [T, K], fp32
    ids_ptr: Any  # [T, K], int32; None, as `weights_ptr`: `route_kernel` selects


# By what passes L2 and an SM: a part of the gate for each SM, then fewer reads of the gate and of x.
GATE_TILES = (GateTile(128, 16, 32, 128, 4, 3), GateTile(512, 16, 128, 64, 4, 3), GateTile(2048, 32, 128, 64, 4, 3))


@triton.jit
def _load_gate(gate, offs_e, offs_h, E, H: tl.constexpr):
    """Load columns of the gate, [experts, columns]."""
    ptrs = gate.ptr + offs_e.to(tl.int64)[:, None] * gate.stride + offs_h[None, :]
    return tl.load(ptrs, mask=(offs_e < E)[:, None] & (offs_h < H)[None, :], other=0.0)


@triton.jit
def _load_sum(x_ptr, residual_ptr, offs_h, H: tl.constexpr, live=None):
    """Load columns of rows, the residual added: fp32 holding values rounded to x's dtype."""
    mask = offs_h < H if live is None else (offs_h < H) & live
    x = tl.load(x_ptr + offs_h, mask=mask, other=0.0)
    values = x.to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs_h, mask=mask, other=0.0)
        # The next layer reads the rounded sum, so the norm must use it, too.
        values = (values + residual.to(tl.float32)).to(x.dtype).to(tl.float32)
    return values


@triton.jit
def _store_and_square(total_ptr, values, offs_h, end):
    """Store columns of a row before `end` and return the sum of their squares."""
    tl.store(total_ptr + offs_h, values.to(total_ptr.dtype.element_ty), mask=offs_h < end)
    return tl.sum(values * values, axis=0)


@triton.jit
def _products(y_ptr, values, scale, gate, weight, offs_h, end):
    """Multiply columns of a row with the gate's -> [BLOCK_E]; with a norm, normalize and store them first."""
    if weight is not None:
        y = apply_norm(values, scale, weight, y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_h, y, mask=offs_h < end)
        values = y.to(tl.float32)
    return tl.sum(gate.to(tl.float32) * values[None, :], axis=1)


@triton.jit
def _store_logits_and_routes(
    acc, out, bias_ptr, offs_t, offs_e, T, E,
    TOP_K: tl.constexpr, ROUTER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store acc [tokens, experts], and the routes where one program has all experts: where `out` has their places."""
    logits = acc.to(out.logits_ptr.dtype.element_ty)
    mask = (offs_t < T)[:, None] & (offs_e < E)[None, :]
    tl.store(out.logits_ptr + offs_t[:, None] * E + offs_e[None, :], logits, mask=mask)
    if out.ids_ptr is not None:
        # Route by the rounded logits, which the caller receives.
        weights, ids = select_top_k(
            logits.to(tl.float32), bias_ptr, E, TOP_K, ROUTER, acc.shape[0], acc.shape[1], BLOCK_K
        )
        store_routes(out.weights_ptr, out.ids_ptr, weights, ids, offs_t, T, TOP_K, BLOCK_K)


@triton.jit(do_not_specialize=["T"])
def gate_route_kernel(
    x,  # Rows [T, H]
    norm,  # FusedNorm of x + residual, or None
    gate,  # Rows [E, H]
    bias_ptr,  # [E], or None
    y_ptr,  # [T, H] out: that norm, or None
    out,  # GateResults
    T, E,
    H: tl.constexpr, TOP_K: tl.constexpr, ROUTER: tl.constexpr, PDL: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t, offs_h, offs_e, end = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E), H
    if out.ids_ptr is None:  # a part of the experts, of which the first stores the norm
        offs_e += tl.program_id(1) * BLOCK_E
        end = tl.where(tl.program_id(1) == 0, H, 0)
    gate_tile = _load_gate(gate, offs_e, offs_h, E, H)
    weight = None if norm is None else tl.load(norm.weight + offs_h, mask=offs_h < H, other=0.0)
    pdl_wait(PDL)
    x_row, residual, y = x.ptr + t * x.stride, None, y_ptr
    if norm is not None:
        residual, y = norm.residual + t * norm.stride, y_ptr + t * H
    values, scale = _load_sum(x_row, residual, offs_h, H), 1.0
    if norm is not None:
        total = norm.total_ptr + t * H
        squares = _store_and_square(total, values, offs_h, end)
        for h in range(BLOCK_H, H, BLOCK_H):
            squares += _store_and_square(total, _load_sum(x_row, residual, h + offs_h, H), h + offs_h, end)
        scale = tl.rsqrt(squares / H + norm.eps)
    acc = _products(y, values, scale, gate_tile, weight, offs_h, end)
    for h in range(BLOCK_H, H, BLOCK_H):
        columns = h + offs_h
        next_gate = _load_gate(gate, offs_e, columns, E, H)
        norm_weight = None if norm is None else tl.load(norm.weight + columns, mask=columns < H, other=0.0)
        acc += _products(y, _load_sum(x_row, residual, columns, H), scale, next_gate, norm_weight, columns, end)
    offs_t = t + tl.arange(0, 1)
    _store_logits_and_routes(acc[None, :], out, bias_ptr, offs_t, offs_e, T, E, TOP_K, ROUTER, BLOCK_K)


@triton.jit(do_not_specialize=["T"])
def gate_route_tile_kernel(
    x, norm, gate, bias_ptr, y_ptr, out, T, E,  # as of `gate_route_kernel`
    H: tl.constexpr, TOP_K: tl.constexpr, ROUTER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_e, offs_h = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_H)
    rows, live, residual = x.ptr + offs_t[:, None] * x.stride, (offs_t < T)[:, None], None
    stored, scale = (offs_t < tl.where(tl.program_id(1) == 0, T, 0))[:, None], 1.0
    if norm is not None:
        residual = norm.residual + offs_t[:, None] * norm.stride
        squares = tl.zeros((BLOCK_T,), tl.float32)
        for h in range(0, H, BLOCK_H):
            columns = h + offs_h[None, :]
            total = _load_sum(rows, residual, columns, H, live)
            places = norm.total_ptr + offs_t[:, None] * H + columns
            tl.store(places, total.to(norm.total_ptr.dtype.element_ty), mask=stored & (columns < H))
            squares += tl.sum(total * total, axis=1)
        scale = tl.rsqrt(squares / H + norm.eps)[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for h in range(0, H, BLOCK_H):
        columns = h + offs_h[None, :]
        y = _load_sum(rows, residual, columns, H, live).to(out.logits_ptr.dtype.element_ty)
        if norm is not None:
            weight = tl.load(norm.weight + columns, mask=columns < H, other=0.0)
            y = apply_norm(y.to(tl.float32), scale, weight, y.dtype)
            tl.store(y_ptr + offs_t[:, None] * H + columns, y, mask=stored & (columns < H))
        acc = tl.dot(y, _load_gate(gate, offs_e, h + offs_h, E, H).T, acc)
    _store_logits_and_routes(acc, out, bias_ptr, offs_t, offs_e, T, E, TOP_K, ROUTER, BLOCK_K)


@dataclass(frozen=True)
class GateSizes:
    """As RouteSizes (route.py)."""

    T: int
    H: int
    E: int
    K: int
    renormalize: bool = True
    deterministic: bool = False
    scoring: str = "softmax"
    bias: bool = False
    groups: tuple[int, int] | None = None
    scale: float = 1.0


def gate_configs(sizes: GateSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """A tile holds as much of the gate as registers allow: all of Mixtral 8x7B's in 16 bits."""
    T, E, free = sizes.T, sizes.E, not sizes.deterministic
    block_e, block_k = power_of_2(E), power_of_2(sizes.K)
    tile = next((tile for tile in reversed(GATE_TILES) if tile.T <= T), None)
    if tile is not None and free and E >= 16 and dtype.itemsize == 2:
        part = min(block_e, tile.BLOCK_E)
        tiles = {"BLOCK_T": tile.BLOCK_T, "BLOCK_E": part, "BLOCK_H": power_of_2(sizes.H, low=16, high=tile.BLOCK_H)}
        kernel, config = "gate_route_tile_kernel", LaunchConfig(tiles, tile.num_warps, tile.num_stages)
    else:
        part = power_of_2(block_e * T // PROGRAMS, high=block_e) if free and E * sizes.H > WHOLE else block_e
        tiles = {"BLOCK_E": part, "BLOCK_H": power_of_2(sizes.H, high=max(16, TILE_BYTES // dtype.itemsize // part))}
        warps = power_of_2(part * tiles["BLOCK_H"] // (2048 if part == block_e else 512), high=16)
        kernel, config = "gate_route_kernel", LaunchConfig(tiles, num_warps=warps)
    gate = {kernel: LaunchConfig(tiles | {"BLOCK_K": block_k}, config.num_warps, config.num_stages)}
    return gate if part == block_e else gate | configs(sizes, dtype, arch)


Gate = Annotated[Tensor, "E H"]


def _gate_flops(case: GateSizes) -> int:
    return route_flops(case) + 2 * case.T * case.E * case.H


_NAMES = "renormalize", "scoring", "bias", "groups", "scale"
_GATE_FIELDS: dict[str, Any] = {
    "case": GateSizes,
    # Of the returned logits.
    "derived_outputs": lambda args, results: reference.route(
        results[-3], args["top_k"], **{name: args[name] for name in _NAMES if name in args}
    ),
    "test_shapes": (
        *shapes(GateSizes, "1 128 8 2, 19 80 8 2, 33 300 16 3, 2 64 160 6, 3 64 1 1, 2 4200 8 2"),
        *shapes(GateSizes, "19 80 8 2", renormalize=False),
        # A part of the experts a program; tiles of tokens, with a part and with all.
        *shapes(GateSizes, "1 520 100 4, 3 520 100 4, 130 80 40 2, 1030 40 20 2, 2050 24 16 2"),
    ),
    "bench_shapes": (
        *(GateSizes(T, H, 8, 2) for T in (1, 64, 4096) for H in (4096, 6144)),
        *shapes(GateSizes, "1 2048 128 8, 8 2048 128 8, 64 2048 128 8, 256 2048 128 8"),  # of Qwen3-30B-A3B
        *shapes(GateSizes, "1024 2048 128 8, 4096 2048 128 8"),
        *shapes(GateSizes, "1 2048 128 8, 4096 2048 128 8", deterministic=True),
        *shapes(GateSizes, "1 2048 64 8, 4096 2048 64 8", renormalize=False),  # of OLMoE-1B-7B
    ),
}


@operation(
    reference=reference.gate_route,
    flops=_gate_flops,
    rule=check_router,
    **_GATE_FIELDS
    | {
        "test_shapes": (
            *_GATE_FIELDS["test_shapes"],
            *(GateSizes(T, 72, 32, 3, **ROUTERS[0]) for T in (5, 1030)),
        ),
        "bench_shapes": (
            *_GATE_FIELDS["bench_shapes"],
            *(GateSizes(T, 7168, 256, 8, **ROUTERS[0]) for T in (1, 4096)),
            GateSizes(1, 2560, 64, 6, **ROUTERS[2]),
        ),
    },
)
def gate_route(
    x: Tokens,
    gate: Gate,
    top_k: TopK,
    deterministic: bool = False,
    renormalize: bool = True,
    scoring: str = "softmax",
    bias: Bias | None = None,
    groups: TopGroups | None = None,
    scale: float = 1.0,
) -> tuple[Logits, RoutingWeights, Ids]:
    """Multiply tokens with the gate and select their experts (`route`), in one launch, or in two for few tokens
    and many experts.

    x              [T, H], fp32, bf16 or fp16
    gate           [E, H] in x's dtype
    top_k          K, in 1..E
    deterministic  a token's bits do not depend on the other tokens: one token a program
    renormalize, scoring, bias, groups, scale  as in `route`

    Returns logits [T, E] in x's dtype, routing weights fp32 [T, K] and expert ids int32 [T, K]. Raises ValueError for
    another shape, dtype or device.

    >>> logits, routing_weights, ids = ops.gate_route(torch.randn(3, 64), torch.randn(8, 64), top_k=2)
    """
    return _launch_gate(x, gate, top_k, deterministic, Router.of(renormalize, scoring, groups, scale), bias)


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
    """Add the residual, normalize the sum (`rms_norm`), and route the norm (`gate_route`), in as many launches as that.

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
    norm = FusedNorm.of(residual, weight, total, eps)
    router = Router.of(renormalize, "softmax", None, 1.0)
    return y, total, *_launch_gate(x, gate, top_k, deterministic, router, None, y, norm)


def _launch_gate(
    x: Tensor,
    gate: Tensor,
    top_k: int,
    deterministic: bool,
    router: Router,
    bias: Tensor | None,
    y: Tensor | None = None,
    norm: FusedNorm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    (T, H), E = x.shape, len(gate)
    logits = torch.empty((T, E), dtype=x.dtype, device=x.device)
    weights, ids = empty_routes(T, top_k, x.device)
    selected = select_configs(gate_configs, GateSizes(T, H, E, top_k, deterministic=deterministic), x.dtype, x.device)
    selects = "route_kernel" not in selected
    kernel = gate_route_tile_kernel if "gate_route_tile_kernel" in selected else gate_route_kernel
    config = selected[kernel.__name__]
    launch(
        kernel,
        (triton.cdiv(T, config.constexprs.get("BLOCK_T", 1)), triton.cdiv(E, config.constexprs["BLOCK_E"])),
        config,
        x=Rows.of(x),
        norm=norm,
        gate=Rows.of(gate),
        bias_ptr=bias.contiguous() if selects and bias is not None else None,
        y_ptr=y,
        out=GateResults(logits, weights if selects else None, ids if selects else None),
        T=T,
        E=E,
        H=H,
        TOP_K=top_k,
        ROUTER=router,
    )
    if not selects:
        launch_route(logits, bias, weights, ids, router)
    return logits, weights, ids
