"""Launch choices of the matrix kernels where a weight is quantized: pure functions of sizes, dtype and architecture.

The depth of a tile is the layout's own: the columns of one field of a unit. A name such as "int4:128" is that of
`QuantizedWeight.name`. Not measured on a GPU yet: chosen by instructions a byte (decode) and by FLOP per instruction.
"""

from __future__ import annotations

import torch

from .arch import family
from .op import LaunchConfig, power_of_2
from .quantized import tile_columns

# (weight rows, warps, stages) by rows of x in a tile.
_FEW = {
    "sm_80": {16: (128, 8, 4), 32: (128, 8, 3), 64: (64, 4, 3)},
    "sm_90": {16: (64, 4, 5), 32: (64, 4, 4), 64: (64, 4, 3)},
    "gfx942": {16: (32, 4, 1), 64: (32, 8, 1)},
}
# (rows of x, weight rows, warps, stages) by rows of x that share a weight, on average.
_MANY = {
    "sm_80": {0: (64, 128, 4, 3), 128: (128, 64, 4, 3), 256: (256, 64, 8, 3)},
    "sm_90": {0: (64, 128, 4, 4), 128: (128, 128, 4, 4), 256: (256, 128, 8, 4)},
    "sm_100": {0: (64, 128, 4, 4), 128: (128, 256, 8, 3)},
    "gfx942": {0: (64, 64, 4, 2), 256: (128, 128, 8, 2)},
}
_FEW["sm_100"] = _FEW["sm_90"]
# fp32, without tensor cores at this precision: registers bound the tile, of a decode kernel to 16 rows of x.
_FEW_SINGLE, _MANY_SINGLE = (16, 8, 2), (32, 32, 8, 2)


def skinny_config(
    weights: str, columns: int, depth: int, block_t: int, dtype: torch.dtype, arch: str, halves: int = 1
) -> LaunchConfig:
    """Of a decode kernel, at most block_t rows of x in a tile. `columns`: rows of each of the weight's `halves`."""
    table = {16: _FEW_SINGLE} if dtype == torch.float32 else _FEW[family(arch)]
    height = max(least for least in table if least <= block_t)
    rows, warps, stages = table[height]
    tile = {"BLOCK_T": height, "BLOCK_N": power_of_2(columns, low=16, high=rows // halves)}
    return LaunchConfig(tile | {"BLOCK_K": tile_columns(weights, depth)}, num_warps=warps, num_stages=stages)


def wide_config(
    weights: str,
    columns: int,
    depth: int,
    rows: tuple[int, int] | None,
    dtype: torch.dtype,
    arch: str,
    halves: int = 1,
) -> LaunchConfig:
    """Of a kernel for many rows of x. `rows`: how many share a weight on average, and how many there are at all; None:
    one tile for any number."""
    shared, most = rows or (0, 0)
    table = {0: _MANY_SINGLE} if dtype == torch.float32 else _MANY[family(arch)]
    block_m, block_n, warps, stages = table[max(least for least in table if least <= shared)]
    tile = {"BLOCK_M": power_of_2(most, low=16, high=block_m) if rows else block_m}
    tile |= {"BLOCK_N": power_of_2(columns, low=16, high=block_n // halves), "BLOCK_K": tile_columns(weights, depth)}
    return LaunchConfig(tile | {"GROUP_M": 8}, num_warps=warps, num_stages=stages)
