"""Device functions that the matrix kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


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
