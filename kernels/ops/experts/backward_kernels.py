"""Kernels of `expert_swiglu_backward`: products with a transposed weight, and SwiGLU's derivative.

T tokens, K experts a token, N = T * K slots (slot t*K + k), E experts, H hidden, I intermediate

The sum of a transposed product runs over a weight's rows, and the codes of an element lie along its columns. So a
program has the columns of one unit (packing.py): it loads a tile of elements once, and each of its F fields has a
product, and a sum, of its own.
"""

import triton
import triton.language as tl

from ...weights.formats import field_values
from ...weights.packing import scale_values
from ...weights.weight_args import depth_tile, expert_rows
from .kernels import group_tile, store_slots


@triton.jit
def swiglu_backward_kernel(
    gate_up_ptr,  # [N, 2I] gate, then up, in sorted order; out: their gradients for a routing weight of 1
    grad_h_ptr,  # [N, I] in sorted order, for a routing weight of 1
    ids_ptr,  # [N]
    grad_weights_ptr,  # [N] out, fp32, by slot: 0 for an id out of range
    groups,  # Groups
    I: tl.constexpr, BLOCK_I: tl.constexpr, ACTIVATION: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    # A program has a slot, for the zero, and a sorted row.
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = gate_up_ptr.dtype.element_ty
    expert = tl.load(ids_ptr + row)
    if (expert < 0) | (expert >= groups.E):
        tl.store(grad_weights_ptr + row, 0.0)
    if row < tl.load(groups.offsets + groups.E):
        total = tl.zeros((BLOCK_I,), tl.float32)
        for i in range(0, I, BLOCK_I):
            offs_i = i + tl.arange(0, BLOCK_I)
            gate_ptrs, inside = gate_up_ptr + row * (2 * I) + offs_i, offs_i < I
            gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(gate_ptrs + I, mask=inside, other=0.0).to(tl.float32)
            grad_h = tl.load(grad_h_ptr + row * I + offs_i, mask=inside, other=0.0).to(tl.float32)
            h, of_gate, of_up = ACTIVATION(gate, up, NUMBERS)
            total += grad_h * h
            tl.store(gate_ptrs, (grad_h * of_gate).to(dtype), mask=inside)
            tl.store(gate_ptrs + I, (grad_h * of_up).to(dtype), mask=inside)
        tl.store(grad_weights_ptr + tl.load(groups.order + row), tl.sum(total, axis=0))


@triton.jit
def _group_values(ptr, indices, inside):
    """Load the scales or zeros of a group of columns, [rows, 1]."""
    ptrs = ptr + indices[:, None]
    return tl.load(ptrs) if inside is None else tl.load(ptrs, mask=inside[:, None], other=0.0)


@triton.jit
def _add_fields(
    accs,  # F sums [rows, J]
    x,  # [rows, BLOCK_K]
    tile,  # int16 elements [BLOCK_K, J]
    weight,  # WeightArgs
    w_rows,  # of the tile, among all experts'
    inside,  # which of these exist, or None: all
    pid_n,
    COLUMNS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """accs + x @ each field of the tile."""
    J: tl.constexpr = tile.shape[1]
    FIELDS: tl.constexpr = LAYOUT.fields
    GROUP: tl.constexpr = LAYOUT.group
    GROUPS: tl.constexpr = COLUMNS // GROUP
    # 0, which the compiler does not know: a shift by a constant it would move behind the conversion of the elements to
    # the layout of the tensor cores' operand, in which each warp unpacks all of them.
    zero = tl.minimum(pid_n, 0)
    sums = ()
    for field in tl.static_range(FIELDS):
        if field == 0 or field * J % GROUP == 0:
            group = tl.minimum((pid_n * FIELDS + field) * J // GROUP, GROUPS - 1)  # there may be padding
            scales = _group_values(weight.scales, w_rows * GROUPS + group, inside)
            zeros = None if weight.zeros is None else _group_values(weight.zeros, w_rows * GROUPS + group, inside)
        values = scale_values(field_values(tile, field + zero, zeros, LAYOUT, x.dtype), scales, LAYOUT.ptx)
        product = tl.dot(x, values, accs[field], input_precision="ieee")
        sums = sums + (product,)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def _transposed_tile(
    x_ptr, x_desc, weight, w_desc, y_ptr, order_ptr, place,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_transposed_product` of ROWS rows at most; place: expert, row, end of the group, column tile."""
    expert, row, end, pid_n = place
    FIELDS: tl.constexpr = LAYOUT.fields
    J: tl.constexpr = BLOCK_N // FIELDS
    EVEN: tl.constexpr = DEPTH % BLOCK_K == 0
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_k, offs_n, index = tl.arange(0, BLOCK_K), pid_n * J + tl.arange(0, J), expert.to(tl.int64)
    # Rows past the group repeat its last one: valid memory, no mask in the loop, never stored.
    x_rows = tl.minimum(row + tl.arange(0, ROWS), end - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * DEPTH + offs_k[None, :]
    w_ptrs = expert_rows(weight, index, dtype, LAYOUT)
    w_ptrs += offs_k.to(tl.int64)[:, None] * weight.stride_n + offs_n[None, :]
    zeros = tl.zeros((ROWS, J), tl.float32)
    accs = (zeros,) if FIELDS == 1 else (zeros, zeros) if FIELDS == 2 else (zeros, zeros, zeros, zeros)
    for k in range(0, DEPTH, BLOCK_K):
        x = depth_tile(x_ptrs, offs_k[None, :] < DEPTH - k, EVEN) if x_desc is None else x_desc.load([row, k])
        inside = None if EVEN else offs_k < DEPTH - k
        if w_desc is not None:
            tile = w_desc.load([expert, k, pid_n * J]).reshape(BLOCK_K, J)
        elif FIELDS == 1 and COLUMNS % BLOCK_N:
            tile = tl.load(w_ptrs, mask=(offs_k < DEPTH - k)[:, None] & (offs_n < COLUMNS)[None, :], other=0.0)
        else:
            tile = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=(offs_k < DEPTH - k)[:, None], other=0)
        if FIELDS == 1:
            accs = (tl.dot(x, tile, accs[0], input_precision="ieee"),)
        else:
            accs = _add_fields(accs, x, tile, weight, index * DEPTH + k + offs_k, inside, pid_n, COLUMNS, LAYOUT)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * weight.stride_n
    for field in tl.static_range(FIELDS):
        store_slots(accs[field], y_ptr, order_ptr, row, end, pid_n * FIELDS + field, COLUMNS)


@triton.jit
def _transposed_product(
    x_ptr, x_desc, short_desc, weight, w_desc, y_ptr, order_ptr, groups,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, SHORT_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Multiply rows of x [N, DEPTH], in sorted order, by their experts of a weight [E, DEPTH, COLUMNS]. The last tile
    of a group has SHORT_M rows, unless that is 0, where they suffice."""
    expert, row, end, pid_n = group_tile(groups, COLUMNS, BLOCK_M, BLOCK_N, BLOCK_E, GROUP_M)
    if expert < groups.E:
        place = expert, row, end, pid_n
        if SHORT_M == 0:
            _transposed_tile(
                x_ptr, x_desc, weight, w_desc, y_ptr, order_ptr, place, DEPTH, COLUMNS, LAYOUT, BLOCK_M, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip
        elif end - row <= SHORT_M:
            _transposed_tile(
                x_ptr, short_desc, weight, w_desc, y_ptr, order_ptr, place, DEPTH, COLUMNS, LAYOUT, SHORT_M, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip
        else:
            _transposed_tile(
                x_ptr, x_desc, weight, w_desc, y_ptr, order_ptr, place, DEPTH, COLUMNS, LAYOUT, BLOCK_M, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip


@triton.jit
def experts_grad_h_kernel(
    x_ptr,  # [N, H] the gradient of the result, in sorted order
    x_desc,  # the same in tiles [BLOCK_M, BLOCK_K], or None: pointers read
    short_desc,  # the same in tiles [SHORT_M, BLOCK_K], or None
    weight,  # WeightArgs [E, H, I]
    weight_desc,  # the same in tiles [1, BLOCK_K, BLOCK_N], or None
    out_ptr,  # [N, I] out, in sorted order
    groups,  # Groups
    H: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, SHORT_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    _transposed_product(
        x_ptr, x_desc, short_desc, weight, weight_desc, out_ptr, None, groups, H, I, LAYOUT, BLOCK_M, SHORT_M, BLOCK_N,
        BLOCK_K, BLOCK_E, GROUP_M,
    )  # fmt: skip


@triton.jit
def experts_grad_x_kernel(
    x_ptr,  # [N, 2I] the gradients of gate and up, in sorted order
    x_desc,
    short_desc,
    weight,  # WeightArgs [E, 2I, H]
    weight_desc,
    out_ptr,  # [N, H] out, by slot
    groups,  # Groups
    H: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, SHORT_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    _transposed_product(
        x_ptr, x_desc, short_desc, weight, weight_desc, out_ptr, groups.order, groups, 2 * I, H, LAYOUT, BLOCK_M,
        SHORT_M, BLOCK_N, BLOCK_K, BLOCK_E, GROUP_M,
    )  # fmt: skip
