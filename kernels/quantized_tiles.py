"""Launch configurations for quantized weights: pure functions of sizes, dtype and architecture.

The layout fixes the depth of a tile: the columns of one field of a unit. `weights` is a `QuantizedWeight.name`, such as
"int4:128". Not measured on a GPU: selected by instructions per byte (decode) and FLOP per instruction (prefill).
"""

from __future__ import annotations

import torch

from .arch import family
from .op import LaunchConfig, power_of_2
from .quantized import tile_columns

# (weight rows, warps, stages) by the rows of x in a tile.
_SKINNY = {
    "sm_80": {16: (128, 8, 4), 32: (128, 8, 3), 64: (64, 4, 3)},
    "sm_90": {16: (64, 4, 5), 32: (64, 4, 4), 64: (64, 4, 3)},
    "gfx942": {16: (32, 4, 1), 64: (32, 8, 1)},
}
# (rows of x, weight rows, warps, stages) by the average rows of x that share a weight.
_WIDE = {
    "sm_80": {0: (64, 128, 4, 3), 128: (128, 64, 4, 3), 256: (256, 64, 8, 3)},
    "sm_90": {0: (64, 128, 4, 4), 128: (128, 128, 4, 4), 256: (256, 128, 8, 4)},
    "sm_100": {0: (64, 128, 4, 4), 128: (128, 256, 8, 3)},
    "gfx942": {0: (64, 64, 4, 2), 256: (128, 128, 8, 2)},
}
_SKINNY["sm_100"] = _SKINNY["sm_90"]
# fp32 has no tensor cores at this precision: registers bound the tile, in decode to 16 rows of x.
_SKINNY_SINGLE, _WIDE_SINGLE = (16, 8, 2), (32, 32, 8, 2)


def skinny_config(
    weights: str, columns: int, depth: int, block_t: int, dtype: torch.dtype, arch: str, halves: int = 1
) -> LaunchConfig:
    """Configure a decode kernel with at most block_t rows of x a tile. `columns`: rows of each of the halves."""
    table = {16: _SKINNY_SINGLE} if dtype == torch.float32 else _SKINNY[family(arch)]
    height = max(key for key in table if key <= block_t)
    rows, warps, stages = table[height]
    tile = {"BLOCK_T": height, "BLOCK_N": power_of_2(columns, low=16, high=rows // halves)}
    return LaunchConfig(tile | {"BLOCK_K": tile_columns(weights, depth)}, num_warps=warps, num_stages=stages)


def wide_config(
    weights: str, columns: int, depth: int, rows: tuple[int, int] | None, dtype: torch.dtype, arch: str, halves: int = 1
) -> LaunchConfig:
    """Configure a kernel for many rows of x. `rows`: average rows that share a weight, and all rows; None: one tile."""
    shared, total = rows or (0, 0)
    table = {0: _WIDE_SINGLE} if dtype == torch.float32 else _WIDE[family(arch)]
    block_m, block_n, warps, stages = table[max(key for key in table if key <= shared)]
    tile = {"BLOCK_M": power_of_2(total, low=16, high=block_m) if rows else block_m}
    tile |= {"BLOCK_N": power_of_2(columns, low=16, high=block_n // halves), "BLOCK_K": tile_columns(weights, depth)}
    return LaunchConfig(tile | {"GROUP_M": 8}, num_warps=warps, num_stages=stages)
