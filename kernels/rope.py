"""rope: rotary embedding of q and k (Su et al. 2021).

B batch, T tokens, Hq query heads, Hkv key/value heads, D head size, P rows of the tables
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import INTS, SINGLE, Within, constrain, fail
from .launch import launch, select_configs
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, power_of_2, random_inputs, shapes
from .ring import Heads, Queries, strides


@triton.jit
def angles(cos_ptr, sin_ptr, position, P, columns, half):
    """cos and sin [1, columns] of a position; NaN for a position outside the tables, where a host check would stall."""
    inside = (position >= 0) & (position < P)
    at = tl.where(inside, position, 0) * half + columns
    mask = columns < tl.where(inside, half, 0)
    cos = tl.load(cos_ptr + at, mask=mask, other=float("nan"))[None, :]
    return cos, tl.load(sin_ptr + at, mask=mask, other=float("nan"))[None, :]


@triton.jit
def _rotate(
    x_ptr,  # [heads, D] of one token
    y_ptr,  # [heads, D] out
    stride_xh, stride_yh,
    cos,  # [1, BLOCK_D] fp32
    sin,  # [1, BLOCK_D] fp32
    heads,
    half,  # D / 2
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_h < heads) & (offs_d < half)
    low = tl.load(x_ptr + offs_h * stride_xh + offs_d, mask=mask, other=0.0)
    high = tl.load(x_ptr + offs_h * stride_xh + offs_d + half, mask=mask, other=0.0).to(tl.float32)
    dtype = low.dtype
    low = low.to(tl.float32)
    out = y_ptr + offs_h * stride_yh + offs_d
    tl.store(out, (low * cos - high * sin).to(dtype), mask=mask)
    tl.store(out + half, (high * cos + low * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["T", "C", "stride_pb", "stride_pt"])
def rope_kernel(
    q_ptr,  # [B, T, Hq, D]
    k_ptr,  # [B, T, Hkv, D]
    cos_ptr,  # [P, D / 2] fp32
    sin_ptr,  # [P, D / 2] fp32
    positions_ptr,  # [B, T]
    q_out_ptr,  # [B, T, Hq, D] out
    k_out_ptr,  # [B, T, Hkv, D] out
    T, P, Hq, Hkv, D,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_pb, stride_pt,
    BLOCK_HQ: tl.constexpr, BLOCK_HKV: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(positions_ptr + b * stride_pb + t * stride_pt).to(tl.int64)
    cos, sin = angles(cos_ptr, sin_ptr, position, P, tl.arange(0, BLOCK_HALF), D // 2)
    q, k, token = q_ptr + b * stride_qb + t * stride_qt, k_ptr + b * stride_kb + t * stride_kt, b * T + t
    _rotate(q, q_out_ptr + token * Hq * D, stride_qh, D, cos, sin, Hq, D // 2, BLOCK_HQ, BLOCK_HALF)
    _rotate(k, k_out_ptr + token * Hkv * D, stride_kh, D, cos, sin, Hkv, D // 2, BLOCK_HKV, BLOCK_HALF)


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """One token a program: its heads share one row of the tables."""
    tiles = {"BLOCK_HQ": power_of_2(sizes.get("Hq", 1)), "BLOCK_HKV": power_of_2(sizes["Hkv"])}
    return {"rope_kernel": LaunchConfig(tiles | {"BLOCK_HALF": power_of_2(sizes["D"] // 2)}, num_warps=4)}


def check_head_size(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    if sizes["D"] % 2:
        raise fail(op, "q", f"of head size {sizes['D']}", "an even head size")


Table = Annotated[Tensor, "P D//2", SINGLE]


@constrain(rule=check_head_size)
def rope(
    q: Queries, k: Heads, cos: Table, sin: Table, positions: Annotated[Tensor, "B T", INTS, Within(0, "P - 1")]
) -> tuple[Queries, Heads]:
    """Rotate the halves of q and k against each other -> q, k (`reference.rope`)."""
    q, k = dense_rows(q), dense_rows(k)
    B, T, Hq, D = q.shape
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    sizes = {"D": D, "Hq": Hq, "Hkv": k.shape[2]}
    args: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "cos_ptr": cos.contiguous(), "sin_ptr": sin.contiguous()}
    args |= {"positions_ptr": positions, "q_out_ptr": q_out, "k_out_ptr": k_out, "T": T, "P": len(cos), **sizes}
    args |= strides("q", q) | strides("k", k) | strides("p", positions)
    launch(rope_kernel, (T, B), args, select_configs(configs, sizes, q.dtype, q.device)["rope_kernel"])
    return q_out, k_out


def tables(P: int, D: int, device: Any) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(P), 10000.0 ** -(torch.arange(0, D, 2) / D))
    return angles.cos().to(device), angles.sin().to(device)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    B, T, P = sizes["B"], sizes["T"], sizes["P"]
    cos, sin = tables(P, sizes["D"], device)
    positions = (torch.arange(T) * 7 + torch.arange(B)[:, None] * 5) % P
    return {"cos": cos, "sin": sin, "positions": positions.to(device)}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Count each element of q and k read and written once, and one row of the tables a token."""
    tokens, D = sizes["B"] * sizes["T"], sizes["D"]
    rotated = tokens * (sizes["Hq"] + sizes["Hkv"]) * D
    return Cost(flops=3 * rotated, bytes=2 * rotated * dtype.itemsize + tokens * D * 4)


OP = Op(
    run=rope,
    reference=reference.rope,
    inputs=random_inputs(rope, _inputs),
    configs=configs,
    cost=cost,
    test_shapes=shapes("B T Hq Hkv D P", "2 1 4 4 64 96, 2 5 8 2 80 96, 2 3 4 1 96 96, 2 4 4 4 128 96, 2 2 8 2 32 96"),
    bench_shapes=shapes("B T Hq Hkv D P", "1 1 32 8 128 32768, 1 4096 32 8 128 32768"),
)
