"""The loop over keys of the attention kernels: products, mask and running softmax of a tile of queries.

The letters are those of kernels.py. Keys are in 16 or 32 bits, or in 8, with a scale each.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...launching.kernel_args import Pointer

# The running softmax of a tile, fp32: sum of p @ v [BLOCK_M, BLOCK_D], greatest score in base 2 and sum of p [BLOCK_M].
Softmax = namedtuple("Softmax", "acc largest total")
# q [BLOCK_M, BLOCK_D] and its positions [BLOCK_M]; scale is the softmax scale * log2(e), positive.
Queries = namedtuple("Queries", "q offs_i window scale")


class SequenceKeys(NamedTuple):
    """Keys and values of one sequence and head, by pointers and strides, or by descriptors of all."""

    k_ptr: Pointer
    v_ptr: Pointer
    stride_ks: int
    stride_vs: int
    k_desc: Any  # or None
    v_desc: Any
    b: int  # where the descriptors read
    hkv: int
    first: int  # the position of index 0, or the number of slots of a ring
    k_scales: Pointer  # in 8 bits, or None
    v_scales: Pointer


# Positions low..high that some query of the tile sees, and inner_low..inner_high that all of them see.
Span = namedtuple("Span", "low high inner_low inner_high")
Kind = namedtuple("Kind", "D RING CAUSAL WINDOWED HEADS_FIRST")  # what selects code
# In fp16, p times a value's scale would lose bits of small values: it is multiplied by this, which cannot overflow.
_FP16_UNIT = tl.constexpr(64.0)


@triton.constexpr_function
def unit_of(dtype):
    return _FP16_UNIT.value if dtype == tl.float16 else 1.0


@triton.jit
def take_keys(
    state,  # Softmax
    queries,  # Queries
    keys,  # SequenceKeys
    low,  # positions low..high, BLOCK_N at a time
    high,
    limit,  # keys at or after this position do not exist
    KIND: tl.constexpr,  # Kind
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take keys into the softmax. In 8 bits a key's scale multiplies its scores, and a value's scale its p."""
    acc, largest, total = state
    q, offs_i, window, scale = queries
    D: tl.constexpr = KIND.D
    CODES: tl.constexpr = keys.k_scales is not None
    score_scale = 1.0 if CODES else scale  # a key's scale has it
    dtype: tl.constexpr = q.dtype
    BLOCK_D: tl.constexpr = q.shape[1]
    first = keys.first
    offs_d = tl.arange(0, BLOCK_D)
    for start in range(low, high, BLOCK_N):
        offs_j = start + tl.arange(0, BLOCK_N)
        index = (offs_j % first if KIND.RING else offs_j - first).to(tl.int64)
        k_ptrs = keys.k_ptr + index[None, :] * keys.stride_ks + offs_d[:, None]
        v_ptrs = keys.v_ptr + index[:, None] * keys.stride_vs + offs_d[None, :]
        if MASKED:
            # What lies past the keys may be NaN, and 0 * NaN is NaN: it must not be read.
            k = tl.load(k_ptrs, mask=(offs_j < limit)[None, :] & (offs_d < D)[:, None], other=0)
            v = tl.load(v_ptrs, mask=(offs_j < limit)[:, None] & (offs_d < D)[None, :], other=0)
        elif keys.k_desc is not None:
            row = start - first
            coords = (keys.b, keys.hkv, row, 0) if KIND.HEADS_FIRST else (keys.b, row, keys.hkv, 0)
            k = keys.k_desc.load(coords).reshape(BLOCK_N, BLOCK_D).T
            v = keys.v_desc.load(coords).reshape(BLOCK_N, BLOCK_D)
        elif D == BLOCK_D:
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=(offs_d < D)[:, None], other=0)
            v = tl.load(v_ptrs, mask=(offs_d < D)[None, :], other=0)
        if CODES:
            k_scales = keys.k_scales + index * (keys.stride_ks // D)
            k_scale = tl.load(k_scales, mask=offs_j < limit, other=0.0) if MASKED else tl.load(k_scales)
        scores = tl.dot(q, k.to(dtype), input_precision="ieee")  # converts codes, where registers are free for them
        if CODES:
            scores *= (k_scale * scale)[None, :]
        if MASKED:
            visible = (offs_j < limit)[None, :]
            if KIND.CAUSAL:
                visible = visible & (offs_j[None, :] <= offs_i[:, None])
                if KIND.WINDOWED:
                    visible = visible & (offs_j[None, :] > offs_i[:, None] - window)
            elif KIND.WINDOWED:
                visible = visible & (tl.abs(offs_i[:, None] - offs_j[None, :]) <= window // 2)
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1) * score_scale)
        # A row without a visible key so far has no maximum to subtract.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASKED else new_largest
        p = tl.exp2(scores * score_scale - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(p, axis=1)
        if CODES:
            v_scales = keys.v_scales + index * (keys.stride_vs // D)
            v_scale = tl.load(v_scales, mask=offs_j < limit, other=0.0) if MASKED else tl.load(v_scales)
            p *= (v_scale * unit_of(dtype))[None, :]
        acc = tl.dot(p.to(dtype), v.to(dtype), acc * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return Softmax(acc, largest, total)


@triton.jit
def sweep(state, queries, keys, span, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left edge with a mask, interior without, right edge with a mask: in shorter tiles, for the mask's registers."""
    low, high, inner_low, inner_high = span
    EDGE_N: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 64 else BLOCK_N
    left_end = tl.minimum(low + tl.cdiv(tl.maximum(inner_low - low, 0), EDGE_N) * EDGE_N, high)
    right = left_end + tl.maximum(tl.minimum(inner_high, high) - left_end, 0) // BLOCK_N * BLOCK_N
    state = take_keys(state, queries, keys, low, left_end, high, KIND, True, EDGE_N)
    state = take_keys(state, queries, keys, left_end, right, high, KIND, False, BLOCK_N)
    return take_keys(state, queries, keys, right, high, high, KIND, True, EDGE_N)


@triton.jit
def take_sinks(state, sinks):
    """Take a logit that belongs to no key into each row's softmax (Xiao et al. 2024, section 3.3; gpt-oss): it adds to
    the sum alone, and after the loop, so that it costs no register there. sinks: natural, [BLOCK_M] or one."""
    acc, largest, total = state
    sinks = sinks.to(tl.float32) * 1.4426950408889634  # log2(e)
    greatest = tl.maximum(largest, sinks)
    shift = tl.where(greatest == float("-inf"), 0.0, greatest)
    shrink = tl.exp2(largest - shift)
    return Softmax(acc * shrink[:, None], greatest, total * shrink + tl.exp2(sinks - shift))


@triton.jit
def normalize(acc, total, dtype: tl.constexpr, CODES: tl.constexpr):
    """acc / total, by the unit that 8-bit values have in acc."""
    total = tl.where(total == 0.0, 1.0, total)
    if CODES:
        total *= unit_of(dtype)
    return acc / total[:, None]
