"""rope: rotary embedding of q and k; rope_append: the same, and k and v into the ring cache, in one launch for decode.

B batch, T tokens, Hq query heads, Hkv key/value heads, D head size, P rows of the tables, C slots of a cache
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference, ring
from .checks import INTS, SINGLE, Within, fail
from .launch import choices, launch
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, power_of_2, sample
from .ring import CACHES, Heads, New, Past, Queries, Slots, copy_heads, ring_rule, standing, stored_heads, strides


@triton.jit
def _rotate(
    x_ptr,  # [heads, D] of one token
    y_ptr,  # [heads, D] out
    stride_xh,
    stride_yh,
    cos,  # [1, BLOCK_D] fp32
    sin,  # [1, BLOCK_D] fp32
    heads,
    stored,  # how many of the heads are written
    half,  # D / 2
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_h < heads) & (offs_d < half)
    low = tl.load(x_ptr + offs_h * stride_xh + offs_d, mask=mask, other=0.0)
    high = tl.load(x_ptr + offs_h * stride_xh + offs_d + half, mask=mask, other=0.0).to(tl.float32)
    dtype = low.dtype
    low = low.to(tl.float32)
    out = y_ptr + offs_h * stride_yh + offs_d
    mask = mask & (offs_h < stored)
    tl.store(out, (low * cos - high * sin).to(dtype), mask=mask)
    tl.store(out + half, (high * cos + low * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["T", "C", "stride_pb", "stride_pt"])
def rope_kernel(
    q_ptr,  # [B, T, Hq, D]
    k_ptr,  # [B, T, Hkv, D]
    v_ptr,  # [B, T, Hkv, D], or None
    cos_ptr,  # [P, D / 2] fp32
    sin_ptr,  # [P, D / 2] fp32
    positions_ptr,  # [B, T], or with APPEND [B], contiguous: the position of token 0
    new_ptr,  # [B] how many of the T tokens to append, or None
    q_out_ptr,  # [B, T, Hq, D] out
    k_out_ptr,  # [B, T, Hkv, D] out, or with APPEND the cache [B, Hkv, C, D]
    v_out_ptr,  # the other cache, or None
    T,
    P,
    C,
    Hq,
    Hkv,
    D,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_pb,
    stride_pt,
    stride_ob,  # of k_out (and v_out): batch, token or slot, head
    stride_ot,
    stride_oh,
    APPEND: tl.constexpr,
    BLOCK_HQ: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    row = t
    stored = Hkv
    if APPEND:
        past, new = standing(positions_ptr, new_ptr, b, T)
        position = past + t
        row = position % C
        stored = stored_heads(t, new, C, Hkv)
        # Padding may stand past the last position: what it gives means nothing, but is no NaN.
        position = tl.where(stored > 0, position, tl.minimum(position, P - 1))
        position = tl.where(new < 0, P, position)
    else:
        position = tl.load(positions_ptr + b * stride_pb + t * stride_pt).to(tl.int64)
    half = D // 2
    offs_d = tl.arange(0, BLOCK_HALF)
    # A position outside the tables reads nothing and gives NaN: loud, where a host check would stall the stream.
    inside = (position >= 0) & (position < P)
    mask = offs_d < tl.where(inside, half, 0)
    position = tl.where(inside, position, 0)
    cos = tl.load(cos_ptr + position * half + offs_d, mask=mask, other=float("nan"))[None, :]
    sin = tl.load(sin_ptr + position * half + offs_d, mask=mask, other=float("nan"))[None, :]
    q = q_ptr + b * stride_qb + t * stride_qt
    k = k_ptr + b * stride_kb + t * stride_kt
    q_out = q_out_ptr + (b * T + t) * Hq * D
    out = b * stride_ob + row * stride_ot
    _rotate(q, q_out, stride_qh, D, cos, sin, Hq, Hq, half, BLOCK_HQ, BLOCK_HALF)
    _rotate(k, k_out_ptr + out, stride_kh, stride_oh, cos, sin, Hkv, stored, half, BLOCK_HKV, BLOCK_HALF)
    if APPEND:
        v = v_ptr + b * stride_vb + t * stride_vt
        copy_heads(v, v_out_ptr + out, stride_vh, stride_oh, stored, D, BLOCK_HKV, 2 * BLOCK_HALF)


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """One token a program: all its heads share one row of the tables."""
    half, hkv = power_of_2(sizes["D"] // 2), power_of_2(sizes["Hkv"])
    hq = power_of_2(sizes.get("Hq", 1))
    return {
        "rope_kernel": LaunchConfig({"BLOCK_HQ": hq, "BLOCK_HKV": hkv, "BLOCK_HALF": half}, num_warps=4),
    }


def rule(op: str, given: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    if sizes["D"] % 2:
        raise fail(op, "q", f"of head size {sizes['D']}", "an even head size")
    if "k_cache" in given:
        ring_rule(op, given, sizes)


Table = Annotated[Tensor, "P D//2", SINGLE]


def rope(
    q: Queries,
    k: Heads,
    cos: Table,
    sin: Table,
    positions: Annotated[Tensor, "B T", INTS, Within(0, "P - 1")],
) -> tuple[Queries, Heads]:
    """Rotary embedding, halves rotated against each other -> q, k: see `reference.rope`."""
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    return _launch_rope(q, k, None, cos, sin, positions, None, k_out, None), k_out


def rope_append(
    q: Queries,
    k: Heads,
    v: Heads,
    cos: Table,
    sin: Table,
    k_cache: Slots,
    v_cache: Slots,
    past: Past,
    new: New,
) -> Queries:
    """`rope` at positions past[b] + t, k and v straight into the caches -> q: see `reference.rope_append`.

    For chunks none of whose queries needs what they overwrite: T = 1. Where past or new is out of range (a ValueError
    on a CPU), q is NaN and nothing enters the cache.
    """
    slots = (k_cache.transpose(1, 2), v_cache.transpose(1, 2))
    return _launch_rope(q, k, dense_rows(v), cos, sin, past.contiguous(), new.contiguous(), *slots)


def _launch_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    new: Tensor | None,
    k_out: Tensor,
    v_out: Tensor | None,
) -> Tensor:
    q, k = dense_rows(q), dense_rows(k)
    B, T, Hq, D = q.shape
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sizes = {"D": D, "Hq": Hq, "Hkv": k.shape[2]}
    args = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "cos_ptr": cos.contiguous(),
        "sin_ptr": sin.contiguous(),
        "positions_ptr": positions,
        "new_ptr": new,
        "q_out_ptr": q_out,
        "k_out_ptr": k_out,
        "v_out_ptr": v_out,
        "T": T,
        "P": cos.shape[0],
        "C": k_out.shape[1],
        **sizes,
        **strides("q", q),
        **strides("k", k),
        **strides("v", k if v is None else v),
        "stride_pb": positions.stride(0),
        "stride_pt": 0 if v is not None else positions.stride(1),
        **strides("o", k_out),
    }
    config = choices(configs, sizes, q.dtype, q.device)["rope_kernel"]
    launch(rope_kernel, (T, B), args, config, APPEND=v is not None)
    return q_out


def _tables(P: int, D: int, device: Any) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(P), 10000.0 ** -(torch.arange(0, D, 2) / D))
    return angles.cos().to(device), angles.sin().to(device)


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    B, T, D, P = sizes["B"], sizes["T"], sizes["D"], sizes["P"]
    q, k = (sample(B, T, sizes[h], D, dtype=dtype, device=device, generator=generator) for h in ("Hq", "Hkv"))
    cos, sin = _tables(P, D, device)
    positions = (torch.arange(T) * 7 + torch.arange(B)[:, None] * 5) % P
    return {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions.to(device)}


def rope_append_inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    rotated = inputs({**sizes, "P": 8192}, dtype, device, generator)
    del rotated["positions"]
    return {**rotated, **ring.inputs(sizes, dtype, device, generator)} | {"k": rotated["k"]}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Each element of q and k (and v, where appended) read once and written once, and one row of the tables a token."""
    tokens, D = sizes["B"] * sizes["T"], sizes["D"]
    rotated = tokens * (sizes.get("Hq", 0) + sizes["Hkv"]) * D
    copied = tokens * sizes["Hkv"] * D if "C" in sizes else 0
    return Cost(flops=3 * rotated, bytes=2 * (rotated + copied) * dtype.itemsize + tokens * D * 4)


_HEADS = ((4, 4), (8, 2), (4, 1))

OP = Op(
    run=rope,
    reference=reference.rope,
    inputs=inputs,
    configs=configs,
    cost=cost,
    rule=rule,
    test_shapes=tuple(
        {"B": 2, "T": T, "Hq": hq, "Hkv": hkv, "D": D, "P": 96}
        for T, D, (hq, hkv) in zip((1, 5, 3, 4, 2), (64, 80, 96, 128, 32), (*_HEADS, *_HEADS), strict=False)
    ),
    bench_shapes=tuple({"B": 1, "T": T, "Hq": 32, "Hkv": 8, "D": 128, "P": 32768} for T in (1, 4096)),
)

ROPE_APPEND_OP = Op(
    run=rope_append,
    reference=reference.rope_append,
    inputs=rope_append_inputs,
    configs=configs,
    cost=cost,
    test_shapes=tuple({"B": 3, "T": 1, "Hq": 8, "Hkv": 2, "D": D, **cache} for cache in CACHES for D in (96, 128)),
    bench_shapes=tuple({"B": B, "T": 1, "Hq": 32, "Hkv": 8, "D": 128, "C": 4096, "past": 4000} for B in (1, 32)),
    mutates=("k_cache", "v_cache"),
    rule=rule,
)
