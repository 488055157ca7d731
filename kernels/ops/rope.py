"""rope: rotary embedding of q and k (Su et al. 2021); append: keys and values into the ring cache.

B batch, T tokens, Hq query heads, Hkv key/value heads, D head size, P rows of the tables, C slots of a cache; slot
p mod C holds position p
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..launching.kernel_args import Heads
from ..launching.launch import LaunchConfig, launch, select_configs
from ..operation.cases import Cost, operation, shapes
from ..operation.checks import INTS, Within
from ..weights.composite_args import Cache, quantized_vectors, vector_bytes
from .cache_args import (
    CacheArgs,
    HeadNorm,
    HeadNorms,
    KeyHeads,
    New,
    Past,
    Queries,
    RotaryTables,
    Slots,
    Table,
    angles,
    cache_inputs,
    check_caches,
    check_rotated_heads,
    norm_inputs,
    rope_tables,
    sequence_position,
)
from .tiles import power_of_2


@triton.jit
def _copy_heads(x_ptr, y_ptr, stride_xh, stride_yh, heads, D, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_h < heads) & (offs_d < D)
    tl.store(y_ptr + offs_h * stride_yh + offs_d, tl.load(x_ptr + offs_h * stride_xh + offs_d, mask=mask), mask=mask)


@triton.jit
def _quantize_heads(
    x_ptr, y_ptr, scale_ptr, stride_xh, stride_yh, heads, D, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    offs_h, offs_d = tl.arange(0, BLOCK_H).to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    exists = offs_h < heads
    mask = exists[:, None] & (offs_d < D)
    codes, scales = quantized_vectors(tl.load(x_ptr + offs_h[:, None] * stride_xh + offs_d, mask=mask, other=0.0))
    tl.store(y_ptr + offs_h[:, None] * stride_yh + offs_d, codes.to(tl.int8), mask=mask)
    tl.store(scale_ptr + offs_h * (stride_yh // D), scales, mask=exists)


@triton.jit(do_not_specialize=["T", "C"])
def append_kernel(
    k,  # Heads [B, T, Hkv, D]
    v,  # Heads [B, T, Hkv, D]
    past_ptr,  # [B] the position of token 0, or None: 0
    new_ptr,  # [B] how many of the T tokens to append
    cache,  # CacheArgs
    T, C, Hkv, D,
    BLOCK_HKV: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    past, new = sequence_position(new_ptr if past_ptr is None else past_ptr, new_ptr, b, T)
    if past_ptr is None:
        past *= 0  # what it loaded is a count
    # None where t is no new token, or a later token of the chunk takes its slot.
    stored = tl.where((t < new) & (t >= new - C), Hkv, 0)
    out = b * cache.stride_b + (past + t) % C * cache.stride_c
    k_token = k.ptr + b * k.stride_b + t * k.stride_t
    v_token = v.ptr + b * v.stride_b + t * v.stride_t
    k_slot, v_slot, stride_ch = cache.k_ptr + out, cache.v_ptr + out, cache.stride_h
    if cache.k_scales is None:
        _copy_heads(k_token, k_slot, k.stride_h, stride_ch, stored, D, BLOCK_HKV, BLOCK_D)
        _copy_heads(v_token, v_slot, v.stride_h, stride_ch, stored, D, BLOCK_HKV, BLOCK_D)
    else:
        k_scales, v_scales = cache.k_scales + out // D, cache.v_scales + out // D
        _quantize_heads(k_token, k_slot, k_scales, k.stride_h, stride_ch, stored, D, BLOCK_HKV, BLOCK_D)
        _quantize_heads(v_token, v_slot, v_scales, v.stride_h, stride_ch, stored, D, BLOCK_HKV, BLOCK_D)


@triton.jit
def _rotate(
    x_ptr,  # [heads, D] of one token
    y_ptr,  # [heads, D] out
    stride_xh, stride_yh,
    cos,  # [1, BLOCK_D] fp32
    sin,  # [1, BLOCK_D] fp32
    norm_ptr,  # [D] of each head, or None
    eps,
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
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / (2 * half) + eps)[:, None]
        low *= scale * tl.load(norm_ptr + offs_d, mask=offs_d < half, other=0.0).to(tl.float32)
        high *= scale * tl.load(norm_ptr + offs_d + half, mask=offs_d < half, other=0.0).to(tl.float32)
    out = y_ptr + offs_h * stride_yh + offs_d
    tl.store(out, (low * cos - high * sin).to(dtype), mask=mask)
    tl.store(out + half, (high * cos + low * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["T", "P", "stride_pb", "stride_pt"])
def rope_kernel(
    q,  # Heads [B, T, Hq, D]
    k,  # Heads [B, T, Hkv, D]
    tables,  # RotaryTables
    norms,  # HeadNorms, or None
    positions_ptr,  # [B, T]
    q_out_ptr,  # [B, T, Hq, D] out
    k_out_ptr,  # [B, T, Hkv, D] out
    T, Hq, Hkv, D,
    P,  # rows of the tables: other ones in each call of a caller that makes them for its positions
    stride_pb, stride_pt,
    BLOCK_HQ: tl.constexpr, BLOCK_HKV: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(positions_ptr + b * stride_pb + t * stride_pt).to(tl.int64)
    cos, sin = angles(tables, P, position, tl.arange(0, BLOCK_HALF), D // 2)
    token = b * T + t
    q_token, k_token = q.ptr + b * q.stride_b + t * q.stride_t, k.ptr + b * k.stride_b + t * k.stride_t
    q_norm, k_norm, eps = None, None, 0.0
    if norms is not None:
        q_norm, k_norm, eps = norms.q_ptr, norms.k_ptr, norms.eps
    q_out, k_out = q_out_ptr + token * Hq * D, k_out_ptr + token * Hkv * D
    _rotate(q_token, q_out, q.stride_h, D, cos, sin, q_norm, eps, Hq, D // 2, BLOCK_HQ, BLOCK_HALF)
    _rotate(k_token, k_out, k.stride_h, D, cos, sin, k_norm, eps, Hkv, D // 2, BLOCK_HKV, BLOCK_HALF)


@dataclass(frozen=True)
class RopeSizes:
    B: int
    T: int
    Hq: int
    Hkv: int
    D: int
    P: int
    norms: bool = False


def configs(sizes: RopeSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """One token a program: its heads share one row of the tables."""
    tiles = {"BLOCK_HQ": power_of_2(sizes.Hq), "BLOCK_HKV": power_of_2(sizes.Hkv)}
    return {"rope_kernel": LaunchConfig(tiles | {"BLOCK_HALF": power_of_2(sizes.D // 2)}, num_warps=4)}


@dataclass(frozen=True)
class AppendSizes:
    Hkv: int
    D: int


def append_configs(sizes: AppendSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    tiles = {"BLOCK_HKV": power_of_2(sizes.Hkv), "BLOCK_D": power_of_2(sizes.D)}
    return {"append_kernel": LaunchConfig(tiles, num_warps=2)}


def _inputs(case: RopeSizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    B, T, P = case.B, case.T, case.P
    cos, sin = rope_tables(10000.0, P, case.D, device)
    positions = (torch.arange(T) * 7 + torch.arange(B)[:, None] * 5) % P
    norms = norm_inputs(case, dtype, device, generator)
    return {"cos": cos, "sin": sin, "positions": positions.to(device), **norms}


def cost(case: RopeSizes, dtype: torch.dtype) -> Cost:
    """Count each element of q and k read and written once, one row of the tables a token, and the norms' weights."""
    tokens, D = case.B * case.T, case.D
    rotated, weights = tokens * (case.Hq + case.Hkv) * D, 2 * D * case.norms
    return Cost(flops=(3 + 4 * case.norms) * rotated, bytes=(2 * rotated + weights) * dtype.itemsize + tokens * D * 4)


@dataclass(frozen=True)
class AppendCase:
    B: int
    T: int
    Hkv: int
    D: int
    C: int
    past: int = 0  # see `cache_inputs`
    cache: str | None = None  # "int8"


def append_cost(case: AppendCase, dtype: torch.dtype) -> Cost:
    """Count each element of k and v read once and written once."""
    vectors, D, size = 2 * case.B * case.T * case.Hkv, case.D, dtype.itemsize
    return Cost(flops=0, bytes=vectors * (D * size + vector_bytes(D, size, case.cache is not None)))


@operation(
    reference=reference.rope,
    case=RopeSizes,
    draw=_inputs,
    count=cost,
    test_shapes=(
        *shapes(RopeSizes, "2 1 4 4 64 96, 2 5 8 2 80 96, 2 3 4 1 96 96, 2 4 4 4 128 96, 2 2 8 2 32 96"),
        *shapes(RopeSizes, "2 1 4 4 64 96, 2 5 8 2 80 96", norms=True),
    ),
    bench_shapes=(
        *shapes(RopeSizes, "1 1 32 8 128 32768, 1 4096 32 8 128 32768"),
        *shapes(RopeSizes, "1 1 32 4 128 40960, 1 4096 32 4 128 40960", norms=True),  # of Qwen3-30B-A3B
    ),
    rule=check_rotated_heads,
)
def rope(
    q: Queries,
    k: KeyHeads,
    cos: Table,
    sin: Table,
    positions: Annotated[Tensor, "B T", INTS, Within(0, "P - 1")],
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    eps: float = 1e-6,
) -> tuple[Queries, KeyHeads]:
    """Rotary embedding (Su et al. 2021, eq. 34): rotate the halves of each head against each other.

    q, k       [B, T, Hq, D] and [B, T, Hkv, D], fp32, bf16 or fp16; D even
    cos, sin   fp32 [P, D/2]: of position * theta ** (-2i / D)
    positions  [B, T], int32 or int64, in 0..P - 1
    q_norm,    both or neither [D], in q's dtype: the RMS norm of each head, with eps, before it is rotated (Qwen3
      k_norm   technical report, section 2)

    Returns the rotated q and k, computed in fp32 and rounded once. Raises ValueError for another shape, dtype or
    device. A position out of range gives NaN; on a CPU it is a ValueError.

    >>> q, k, angles = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 2, 8), torch.outer(torch.arange(16), torch.ones(4))
    >>> q, k = ops.rope(q, k, angles.cos(), angles.sin(), positions=torch.tensor([[0, 1, 2]]))
    """
    B, T, Hq, D = q.shape
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    sizes = RopeSizes(B, T, Hq, k.shape[2], D, len(cos), q_norm is not None)
    launch(
        rope_kernel,
        (T, B),
        select_configs(configs, sizes, q.dtype, q.device)["rope_kernel"],
        q=Heads.of(q),
        k=Heads.of(k),
        tables=RotaryTables.of(cos, sin),
        norms=HeadNorms.of(q_norm, k_norm, eps),
        positions_ptr=positions,
        q_out_ptr=q_out,
        k_out_ptr=k_out,
        T=T,
        Hq=Hq,
        Hkv=sizes.Hkv,
        D=D,
        P=sizes.P,
        stride_pb=positions.stride(0),
        stride_pt=positions.stride(1),
    )
    return q_out, k_out


@operation(
    reference=reference.append,
    case=AppendCase,
    draw=cache_inputs,
    count=append_cost,
    test_shapes=(
        *(AppendCase(2, T, 2, 80, 16, past) for past in (0, 13) for T in (1, 15, 40)),
        *shapes(AppendCase, "2 1 2 80 64 40, 2 15 2 80 64 40, 2 40 2 80 64 40"),
        *shapes(AppendCase, "2 15 2 80 16 13, 3 2 1 128 64 40", cache="int8"),
    ),
    bench_shapes=tuple(AppendCase(1, 2048, 8, 128, 4096, cache=cache) for cache in (None, "int8")),
    mutates=("k_cache", "v_cache"),
    rule=check_caches,
)
def append(k: KeyHeads, v: KeyHeads, k_cache: Slots, v_cache: Slots, past: Past, new: New) -> None:
    """Write a chunk's keys and values into the ring caches (Mistral 7B, section 2): position p into slot p mod C.

    k, v              [B, T, Hkv, D], fp32, bf16 or fp16
    k_cache, v_cache  [B, Hkv, C, D] in k's dtype, or of 8 bits; of equal strides; written in place
    past, new         [B], int32 or int64: sequence b stands at position past[b], and its first new[b] tokens are
                      written

    Returns None. Raises ValueError for another shape, dtype or device. A sequence with past or new out of range writes
    nothing; on a CPU it is a ValueError. Caches that are views of one tensor are wrong in torch.compile where sizes
    vary: inductor (torch 2.13) drops the offset of a view that an operator writes into.

    >>> k_cache, v_cache = torch.zeros(1, 2, 16, 8), torch.zeros(1, 2, 16, 8)
    >>> k, past, new = torch.ones(1, 3, 2, 8), torch.tensor([15]), torch.tensor([3])
    >>> ops.append(k, k, k_cache, v_cache, past, new)
    >>> k_cache[0, 0, :, 0].nonzero().flatten().tolist()
    [0, 1, 15]
    """
    launch_append(k, v, k_cache, v_cache, past.contiguous(), new.contiguous())


def launch_append(k: Tensor, v: Tensor, k_cache: Cache, v_cache: Cache, past: Tensor | None, new: Tensor) -> None:
    """Launch `append`; past None: 0."""
    B, T, Hkv, D = k.shape
    launch(
        append_kernel,
        (T, B),
        select_configs(append_configs, AppendSizes(Hkv, D), k.dtype, k.device)["append_kernel"],
        k=Heads.of(k),
        v=Heads.of(v),
        past_ptr=past,
        new_ptr=new,
        cache=CacheArgs.of(k_cache, v_cache),
        T=T,
        C=k_cache.shape[2],
        Hkv=Hkv,
        D=D,
    )
