"""Kernels of the sparse expert layer: up and down for few tokens (decode: no sort) and for many (prefill: a group of
sorted rows for each expert), and the combine for any number.

T tokens, K experts a token, N = T * K slots (slot t*K + k), E experts, H hidden, I intermediate

A weight tile of the up kernels holds BLOCK_N rows of the gate projection and the same rows of the up projection: one
dot computes both, and the epilogue splits the accumulator.

`*_desc` are TMA descriptors, or None: then the kernel reads by pointers. Where TMA reads x, in sorted order, a row tile
of BLOCK_M rows may have two parts, 128 + SHORT_M, which share each tile of the weight; and the last tile of a group is
as short as its rows allow: SHORT_M, the upper part alone, or full.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from ...launching.pdl import pdl_wait, pdl_wait_first, prefetch_rows
from ...weights.weight_args import (
    WeightRows,
    add_product,
    add_products,
    expert_rows,
    program_tile,
    row_products,
    times_scales,
    weight_tile,
)
from ..norm import normed_rows

# The rows of x of a tile: Rows, and pointers [rows, BLOCK_K] of column 0, or descriptors of the upper part and of
# SHORT_M rows.
RowSource = namedtuple("RowSource", "rows ptrs desc short_desc")


@triton.jit
def pair_rows(pid_n, I, BLOCK_N: tl.constexpr):
    """[2 BLOCK_N] rows of `gate_up_proj`: the gate rows of column tile `pid_n`, then its up rows. Row I - 1 repeats."""
    offs = tl.arange(0, 2 * BLOCK_N)
    return (tl.minimum(pid_n * BLOCK_N + offs % BLOCK_N, I - 1) + offs // BLOCK_N * I).to(tl.int64)


@triton.jit
def _matching_slots(
    ids_ptr, N, E, BLOCK_S: tl.constexpr, BY_SLOT: tl.constexpr, EARLY: tl.constexpr = False
):  # fmt: skip
    """This program's expert, all slots, which of them match it, their ranks among the matches, and the count.

    BY_SLOT (fewer slots than experts): one program a slot; only the first slot of an expert does the work.
    """
    CACHE: tl.constexpr = ".cg" if EARLY else ""  # see pdl.py
    expert = tl.program_id(1)
    slots = tl.arange(0, BLOCK_S)
    if BY_SLOT:
        expert = tl.load(ids_ptr + expert, cache_modifier=CACHE).to(tl.int32)
    match = tl.load(ids_ptr + slots, mask=slots < N, other=-1, cache_modifier=CACHE) == expert
    rank = tl.cumsum(match.to(tl.int32), axis=0) - 1
    count = tl.sum(match.to(tl.int32), axis=0)
    if BY_SLOT:
        earlier = tl.sum((match & (slots < tl.program_id(1))).to(tl.int32), axis=0)
        count = tl.where((earlier == 0) & (expert >= 0) & (expert < E), count, 0)
    return expert.to(tl.int64), slots, match, rank, count


@triton.jit
def _compact(slots, match, rank, ranks):
    """The slots int64 whose rank among the matches is in `ranks` [BLOCK_T]; 0 where there is none."""
    hit = match[None, :] & (rank[None, :] == ranks[:, None])
    return tl.sum(tl.where(hit, slots[None, :], 0), axis=1).to(tl.int64)


@triton.jit(do_not_specialize=["N"])
def experts_up_decode_kernel(
    x,  # Rows [T, H]
    gate_up,  # WeightArgs [E, 2I, H]
    ids_ptr,  # [N]
    h_ptr,  # [N, I] out, by slot
    N, E, TOP_K,
    H: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BY_SLOT: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    # Swapped operands: weight rows fill the tensor core's M, the few tokens its N.
    pdl_wait_first(PDL)  # the route selects the weights, also those of the next launch
    pid_n = tl.program_id(0)
    expert, slots, match, rank, count = _matching_slots(ids_ptr, N, E, BLOCK_S, BY_SLOT)
    UNIT: tl.constexpr = BLOCK_K * LAYOUT.fields
    # Outside the loop: the loop then has the same instructions, whether an address is loaded or not.
    rows = expert_rows(gate_up, expert, x.ptr.dtype.element_ty, LAYOUT, count > 0)
    for first in range(0, count, BLOCK_T):
        offs_k = tl.arange(0, BLOCK_K)
        w_ptrs = rows + offs_k[None, :]
        w_ptrs += pair_rows(pid_n, I, BLOCK_N)[:, None] * gate_up.stride_n
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ranks = first + tl.arange(0, BLOCK_T)
        slot = _compact(slots, match, rank, ranks)
        x_ptrs = x.ptr + (slot // TOP_K)[None, :] * x.stride + offs_k[:, None]
        w = WeightRows(gate_up, w_ptrs, expert * 2 * I + pair_rows(pid_n, I, BLOCK_N), None, None)
        acc = tl.zeros((2 * BLOCK_N, BLOCK_T), tl.float32)
        acc = add_products(acc, w, x_ptrs, (ranks < count)[None, :], 0, H, H % UNIT == 0, H, LAYOUT)
        acc = times_scales(acc, w, H, LAYOUT, AXIS=0)
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_N, BLOCK_T)), (1, 2, 0)))
        out = h_ptr + slot[None, :] * I + offs_n[:, None]
        mask = (ranks < count)[None, :] & (offs_n < I)[:, None]
        h, _, _ = ACTIVATION(gate, up, NUMBERS)
        tl.store(out, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def experts_down_decode_kernel(
    h_ptr,  # [N, I] by slot
    down,  # WeightArgs [E, H, I]
    ids_ptr,  # [N]
    y_ptr,  # [SPLIT_K, N, H] out, fp32: one partial sum a split
    N, E,
    H: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BY_SLOT: tl.constexpr, SPLIT_K: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    EARLY: tl.constexpr = PDL and PREFETCH > 0  # ids before the wait: see pdl.py
    if not EARLY:
        pdl_wait(PDL)
    pid_n, split = tl.program_id(0), tl.program_id(2)
    expert, slots, match, rank, count = _matching_slots(ids_ptr, N, E, BLOCK_S, BY_SLOT, EARLY)
    UNIT: tl.constexpr = BLOCK_K * LAYOUT.fields
    SPAN: tl.constexpr = (I + SPLIT_K * UNIT - 1) // (SPLIT_K * UNIT) * UNIT
    EVEN: tl.constexpr = I % (SPLIT_K * UNIT) == 0
    rows = expert_rows(down, expert, h_ptr.dtype.element_ty, LAYOUT, count > 0)
    if EARLY:
        if EVEN and count > 0:
            offs_n = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), H - 1).to(tl.int64)
            prefetch_rows(rows + split * (SPAN // UNIT * BLOCK_K) + offs_n * down.stride_n, PREFETCH)
        pdl_wait(PDL)
    for first in range(0, count, BLOCK_T):
        begin, offs_k = split * SPAN, tl.arange(0, BLOCK_K)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        w_ptrs = rows + (split * (SPAN // UNIT * BLOCK_K) + offs_k)[None, :]
        w_ptrs += tl.minimum(offs_n, H - 1).to(tl.int64)[:, None] * down.stride_n
        ranks = first + tl.arange(0, BLOCK_T)
        slot = _compact(slots, match, rank, ranks)
        h_ptrs = h_ptr + slot[None, :] * I + (begin + offs_k)[:, None]
        w = WeightRows(down, w_ptrs, expert * H + tl.minimum(offs_n, H - 1), None, None)
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        acc = add_products(acc, w, h_ptrs, (ranks < count)[None, :], begin, SPAN, EVEN, I, LAYOUT)
        acc = times_scales(acc, w, I, LAYOUT, AXIS=0)
        out = y_ptr + (split.to(tl.int64) * N + slot)[None, :] * H + offs_n[:, None]
        tl.store(out, acc, mask=(ranks < count)[None, :] & (offs_n < H)[:, None])


@triton.constexpr_function
def main_rows(BLOCK_M, SHORT_M):
    """Return the rows of a row tile's upper part: all of up to 128, else those above the last SHORT_M."""
    return BLOCK_M if BLOCK_M <= 128 else BLOCK_M - SHORT_M


@triton.jit
def group_tile(
    groups,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """This program's expert (E or more: none), first sorted row, end of the group, and column tile.

    The tiles of an expert are consecutive programs.
    """
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    pid, offs_e = tl.program_id(0), tl.arange(0, BLOCK_E)
    begins = tl.load(groups.offsets + offs_e, mask=offs_e < groups.E, other=0)
    ends = tl.load(groups.offsets + offs_e + 1, mask=offs_e < groups.E, other=0)
    row_tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    programs = tl.cumsum(row_tiles, axis=0) * column_tiles
    expert = tl.sum((programs <= pid).to(tl.int32), axis=0)
    is_expert = offs_e == expert
    pid -= tl.sum(tl.where(offs_e == expert - 1, programs, 0), axis=0)
    pid_m, pid_n = program_tile(pid, tl.sum(tl.where(is_expert, row_tiles, 0), axis=0), column_tiles, GROUP_M)
    row = tl.sum(tl.where(is_expert, begins, 0), axis=0) + pid_m * BLOCK_M
    return expert, row, tl.sum(tl.where(is_expert, ends, 0), axis=0), pid_n


@triton.jit
def _products_of_both_parts(
    x, row, w, MAIN_M: tl.constexpr, SHORT_M: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr, LAYOUT: tl.constexpr
):
    """`row_products` of a full tile with two parts: each tile of the weight multiplies both."""
    acc, short = tl.zeros((MAIN_M, w.rows.shape[0]), tl.float32), tl.zeros((SHORT_M, w.rows.shape[0]), tl.float32)
    for k in range(0, K, BLOCK_K):
        x_main, x_short = x.desc.load([row, k]), x.short_desc.load([row + MAIN_M, k])
        w_tile = weight_tile(w, k, K, BLOCK_K, LAYOUT)
        acc = add_product(acc, x_main, w_tile, LAYOUT)
        short = add_product(short, x_short, w_tile, LAYOUT)
    return acc, short


@triton.jit
def _store_scaled(
    acc, x, w, store: tl.constexpr, out, row, end, pid_n, COLUMNS: tl.constexpr, K: tl.constexpr, LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr = None, NUMBERS: tl.constexpr = None,
):  # fmt: skip
    """Multiply the products acc of sorted rows `row`.. by the scales of Rows x and of the weight, and store them."""
    x_rows = tl.minimum(row + tl.arange(0, acc.shape[0]), end - 1)
    # Indices of 64 bits take registers that the loop before needs.
    w = WeightRows(w.weight, w.ptrs, w.rows.to(tl.int32), None, None)
    store(times_scales(acc, w, K, LAYOUT, 1, x.scales, x_rows), *out, row, end, pid_n, COLUMNS, ACTIVATION, NUMBERS)


@triton.jit
def _multiply_parts(
    x,  # RowSource
    row, end,
    w,  # WeightRows
    store: tl.constexpr,  # _store_activated or store_slots
    out,  # the first arguments of `store` after the products
    pid_n,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, SHORT_M: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr,
    LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr = None, NUMBERS: tl.constexpr = None,
):  # fmt: skip
    """Multiply and store the row tile at `row`, as tall as the rows before `end` need."""
    MAIN_M: tl.constexpr = main_rows(BLOCK_M, SHORT_M)
    remaining = tl.minimum(end - row, BLOCK_M)
    if remaining <= SHORT_M:
        short = row_products(x.ptrs, x.short_desc, row, w, SHORT_M, BLOCK_K, K, LAYOUT)
        _store_scaled(short, x.rows, w, store, out, row, end, pid_n, COLUMNS, K, LAYOUT, ACTIVATION, NUMBERS)
    elif remaining <= MAIN_M:
        upper = row_products(x.ptrs, x.desc, row, w, MAIN_M, BLOCK_K, K, LAYOUT)
        _store_scaled(upper, x.rows, w, store, out, row, end, pid_n, COLUMNS, K, LAYOUT, ACTIVATION, NUMBERS)
    elif MAIN_M < BLOCK_M:
        main, short = _products_of_both_parts(x, row, w, MAIN_M, SHORT_M, BLOCK_K, K, LAYOUT)
        _store_scaled(main, x.rows, w, store, out, row, end, pid_n, COLUMNS, K, LAYOUT, ACTIVATION, NUMBERS)
        _store_scaled(short, x.rows, w, store, out, row + MAIN_M, end, pid_n, COLUMNS, K, LAYOUT, ACTIVATION, NUMBERS)


@triton.jit
def _store_activated(acc, h_ptr, row, end, pid_n, I: tl.constexpr, ACTIVATION: tl.constexpr, NUMBERS: tl.constexpr):
    """Store the activation of acc [rows, gate columns then up columns] to rows row..end of h."""
    ROWS: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1] // 2
    gate, up = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, BLOCK_N)), (0, 2, 1)))
    rows, offs_n = row + tl.arange(0, ROWS), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    out = h_ptr + rows.to(tl.int64)[:, None] * I + offs_n[None, :]
    h, _, _ = ACTIVATION(gate, up, NUMBERS)
    tl.store(out, h.to(h_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (offs_n < I)[None, :])


@triton.jit
def experts_up_kernel(
    x,  # Rows [T, H]; where descriptors read only its scales are used, [N] in sorted order
    x_desc,  # [N, H], the same in sorted order, in tiles [BLOCK_M, or MAIN_M of it, BLOCK_K], or None
    short_desc,  # the same in tiles [SHORT_M, BLOCK_K], or None
    gate_up,  # WeightArgs [E, 2I, H]
    gate_up_desc,  # [E, 2, I, H] in tiles [1, 2, BLOCK_N, BLOCK_K], or None
    h_ptr,  # [N, I] out, in sorted order
    groups,  # Groups
    TOP_K,
    H: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, SHORT_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    expert, row, end, pid_n = group_tile(groups, I, BLOCK_M, BLOCK_N, BLOCK_E, GROUP_M)
    if expert < groups.E:
        offs_k, w_rows = tl.arange(0, BLOCK_K), pair_rows(pid_n, I, BLOCK_N)
        w_ptrs = expert_rows(gate_up, expert.to(tl.int64), h_ptr.dtype.element_ty, LAYOUT)
        w_ptrs += w_rows[:, None] * gate_up.stride_n + offs_k[None, :]
        coords = expert, 0, pid_n * BLOCK_N
        w = WeightRows(gate_up, w_ptrs, expert.to(tl.int64) * 2 * I + w_rows, gate_up_desc, coords)
        if SHORT_M == 0:
            # Rows past the group repeat one of its slots: valid memory, no mask in the loop, never stored.
            x_ptrs, x_rows = x.ptr, tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)
            if x_desc is None:
                x_rows = tl.load(groups.order + x_rows) // TOP_K
                x_ptrs += x_rows.to(tl.int64)[:, None] * x.stride + offs_k[None, :]
            acc = row_products(x_ptrs, x_desc, row, w, BLOCK_M, BLOCK_K, H, LAYOUT)
            acc = times_scales(acc, w, H, LAYOUT, 1, x.scales, x_rows)
            _store_activated(acc, h_ptr, row, end, pid_n, I, ACTIVATION, NUMBERS)
        else:
            rows, out = RowSource(x, x.ptr, x_desc, short_desc), (h_ptr,)
            _multiply_parts(
                rows, row, end, w, _store_activated, out, pid_n, I, BLOCK_M, SHORT_M, BLOCK_K, H, LAYOUT, ACTIVATION,
                NUMBERS,
            )  # fmt: skip


@triton.jit
def store_slots(
    acc, y_ptr, order_ptr, row, end, pid_n, H: tl.constexpr, ACTIVATION: tl.constexpr = None,
    NUMBERS: tl.constexpr = None,
):  # fmt: skip
    """Store acc [rows, columns] to the slots of y whose sorted rows are row..end; without an order to these rows."""
    ROWS: tl.constexpr = acc.shape[0]
    rows, offs_n = row + tl.arange(0, ROWS), pid_n * acc.shape[1] + tl.arange(0, acc.shape[1])
    slots = rows if order_ptr is None else tl.load(order_ptr + tl.minimum(rows, end - 1))
    out = y_ptr + slots.to(tl.int64)[:, None] * H + offs_n[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (offs_n < H)[None, :])


@triton.jit
def experts_down_kernel(
    h,  # Rows [N, I] in sorted order, without gaps; where descriptors read only its scales are used
    h_desc,  # the same in tiles [BLOCK_M, or MAIN_M of it, BLOCK_K], or None
    short_desc,  # the same in tiles [SHORT_M, BLOCK_K], or None
    down,  # WeightArgs [E, H, I]
    down_desc,  # the same in tiles [1, BLOCK_N, BLOCK_K], or None
    y_ptr,  # [N, H] out, by slot
    groups,  # Groups
    H: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, SHORT_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    expert, row, end, pid_n = group_tile(groups, H, BLOCK_M, BLOCK_N, BLOCK_E, GROUP_M)
    if expert < groups.E:
        offs_k, w_rows = tl.arange(0, BLOCK_K), tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), H - 1).to(tl.int64)
        w_ptrs = expert_rows(down, expert.to(tl.int64), y_ptr.dtype.element_ty, LAYOUT)
        w_ptrs += w_rows[:, None] * down.stride_n + offs_k[None, :]
        coords, out = (expert, pid_n * BLOCK_N), (y_ptr, groups.order)
        w = WeightRows(down, w_ptrs, expert.to(tl.int64) * H + w_rows, down_desc, coords)
        if SHORT_M == 0:
            rows = tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)
            h_ptrs = h.ptr + rows.to(tl.int64)[:, None] * I + offs_k[None, :]
            acc = row_products(h_ptrs, h_desc, row, w, BLOCK_M, BLOCK_K, I, LAYOUT)
            _store_scaled(acc, h, w, store_slots, out, row, end, pid_n, H, I, LAYOUT)
        else:
            rows = RowSource(h, h.ptr, h_desc, short_desc)
            _multiply_parts(rows, row, end, w, store_slots, out, pid_n, H, BLOCK_M, SHORT_M, BLOCK_K, I, LAYOUT)


@triton.jit
def _add_slot(acc, y_ptr, ids_ptr, weights_ptr, slot, offs_h, N, E, H, SPLIT_K: tl.constexpr):
    """Add a slot's row of y, the sum of its splits, times its routing weight."""
    expert = tl.load(ids_ptr + slot)
    # No kernel wrote the rows of an id out of range.
    mask = offs_h < tl.where((expert >= 0) & (expert < E), H, 0)
    y = tl.zeros((acc.shape[0],), tl.float32)
    for split in tl.static_range(SPLIT_K):
        y += tl.load(y_ptr + (split * N + slot) * H + offs_h, mask=mask, other=0.0).to(tl.float32)
    return acc + tl.load(weights_ptr + slot).to(tl.float32) * y


@triton.jit(do_not_specialize=["N"])
def experts_combine_kernel(
    y_ptr,  # [SPLIT_K, N, H]
    ids_ptr,  # [N]
    weights_ptr,  # [T, K] fp32, or x's dtype
    out_ptr,  # [T, H] out; with a norm: the norm of the sum
    norm,  # FusedNorm of the experts' output + residual, or None
    N, E, H,
    TOP_K: tl.constexpr, SPLIT_K: tl.constexpr, PDL: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    # An ordered fp32 sum over splits, then experts: no atomics, so the bits repeat.
    t = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    if TOP_K <= 8:
        for k in tl.static_range(TOP_K):
            acc = _add_slot(acc, y_ptr, ids_ptr, weights_ptr, t * TOP_K + k, offs_h, N, E, H, SPLIT_K)
    else:  # unrolled, the loads of so many would spill
        for k in range(TOP_K):
            acc = _add_slot(acc, y_ptr, ids_ptr, weights_ptr, t * TOP_K + k, offs_h, N, E, H, SPLIT_K)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out = acc.to(dtype)
    if norm is not None:
        residual_row = norm.residual + t * norm.stride
        residual = tl.load(residual_row + offs_h, mask=offs_h < H, other=0.0)
        # Rounded where the separate kernels round.
        total = (out.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(norm.total_ptr + t * H + offs_h, total, mask=offs_h < H)
        rows = normed_rows(total.to(tl.float32)[None, :], norm.weight, H, norm.eps, dtype, BLOCK_H)
        out = tl.reshape(rows, (BLOCK_H,))
    tl.store(out_ptr + t * H + offs_h, out, mask=offs_h < H)
