"""Device functions that the matrix kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def depth_tile(ptrs, inside, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of a reduction over DEPTH, masked only where steps of BLOCK_K do not divide it."""
    return tl.load(ptrs) if DEPTH % BLOCK_K == 0 else tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def program_tile(row_tiles, columns, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Program id -> (row tile, column tile), GROUP_M row tiles sweep the columns together: weights stay in L2."""
    pid = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    group = pid // (GROUP_M * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * column_tiles)
    return group * GROUP_M + within % height, within // height
