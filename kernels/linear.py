"""linear: x @ weight.T with our own kernels for few rows, and for any number of rows where `deterministic` is set.

T rows of x, N rows of the weight, H columns of both: the depth of the sum. PDL is set by `launch` (pdl.py).

torch's library multiplies more rows (`use_skinny_kernel`), except in deterministic mode: a library picks another
kernel, with another order of the sum, for another T.
"""

from collections import namedtuple
from dataclasses import dataclass
from typing import Annotated

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .arch import amd, family, max_multiprocessors
from .arguments import Rows
from .call import operation
from .checks import Matrix
from .launch import LaunchConfig, is_overridden, launch, power_of_2, select_configs, target_arch
from .pdl import prefetch_rows
from .quantized import QUANT_NAMES, tile_columns
from .samples import shape_grid, shapes
from .unpack import fields_of
from .weight import Weight, WeightPtrs, add_products, times_row_scales, weight_tile

SKINNY_M = 16  # up to here always the skinny kernel: the narrowest side of a tensor core tile
SKINNY_M_MAX = 64  # beyond it never


# BLOCK_M rows of x, BLOCK_N rows of the weight.
DecodeTile = namedtuple("DecodeTile", "BLOCK_N BLOCK_K")
SkinnyTile = namedtuple("SkinnyTile", "BLOCK_N num_warps num_stages")
WideTile = namedtuple("WideTile", "BLOCK_M BLOCK_N num_warps num_stages")
# Dense weights of 16 bits on NVIDIA, by the most rows of x. Each program reads all rows of x through L2: fewer weight
# rows give more programs, but x may take at most 0.3 of the weight's bytes up to SKINNY_M, and half of them beyond.
_DECODE = {
    4: DecodeTile(16, 256),
    9: DecodeTile(32, 128),
    16: DecodeTile(64, 128),
    32: DecodeTile(64, 128),
    64: DecodeTile(128, 64),
}
# Quantized weights, by the rows of x in a tile. The layout fixes the depth of a tile: the columns of one field of a
# unit. Not measured on a GPU: selected by instructions per byte (decode) and FLOP per instruction (prefill).
_SKINNY = {
    "sm_80": {16: SkinnyTile(128, 8, 4), 32: SkinnyTile(128, 8, 3), 64: SkinnyTile(64, 4, 3)},
    "sm_90": {16: SkinnyTile(64, 4, 5), 32: SkinnyTile(64, 4, 4), 64: SkinnyTile(64, 4, 3)},
    "gfx942": {16: SkinnyTile(32, 4, 1), 64: SkinnyTile(32, 8, 1)},
}
# The same, by the average rows of x that share a weight.
_WIDE = {
    "sm_80": {0: WideTile(64, 128, 4, 3), 128: WideTile(128, 64, 4, 3), 256: WideTile(256, 64, 8, 3)},
    "sm_90": {0: WideTile(64, 128, 4, 4), 128: WideTile(128, 128, 4, 4), 256: WideTile(256, 128, 8, 4)},
    "sm_100": {0: WideTile(64, 128, 4, 4), 128: WideTile(128, 256, 8, 3)},
    "gfx942": {0: WideTile(64, 64, 4, 2), 256: WideTile(128, 128, 8, 2)},
}
_SKINNY["sm_100"] = _SKINNY["sm_90"]
# fp32 has no tensor cores at this precision: registers bound the tile, in decode to 16 rows of x.
_SKINNY_FP32, _WIDE_FP32 = SkinnyTile(16, 8, 2), WideTile(32, 32, 8, 2)


@triton.jit
def depth_tile(ptrs, inside, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a tile of a reduction over DEPTH, masked only where BLOCK_K does not divide it."""
    return tl.load(ptrs) if DEPTH % BLOCK_K == 0 else tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def program_tile(pid, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Program -> (row tile, column tile). GROUP_M row tiles sweep the columns together, so weights stay in L2."""
    group = pid // (GROUP_M * column_tiles)
    height = tl.maximum(1, tl.minimum(row_tiles - group * GROUP_M, GROUP_M))  # 1 for a surplus program
    within = pid % (GROUP_M * column_tiles)
    return group * GROUP_M + within % height, within // height


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
    w = WeightPtrs(weight.ptr + w_rows[:, None] * weight.stride_n + offs_k[None, :], weight.scales, weight.zeros)
    x_ptrs = x.ptr + offs_t.to(tl.int64)[None, :] * x.stride + offs_k[:, None]
    EVEN: tl.constexpr = H % (BLOCK_K * fields_of(LAYOUT.format)) == 0
    if PDL and PREFETCH:
        prefetch_rows(weight.ptr + w_rows * weight.stride_n, PREFETCH)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    acc = add_products(acc, w, w_rows, x_ptrs, (offs_t < T)[None, :], 0, H, EVEN, H, LAYOUT, PDL)
    acc = times_row_scales(acc, w, w_rows, H, LAYOUT, AXIS=0)
    out = y_ptr + offs_t.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(offs_t < T)[None, :] & (offs_n < N)[:, None])


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x,  # Rows [T, H]
    weight,  # WeightArgs [N, H]
    y_ptr,  # [T, N] out
    T, N,
    H: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = program_tile(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_t = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x.ptr + tl.minimum(offs_t, T - 1).to(tl.int64)[:, None] * x.stride + offs_k[None, :]
    w_rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    w = WeightPtrs(weight.ptr + w_rows[:, None] * weight.stride_n + offs_k[None, :], weight.scales, weight.zeros)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, H, BLOCK_K):
        x_tile = depth_tile(x_ptrs, offs_k[None, :] < H - k, H, BLOCK_K)
        w_tile = weight_tile(w, w_rows, k, H, BLOCK_K, x_tile.dtype, LAYOUT)
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
        x_ptrs += BLOCK_K  # stepped, not computed from k: fewer instructions in the loop
    acc = times_row_scales(acc, w, w_rows, H, LAYOUT, AXIS=1)
    out = y_ptr + offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & (offs_n < N)[None, :])


def skinny_config(
    weights: str, columns: int, depth: int, block_t: int, dtype: torch.dtype, arch: str, halves: int = 1
) -> LaunchConfig:
    """Configure a decode kernel with at most block_t rows of x a tile. `columns`: rows of each of the halves."""
    table = {16: _SKINNY_FP32} if dtype == torch.float32 else _SKINNY[family(arch)]
    height = max(key for key in table if key <= block_t)
    rows, warps, stages = table[height]
    tile = {"BLOCK_T": height, "BLOCK_N": power_of_2(columns, low=16, high=rows // halves)}
    return LaunchConfig(tile | {"BLOCK_K": tile_columns(weights, depth)}, num_warps=warps, num_stages=stages)


def wide_config(
    weights: str, columns: int, depth: int, rows: tuple[int, int] | None, dtype: torch.dtype, arch: str, halves: int = 1
) -> LaunchConfig:
    """Configure a kernel for many rows of x. `rows`: average rows that share a weight, and all rows; None: one tile."""
    shared, total = rows or (0, 0)
    table = {0: _WIDE_FP32} if dtype == torch.float32 else _WIDE[family(arch)]
    block_m, block_n, warps, stages = table[max(key for key in table if key <= shared)]
    tile = {"BLOCK_M": power_of_2(total, low=16, high=block_m) if rows else block_m}
    tile |= {"BLOCK_N": power_of_2(columns, low=16, high=block_n // halves), "BLOCK_K": tile_columns(weights, depth)}
    return LaunchConfig(tile | {"GROUP_M": 8}, num_warps=warps, num_stages=stages)


@dataclass(frozen=True)
class LinearSizes:
    T: int
    H: int
    N: int
    deterministic: bool = False
    weight: str | None = None  # the name of a quantized weight's format


def use_skinny_kernel(sizes: LinearSizes, dtype: torch.dtype, arch: str) -> bool:
    """Return whether the skinny kernel runs: up to SKINNY_M rows always, up to SKINNY_M_MAX where the cost model
    predicts it no slower than a library: memory is slow relative to L2, and the weight has a program for every SM."""
    T, N = sizes.T, sizes.N
    if T <= SKINNY_M or T > SKINNY_M_MAX or dtype == torch.float32:
        return T <= SKINNY_M
    if sizes.weight:
        return True
    return family(arch) in ("sm_80", "sm_90") and _decode_tile(T).BLOCK_N * max_multiprocessors(arch) <= N


def _decode_tile(T: int) -> DecodeTile:
    return _DECODE[min(most for most in _DECODE if most >= min(T, SKINNY_M_MAX))]


def _decode_rows(T: int, arch: str) -> int:
    """Return the rows of x in a tile, which holds them all. AMD's has no size in between."""
    return SKINNY_M_MAX if T > SKINNY_M and amd(arch) else power_of_2(T, low=SKINNY_M, high=SKINNY_M_MAX)


def _decode_config(sizes: LinearSizes, dtype: torch.dtype, arch: str) -> LaunchConfig:
    T, H, fp32, cdna = sizes.T, sizes.H, dtype == torch.float32, amd(arch)
    block_n, block_k = DecodeTile(16, 64 if fp32 else 128) if fp32 or cdna else _decode_tile(T)
    tiles = {"BLOCK_T": _decode_rows(T, arch), "BLOCK_N": block_n, "BLOCK_K": power_of_2(H, 16, block_k)}
    # With more than SKINNY_M rows four stages would leave room for one program an SM.
    return LaunchConfig(tiles, num_warps=4, num_stages=2 if fp32 or cdna else 4 if T <= SKINNY_M else 3)


def configs(sizes: LinearSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    T, N, H, fp32 = sizes.T, sizes.N, sizes.H, dtype == torch.float32
    if weights := sizes.weight:
        rows = None if sizes.deterministic else (T, T)
        skinny = skinny_config(weights, N, H, _decode_rows(T, arch), dtype, arch)
        wide = wide_config(weights, N, H, rows, dtype, arch)
    else:
        block = 32 if fp32 else 64
        tiles = {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": power_of_2(H, low=16, high=block), "GROUP_M": 8}
        skinny = _decode_config(sizes, dtype, arch)
        wide = LaunchConfig(tiles, num_warps=4, num_stages=2 if fp32 or amd(arch) else 4)
    return {"linear_decode_kernel": skinny, "linear_kernel": wide}


@operation(
    reference=reference.linear,
    case=LinearSizes,
    configs=configs,
    flops=lambda case: 2 * case.T * case.H * case.N,
    test_shapes=(
        *shapes(LinearSizes, "1 512 40, 3 100 64, 16 256 33"),
        *shapes(LinearSizes, "1 128 70, 70 100 64", deterministic=True),
        *shapes(LinearSizes, "3 128 40", weight="int4:64"),
        *shapes(LinearSizes, "20 100 33", weight="int8"),
        *shapes(LinearSizes, "5 96 33", weight="fp8", deterministic=True),
    ),
    bench_shapes=(
        *shape_grid(LinearSizes, T=(1, 4, 8, 16), H=4096, N=(6144, 4096)),
        *shape_grid(LinearSizes, T=(1, 4, 16), H=6144, N=8192),
        *shapes(LinearSizes, "1 4096 32000, 32 4096 4096, 32 4096 32000, 64 4096 4096, 64 4096 32000"),
        *shapes(LinearSizes, "1 4096 6144, 4096 4096 6144", deterministic=True),
        *shape_grid(LinearSizes, T=(1, 32, 128, 4096), H=4096, N=6144, weight=QUANT_NAMES),
    ),
)
def linear(
    x: Annotated[Tensor, "... H"], weight: Annotated[Matrix, "N H"], deterministic: bool = False
) -> Annotated[Tensor, "... N"]:
    """Multiply rows with a weight: x @ weight.T.

    x              [..., H], fp32, bf16 or fp16
    weight         [N, H] in x's dtype, or a QuantizedWeight of that shape
    deterministic  a row's bits do not depend on the other rows: one tile for any number of rows

    Returns [..., N] in x's dtype, summed in fp32. Raises ValueError for another shape, dtype or device.

    >>> ops.linear(torch.randn(2, 5, 64), torch.randn(48, 64)).shape
    torch.Size([2, 5, 48])
    """
    rows, w = Rows.of(x.reshape(-1, x.shape[-1])), Weight.of(weight)
    (T, H), N = rows.ptr.shape, len(weight)
    sizes, arch = LinearSizes(T, H, N, deterministic, w.name), target_arch(x.device)
    skinny = use_skinny_kernel(sizes, x.dtype, arch) or (T <= SKINNY_M_MAX and is_overridden("linear_decode_kernel"))
    if not skinny and not deterministic and w.name is None:
        return torch.mm(rows.ptr, w.data.t()).view(*x.shape[:-1], N)
    wide = deterministic or not skinny
    kernel = linear_kernel if wide else linear_decode_kernel
    config = select_configs(configs, sizes, x.dtype, x.device)[kernel.__name__]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    row_tiles = triton.cdiv(T, config.constexprs["BLOCK_M"]) if wide else min(T, 1)
    grid = (row_tiles * triton.cdiv(N, config.constexprs["BLOCK_N"]),)
    more = {} if wide else {"PREFETCH": w.prefetch_bytes(H, config, grid, arch)}
    launch(kernel, grid, config, x=rows, weight=w.args, y_ptr=y, T=T, N=N, H=H, LAYOUT=w.layout(arch), **more)
    return y
