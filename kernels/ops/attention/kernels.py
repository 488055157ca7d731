"""Flash attention kernels (Dao et al. 2022, 2023) for sliding windows, grouped queries and a ring cache.

B batch, T query tokens, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head size, C slots of the ring cache

Positions count from the start of a sequence. A key at position j is at index j - first of the keys that are arguments
beside the queries, and at slot j mod C of the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...launching.kernel_args import Heads, Pointer
from ...launching.pdl import pdl_wait
from ...weights.composite_args import quantized_vectors
from ..cache_args import POSITIONS_MAX, RotaryTables, angles, sequence_position
from .softmax import Kind, Queries, SequenceKeys, Softmax, Span, normalize, sweep, take_keys, take_sinks, unit_of


class Keys(NamedTuple):
    """Keys and values of all sequences and heads."""

    k_ptr: Pointer  # [B, S, Hkv, D]
    v_ptr: Pointer
    k_scales: Pointer  # [B, Hkv, S] fp32 in 8 bits, at a vector's index, or None
    v_scales: Pointer
    stride_kb: int
    stride_kt: int
    stride_kh: int
    stride_vb: int
    stride_vt: int
    stride_vh: int


class Bounds(NamedTuple):
    """Which keys are valid, and where the queries are."""

    starts: Pointer  # [B] first valid key, or None: 0
    lengths: Pointer  # [B] end of the valid keys, or None: S; with past: how many of the T tokens are new
    past: Pointer  # [B] position of query 0, or None: the queries are the last T positions


class Newest(NamedTuple):
    """The key and value of a decode step, neither rotated (as the query is not) nor in the ring."""

    k: Heads  # [B, 1, Hkv, D]
    v: Heads
    tables: RotaryTables


@triton.jit
def _bound(bounds_ptr, b):
    """One of starts or lengths, which may hold any number, clamped so that int32 arithmetic cannot overflow."""
    bound = tl.minimum(tl.maximum(tl.load(bounds_ptr + b), -POSITIONS_MAX), POSITIONS_MAX)
    return bound.to(tl.int32)


@triton.jit
def _scale_offset(b, head, stride_b, stride_h, D: tl.constexpr):
    """The offset of a sequence's head in vectors, as scales have it."""
    return b * (stride_b // D) + head * (stride_h // D)


@triton.jit(do_not_specialize=["T", "S", "C"])
def attention_prefill_kernel(
    q,  # Heads [B, T, Hq, D]
    keys,  # Keys beside the queries
    k_desc,  # the same in tiles [1, BLOCK_N, 1, BLOCK_D] for TMA, with HEADS_FIRST as [B, Hkv, S, D]; or None
    v_desc,
    cache,  # CacheArgs of the keys before them, or None
    out_ptr,  # [B, T, Hq, D] out
    bounds,  # Bounds
    sinks_ptr,  # [Hq], or None
    T, S, C, Hq, G,
    window, scale,
    D: tl.constexpr, CACHED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, HEADS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Heads of a group run next to each other and share K and V in L2; the tiles with the most keys go first.
    b, hq = (tl.program_id(0) // Hq).to(tl.int64), (tl.program_id(0) % Hq).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    start = _bound(bounds.starts, b) if bounds.starts is not None else 0
    if CACHED:
        past, new = sequence_position(bounds.past, bounds.lengths, b, T)
        first = past.to(tl.int32)  # position of query 0 and of key 0
        end = first + new.to(tl.int32)
        query = first
    else:
        end = _bound(bounds.lengths, b) if bounds.lengths is not None else S
        first = 0
        query = end - T
        end = tl.minimum(end, S)
        start = tl.maximum(start, 0)
    offs_t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i = query + offs_t
    low_i, high_i = query + tile * BLOCK_M, query + tl.minimum(tile * BLOCK_M + BLOCK_M, T) - 1
    # The last row of a full tile, whatever T is: where tiles of keys start decides a row's bits.
    last_i = low_i + BLOCK_M - 1
    low, high, inner_low, inner_high = start, end, start, end
    if CAUSAL:
        high = tl.minimum(end, high_i + 1)
        inner_high = tl.minimum(end, low_i + 1)
        if WINDOWED:
            low = tl.maximum(start, low_i - window + 1)
            inner_low = tl.maximum(start, last_i - window + 1)
    elif WINDOWED:
        low, inner_low = tl.maximum(start, low_i - window // 2), tl.maximum(start, last_i - window // 2)
        high = tl.minimum(end, high_i + window // 2 + 1)
        inner_high = tl.minimum(end, low_i + window // 2 + 1)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_t < T)[:, None] & (offs_d < D)[None, :]
    q_row = q.ptr + b * q.stride_b + hq * q.stride_h
    q_ptrs = q_row + offs_t.to(tl.int64)[:, None] * q.stride_t + offs_d[None, :]
    q_tile = tl.load(q_ptrs, mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    hkv = hq // G
    state, queries = Softmax(acc, largest, total), Queries(q_tile, offs_i, window, scale)
    if CACHED:
        slots = b * cache.stride_b + hkv * cache.stride_h
        vector = _scale_offset(b, hkv, cache.stride_b, cache.stride_h, D)
        ks = None if cache.k_scales is None else cache.k_scales + vector
        vs = None if cache.v_scales is None else cache.v_scales + vector
        stored_k, stored_v, stride_c = cache.k_ptr + slots, cache.v_ptr + slots, cache.stride_c
        stored = SequenceKeys(stored_k, stored_v, stride_c, stride_c, None, None, 0, 0, C, ks, vs)
        span = Span(tl.maximum(low, first - C), tl.minimum(high, first), inner_low, inner_high)
        state = sweep(state, queries, stored, span, Kind(D, True, CAUSAL, WINDOWED, HEADS_FIRST), BLOCK_N)
        low = tl.maximum(low, first)
    k_offset, v_offset = b * keys.stride_kb + hkv * keys.stride_kh, b * keys.stride_vb + hkv * keys.stride_vh
    k, v, ks, vs = keys.k_ptr + k_offset, keys.v_ptr + v_offset, None, None
    if keys.k_scales is not None:
        ks = keys.k_scales + _scale_offset(b, hkv, keys.stride_kb, keys.stride_kh, D)
        vs = keys.v_scales + _scale_offset(b, hkv, keys.stride_vb, keys.stride_vh, D)
    of_batch, of_head = b.to(tl.int32), hkv.to(tl.int32)
    fresh = SequenceKeys(k, v, keys.stride_kt, keys.stride_vt, k_desc, v_desc, of_batch, of_head, first, ks, vs)
    span = Span(low, high, inner_low, inner_high)
    KIND: tl.constexpr = Kind(D, False, CAUSAL, WINDOWED, HEADS_FIRST)
    state = sweep(state, queries, fresh, span, KIND, BLOCK_N)
    if sinks_ptr is not None:
        state = take_sinks(state, tl.load(sinks_ptr + hq))
    acc, largest, total = state
    if CACHED:
        total = tl.where(new < 0, float("nan"), total)
    out = normalize(acc, total, q.ptr.dtype.element_ty, keys.k_scales is not None)
    out_row = out_ptr + ((b * T + offs_t.to(tl.int64)) * Hq + hq)[:, None] * D + offs_d[None, :]
    tl.store(out_row, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_rotated(ptrs, mask, cos, sin, norm_ptr, eps, D: tl.constexpr):
    """Load heads at `ptrs` ([rows, 1], or one), normalize each with a norm_ptr, and rotate each column with the one
    half a head away."""
    offs_d = tl.arange(0, cos.shape[1])[None, :]
    x = tl.load(ptrs + offs_d, mask=mask, other=0.0)
    first = offs_d < D // 2
    others = tl.where(first, offs_d + D // 2, offs_d - D // 2)
    other, values = tl.load(ptrs + others, mask=mask, other=0.0).to(tl.float32), x.to(tl.float32)
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(values * values, axis=1) / D + eps)[:, None]
        values *= scale * tl.load(norm_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        other *= scale * tl.load(norm_ptr + others, mask=offs_d < D, other=0.0).to(tl.float32)
    return (values * cos + tl.where(first, -other, other) * sin).to(x.dtype)


@triton.jit
def _append_newest_key(
    state, q, scale,
    fresh,  # pointers of the newest key and its value, not rotated
    caches,  # of their slots
    scales,  # of their slots' scales, in 8 bits
    angle, norm_ptr, eps, active,
    D: tl.constexpr,
):  # fmt: skip
    """Rotate and store the newest key and its value, and start the softmax with them, in 8 bits with their codes; do
    nothing unless `active`."""
    # The stored slot is not read back: other splits skip it, and this one has the key in registers.
    acc, largest, total = state
    offs_d = tl.arange(0, angle[0].shape[1])[None, :]
    mask = offs_d < tl.where(active, D, 0)
    k = _load_rotated(fresh[0], mask, angle[0], angle[1], norm_ptr, eps, D)
    v = tl.load(fresh[1] + offs_d, mask=mask, other=0.0)
    if scales is not None:
        k, k_scale = quantized_vectors(k)
        v, v_scale = quantized_vectors(v)
        offs_scale = tl.arange(0, 1)
        tl.store(scales[0] + offs_scale, k_scale, mask=offs_scale < tl.where(active, 1, 0))
        tl.store(scales[1] + offs_scale, v_scale, mask=offs_scale < tl.where(active, 1, 0))
        scale *= k_scale
    tl.store(caches[0] + offs_d, k.to(caches[0].dtype.element_ty), mask=mask)
    tl.store(caches[1] + offs_d, v.to(caches[1].dtype.element_ty), mask=mask)
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale
    v = v.to(tl.float32)
    if scales is not None:
        v *= (v_scale * unit_of(q.dtype))[:, None]
    acc += v
    return Softmax(acc, tl.where(active, score, largest), tl.where(active, 1.0, total))


@triton.jit(do_not_specialize=["T", "S", "P", "SPLITS"])
def attention_decode_kernel(
    q,  # Heads [B, T, Hq, D]
    keys,  # Keys; with `newest` the ring by its strides
    out_ptr,  # [B, T, Hq, D] out, or with SPLITS > 1 fp32 partial results [B, T, Hq, SPLITS, D]
    lse_ptr,  # [B, T, Hq, SPLITS] out, fp32: log2 of the sum of each split's exponentials
    bounds,  # Bounds
    newest,  # Newest, which the ring does not have yet, or None: `keys` are no ring
    norms,  # HeadNorms of the queries and the newest key, or None
    sinks_ptr,  # [Hq], or None
    T,
    S,  # key positions, or slots of the ring
    P,  # rows of the newest key's tables
    Hq, G,
    window, scale,
    SPLITS,  # programs that share the keys; as a constexpr it would compile a kernel for each value
    D: tl.constexpr, WINDOWED: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    RING: tl.constexpr = newest is not None
    # All query heads of a group, of all T tokens, are rows of one tile: its keys and values are read once.
    split, hkv, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = _bound(bounds.starts, b) if bounds.starts is not None else 0
    if RING:
        past, new = sequence_position(bounds.past, bounds.lengths, b, T)
        query = past.to(tl.int32)
        end = query + new.to(tl.int32)
        start = tl.maximum(start, end - S)
    else:
        end = _bound(bounds.lengths, b) if bounds.lengths is not None else S
        query = end - T
        end = tl.minimum(end, S)
        start = tl.maximum(start, 0)
    low = tl.maximum(start, query - window + 1) if WINDOWED else start
    # The newest key is not read from the ring: the last split has it in registers.
    high = tl.minimum(end, query + T) if newest is None else query
    span = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), SPLITS), BLOCK_N) * BLOCK_N
    low += split * span
    high = tl.minimum(high, low + span)
    rows = tl.arange(0, BLOCK_M)
    t, hq = (rows // G).to(tl.int64), hkv * G + rows % G
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows < T * G)[:, None] & (offs_d < D)[None, :]
    q_rows = q.ptr + b * q.stride_b + (t * q.stride_t + hq * q.stride_h)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    head, state = hkv.to(tl.int64), Softmax(acc, largest, total)
    k_offset, v_offset = b * keys.stride_kb + head * keys.stride_kh, b * keys.stride_vb + head * keys.stride_vh
    k, v, ks, vs = keys.k_ptr + k_offset, keys.v_ptr + v_offset, None, None
    if keys.k_scales is not None:
        ks = keys.k_scales + _scale_offset(b, head, keys.stride_kb, keys.stride_kh, D)
        vs = keys.v_scales + _scale_offset(b, head, keys.stride_vb, keys.stride_vh, D)
    if newest is not None:
        # Padding may lie past the last position: its result is unused, but must not be NaN.
        position = tl.where(new > 0, past, tl.minimum(past, P - 1))
        angle = angles(newest.tables, P, tl.where(new < 0, P, position), offs_d % (D // 2), D // 2)
        q_norm, k_norm, eps = None, None, 0.0
        if norms is not None:
            q_norm, k_norm, eps = norms.q_ptr, norms.k_ptr, norms.eps
        q_tile = _load_rotated(q_rows, mask, angle[0], angle[1], q_norm, eps, D)
        slot = past % S
        new_k = newest.k.ptr + b * newest.k.stride_b + head * newest.k.stride_h
        new_v = newest.v.ptr + b * newest.v.stride_b + head * newest.v.stride_h
        active = (new > 0) & (split == SPLITS - 1)
        caches, scales = (k + slot * keys.stride_kt, v + slot * keys.stride_vt), None
        if ks is not None:
            scales = ks + slot * (keys.stride_kt // D), vs + slot * (keys.stride_vt // D)
        fresh = new_k, new_v
        state = _append_newest_key(state, q_tile, scale, fresh, caches, scales, angle, k_norm, eps, active, D)
    else:
        q_tile = tl.load(q_rows + offs_d[None, :], mask=mask, other=0.0)
    stored = SequenceKeys(k, v, keys.stride_kt, keys.stride_vt, None, None, 0, 0, S if RING else 0, ks, vs)
    queries = Queries(q_tile, query + t.to(tl.int32), window, scale)
    KIND: tl.constexpr = Kind(D, RING, True, WINDOWED, False)
    state = take_keys(state, queries, stored, low, high, high, KIND, True, BLOCK_N)
    if sinks_ptr is not None:  # in one split of all
        state = take_sinks(state, tl.where(split == 0, tl.load(sinks_ptr + hq), float("-inf")))
    acc, largest, total = state
    if RING:
        total = tl.where(new < 0, float("nan"), total)
    out = normalize(acc, total, q.ptr.dtype.element_ty, keys.k_scales is not None)
    row = ((b * T + t) * Hq + hq) * SPLITS + split
    tl.store(out_ptr + row[:, None] * D + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, largest + tl.log2(total), mask=rows < T * G)


@triton.jit(do_not_specialize=["SPLITS"])
def attention_combine_kernel(
    part_ptr,  # [rows, SPLITS, D] fp32
    lse_ptr,  # [rows, SPLITS] fp32
    out_ptr,  # [rows, D] out
    SPLITS,
    D: tl.constexpr, PDL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    row, offs_d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    out, total, largest = tl.zeros((BLOCK_D,), tl.float32), 0.0, float("-inf")
    for first in range(0, SPLITS, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + row * SPLITS + splits, mask=splits < SPLITS, other=float("-inf"))
        before, largest = largest, tl.maximum(largest, tl.max(lse, axis=0))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        share, kept = tl.exp2(lse - base), tl.exp2(before - base)
        parts = part_ptr + (row * SPLITS + splits)[:, None] * D + offs_d[None, :]
        part = tl.load(parts, mask=(splits < SPLITS)[:, None] & (offs_d < D)[None, :], other=0.0)
        total = total * kept + tl.sum(share, axis=0)
        out = out * kept + tl.sum(part * share[:, None], axis=0)
    out /= tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)
