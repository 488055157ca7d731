"""expert_swiglu: the sparse expert layer. Sorted groups for prefill, sort-free for decode; equals `reference.expert_swiglu`.

T tokens, K experts a token, N = T * K slots (slot t*K + k), E experts, H hidden, I intermediate

prefill  sort_by_expert -> up (gate and up GEMM, SwiGLU epilogue) -> down -> combine
decode   up -> down, its reduction split -> combine; each program finds the tokens of its expert itself

Both keep rows of the gate and of the up projection interleaved in one weight tile (gate n, up n, gate n+1, ...), so
that one dot feeds both and a SwiGLU pair ends in neighbouring accumulator columns, held by the same thread.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import FLOATS, INTS, Binder, in_range
from .dispatch import sample_ids, sort_by_expert
from .experts_config import DECODE_TOKENS, configs
from .launch import launch, target_arch
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, power_of_2, sample


@triton.jit
def _swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _row_tile(pid_m, offsets_ptr, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Row tile `pid_m` over all groups -> its expert (E or more: none), first sorted row, end of the group."""
    offs_e = tl.arange(0, BLOCK_E)
    begins = tl.load(offsets_ptr + offs_e, mask=offs_e < E, other=0)
    ends = tl.load(offsets_ptr + offs_e + 1, mask=offs_e < E, other=0)
    tiles = tl.cumsum((ends - begins + BLOCK_M - 1) // BLOCK_M, axis=0)
    expert = tl.sum((tiles <= pid_m).to(tl.int32), axis=0)
    earlier = tl.sum(tl.where(offs_e == expert - 1, tiles, 0), axis=0)
    begin = tl.sum(tl.where(offs_e == expert, begins, 0), axis=0) + (pid_m - earlier) * BLOCK_M
    return expert, begin, tl.sum(tl.where(offs_e == expert, ends, 0), axis=0)


@triton.jit
def _program_tile(row_tiles, columns, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Program id -> (row tile, column tile), GROUP_M row tiles sweep the columns together: weights stay in L2."""
    pid = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    group = pid // (GROUP_M * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * column_tiles)
    return group * GROUP_M + within % height, within // height


@triton.jit
def experts_up_kernel(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2I, H]
    h_ptr,  # [N, I] out, in sorted order
    order_ptr,  # [N] sorted slots
    offsets_ptr,  # [E + 1] groups in `order`
    row_tiles,  # upper bound on the row tiles of all groups
    E,
    TOP_K,
    stride_xt,
    stride_we,
    stride_wn,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = _program_tile(row_tiles, I, BLOCK_N, GROUP_M)
    expert, row, end = _row_tile(pid_m, offsets_ptr, E, BLOCK_M, BLOCK_E)
    if expert < E:
        rows = row + tl.arange(0, BLOCK_M)
        # Rows past the group repeat a slot of it: valid memory, no mask in the loop, never stored.
        slots = tl.load(order_ptr + tl.minimum(rows, end - 1))
        offs_k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + (slots // TOP_K).to(tl.int64)[:, None] * stride_xt + offs_k[None, :]
        offs_w = tl.arange(0, 2 * BLOCK_N)
        column = tl.minimum(pid_n * BLOCK_N + offs_w // 2, I - 1) + (offs_w % 2) * I
        w_ptrs = gate_up_ptr + expert.to(tl.int64) * stride_we
        w_ptrs += column.to(tl.int64)[None, :] * stride_wn + offs_k[:, None]
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, H, BLOCK_K):
            if H % BLOCK_K == 0:
                x, w = tl.load(x_ptrs), tl.load(w_ptrs)
            else:
                x = tl.load(x_ptrs, mask=offs_k[None, :] < H - k, other=0.0)
                w = tl.load(w_ptrs, mask=offs_k[:, None] < H - k, other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        out = h_ptr + rows.to(tl.int64)[:, None] * I + offs_n[None, :]
        mask = (rows < end)[:, None] & (offs_n < I)[None, :]
        tl.store(out, _swiglu(gate, up).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def experts_down_kernel(
    h_ptr,  # [N, I] in sorted order
    down_ptr,  # [E, H, I]
    y_ptr,  # [N, H] out, by slot
    order_ptr,  # [N] sorted slots
    offsets_ptr,  # [E + 1] groups in `order`
    row_tiles,
    E,
    stride_we,
    stride_wn,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = _program_tile(row_tiles, H, BLOCK_N, GROUP_M)
    expert, row, end = _row_tile(pid_m, offsets_ptr, E, BLOCK_M, BLOCK_E)
    if expert < E:
        rows = row + tl.arange(0, BLOCK_M)
        offs_k = tl.arange(0, BLOCK_K)
        h_ptrs = h_ptr + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * I + offs_k[None, :]
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        w_ptrs = down_ptr + expert.to(tl.int64) * stride_we
        w_ptrs += tl.minimum(offs_n, H - 1).to(tl.int64)[None, :] * stride_wn + offs_k[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, I, BLOCK_K):
            if I % BLOCK_K == 0:
                h, w = tl.load(h_ptrs), tl.load(w_ptrs)
            else:
                h = tl.load(h_ptrs, mask=offs_k[None, :] < I - k, other=0.0)
                w = tl.load(w_ptrs, mask=offs_k[:, None] < I - k, other=0.0)
            acc = tl.dot(h, w, acc, input_precision="ieee")
            h_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
        slots = tl.load(order_ptr + tl.minimum(rows, end - 1))
        out = y_ptr + slots.to(tl.int64)[:, None] * H + offs_n[None, :]
        tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (offs_n < H)[None, :])


@triton.jit
def _matching_slots(ids_ptr, N, E, BLOCK_S: tl.constexpr, BY_SLOT: tl.constexpr):
    """This program's expert, all slots, which of them chose it, each one's rank among those, and how many there are.

    BY_SLOT (fewer slots than experts): a program a slot, and only the first slot of an expert works.
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
def _compact(slots, match, rank, wanted):
    """The slots whose rank among the matches is in `wanted` [BLOCK_T]; 0 where there is none."""
    hit = match[None, :] & (rank[None, :] == wanted[:, None])
    return tl.sum(tl.where(hit, slots[None, :], 0), axis=1)


@triton.jit
def experts_up_decode_kernel(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2I, H]
    ids_ptr,  # [N]
    h_ptr,  # [N, I] out, by slot
    N,
    E,
    TOP_K,
    stride_xt,
    stride_we,
    stride_wn,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BY_SLOT: tl.constexpr,
):
    # Operands are swapped: weight rows fill the tensor core's M, the few tokens its N.
    pid_n = tl.program_id(0)
    expert, slots, match, rank, count = _matching_slots(ids_ptr, N, E, BLOCK_S, BY_SLOT)
    for first in range(0, count, BLOCK_T):
        offs_k = tl.arange(0, BLOCK_K)
        offs_w = tl.arange(0, 2 * BLOCK_N)
        column = tl.minimum(pid_n * BLOCK_N + offs_w // 2, I - 1) + (offs_w % 2) * I
        w_row = gate_up_ptr + expert * stride_we + column.to(tl.int64)[:, None] * stride_wn
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        wanted = first + tl.arange(0, BLOCK_T)
        slot = _compact(slots, match, rank, wanted).to(tl.int64)
        x_row = x_ptr + (slot // TOP_K)[None, :] * stride_xt
        acc = tl.zeros((2 * BLOCK_N, BLOCK_T), tl.float32)
        for k in range(0, H, BLOCK_K):
            if H % BLOCK_K == 0:
                w, x = tl.load(w_row + (k + offs_k)[None, :]), tl.load(x_row + (k + offs_k)[:, None])
            else:
                w = tl.load(w_row + (k + offs_k)[None, :], mask=(k + offs_k)[None, :] < H, other=0.0)
                x = tl.load(x_row + (k + offs_k)[:, None], mask=(k + offs_k)[:, None] < H, other=0.0)
            acc = tl.dot(w, x, acc, input_precision="ieee")
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_T)), (0, 2, 1)))
        out = h_ptr + slot[None, :] * I + offs_n[:, None]
        mask = (wanted < count)[None, :] & (offs_n < I)[:, None]
        tl.store(out, _swiglu(gate, up).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def experts_down_decode_kernel(
    h_ptr,  # [N, I] by slot
    down_ptr,  # [E, H, I]
    ids_ptr,  # [N]
    y_ptr,  # [SPLIT_K, N, H] out, fp32: one partial sum a split
    N,
    E,
    stride_we,
    stride_wn,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BY_SLOT: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    pid_n, split = tl.program_id(0), tl.program_id(2)
    expert, slots, match, rank, count = _matching_slots(ids_ptr, N, E, BLOCK_S, BY_SLOT)
    SPAN: tl.constexpr = (I + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    for first in range(0, count, BLOCK_T):
        offs_k = split * SPAN + tl.arange(0, BLOCK_K)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        w_row = down_ptr + expert * stride_we + tl.minimum(offs_n, H - 1).to(tl.int64)[:, None] * stride_wn
        wanted = first + tl.arange(0, BLOCK_T)
        slot = _compact(slots, match, rank, wanted).to(tl.int64)
        h_row = h_ptr + slot[None, :] * I
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for k in range(0, SPAN, BLOCK_K):
            if I % (SPLIT_K * BLOCK_K) == 0:
                w, h = tl.load(w_row + (k + offs_k)[None, :]), tl.load(h_row + (k + offs_k)[:, None])
            else:
                w = tl.load(w_row + (k + offs_k)[None, :], mask=(k + offs_k)[None, :] < I, other=0.0)
                h = tl.load(h_row + (k + offs_k)[:, None], mask=(k + offs_k)[:, None] < I, other=0.0)
            acc = tl.dot(w, h, acc, input_precision="ieee")
        out = y_ptr + (split.to(tl.int64) * N + slot)[None, :] * H + offs_n[:, None]
        tl.store(out, acc, mask=(wanted < count)[None, :] & (offs_n < H)[:, None])


@triton.jit
def experts_combine_kernel(
    y_ptr,  # [SPLIT_K, N, H]
    ids_ptr,  # [N]
    weights_ptr,  # [T, K] fp32
    out_ptr,  # [T, H] out
    N,
    E,
    H,
    TOP_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # An ordered fp32 sum over splits, then choices: no atomics, so the same bits every time.
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
    tl.store(out_ptr + t * H + offs_h, acc.to(out_ptr.dtype.element_ty), mask=offs_h < H)


def check(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor, deterministic: bool = False
) -> Sizes:
    binder = Binder("expert_swiglu")
    binder.tensor("x", x, "T H", FLOATS)
    binder.tensor("down_proj", down_proj, "E H I", (x.dtype,))
    binder.positive("H", "I", "E")
    binder.tensor("gate_up_proj", gate_up_proj, f"E {2 * binder.sizes['I']} H", (x.dtype,))
    binder.tensor("ids", ids, "T K", INTS)
    binder.tensor("weights", weights, "T K", (torch.float32,))
    binder.positive("K")
    in_range("expert_swiglu", "ids", ids, 0, binder.sizes["E"] - 1)
    return binder.sizes


def expert_swiglu(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor, deterministic: bool = False
) -> Tensor:
    """Triton way of `reference.expert_swiglu`. `deterministic`: the prefill kernels, with one tile, whatever T is.

    An id out of range (which the check sees on a CPU only) contributes nothing.
    """
    T, H = x.shape
    E, _, I = down_proj.shape
    sizes = {"T": T, "H": H, "I": I, "E": E, "K": ids.shape[1], "deterministic": int(deterministic)}
    choices = configs(sizes, x.dtype, target_arch(x.device))
    x, gate_up_proj, down_proj = dense_rows(x), dense_rows(gate_up_proj), dense_rows(down_proj)
    ids = ids.contiguous()
    decode = T <= DECODE_TOKENS and not deterministic
    y = (_decode if decode else _prefill)(x, gate_up_proj, down_proj, ids, sizes, choices)
    out = torch.empty((T, H), dtype=x.dtype, device=x.device)
    combine = choices["experts_combine_kernel"]
    args = {"y_ptr": y, "ids_ptr": ids, "weights_ptr": weights.contiguous(), "out_ptr": out}
    args |= {"N": ids.numel(), "E": E, "H": H}
    grid = (T, triton.cdiv(H, combine.constexprs["BLOCK_H"]))
    launch(experts_combine_kernel, grid, args, combine, TOP_K=sizes["K"], SPLIT_K=y.shape[0])
    return out


def _weight_strides(w: Tensor) -> dict[str, int]:
    return {"stride_we": w.stride(0), "stride_wn": w.stride(1)}


def _decode(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, sizes: Sizes, choices: dict[str, LaunchConfig]
) -> Tensor:
    """-> partial sums fp32 [SPLIT_K, N, H]."""
    H, I, E, N = sizes["H"], sizes["I"], sizes["E"], ids.numel()
    up, split = choices["experts_up_decode_kernel"], choices["experts_down_decode_kernel"]
    h = torch.empty((N, I), dtype=x.dtype, device=x.device)
    args = {"x_ptr": x, "gate_up_ptr": gate_up, "ids_ptr": ids, "h_ptr": h, "N": N, "E": E, "TOP_K": sizes["K"]}
    args |= {"stride_xt": x.stride(0), **_weight_strides(gate_up)}
    working = {"H": H, "I": I, "BY_SLOT": N < E}
    launch(experts_up_decode_kernel, (triton.cdiv(I, up.constexprs["BLOCK_N"]), min(N, E)), args, up, **working)
    splits = split.constexprs["SPLIT_K"]
    y = torch.empty((splits, N, H), dtype=torch.float32, device=x.device)
    args = {"h_ptr": h, "down_ptr": down, "ids_ptr": ids, "y_ptr": y, "N": N, "E": E, **_weight_strides(down)}
    grid = (triton.cdiv(H, split.constexprs["BLOCK_N"]), min(N, E), splits)
    launch(experts_down_decode_kernel, grid, args, split, **working)
    return y


def _prefill(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, sizes: Sizes, choices: dict[str, LaunchConfig]
) -> Tensor:
    """-> each slot's expert output [1, N, H]."""
    H, I, E, N = sizes["H"], sizes["I"], sizes["E"], ids.numel()
    order, offsets = sort_by_expert(ids, E)
    h = torch.empty((N, I), dtype=x.dtype, device=x.device)
    y = torch.empty((1, N, H), dtype=x.dtype, device=x.device)
    groups = {"order_ptr": order, "offsets_ptr": offsets, "E": E}

    def run(kernel: Any, config: LaunchConfig, columns: int, **args: Any) -> None:
        # Each group wastes less than one row tile, so this many always do; those too many leave at once.
        row_tiles = triton.cdiv(N, config.constexprs["BLOCK_M"]) + E - 1 if N else 0
        grid = (row_tiles * triton.cdiv(columns, config.constexprs["BLOCK_N"]),)
        args |= {"row_tiles": row_tiles, **groups}
        launch(kernel, grid, args, config, H=H, I=I, BLOCK_E=power_of_2(E))

    up_args = {"x_ptr": x, "gate_up_ptr": gate_up, "h_ptr": h, "TOP_K": sizes["K"], "stride_xt": x.stride(0)}
    run(experts_up_kernel, choices["experts_up_kernel"], I, **up_args, **_weight_strides(gate_up))
    down_args = {"h_ptr": h, "down_ptr": down, "y_ptr": y}
    run(experts_down_kernel, choices["experts_down_kernel"], H, **down_args, **_weight_strides(down))
    return y


def empty(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    T, H, I, E, K = (sizes[letter] for letter in ("T", "H", "I", "E", "K"))
    x = sample(T, H, dtype=dtype, device=device, generator=generator)
    gate_up = sample(E, 2 * I, H, dtype=dtype, device=device, generator=generator, scale=H**-0.5)
    down = sample(E, H, I, dtype=dtype, device=device, generator=generator, scale=I**-0.5)
    weights = sample(T, K, dtype=torch.float32, device=device, generator=generator).softmax(-1)
    ids = sample_ids(sizes, device, generator)
    return {"x": x, "gate_up_proj": gate_up, "down_proj": down, "ids": ids, "weights": weights}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Every chosen expert's weights once (in expectation over uniform routing), x in, the result out."""
    T, H, I, E, K = (sizes[letter] for letter in ("T", "H", "I", "E", "K"))
    chosen = E * (1 - (1 - K / E) ** T)
    return Cost(flops=6 * T * K * H * I, bytes=int((chosen * 3 * H * I + 2 * T * H) * dtype.itemsize) + 8 * T * K)


OP = Op(
    name="expert_swiglu",
    check=check,
    run=expert_swiglu,
    reference=reference.expert_swiglu,
    empty=empty,
    inputs=inputs,
    configs=configs,
    cost=cost,
    test_shapes=tuple(
        {"T": T, "H": H, "I": I, "E": E, "K": K}
        for T, H, I, E, K in (
            (1, 128, 256, 8, 2),
            (7, 80, 96, 4, 1),
            (33, 72, 100, 8, 3),
            (65, 128, 256, 8, 2),
            (130, 90, 70, 4, 2),
            (200, 64, 48, 2, 2),
        )
    ),
    bench_shapes=tuple(
        {"T": T, "H": H, "I": I, "E": 8, "K": 2}
        for H, I in ((4096, 14336), (6144, 16384))
        for T in (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 2048, 4096, 8192)
    ),
)
