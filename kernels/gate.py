"""gate_route: the gate's logits, and the route by them; rms_norm_gate_route: before them the residual add and norm.

T tokens, H hidden, E experts, K experts a token

A program takes one token against the whole gate: a tile of several would have padding, and would keep fewer SMs busy.
So a token's bits depend on no other one.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import INT32, SINGLE, Above, Within
from .launch import launch, select_configs
from .norm import normed
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, power_of_2, sample
from .pdl import pdl_wait
from .router import choose, store_choice, unset_choice
from .router import cost as route_cost

PIECE = 32768  # numbers of the gate that a program holds at once


@triton.jit
def _gate_piece(gate_ptr, stride_ge, h, E, H: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr):
    """Columns h.. of the gate [BLOCK_E, BLOCK_H]."""
    offs_e, offs_h = tl.arange(0, BLOCK_E), h + tl.arange(0, BLOCK_H)
    ptrs = gate_ptr + offs_e.to(tl.int64)[:, None] * stride_ge + offs_h[None, :]
    return tl.load(ptrs, mask=(offs_e < E)[:, None] & (offs_h < H)[None, :], other=0.0)


@triton.jit
def _norm_piece(norm_ptr, h, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Columns h.. of the norm's weight [BLOCK_H]."""
    offs_h = h + tl.arange(0, BLOCK_H)
    return tl.load(norm_ptr + offs_h, mask=offs_h < H, other=0.0)


@triton.jit
def _summed(x_ptr, residual_ptr, h, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Columns h.. of a row, with the residual, as fp32 of a number rounded to x's dtype."""
    offs_h = h + tl.arange(0, BLOCK_H)
    x = tl.load(x_ptr + offs_h, mask=offs_h < H, other=0.0)
    values = x.to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs_h, mask=offs_h < H, other=0.0)
        # The next layer reads the rounded sum, so the norm must see it too.
        values = (values + residual.to(tl.float32)).to(x.dtype).to(tl.float32)
    return values


@triton.jit
def _kept_square(total_ptr, values, h, H: tl.constexpr):
    """The sum of the squares of columns h.. of a row, which is stored."""
    offs_h = h + tl.arange(0, values.shape[0])
    tl.store(total_ptr + offs_h, values.to(total_ptr.dtype.element_ty), mask=offs_h < H)
    return tl.sum(values * values, axis=0)


@triton.jit
def _products(y_ptr, values, scale, gate, weight, h, H: tl.constexpr):
    """[BLOCK_E] products of columns h.. of a row, normed and stored where a norm is asked for, with the gate's."""
    if weight is not None:
        offs_h = h + tl.arange(0, values.shape[0])
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        y = normed(values, scale, weight, dtype)
        tl.store(y_ptr + offs_h, y, mask=offs_h < H)
        values = y.to(tl.float32)
    return tl.sum(gate.to(tl.float32) * values[None, :], axis=1)


@triton.jit(do_not_specialize=["T"])
def gate_route_kernel(
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H], or None: no norm
    norm_ptr,  # [H] weight of the norm of x + residual, or None
    gate_ptr,  # [E, H]
    y_ptr,  # [T, H] out: that norm, or None
    total_ptr,  # [T, H] out: x + residual, or None
    logits_ptr,  # [T, E] out
    weights_ptr,  # [T, K] out, fp32
    ids_ptr,  # [T, K] out, int32
    T,
    E,
    stride_xt,
    stride_rt,
    stride_ge,
    eps,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    gate = _gate_piece(gate_ptr, stride_ge, 0, E, H, BLOCK_E, BLOCK_H)
    weight = None if norm_ptr is None else _norm_piece(norm_ptr, 0, H, BLOCK_H)
    pdl_wait(PDL)
    x, residual, y, total = x_ptr + t * stride_xt, residual_ptr, y_ptr, total_ptr
    if residual_ptr is not None:
        residual, y, total = residual_ptr + t * stride_rt, y_ptr + t * H, total_ptr + t * H
    values, scale = _summed(x, residual, 0, H, BLOCK_H), 1.0
    if residual_ptr is not None:
        squares = _kept_square(total, values, 0, H)
        for h in range(BLOCK_H, H, BLOCK_H):
            squares += _kept_square(total, _summed(x, residual, h, H, BLOCK_H), h, H)
        scale = tl.rsqrt(squares / H + eps)
    acc = _products(y, values, scale, gate, weight, 0, H)
    for h in range(BLOCK_H, H, BLOCK_H):
        piece = _gate_piece(gate_ptr, stride_ge, h, E, H, BLOCK_E, BLOCK_H)
        own_weight = None if norm_ptr is None else _norm_piece(norm_ptr, h, H, BLOCK_H)
        acc += _products(y, _summed(x, residual, h, H, BLOCK_H), scale, piece, own_weight, h, H)
    logits, offs_e = acc[None, :].to(logits_ptr.dtype.element_ty), tl.arange(0, BLOCK_E)
    tl.store(logits_ptr + t * E + offs_e[None, :], logits, mask=(offs_e < E)[None, :])
    # The route is that of the rounded logits, which a caller may see.
    weights, ids = choose(logits.to(tl.float32), E, TOP_K, 1, BLOCK_E, BLOCK_K)
    store_choice(weights_ptr, ids_ptr, weights, ids, t + tl.arange(0, 1), T, TOP_K, BLOCK_K)


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """Of the gate as much at once as registers hold: all of Mixtral 8x7B's."""
    block_e = power_of_2(sizes["E"])
    tiles = {"BLOCK_E": block_e, "BLOCK_H": power_of_2(sizes["H"], high=max(16, PIECE // block_e))}
    warps = power_of_2(block_e * tiles["BLOCK_H"] // 2048, high=16)
    return {"gate_route_kernel": LaunchConfig(tiles | {"BLOCK_K": power_of_2(sizes["K"])}, num_warps=warps)}


Gate = Annotated[Tensor, "E H"]
Tokens = Annotated[Tensor, "T H"]
TopK = Annotated[int, "K", Within(1, "E")]
Logits = Annotated[Tensor, "T E"]
Scores = Annotated[Tensor, "T K", SINGLE]
Ids = Annotated[Tensor, "T K", INT32]


def gate_route(x: Tokens, gate: Gate, top_k: TopK, deterministic: bool = False) -> tuple[Logits, Scores, Ids]:
    """The gate's matrix product and `route` of it -> logits, weights, ids: see `reference.gate_route`.

    A token's bits do not depend on the other tokens in any case.
    """
    return _launch(x, gate, top_k)


def rms_norm_gate_route(
    x: Tokens,
    residual: Tokens,
    weight: Annotated[Tensor, "H"],
    eps: Annotated[float, Above(0.0)],
    gate: Gate,
    top_k: TopK,
    deterministic: bool = False,
) -> tuple[Tokens, Tokens, Logits, Scores, Ids]:
    """The norm y of x + residual, the sum, and `gate_route` of y -> y, sum, logits, weights, ids.

    A token's bits do not depend on the other tokens in any case.
    """
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    norm = {"residual_ptr": dense_rows(residual), "norm_ptr": weight.contiguous(), "y_ptr": y, "total_ptr": total}
    return y, total, *_launch(x, gate, top_k, **norm, eps=eps)


def _launch(x: Tensor, gate: Tensor, top_k: int, **norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    (T, H), E = x.shape, len(gate)
    logits = torch.empty((T, E), dtype=x.dtype, device=x.device)
    weights, ids = unset_choice(T, top_k, x.device)
    config = select_configs(configs, {"T": T, "H": H, "E": E, "K": top_k}, x.dtype, x.device)["gate_route_kernel"]
    x, gate = dense_rows(x), dense_rows(gate)
    norm = norm or {"residual_ptr": None, "norm_ptr": None, "y_ptr": None, "total_ptr": None, "eps": 0.0}
    residual = norm["residual_ptr"]
    args = {"x_ptr": x, "gate_ptr": gate, "logits_ptr": logits, "weights_ptr": weights, "ids_ptr": ids, "T": T, "E": E}
    args |= {"stride_xt": x.stride(0), "stride_rt": 0 if residual is None else residual.stride(0)}
    args |= {"stride_ge": gate.stride(0), **norm}
    launch(gate_route_kernel, (T,), args, config, H=H, TOP_K=top_k)
    return logits, weights, ids


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    T, H, E = sizes["T"], sizes["H"], sizes["E"]
    x = sample(T, H, dtype=dtype, device=device, generator=generator)
    gate = sample(E, H, dtype=dtype, device=device, generator=generator, scale=2.0 * H**-0.5)
    return {"x": x, "gate": gate, "top_k": sizes["K"]}


def inputs_norm(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    residual = sample(sizes["T"], sizes["H"], dtype=dtype, device=device, generator=generator)
    norm = {"weight": sample(sizes["H"], dtype=dtype, device=device, generator=generator), "eps": 1e-5}
    return {**inputs(sizes, dtype, device, generator), "residual": residual, **norm}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    T, H, E = sizes["T"], sizes["H"], sizes["E"]
    rest = route_cost(sizes, dtype)
    return Cost(flops=2 * T * H * E + rest.flops, bytes=(T * H + E * H) * dtype.itemsize + rest.bytes)


def cost_norm(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """The gate's, the residual in, the sum and the norm out, the norm's weight."""
    gate, T, H = cost(sizes, dtype), sizes["T"], sizes["H"]
    return Cost(flops=gate.flops + 5 * T * H, bytes=gate.bytes + (3 * T + 1) * H * dtype.itemsize)


def derived_outputs(args: Any, results: Any) -> Any:
    """The route is exactly that of the logits beside it, whichever way they were rounded."""
    return reference.route(results[-3], args["top_k"])


def _shape(T: int, H: int, E: int, K: int) -> Sizes:
    return {"T": T, "H": H, "E": E, "K": K}


OP = Op(
    run=gate_route,
    reference=reference.gate_route,
    inputs=inputs,
    configs=configs,
    cost=cost,
    test_shapes=(
        *(_shape(1, 128, 8, 2), _shape(19, 80, 8, 2), _shape(33, 300, 16, 3), _shape(2, 64, 160, 6)),
        *(_shape(3, 64, 1, 1), _shape(2, 4200, 8, 2)),
    ),
    bench_shapes=tuple(_shape(T, H, 8, 2) for H in (4096, 6144) for T in (1, 64, 4096)),
    derived_outputs=derived_outputs,
)

NORM_OP = Op(
    run=rms_norm_gate_route,
    reference=reference.rms_norm_gate_route,
    inputs=inputs_norm,
    configs=configs,
    cost=cost_norm,
    test_shapes=OP.test_shapes,
    bench_shapes=OP.bench_shapes,
    derived_outputs=derived_outputs,
)
