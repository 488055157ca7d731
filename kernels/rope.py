"""rope: rotary embedding of q and k; append: into the ring cache; rope_append: both in one launch, for decode.

B batch, T tokens, Hq query heads, Hkv key/value heads, D head size, P rows of the tables, C slots of a cache
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import FLOATS, INTS, Binder, fail, in_range
from .launch import launch, target_arch
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, power_of_2, sample


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


@triton.jit
def _stored_heads(t, new, C, Hkv):
    """Token t of a chunk enters the ring if it is among the first `new`, and no later one of them takes its slot."""
    return tl.where((t < new) & (t >= new - C), Hkv, 0)


@triton.jit
def _copy_heads(x_ptr, y_ptr, stride_xh, stride_yh, heads, D, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_h < heads) & (offs_d < D)
    tl.store(y_ptr + offs_h * stride_yh + offs_d, tl.load(x_ptr + offs_h * stride_xh + offs_d, mask=mask), mask=mask)


@triton.jit
def rope_kernel(
    q_ptr,  # [B, T, Hq, D]
    k_ptr,  # [B, T, Hkv, D]
    v_ptr,  # [B, T, Hkv, D], or None
    cos_ptr,  # [P, D / 2] fp32
    sin_ptr,  # [P, D / 2] fp32
    positions_ptr,  # [B, T], or with APPEND [B]: the position of token 0
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
    position = tl.load(positions_ptr + b * stride_pb + t * stride_pt).to(tl.int64)
    row = t
    stored = Hkv
    if APPEND:
        position += t
        row = position % C
        stored = _stored_heads(t, tl.load(new_ptr + b), C, Hkv)
    half = D // 2
    offs_d = tl.arange(0, BLOCK_HALF)
    # A position outside the tables reads nothing and gives NaN: loud, where a host check would stall the stream.
    mask = offs_d < tl.where((position >= 0) & (position < P), half, 0)
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
        _copy_heads(v, v_out_ptr + out, stride_vh, stride_oh, stored, D, BLOCK_HKV, 2 * BLOCK_HALF)


@triton.jit
def append_kernel(
    k_ptr,  # [B, T, Hkv, D]
    v_ptr,  # [B, T, Hkv, D]
    past_ptr,  # [B] the position of token 0
    new_ptr,  # [B] how many of the T tokens to append
    k_cache_ptr,  # [B, Hkv, C, D]
    v_cache_ptr,  # [B, Hkv, C, D]
    C,
    Hkv,
    D,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_cb,
    stride_ch,
    stride_cs,
    BLOCK_HKV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    stored = _stored_heads(t, tl.load(new_ptr + b), C, Hkv)
    slot = (tl.load(past_ptr + b).to(tl.int64) + t) % C
    out = b * stride_cb + slot * stride_cs
    k = k_ptr + b * stride_kb + t * stride_kt
    v = v_ptr + b * stride_vb + t * stride_vt
    _copy_heads(k, k_cache_ptr + out, stride_kh, stride_ch, stored, D, BLOCK_HKV, BLOCK_D)
    _copy_heads(v, v_cache_ptr + out, stride_vh, stride_ch, stored, D, BLOCK_HKV, BLOCK_D)


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """One token a program: all its heads share one row of the tables."""
    half, hkv = power_of_2(sizes["D"] // 2), power_of_2(sizes["Hkv"])
    hq = power_of_2(sizes.get("Hq", 1))
    return {
        "rope_kernel": LaunchConfig({"BLOCK_HQ": hq, "BLOCK_HKV": hkv, "BLOCK_HALF": half}, num_warps=4),
        "append_kernel": LaunchConfig({"BLOCK_HKV": hkv, "BLOCK_D": 2 * half}, num_warps=2),
    }


def _bind_heads(binder: Binder, **tensors: tuple[Tensor, str]) -> None:
    dtype = next(iter(tensors.values()))[0].dtype
    for name, (value, letters) in tensors.items():
        binder.tensor(name, value, letters, (dtype,) if dtype in FLOATS else FLOATS)


def _bind_tables(binder: Binder, q: Tensor, cos: Tensor, sin: Tensor) -> None:
    D = binder.sizes["D"]
    if D % 2:
        raise fail(binder.op, "q", f"of head size {D}", "an even head size")
    for name, table in (("cos", cos), ("sin", sin)):
        binder.tensor(name, table, f"P {D // 2}", (torch.float32,))


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Sizes:
    binder = Binder("rope")
    _bind_heads(binder, q=(q, "B T Hq D"), k=(k, "B T Hkv D"))
    binder.positive("D", "Hq", "Hkv")
    _bind_tables(binder, q, cos, sin)
    binder.tensor("positions", positions, "B T", INTS)
    in_range("rope", "positions", positions, 0, binder.sizes["P"] - 1)
    return binder.sizes


def bind_cache(binder: Binder, k_cache: Tensor, v_cache: Tensor, past: Tensor, new: Tensor) -> None:
    """The ring caches [B,Hkv,C,D], and where each sequence stands: past and new int32 or int64 [B]."""
    _bind_heads(binder, k_cache=(k_cache, "B Hkv C D"), v_cache=(v_cache, "B Hkv C D"))
    binder.positive("C")
    if k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise fail(binder.op, "v_cache", f"of strides {v_cache.stride()}", "those of k_cache, the last of them 1")
    binder.tensor("past", past, "B", INTS)
    binder.tensor("new", new, "B", INTS)
    in_range(binder.op, "past", past, 0, (1 << 31) - 1)
    if "T" in binder.sizes:
        in_range(binder.op, "new", new, 0, binder.sizes["T"])


def check_append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, past: Tensor, new: Tensor) -> Sizes:
    binder = Binder("append")
    _bind_heads(binder, k=(k, "B T Hkv D"), v=(v, "B T Hkv D"), k_cache=(k_cache, "B Hkv C D"))
    bind_cache(binder, k_cache, v_cache, past, new)
    return binder.sizes


def check_rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, past: Tensor, new: Tensor
) -> Sizes:
    binder = Binder("rope_append")
    _bind_heads(binder, q=(q, "B T Hq D"), k=(k, "B T Hkv D"), v=(v, "B T Hkv D"), k_cache=(k_cache, "B Hkv C D"))
    binder.positive("D", "Hq", "Hkv")
    _bind_tables(binder, q, cos, sin)
    bind_cache(binder, k_cache, v_cache, past, new)
    return binder.sizes


def _strides(letter: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{letter}{dim}": stride for dim, stride in zip("bth", x.stride(), strict=False)}


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Triton way of `reference.rope`."""
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    return _launch_rope(q, k, None, cos, sin, positions, None, k_out, None), k_out


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, past: Tensor, new: Tensor
) -> Tensor:
    """Triton way of `reference.rope_append`: one launch. Right where no query of the chunk needs what it overwrites."""
    slots = (k_cache.transpose(1, 2), v_cache.transpose(1, 2))
    return _launch_rope(q, k, dense_rows(v), cos, sin, past, new, *slots)


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
        **_strides("q", q),
        **_strides("k", k),
        **_strides("v", k if v is None else v),
        "stride_pb": positions.stride(0),
        "stride_pt": 0 if v is not None else positions.stride(1),
        **_strides("o", k_out),
    }
    config = configs(sizes, q.dtype, target_arch(q.device))["rope_kernel"]
    launch(rope_kernel, (T, B), args, config, APPEND=v is not None)
    return q_out


def append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, past: Tensor, new: Tensor) -> None:
    """Triton way of `reference.append`."""
    k, v = dense_rows(k), dense_rows(v)
    B, T, Hkv, D = k.shape
    args = {
        "k_ptr": k,
        "v_ptr": v,
        "past_ptr": past.contiguous(),
        "new_ptr": new.contiguous(),
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "C": k_cache.shape[2],
        "Hkv": Hkv,
        "D": D,
        **_strides("k", k),
        **_strides("v", v),
        "stride_cb": k_cache.stride(0),
        "stride_ch": k_cache.stride(1),
        "stride_cs": k_cache.stride(2),
    }
    config = configs({"D": D, "Hkv": Hkv}, k.dtype, target_arch(k.device))["append_kernel"]
    launch(append_kernel, (T, B), args, config)


def empty(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))  # type: ignore[return-value]


def _tables(P: int, D: int, device: Any) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(P), 10000.0 ** -(torch.arange(0, D, 2) / D))
    return angles.cos().to(device), angles.sin().to(device)


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    B, T, D, P = sizes["B"], sizes["T"], sizes["D"], sizes["P"]
    q, k = (sample(B, T, sizes[h], D, dtype=dtype, device=device, generator=generator) for h in ("Hq", "Hkv"))
    cos, sin = _tables(P, D, device)
    positions = (torch.arange(T) * 7 + torch.arange(B)[:, None] * 5) % P
    return {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions.to(device)}


def cache_inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    """Caches that hold something, and where each sequence stands: sequence b has past `past` + 3 b, new T - b."""
    B, T, Hkv, C, D = (sizes[letter] for letter in ("B", "T", "Hkv", "C", "D"))
    k_cache, v_cache = (sample(B, Hkv, C, D, dtype=dtype, device=device, generator=generator) for _ in range(2))
    b = torch.arange(B, dtype=torch.int32)
    past, new = (sizes["past"] + 3 * b).to(device), (T - b).clamp(min=0).to(device)
    return {"k_cache": k_cache, "v_cache": v_cache, "past": past, "new": new}


def append_inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    shape = tuple(sizes[letter] for letter in ("B", "T", "Hkv", "D"))
    k, v = (sample(*shape, dtype=dtype, device=device, generator=generator) for _ in range(2))
    return {"k": k, "v": v, **cache_inputs(sizes, dtype, device, generator)}


def rope_append_inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    rotated = inputs({**sizes, "P": 8192}, dtype, device, generator)
    del rotated["positions"]
    return {**rotated, **append_inputs(sizes, dtype, device, generator)} | {"k": rotated["k"]}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Each element of q and k (and v, where appended) read once and written once, and one row of the tables a token."""
    tokens, D = sizes["B"] * sizes["T"], sizes["D"]
    rotated = tokens * (sizes.get("Hq", 0) + sizes["Hkv"]) * D
    copied = tokens * sizes["Hkv"] * D if "C" in sizes else 0
    return Cost(flops=3 * rotated, bytes=2 * (rotated + copied) * dtype.itemsize + tokens * D * 4)


_HEADS = ((4, 4), (8, 2), (4, 1))
_CACHES = ({"C": 16, "past": 0}, {"C": 16, "past": 13}, {"C": 64, "past": 40})

OP = Op(
    name="rope",
    check=check,
    run=rope,
    reference=reference.rope,
    empty=empty,
    inputs=inputs,
    configs=configs,
    cost=cost,
    test_shapes=tuple(
        {"B": 2, "T": T, "Hq": hq, "Hkv": hkv, "D": D, "P": 96}
        for T, D, (hq, hkv) in zip((1, 5, 3, 4, 2), (64, 80, 96, 128, 32), (*_HEADS, *_HEADS), strict=False)
    ),
    bench_shapes=tuple({"B": 1, "T": T, "Hq": 32, "Hkv": 8, "D": 128, "P": 32768} for T in (1, 4096)),
)

APPEND_OP = Op(
    name="append",
    check=check_append,
    run=append,
    reference=reference.append,
    empty=lambda *args: None,
    inputs=append_inputs,
    configs=configs,
    cost=cost,
    test_shapes=tuple({"B": 2, "T": T, "Hkv": 2, "D": 80, **cache} for cache in _CACHES for T in (1, 15, 40)),
    bench_shapes=tuple({"B": 1, "T": T, "Hkv": 8, "D": 128, "C": 4096, "past": 0} for T in (2048,)),
    mutates=("k_cache", "v_cache"),
)

ROPE_APPEND_OP = Op(
    name="rope_append",
    check=check_rope_append,
    run=rope_append,
    reference=reference.rope_append,
    empty=lambda q, *args: torch.empty(q.shape, dtype=q.dtype, device=q.device),
    inputs=rope_append_inputs,
    configs=configs,
    cost=cost,
    test_shapes=tuple({"B": 3, "T": 1, "Hq": 8, "Hkv": 2, "D": D, **cache} for cache in _CACHES for D in (96, 128)),
    bench_shapes=tuple({"B": B, "T": 1, "Hq": 32, "Hkv": 8, "D": 128, "C": 4096, "past": 4000} for B in (1, 32)),
    mutates=("k_cache", "v_cache"),
)
