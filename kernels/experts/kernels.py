"""Kernels of the sparse expert layer: up and down for few tokens, without a sort, and the combine for any number.

T tokens, K experts a token, N = T * K slots (slot t*K + k), E experts, H hidden, I intermediate

A weight tile of the up kernels holds BLOCK_N rows of the gate projection and the same rows of the up projection: one
dot computes both, and the epilogue splits the accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..norm import normed_rows
from ..pdl import pdl_wait
from ..unpack import fields_of
from ..weight import WeightPtrs, add_products, expert_rows, times_row_scales


@triton.jit
def swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def pair_rows(pid_n, I, BLOCK_N: tl.constexpr):
    """[2 BLOCK_N] rows of `gate_up_proj`: the gate rows of column tile `pid_n`, then its up rows. The last repeats."""
    offs = tl.arange(0, 2 * BLOCK_N)
    return (tl.minimum(pid_n * BLOCK_N + offs % BLOCK_N, I - 1) + offs // BLOCK_N * I).to(tl.int64)


@triton.jit
def _matching_slots(ids_ptr, N, E, BLOCK_S: tl.constexpr, BY_SLOT: tl.constexpr):
    """This program's expert, all slots, which of them match it, their ranks among the matches, and the count.

    BY_SLOT (fewer slots than experts): one program a slot; only the first slot of an expert does the work.
    """
    expert = tl.program_id(1)
    slots = tl.arange(0, BLOCK_S)
    if BY_SLOT:
        expert = tl.load(ids_ptr + expert).to(tl.int32)
    match = tl.load(ids_ptr + slots, mask=slots < N, other=-1) == expert
    rank = tl.cumsum(match.to(tl.int32), axis=0) - 1
    count = tl.sum(match.to(tl.int32), axis=0)
    if BY_SLOT:
        earlier = tl.sum((match & (slots < tl.program_id(1))).to(tl.int32), axis=0)
        count = tl.where((earlier == 0) & (expert >= 0) & (expert < E), count, 0)
    return expert.to(tl.int64), slots, match, rank, count


@triton.jit
def _slot_tile(slots, match, rank, count, first, BLOCK_T: tl.constexpr):
    """Slots int64 [BLOCK_T] of the matches from rank `first` on, 0 beyond the last, and which exist [1, BLOCK_T]."""
    ranks = first + tl.arange(0, BLOCK_T)
    hit = match[None, :] & (rank[None, :] == ranks[:, None])
    return tl.sum(tl.where(hit, slots[None, :], 0), axis=1).to(tl.int64), (ranks < count)[None, :]


@triton.jit(do_not_specialize=["N"])
def experts_up_decode_kernel(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2I, H]
    scales_ptr,  # [E, 2I, G], or None
    zeros_ptr,  # the same, or None
    ids_ptr,  # [N]
    h_ptr,  # [N, I] out, by slot
    N, E, TOP_K,
    stride_xt, stride_we, stride_wn,
    H: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BY_SLOT: tl.constexpr,
):  # fmt: skip
    # Swapped operands: weight rows fill the tensor core's M, the few tokens its N.
    pdl_wait(PDL)  # the route selects the weights
    pid_n = tl.program_id(0)
    expert, slots, match, rank, count = _matching_slots(ids_ptr, N, E, BLOCK_S, BY_SLOT)
    UNIT: tl.constexpr = BLOCK_K * fields_of(LAYOUT.format)
    # Outside the loop: the loop then has the same instructions, whether an address is loaded or not.
    rows = expert_rows(gate_up_ptr, expert, stride_we, x_ptr.dtype.element_ty, LAYOUT, count > 0)
    for first in range(0, count, BLOCK_T):
        offs_k = tl.arange(0, BLOCK_K)
        w_ptrs = rows + offs_k[None, :]
        w_ptrs += pair_rows(pid_n, I, BLOCK_N)[:, None] * stride_wn
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        slot, live = _slot_tile(slots, match, rank, count, first, BLOCK_T)
        x_ptrs = x_ptr + (slot // TOP_K)[None, :] * stride_xt + offs_k[:, None]
        w = WeightPtrs(w_ptrs, scales_ptr, zeros_ptr)
        w_rows = expert * 2 * I + pair_rows(pid_n, I, BLOCK_N)
        acc = tl.zeros((2 * BLOCK_N, BLOCK_T), tl.float32)
        acc = add_products(acc, w, w_rows, x_ptrs, live, 0, H, H % UNIT == 0, H, LAYOUT)
        acc = times_row_scales(acc, w, w_rows, H, LAYOUT, AXIS=0)
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_N, BLOCK_T)), (1, 2, 0)))
        out = h_ptr + slot[None, :] * I + offs_n[:, None]
        tl.store(out, swiglu(gate, up).to(h_ptr.dtype.element_ty), mask=live & (offs_n < I)[:, None])


@triton.jit(do_not_specialize=["N"])
def experts_down_decode_kernel(
    h_ptr,  # [N, I] by slot
    down_ptr,  # [E, H, I]
    scales_ptr,  # [E, H, G], or None
    zeros_ptr,  # the same, or None
    ids_ptr,  # [N]
    y_ptr,  # [SPLIT_K, N, H] out, fp32: one partial sum a split
    N, E,
    stride_we, stride_wn,
    H: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BY_SLOT: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    pid_n, split = tl.program_id(0), tl.program_id(2)
    expert, slots, match, rank, count = _matching_slots(ids_ptr, N, E, BLOCK_S, BY_SLOT)
    UNIT: tl.constexpr = BLOCK_K * fields_of(LAYOUT.format)
    SPAN: tl.constexpr = (I + SPLIT_K * UNIT - 1) // (SPLIT_K * UNIT) * UNIT
    EVEN: tl.constexpr = I % (SPLIT_K * UNIT) == 0
    rows = expert_rows(down_ptr, expert, stride_we, h_ptr.dtype.element_ty, LAYOUT, count > 0)
    for first in range(0, count, BLOCK_T):
        begin, offs_k = split * SPAN, tl.arange(0, BLOCK_K)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        w_ptrs = rows + (split * (SPAN // UNIT * BLOCK_K) + offs_k)[None, :]
        w_ptrs += tl.minimum(offs_n, H - 1).to(tl.int64)[:, None] * stride_wn
        slot, live = _slot_tile(slots, match, rank, count, first, BLOCK_T)
        h_ptrs = h_ptr + slot[None, :] * I + (begin + offs_k)[:, None]
        w = WeightPtrs(w_ptrs, scales_ptr, zeros_ptr)
        w_rows = expert * H + tl.minimum(offs_n, H - 1)
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        acc = add_products(acc, w, w_rows, h_ptrs, live, begin, SPAN, EVEN, I, LAYOUT)
        acc = times_row_scales(acc, w, w_rows, I, LAYOUT, AXIS=0)
        out = y_ptr + (split.to(tl.int64) * N + slot)[None, :] * H + offs_n[:, None]
        tl.store(out, acc, mask=live & (offs_n < H)[:, None])


@triton.jit(do_not_specialize=["N"])
def experts_combine_kernel(
    y_ptr,  # [SPLIT_K, N, H]
    ids_ptr,  # [N]
    weights_ptr,  # [T, K] fp32
    out_ptr,  # [T, H] out; with a residual: the norm of the sum
    residual_ptr,  # [T, H], or None
    norm_ptr,  # [H] weight of the norm that follows, or None
    total_ptr,  # [T, H] out: the experts' output + residual, or None
    N, E, H,
    stride_rt,
    eps,
    TOP_K: tl.constexpr, SPLIT_K: tl.constexpr, PDL: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    # An ordered fp32 sum over splits, then experts: no atomics, so the bits repeat.
    t = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = t * TOP_K + k
        expert = tl.load(ids_ptr + slot)
        # No kernel wrote the rows of an id out of range.
        mask = offs_h < tl.where((expert >= 0) & (expert < E), H, 0)
        y = tl.zeros((BLOCK_H,), tl.float32)
        for split in tl.static_range(SPLIT_K):
            y += tl.load(y_ptr + (split * N + slot) * H + offs_h, mask=mask, other=0.0).to(tl.float32)
        acc += tl.load(weights_ptr + slot) * y
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out = acc.to(dtype)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + t * stride_rt + offs_h, mask=offs_h < H, other=0.0)
        # Rounded where the separate kernels round.
        total = (out.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + t * H + offs_h, total, mask=offs_h < H)
        out = tl.reshape(normed_rows(total.to(tl.float32)[None, :], norm_ptr, H, eps, dtype, BLOCK_H), (BLOCK_H,))
    tl.store(out_ptr + t * H + offs_h, out, mask=offs_h < H)
