"""Tiles of products with a weight: the rows of the tables, how one is selected, and the tables of quantized weights,
which linear and the experts share.

A table has a tuple of tiles for each family of architectures but those that take another's (EARLIER), one for "fp32",
which has no tensor cores at that precision (that of codes needs none: they multiply codes whatever x was), and where
they differ one for "<family> fp32", "<family> pointers", "<family> deterministic", "<family> <architecture>", and
"<family> 100 KB": its GPUs with less shared memory. Another tile is another row.

A row's last column says where it comes from. "measured: FILE": a GPU measured it as the fastest in vLLM's or SGLang's
kernel, for some number of tokens; benchmarks/tiles/measured.csv has the file. Its GROUP_M counts row tiles of all
experts, ours those of one. "compiled: registers, FLOP": of a thread, and for each other instruction of the main loop,
the largest registers and the least FLOP of the kernels that take the tile, with Triton 3.9; AMD's instructions are not
counted.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from ..launching.arch import check_multiplies_fp8, family, has_less_shared_memory, tma
from ..launching.launch import LaunchConfig
from ..weights.formats import FORMATS, multiplies_codes, tile_columns


def power_of_2(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """Return the least power of two that is at least n, clamped to low..high (powers of two themselves)."""
    return max(low, min(high, 1 << max(0, n - 1).bit_length()))


class DecodeTile(NamedTuple):
    """A tile for few rows of x."""

    rows: int  # the most rows of x that it is for
    BLOCK_T: int  # rows of x
    BLOCK_N: int  # rows of the weight
    BLOCK_K: int  # columns; 0: those that the layout of a quantized weight fixes
    num_warps: int
    num_stages: int
    source: str


class PrefillTile(NamedTuple):
    """A tile for many rows of x."""

    rows: int  # the least average of the rows that share a weight
    BLOCK_M: int  # rows of x
    BLOCK_N: int  # rows of the weight
    BLOCK_K: int  # columns; 0: those that the layout of a quantized weight fixes
    num_warps: int
    num_stages: int
    source: str
    GROUP_M: int = 8  # row tiles that sweep the columns together, so that weights stay in L2
    SHORT_M: int = 0  # rows of the last tile of a group, where they suffice (experts/kernels.py); 0: it is full


Tile = TypeVar("Tile")
Table = Mapping[str, Sequence[Tile]]
DETERMINISTIC_ROWS = 32  # the rows for which deterministic mode takes a tile for many, however many there are
# The families whose tiles a family takes, in this order, where a table has none of its own.
EARLIER = {"sm_90": ("sm_80",), "sm_100": ("sm_90", "sm_80")}

# Quantized weights. BLOCK_N counts gate and up rows together. No GPU has measured them in a kernel of these layouts:
# selected by instructions per byte (decode) and FLOP per instruction (prefill). Registers bound the tiles of fp32, in
# decode to 16 rows of x. The experts of up to 128 tokens take these, too. With 2 of 8 an expert then has 32 rows on
# average, and where it has more than BLOCK_T reads its weight again, through L2.
_QUANTIZED_FP32 = (
    DecodeTile(32, 16, 16, 0, 8, 2, "compiled: 88 registers"),
    DecodeTile(64, 16, 16, 0, 8, 2, "compiled: 80 registers"),
)
QUANTIZED_DECODE: Table[DecodeTile] = {
    "sm_80": (
        DecodeTile(16, 16, 128, 0, 8, 4, "compiled: 128 registers, 299 FLOP"),
        DecodeTile(32, 32, 128, 0, 8, 3, "compiled: 182 registers, 604 FLOP"),
        DecodeTile(64, 64, 64, 0, 4, 3, "compiled: 255 registers, 960 FLOP"),
        DecodeTile(128, 64, 128, 0, 8, 2, "compiled: 255 registers, 1,111 FLOP"),
    ),
    "sm_80 100 KB": (
        DecodeTile(16, 16, 64, 0, 4, 3, "compiled: 128 registers, 299 FLOP"),
        DecodeTile(48, 32, 64, 0, 4, 2, "compiled: 168 registers, 580 FLOP"),
        DecodeTile(128, 64, 32, 0, 4, 2, "compiled: 214 registers, 350 FLOP"),
    ),
    "sm_90": (
        DecodeTile(16, 16, 64, 0, 4, 5, "compiled: 128 registers, 266 FLOP"),
        DecodeTile(32, 32, 64, 0, 4, 4, "compiled: 168 registers, 498 FLOP"),
        DecodeTile(64, 64, 64, 0, 4, 3, "compiled: 255 registers, 960 FLOP"),
        DecodeTile(128, 64, 128, 0, 8, 3, "compiled: 236 registers, 978 FLOP"),
    ),
    "gfx942": (
        DecodeTile(16, 16, 32, 0, 4, 1, "compiled: 100 registers"),
        DecodeTile(64, 64, 32, 0, 8, 1, "compiled: 253 registers"),
        DecodeTile(128, 16, 32, 0, 4, 1, "compiled: 98 registers"),  # a taller one spills
    ),
    # Where there are many experts, one family's tile for few tokens spills on the other with Triton 3.6 or 3.7.
    "fp32": (DecodeTile(16, 16, 16, 0, 8, 2, "compiled: 87 registers"), *_QUANTIZED_FP32),
    "sm_90 fp32": (DecodeTile(16, 16, 16, 0, 2, 2, "compiled: 184 registers"), *_QUANTIZED_FP32),
    "sm_100 fp32": (DecodeTile(16, 16, 64, 0, 4, 2, "compiled: 168 registers"), *_QUANTIZED_FP32),
}
# A unit's tile of a weight meets as many tiles of x as an element has codes, which take shared memory.
QUANTIZED_PREFILL: Mapping[int, Table[PrefillTile]] = {  # by the bits of a code
    4: {
        "sm_80": (
            PrefillTile(0, 16, 64, 0, 4, 3, "compiled: 80 registers, 387 FLOP"),
            PrefillTile(8, 32, 64, 0, 4, 3, "compiled: 96 registers, 718 FLOP"),
            PrefillTile(24, 64, 128, 0, 8, 2, "compiled: 126 registers, 1,369 FLOP"),
        ),
        "sm_90": (
            PrefillTile(0, 16, 64, 0, 4, 3, "compiled: 80 registers, 387 FLOP"),
            PrefillTile(8, 32, 64, 0, 4, 3, "compiled: 96 registers, 718 FLOP"),
            PrefillTile(24, 64, 128, 0, 4, 2, "compiled: 168 registers, 981 FLOP"),
            PrefillTile(64, 128, 128, 0, 8, 2, "compiled: 168 registers, 2,356 FLOP"),
        ),
        "gfx942": (
            PrefillTile(0, 64, 64, 0, 4, 2, "compiled: 164 registers"),
            PrefillTile(256, 128, 128, 0, 8, 1, "compiled: 154 registers"),
        ),
        "fp32": (PrefillTile(0, 32, 32, 0, 8, 2, "compiled: 222 registers"),),
        "sm_100 fp32": (
            PrefillTile(0, 32, 16, 0, 8, 2, "compiled: 216 registers"),
        ),  # a wider one spills with Triton 3.6
    },
    8: {
        "sm_80": (
            PrefillTile(0, 16, 128, 0, 4, 3, "compiled: 112 registers, 357 FLOP"),
            PrefillTile(8, 32, 128, 0, 4, 3, "compiled: 137 registers, 636 FLOP"),
            PrefillTile(24, 64, 128, 0, 4, 3, "compiled: 168 registers, 1,132 FLOP"),
            # An A100 measured 4 warps as the fastest (E=16): they spill here, where codes and values take registers.
            PrefillTile(256, 64, 256, 0, 8, 3, "compiled: 165 registers, 1,231 FLOP"),
        ),
        "sm_90": (
            PrefillTile(0, 16, 128, 0, 4, 3, "compiled: 112 registers, 357 FLOP"),
            PrefillTile(8, 32, 128, 0, 4, 3, "compiled: 137 registers, 636 FLOP"),
            PrefillTile(24, 64, 128, 0, 4, 3, "compiled: 168 registers, 1,132 FLOP"),
            PrefillTile(64, 128, 128, 0, 8, 3, "compiled: 128 registers, 1,907 FLOP"),
            PrefillTile(192, 256, 128, 0, 8, 2, "compiled: 230 registers, 3,329 FLOP"),
        ),
        "sm_100": (
            PrefillTile(0, 16, 128, 0, 4, 3, "compiled: 112 registers, 357 FLOP"),
            PrefillTile(8, 32, 128, 0, 4, 3, "compiled: 137 registers, 636 FLOP"),
            PrefillTile(24, 64, 128, 0, 4, 2, "compiled: 165 registers"),
            PrefillTile(64, 128, 128, 0, 8, 2, "compiled: 222 registers"),
        ),
        "gfx942": (
            PrefillTile(0, 64, 64, 0, 4, 2, "compiled: 154 registers"),
            PrefillTile(256, 128, 128, 0, 8, 1, "compiled: 123 registers"),
        ),
        "fp32": (PrefillTile(0, 32, 32, 0, 8, 2, "compiled: 182 registers"),),
    },
}


# Products of codes, those of x, too. sm_80: sm_89 and sm_120, which take its family's tiles. Sums are promoted every
# 128 columns, so no tile is as deep as the 256 that an RTX 4090 measured as the fastest for few tokens.
_RTX_4090 = "measured: E=8,N=3584,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8.json"
FP8_PREFILL: Table[PrefillTile] = {
    "sm_80": (
        PrefillTile(0, 16, 32, 128, 4, 4, _RTX_4090),
        PrefillTile(12, 32, 64, 128, 4, 4, _RTX_4090),
        PrefillTile(96, 64, 128, 128, 4, 3, "compiled: 228 registers, 2,759 FLOP"),
        PrefillTile(128, 128, 128, 128, 8, 2, "compiled: 224 registers, 3,178 FLOP"),
    ),
    "sm_80 deterministic": (PrefillTile(0, 64, 128, 128, 4, 3, "compiled: 228 registers, 2,759 FLOP"),),
    "sm_90": (
        PrefillTile(0, 64, 128, 128, 4, 4, "compiled: 160 registers, 3,427 FLOP"),
        PrefillTile(64, 256, 128, 128, 8, 4, "compiled: 255 registers, 4,263 FLOP", SHORT_M=128),
    ),
    # The larger one spills.
    "sm_90 fp32": (
        PrefillTile(0, 64, 128, 128, 4, 4, "compiled: 160 registers, 3,427 FLOP"),
        PrefillTile(64, 128, 128, 128, 8, 4, "compiled: 158 registers, 3,427 FLOP"),
    ),
    "sm_100": (
        PrefillTile(0, 64, 128, 128, 4, 4, "compiled: 160 registers, 3,427 FLOP"),
        PrefillTile(64, 128, 256, 128, 8, 4, "compiled: 246 registers"),
    ),
}


def quantized_prefill(name: str, arch: str) -> Table[PrefillTile]:
    """Return the tiles of a format, as `QuantizedWeight.name` has it; ValueError where `arch` does not multiply it."""
    if multiplies_codes(name):
        check_multiplies_fp8(arch, f"the format of a weight is {name}")
        return FP8_PREFILL
    return QUANTIZED_PREFILL[FORMATS[name.partition(":")[0]].bits]


def least_rows(quantized: str | None, arch: str) -> int:
    """Return the least rows of x of a tile for many: of codes those of wgmma, without which sm_90 widens them."""
    return 64 if multiplies_codes(quantized) and tma(arch) else 16


def tiles_for(table: Table[Tile], dtype: torch.dtype, arch: str, variant: str = "") -> Sequence[Tile]:
    """Return the tiles of an architecture and dtype; `variant`: of "<family> <variant>" where the table has it."""
    names = list[str]()
    for known in (family(arch), *EARLIER.get(family(arch), ())):
        names += [f"{known} fp32", "fp32", known] if dtype == torch.float32 else [f"{known} {variant}", known]
        if has_less_shared_memory(arch):
            names.insert(-1, f"{known} 100 KB")
    return next(table[name] for name in names if name in table)


def decode_tile(table: Table[DecodeTile], rows: int, dtype: torch.dtype, arch: str) -> DecodeTile:
    """Return the first tile that is for so many rows of x; for more than any, the last."""
    tiles = tiles_for(table, dtype, arch)
    return next((tile for tile in tiles if rows <= tile.rows), tiles[-1])


def prefill_tile(table: Table[PrefillTile], rows: int, dtype: torch.dtype, arch: str, variant: str = "") -> PrefillTile:
    """Return the last tile that is for so many rows on average."""
    return [tile for tile in tiles_for(table, dtype, arch, variant) if tile.rows <= rows][-1]


def weight_config(
    tile: DecodeTile | PrefillTile, columns: int, depth: int, quantized: str | None, halves: int = 1, **constexprs: int
) -> LaunchConfig:
    """Configure a product by a tile, which covers no more of a small weight than there is.

    columns     rows of the weight, of each of its `halves` (gate and up)
    quantized   the name of the weight's format
    constexprs  those that are not of the weight
    """
    tiles = {"BLOCK_N": power_of_2(columns, low=16, high=tile.BLOCK_N // halves)}
    # Rows of an odd length are read a value at a time, each with an address.
    deepest = tile.BLOCK_K if quantized or depth % 8 == 0 else min(tile.BLOCK_K, 32)
    free = power_of_2(depth, low=64 if quantized else 16, high=deepest)
    tiles["BLOCK_K"] = tile_columns(quantized, depth) or free
    return LaunchConfig(tiles | constexprs, num_warps=tile.num_warps, num_stages=tile.num_stages)
