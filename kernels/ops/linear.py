"""linear: x @ weight.T with our own kernels for few rows, and for any number of rows where `deterministic` is set.

T rows of x, N rows of the weight, H columns of both: the depth of the sum. PDL is set by `launch` (pdl.py).

torch's library multiplies more rows (`use_skinny_kernel`), except in deterministic mode: a library picks another
kernel, with another order of the sum, for another T.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..launching.arch import family, max_multiprocessors
from ..launching.kernel_args import Rows
from ..launching.launch import LaunchConfig, describe, launch, select_configs, target_arch
from ..launching.pdl import prefetch_rows
from ..operation.cases import Cost, operation, shapes
from ..weights.composite_args import Matrix
from ..weights.formats import CODE_PRODUCTS, QUANT_NAMES, matrix_bytes, multiplies_codes
from ..weights.weight_args import Weight, WeightRows, add_products, program_tile, row_products, times_scales
from .tiles import (
    DETERMINISTIC_ROWS,
    QUANTIZED_DECODE,
    DecodeTile,
    PrefillTile,
    Table,
    decode_tile,
    least_rows,
    power_of_2,
    prefill_tile,
    quantized_prefill,
    weight_config,
)

SKINNY_M = 16  # up to here always the skinny kernel: the narrowest side of a tensor core tile
SKINNY_M_MAX = 64  # beyond it never
PROGRAMS = 64  # at least, of a quantized weight and few rows: a narrower tile than the table's where it has few rows


# Each program reads all rows of x through L2: fewer weight rows give more programs, but x may take at most 0.3 of the
# weight's bytes up to SKINNY_M, and half of them beyond, where four stages would leave room for one program an SM. On
# AMD no size lies between.
DECODE: Table[DecodeTile] = {
    "sm_80": (
        DecodeTile(4, 16, 16, 256, 4, 4, "compiled: 72 registers, 612 FLOP"),
        DecodeTile(9, 16, 32, 128, 4, 4, "compiled: 58 registers, 352 FLOP"),
        DecodeTile(16, 16, 64, 128, 4, 4, "compiled: 64 registers, 551 FLOP"),
        DecodeTile(32, 32, 64, 128, 4, 3, "compiled: 80 registers, 964 FLOP"),
        DecodeTile(64, 64, 128, 64, 4, 3, "compiled: 168 registers, 2,081 FLOP"),
    ),
    "gfx942": (
        DecodeTile(16, 16, 16, 128, 4, 2, "compiled: 64 registers"),
        DecodeTile(64, 64, 16, 128, 4, 2, "compiled: 82 registers"),
    ),
    "fp32": (
        DecodeTile(16, 16, 16, 64, 4, 2, "compiled: 42 registers"),
        DecodeTile(32, 32, 16, 64, 4, 2, "compiled: 56 registers"),
        DecodeTile(64, 64, 16, 64, 4, 2, "compiled: 66 registers"),
    ),
}
# Any number of rows in deterministic mode: one tile.
PREFILL: Table[PrefillTile] = {
    "sm_80": (PrefillTile(0, 64, 64, 64, 4, 4, "compiled: 96 registers, 1,473 FLOP"),),
    "gfx942": (PrefillTile(0, 64, 64, 64, 4, 2, "compiled: 102 registers"),),
    "fp32": (PrefillTile(0, 32, 32, 32, 4, 2, "compiled: 64 registers"),),
}


@triton.jit(do_not_specialize=["T"])
def linear_decode_kernel(
    x,  # Rows [T, H]
    weight,  # WeightArgs [N, H]
    y_ptr,  # [T, N] out
    T, N,
    H: tl.constexpr, LAYOUT: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    # Swapped operands: weight rows, each read by one program, fill the tensor core's M, the few x rows its N.
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t, offs_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    w_rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    w_ptrs = weight.ptr + w_rows[:, None] * weight.stride_n + offs_k[None, :]
    w = WeightRows(weight, w_ptrs, w_rows, None, None)
    x_ptrs = x.ptr + offs_t.to(tl.int64)[None, :] * x.stride + offs_k[:, None]
    EVEN: tl.constexpr = H % (BLOCK_K * LAYOUT.fields) == 0
    if PDL and PREFETCH:
        prefetch_rows(weight.ptr + w_rows * weight.stride_n, PREFETCH)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    acc = add_products(acc, w, x_ptrs, (offs_t < T)[None, :], 0, H, EVEN, H, LAYOUT, PDL)
    acc = times_scales(acc, w, H, LAYOUT, AXIS=0)
    out = y_ptr + offs_t.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(offs_t < T)[None, :] & (offs_n < N)[:, None])


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x,  # Rows [T, H], values or codes
    x_desc,  # the same in tiles [BLOCK_M, BLOCK_K], or None
    weight,  # WeightArgs [N, H]
    weight_desc,  # the same in tiles [BLOCK_N, BLOCK_K], or None
    y_ptr,  # [T, N] out
    T, N,
    H: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = program_tile(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_t = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = tl.minimum(offs_t, T - 1)
    x_ptrs = x.ptr + x_rows.to(tl.int64)[:, None] * x.stride + offs_k[None, :]
    w_rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    w_ptrs = weight.ptr + w_rows[:, None] * weight.stride_n + offs_k[None, :]
    w = WeightRows(weight, w_ptrs, w_rows, weight_desc, (pid_n * BLOCK_N,))
    acc = row_products(x_ptrs, x_desc, pid_m * BLOCK_M, w, BLOCK_M, BLOCK_K, H, LAYOUT)
    acc = times_scales(acc, w, H, LAYOUT, 1, x.scales, x_rows)
    out = y_ptr + offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & (offs_n < N)[None, :])


@dataclass(frozen=True)
class LinearSizes:
    T: int
    H: int
    N: int
    deterministic: bool = False
    weight: str | None = None  # the name of a quantized weight's format


def use_skinny_kernel(sizes: LinearSizes, dtype: torch.dtype, arch: str) -> bool:
    """Return whether the kernel for few rows of x runs, in place of torch's library or the one for many.

    Not for products of codes. Up to SKINNY_M rows it does for others. Up to SKINNY_M_MAX it does for a quantized
    weight, and on sm_80 and sm_90 for a weight whose rows fill a tile on every SM.
    """
    T, N = sizes.T, sizes.N
    if multiplies_codes(sizes.weight):
        return False
    if T <= SKINNY_M or T > SKINNY_M_MAX or dtype == torch.float32:
        return T <= SKINNY_M
    if sizes.weight:
        return True
    tile = decode_tile(DECODE, T, dtype, arch)
    return family(arch) in ("sm_80", "sm_90") and tile.BLOCK_N * max_multiprocessors(arch) <= N


def configs(sizes: LinearSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    T, quantized = sizes.T, sizes.weight
    few = decode_tile(QUANTIZED_DECODE if quantized else DECODE, T, dtype, arch)
    block_n = power_of_2(sizes.N // PROGRAMS, low=32)
    if quantized and few.BLOCK_T == 16 and block_n < few.BLOCK_N:
        few = few._replace(BLOCK_N=block_n, num_warps=4)
    many = prefill_tile(
        quantized_prefill(quantized, arch) if quantized else PREFILL,
        DETERMINISTIC_ROWS if sizes.deterministic else T,
        dtype,
        arch,
        "deterministic" if sizes.deterministic else "",
    )
    rows = many.BLOCK_M - many.SHORT_M  # a tile has one part here
    block_m = rows if sizes.deterministic else power_of_2(T, low=least_rows(quantized, arch), high=rows)
    return {
        "linear_decode_kernel": weight_config(few, sizes.N, sizes.H, quantized, BLOCK_T=few.BLOCK_T),
        "linear_kernel": weight_config(many, sizes.N, sizes.H, quantized, BLOCK_M=block_m, GROUP_M=many.GROUP_M),
    }


def cost(case: LinearSizes, dtype: torch.dtype) -> Cost:
    """Count x, the weight and the result once; codes of x, which a launch of their own writes, once more."""
    T, H, N = case.T, case.H, case.N
    has_codes, flops = multiplies_codes(case.weight), 2 * T * H * N
    codes = 2 * T * (H + torch.float32.itemsize) * has_codes
    elements = T * (H + N) * dtype.itemsize
    return Cost(flops, matrix_bytes(case.weight, N, H, dtype.itemsize) + elements + codes, fp8_flops=flops * has_codes)


@operation(
    reference=reference.linear,
    case=LinearSizes,
    count=cost,
    test_shapes=(
        *shapes(LinearSizes, "1 512 40, 3 100 64, 16 256 33"),
        *shapes(LinearSizes, "1 128 70, 70 100 64", deterministic=True),
        *shapes(LinearSizes, "3 128 40", weight="int4:64"),
        *shapes(LinearSizes, "20 100 33", weight="int8"),
        *shapes(LinearSizes, "5 96 33", weight="fp8", deterministic=True),
        *shapes(LinearSizes, "3 100 40, 70 300 33", weight=CODE_PRODUCTS),
        *shapes(LinearSizes, "5 64 33", weight=CODE_PRODUCTS, deterministic=True),
    ),
    bench_shapes=(
        *(LinearSizes(T, 4096, N) for T in (1, 4, 8, 16) for N in (6144, 4096)),
        *shapes(LinearSizes, "1 6144 8192, 4 6144 8192, 16 6144 8192"),
        *shapes(LinearSizes, "1 4096 32000, 32 4096 4096, 32 4096 32000, 64 4096 4096, 64 4096 32000"),
        *shapes(LinearSizes, "1 4096 6144, 4096 4096 6144", deterministic=True),
        *(LinearSizes(T, 4096, 6144, weight=name) for T in (1, 32, 128, 4096) for name in QUANT_NAMES),
        *shapes(LinearSizes, "128 4096 6144, 4096 4096 6144", weight=CODE_PRODUCTS),
    ),
)
def linear(
    x: Annotated[Tensor, "... H"], weight: Annotated[Matrix, "N H"], deterministic: bool = False
) -> Annotated[Tensor, "... N"]:
    """Multiply rows with a weight: x @ weight.T.

    x              [..., H], fp32, bf16 or fp16
    weight         [N, H] in x's dtype, or a QuantizedWeight of that shape; of one format it quantizes x (fp8.py)
    deterministic  a row's bits do not depend on the other rows: one tile for any number of rows

    Returns [..., N] in x's dtype, summed in fp32. Raises ValueError for another shape, dtype or device.

    >>> ops.linear(torch.randn(2, 5, 64), torch.randn(48, 64)).shape
    torch.Size([2, 5, 48])
    """
    rows, w = Rows.of(x.reshape(-1, x.shape[-1])), Weight.of(weight)
    (T, H), N = rows.ptr.shape, len(weight)
    sizes, arch = LinearSizes(T, H, N, deterministic, w.name), target_arch(x.device)
    skinny = use_skinny_kernel(sizes, x.dtype, arch)
    if not skinny and not deterministic and w.name is None:
        return torch.mm(rows.ptr, w.data.t()).view(*x.shape[:-1], N)
    wide = deterministic or not skinny
    kernel = linear_kernel if wide else linear_decode_kernel
    config = select_configs(configs, sizes, x.dtype, x.device)[kernel.__name__]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    row_tiles = triton.cdiv(T, config.constexprs["BLOCK_M"]) if wide else min(T, 1)
    grid = (row_tiles * triton.cdiv(N, config.constexprs["BLOCK_N"]),)
    kernel_args: dict[str, Any] = {"x_desc": None, "weight_desc": None}
    rows = w.rows_of(rows)
    if rows.scales is not None:
        tile, H = (config.constexprs["BLOCK_M"], config.constexprs["BLOCK_K"]), rows.ptr.shape[1]
        kernel_args = {"x_desc": describe(rows.ptr, tile, arch), "weight_desc": w.descriptor(1, config, arch)}
    elif not wide:
        kernel_args = {"PREFETCH": w.prefetch_bytes(H, config, grid, arch)}
    launch(kernel, grid, config, x=rows, weight=w.args, y_ptr=y, T=T, N=N, H=H, LAYOUT=w.layout(arch), **kernel_args)
    return y
