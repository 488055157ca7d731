"""Rows of activations in e4m3, one fp32 scale a row, for products with fp8 codes (`with_fp8_activations`).

T tokens, N rows or slots, E experts, K columns, K' the padded columns of the weight that they multiply, J elements of a
unit of it

The codes lie in the byte order of the weight's units (packing.py), so that both are read as plain tiles: byte 2j of a
unit is column j, byte 2j + 1 column J + j. Padding is 0.
"""

import torch
import triton
import triton.language as tl

from ..launching.kernel_args import Groups, Rows
from ..launching.launch import LaunchConfig, launch
from .fp8 import FP8_MAX, LEAST_AMAX, Fp8Products

_FORMAT = Fp8Products()
_FP8_MAX, _LEAST_AMAX = tl.constexpr(FP8_MAX), tl.constexpr(LEAST_AMAX)


@triton.jit
def _load_half(x_row, columns, K: tl.constexpr):
    return tl.load(x_row + columns, mask=columns < K, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def quantize_rows_kernel(
    x,  # Rows [T, K], or [N, K] where TOP_K is 0
    groups,  # Groups: rows N are slots in sorted order, those of no expert left out; or None
    codes_ptr,  # [N, K'] out, e4m3
    scales_ptr,  # [N] out
    N,
    TOP_K: tl.constexpr,  # slots of a token; 0: row i of x is row i of the codes
    K: tl.constexpr, J: tl.constexpr, UNITS: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    # A program has a row, whose columns it holds: they are read once.
    row = tl.program_id(0).to(tl.int64)
    count = N
    if groups is not None:
        count = tl.load(groups.offsets + groups.E)
    if row < count:
        source = row
        if TOP_K:
            source = (tl.load(groups.order + row) // TOP_K).to(tl.int64)
        units, offs_j = tl.arange(0, BLOCK_U)[:, None], tl.arange(0, J)[None, :]
        x_row, columns = x.ptr + source * x.stride, units * (2 * J) + offs_j
        low, high = _load_half(x_row, columns, K), _load_half(x_row, columns + J, K)
        largest = tl.max(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1), axis=0)
        largest = tl.maximum(largest, _LEAST_AMAX)
        # IEEE divisions give the reference's codes. A NaN stays one in its code, and an infinity becomes one.
        scale = tl.div_rn(largest, tl.full((), _FP8_MAX, tl.float32))
        inverse = tl.div_rn(tl.full((), _FP8_MAX, tl.float32), largest)
        # Interleaved to rows of bytes, which are stored 16 at a time; pairs would be stored 2 at a time.
        codes = tl.interleave(low * inverse, high * inverse).to(tl.float8e4nv)
        out = codes_ptr + row * (UNITS * 2 * J) + units * (2 * J) + tl.arange(0, 2 * J)[None, :]
        tl.store(out, codes, mask=units < UNITS)
        tl.store(scales_ptr + row, scale)


def quantize_rows(x: Rows, groups: Groups | None = None, top_k: int = 0) -> Rows:
    """Quantize the rows of x -> codes float8_e4m3fn [N, K'] with scales fp32 [N].

    groups  rows are slots, and those of no expert stay unset; None: each row of x
    top_k   row i is the token of slot order[i]; 0: it is row i of x
    """
    (T, K), device = x.ptr.shape, x.ptr.device
    N, unit = T * max(1, top_k), _FORMAT.unit_columns(K, K)
    codes = torch.empty((N, 2 * _FORMAT.row_elements(K, K)), dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(N, dtype=torch.float32, device=device)
    units = codes.shape[1] // unit
    block = triton.next_power_of_2(units)
    config = LaunchConfig({"BLOCK_U": block}, min(16, max(1, triton.next_power_of_2(block * unit // 1024))))
    arguments = {"x": x, "groups": groups, "codes_ptr": codes, "scales_ptr": scales, "N": N, "TOP_K": top_k, "K": K}
    launch(quantize_rows_kernel, (N,), config, **arguments, J=unit // 2, UNITS=units)
    return Rows(codes, codes.stride(0), scales)
