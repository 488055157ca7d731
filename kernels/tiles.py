"""Tiles of products with a weight: the rows of the tables, how one is selected, and the tables of quantized weights,
which linear and the experts share.

A table has a tuple of tiles for each family of architectures, one for "fp32", which has no tensor cores at that
precision (that of codes needs none: they multiply codes whatever x was), and where they differ one for "<family> fp32"
and "<family> pointers". Another tile is another row.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from .arch import check_multiplies_fp8, family
from .launch import LaunchConfig
from .quantized import BITS, W8A8, tile_columns


def power_of_2(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """Return the least power of two that is at least n, clamped to low..high (powers of two themselves)."""
    return max(low, min(high, 1 << max(0, n - 1).bit_length()))


GROUP_M = 8  # row tiles that sweep the columns together, so that weights stay in L2


class DecodeTile(NamedTuple):
    """A tile for few rows of x."""

    rows: int  # the most rows of x that it is for
    BLOCK_T: int  # rows of x
    BLOCK_N: int  # rows of the weight
    BLOCK_K: int  # columns; 0: those that the layout of a quantized weight fixes
    num_warps: int
    num_stages: int


class PrefillTile(NamedTuple):
    """A tile for many rows of x."""

    rows: int  # the least average of the rows that share a weight
    BLOCK_M: int  # rows of x
    BLOCK_N: int  # rows of the weight
    BLOCK_K: int  # columns; 0: those that the layout of a quantized weight fixes
    num_warps: int
    num_stages: int
    SHORT_M: int = 0  # rows of the last tile of a group, where they suffice (experts/kernels.py); 0: it is full


Tile = TypeVar("Tile")
Table = Mapping[str, Sequence[Tile]]

# Quantized weights. BLOCK_N counts gate and up rows together. Not measured on a GPU: selected by instructions per byte
# (decode) and FLOP per instruction (prefill). Registers bound the tiles of fp32, in decode to 16 rows of x.
# The experts of up to 128 tokens take these, too. With 2 of 8 an expert then has 32 rows on average, and where it has
# more than 64 reads its weight again.
_DECODE_HOPPER = (
    DecodeTile(16, 16, 64, 0, 4, 5),
    DecodeTile(32, 32, 64, 0, 4, 4),
    DecodeTile(64, 64, 64, 0, 4, 3),
    DecodeTile(128, 64, 128, 0, 8, 3),
)
QUANTIZED_DECODE: Table[DecodeTile] = {
    "sm_80": (
        DecodeTile(16, 16, 128, 0, 8, 4),
        DecodeTile(32, 32, 128, 0, 8, 3),
        DecodeTile(64, 64, 64, 0, 4, 3),
        DecodeTile(128, 64, 128, 0, 8, 2),
    ),
    "sm_90": _DECODE_HOPPER,
    "sm_100": _DECODE_HOPPER,
    "gfx942": (DecodeTile(16, 16, 32, 0, 4, 1), DecodeTile(64, 64, 32, 0, 8, 1), DecodeTile(128, 64, 32, 0, 8, 1)),
    "fp32": (DecodeTile(16, 16, 16, 0, 8, 2), DecodeTile(32, 16, 16, 0, 8, 2), DecodeTile(64, 16, 16, 0, 8, 2)),
}
# A unit's tile of a weight meets as many tiles of x as an element has codes, which take shared memory.
_INT4_HOPPER = PrefillTile(0, 64, 128, 0, 4, 2), PrefillTile(64, 128, 128, 0, 8, 2)
QUANTIZED_PREFILL: Mapping[int, Table[PrefillTile]] = {  # by the bits of a code
    4: {
        "sm_80": (PrefillTile(0, 64, 128, 0, 8, 2),),
        "sm_90": _INT4_HOPPER,
        "sm_100": _INT4_HOPPER,
        "gfx942": (PrefillTile(0, 64, 64, 0, 4, 2), PrefillTile(256, 128, 128, 0, 8, 1)),
        "fp32": (PrefillTile(0, 32, 32, 0, 8, 2),),
        "sm_100 fp32": (PrefillTile(0, 32, 16, 0, 8, 2),),  # a wider one spills with Triton 3.6
    },
    8: {
        "sm_80": (PrefillTile(0, 64, 128, 0, 4, 3),),
        "sm_90": (
            PrefillTile(0, 64, 128, 0, 4, 3),
            PrefillTile(64, 128, 128, 0, 8, 3),
            PrefillTile(192, 256, 128, 0, 8, 2),
        ),
        "sm_100": (PrefillTile(0, 64, 128, 0, 4, 2), PrefillTile(64, 128, 128, 0, 8, 2)),
        "gfx942": (PrefillTile(0, 64, 64, 0, 4, 2), PrefillTile(256, 128, 128, 0, 8, 1)),
        "fp32": (PrefillTile(0, 32, 32, 0, 8, 2),),
    },
}


# Products of fp8 codes (fp8.py). sm_80: sm_89 and sm_120, which take its family's tiles.
FP8_PREFILL: Table[PrefillTile] = {
    "sm_80": (PrefillTile(0, 64, 128, 128, 4, 3), PrefillTile(128, 128, 128, 128, 8, 2)),
    "sm_90": (PrefillTile(0, 64, 128, 128, 4, 4), PrefillTile(64, 256, 128, 128, 8, 4, SHORT_M=128)),
    "sm_90 fp32": (PrefillTile(0, 64, 128, 128, 4, 4), PrefillTile(64, 128, 128, 128, 8, 4)),  # the larger one spills
    "sm_100": (PrefillTile(0, 64, 128, 128, 4, 4), PrefillTile(64, 128, 256, 128, 8, 4)),
}


def quantized_prefill(name: str, arch: str) -> Table[PrefillTile]:
    """Return the tiles of a format, as `QuantizedWeight.name` has it; ValueError where `arch` does not multiply it."""
    if name == W8A8:
        check_multiplies_fp8(arch, f"the format of a weight is {name}")
        return FP8_PREFILL
    return QUANTIZED_PREFILL[BITS[name.partition(":")[0]]]


def least_rows(quantized: str | None) -> int:
    """Return the least rows of x of a tile for many: of fp8 codes those of wgmma, without which sm_90 widens them."""
    return 64 if quantized == W8A8 else 16


def tiles_for(table: Table[Tile], dtype: torch.dtype, arch: str, variant: str = "") -> Sequence[Tile]:
    """Return the tiles of an architecture and dtype; `variant`: of "<family> <variant>" where the table has it."""
    known = family(arch)
    names = (f"{known} fp32", "fp32", known) if dtype == torch.float32 else (f"{known} {variant}", known)
    return next(table[name] for name in names if name in table)


def decode_tile(table: Table[DecodeTile], rows: int, dtype: torch.dtype, arch: str) -> DecodeTile:
    """Return the first tile that is for so many rows of x; for more than any, the last."""
    tiles = tiles_for(table, dtype, arch)
    return next((tile for tile in tiles if rows <= tile.rows), tiles[-1])


def prefill_tile(table: Table[PrefillTile], rows: int, dtype: torch.dtype, arch: str, variant: str = "") -> PrefillTile:
    """Return the last tile that is for so many rows on average."""
    return [tile for tile in tiles_for(table, dtype, arch, variant) if tile.rows <= rows][-1]


def weight_config(
    tile: DecodeTile | PrefillTile, columns: int, depth: int, quantized: str | None = None, halves: int = 1, **more: int
) -> LaunchConfig:
    """Configure a product by a tile, which covers no more of a small weight than there is.

    columns    rows of the weight, of each of its `halves` (gate and up)
    quantized  the name of the weight's format
    more       other constexprs
    """
    tiles = {"BLOCK_N": power_of_2(columns, low=16, high=tile.BLOCK_N // halves)}
    dense = power_of_2(depth, low=64 if quantized else 16, high=tile.BLOCK_K)
    tiles["BLOCK_K"] = tile_columns(quantized, depth) if quantized and quantized != W8A8 else dense
    return LaunchConfig(tiles | more, num_warps=tile.num_warps, num_stages=tile.num_stages)
