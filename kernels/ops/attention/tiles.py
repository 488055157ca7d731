"""Launch configurations of the attention kernels: pure functions of sizes, dtype and architecture.

Every row is compiled, none was measured on a GPU: `mixtral-triton compile attention --arch ARCH` prints registers and
FLOP per instruction; none spills in a main loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from ...launching.arch import max_multiprocessors, tma
from ...launching.launch import LaunchConfig
from ..tiles import power_of_2, tiles_for


@dataclass(frozen=True)
class AttentionSizes:
    B: int
    T: int
    S: int  # keys beside the queries, or slots of a ring that has all keys
    Hq: int
    Hkv: int
    D: int
    window: int  # 0: none
    C: int  # slots of a ring with the keys before those; 0: none
    quantized: bool  # keys and values in 8 bits
    deterministic: bool
    sms: int | None  # multiprocessors; None: the most that the architecture has


DETERMINISTIC_SPLITS = 8  # for any batch and any length
PACKED_ROWS = 16  # queries x group heads that one decode tile takes
SPLIT_KEYS = 256  # of a decode: so many have one split, more keys one for each quarter of these, a tile


class AttentionTile(NamedTuple):
    """A tile of keys, and in prefill of queries. The first row whose conditions hold is selected.

    heads  "odd": no multiple of 16 wide, which needs masks and their registers; "padded": narrower than the tile;
           "overlapped": see `_overlapped`; "": any
    """

    D: int  # the widest head
    BLOCK_M: int  # queries; in decode 0: those of a group
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int
    heads: str = ""
    T: int = 0  # the most queries, except in deterministic mode; 0: any
    window: int = 0  # the longest window; 0: any, or none


Table = Mapping[str, Sequence[AttentionTile]]
# None spills a register; on AMD none spills a scalar register into a vector one. A short window takes few queries,
# since a tile sees window + BLOCK_M keys.
PREFILL: Table = {
    "sm_80": (
        AttentionTile(128, 16, 32, 4, 3, T=16),
        AttentionTile(128, 32, 32, 8, 3, heads="odd", T=32, window=256),
        AttentionTile(128, 32, 32, 4, 3, T=32, window=256),
        AttentionTile(128, 64, 32, 8, 3, window=256),
        AttentionTile(128, 64, 32, 8, 3, heads="odd", T=64),
        AttentionTile(128, 64, 32, 4, 3, T=64),
        AttentionTile(128, 128, 32, 8, 3),
        AttentionTile(256, 16, 32, 4, 2, T=16),
        AttentionTile(256, 32, 32, 4, 2, T=32),
        AttentionTile(256, 64, 32, 8, 2),
    ),
    "sm_80 fp32": (
        AttentionTile(64, 16, 64, 4, 1, T=16),
        AttentionTile(64, 32, 64, 8, 1),
        AttentionTile(128, 32, 16, 8, 1),
        AttentionTile(256, 16, 16, 4, 1, T=16),
        AttentionTile(256, 32, 16, 8, 1),
    ),
    "sm_90": (
        AttentionTile(128, 16, 32, 4, 2, heads="odd", T=16),
        AttentionTile(128, 32, 32, 8, 2, heads="odd", T=32),
        AttentionTile(128, 64, 64, 8, 2, heads="odd"),
        AttentionTile(128, 64, 128, 4, 1, heads="overlapped"),
        # Heads of 16 and 32: without wgmma, on which ptxas crashes with Triton 3.6 and no window.
        AttentionTile(32, 16, 64, 4, 2, T=16),
        AttentionTile(32, 32, 64, 4, 2),
        # Padded heads: ptxas of CUDA 12.8 and 12.9 crashes where 128 x 64 meets 128 keys, or 64 x 128 has 4 warps.
        AttentionTile(64, 16, 64, 4, 3, T=16, window=256),
        AttentionTile(64, 32, 64, 4, 3, T=32, window=256),
        AttentionTile(64, 64, 64, 4, 3, window=256),
        AttentionTile(64, 16, 128, 4, 3, T=16),
        AttentionTile(64, 64, 128, 4, 3, T=64),
        AttentionTile(64, 128, 64, 8, 3, heads="padded"),
        AttentionTile(64, 128, 128, 8, 3),
        AttentionTile(128, 16, 64, 4, 2, T=16, window=256),
        AttentionTile(128, 32, 64, 4, 2, T=32, window=256),
        AttentionTile(128, 64, 64, 8, 2, heads="padded", window=256),
        AttentionTile(128, 64, 64, 4, 2, window=256),
        AttentionTile(128, 16, 128, 4, 2, T=16),
        AttentionTile(128, 64, 64, 8, 2, heads="padded", T=64),
        AttentionTile(128, 64, 128, 4, 2, T=64),
        AttentionTile(128, 128, 128, 8, 2),
        AttentionTile(256, 64, 32, 8, 2),
    ),
    "sm_90 fp32": (
        AttentionTile(64, 16, 32, 4, 1, T=16),
        AttentionTile(64, 32, 32, 4, 1, T=32),
        AttentionTile(64, 64, 32, 8, 1),
        AttentionTile(128, 16, 16, 4, 1, T=16),
        AttentionTile(128, 32, 16, 8, 1),
        AttentionTile(256, 16, 32, 8, 1),
    ),
    "gfx942": (
        AttentionTile(256, 16, 16, 4, 1, T=16),
        AttentionTile(256, 32, 16, 4, 1, T=32, window=256),
        AttentionTile(128, 64, 16, 4, 1, window=256),
        AttentionTile(128, 64, 16, 4, 1, T=64),
        AttentionTile(128, 128, 16, 4, 1),
        AttentionTile(256, 32, 16, 4, 1, T=32),
        AttentionTile(256, 64, 16, 4, 1),
    ),
    "gfx942 fp32": (
        AttentionTile(256, 16, 16, 4, 1, T=16),
        AttentionTile(128, 32, 16, 4, 1, T=32),
        AttentionTile(128, 64, 16, 8, 1),
        AttentionTile(256, 32, 16, 8, 1),
    ),
}
# Keys in 8 bits, whose codes and numbers take registers side by side.
PREFILL_CODES: Table = {
    "sm_80": (
        AttentionTile(256, 16, 32, 4, 2, T=16),
        AttentionTile(128, 64, 32, 8, 2),
        AttentionTile(256, 32, 32, 8, 2, heads="padded"),
        AttentionTile(256, 64, 32, 8, 2),
    ),
    "sm_90": (
        AttentionTile(256, 16, 32, 4, 2, T=16),
        AttentionTile(128, 64, 64, 8, 2, heads="odd"),
        AttentionTile(128, 64, 64, 8, 2, heads="padded"),
        AttentionTile(128, 128, 64, 8, 2),
        AttentionTile(256, 32, 32, 8, 2, heads="padded"),
        AttentionTile(256, 64, 32, 8, 2),
    ),
    "gfx942": (
        AttentionTile(128, 16, 16, 8, 1, heads="odd"),
        AttentionTile(128, 64, 16, 8, 1),
        AttentionTile(256, 64, 16, 4, 1, heads="padded"),
        AttentionTile(256, 64, 16, 8, 1),
    ),
    "gfx942 fp32": (AttentionTile(256, 16, 16, 8, 1),),
    "fp32": (AttentionTile(256, 16, 16, 8, 2),),
}
DECODE: Table = {
    "sm_80": (
        AttentionTile(256, 0, 32, 4, 3, heads="odd"),
        AttentionTile(128, 0, 64, 4, 3),
        AttentionTile(256, 0, 32, 4, 3),
    ),
    "gfx942": (
        AttentionTile(256, 0, 16, 8, 2, heads="odd"),
        AttentionTile(256, 0, 16, 4, 2, heads="padded"),
        AttentionTile(256, 0, 32, 4, 2),
    ),
    "gfx942 fp32": (
        AttentionTile(128, 0, 16, 4, 2, heads="odd"),
        AttentionTile(128, 0, 16, 4, 2, heads="padded"),
        AttentionTile(128, 0, 32, 4, 2),
        AttentionTile(256, 0, 16, 4, 2),
    ),
    "fp32": (AttentionTile(256, 0, 16, 8, 2),),
}
DECODE_CODES: Table = {
    "sm_80": (
        AttentionTile(256, 0, 32, 4, 2, heads="odd"),
        AttentionTile(128, 0, 32, 4, 2, heads="padded"),
        AttentionTile(64, 0, 64, 4, 2),
        AttentionTile(128, 0, 128, 4, 1),
        AttentionTile(256, 0, 32, 4, 2),
    ),
    "gfx942": (
        AttentionTile(256, 0, 16, 8, 1, heads="odd"),
        AttentionTile(256, 0, 16, 4, 1, heads="padded"),
        AttentionTile(256, 0, 16, 4, 2),
    ),
    "gfx942 fp32": (
        AttentionTile(256, 0, 16, 4, 1, heads="odd"),
        AttentionTile(256, 0, 16, 4, 1, heads="padded"),
        AttentionTile(256, 0, 16, 4, 2),
    ),
    "fp32": (AttentionTile(256, 0, 16, 8, 1),),
}


def fits_decode(T: int, Hq: int, Hkv: int) -> bool:
    """Return whether the kernel of few queries runs."""
    return T == 1 or T * (Hq // Hkv) <= PACKED_ROWS


def _width(sizes: AttentionSizes) -> int:
    """Return BLOCK_D. A product's depth is at least 16."""
    return power_of_2(sizes.D, low=16)


def _select(table: Table, sizes: AttentionSizes, dtype: torch.dtype, arch: str, heads: str = "") -> AttentionTile:
    heads = heads or ("odd" if sizes.D % 16 else "padded" if _width(sizes) > sizes.D else "")
    few = 0 if sizes.deterministic else sizes.T
    return next(
        tile
        for tile in tiles_for(table, dtype, arch)
        if _width(sizes) <= tile.D
        and tile.heads in ("", heads)
        and (tile.T == 0 or 0 < few <= tile.T)
        and (tile.window == 0 or 0 < sizes.window <= tile.window)
    )


def _overlaps(sizes: AttentionSizes, arch: str) -> bool:
    """Return whether an SM should hold two short tiles: one computes its softmax while the other multiplies.

    That is where each SM gets at most one tall tile, or the keys are few. Else tiles of half the rows would read the
    keys through L2 too often. With a window over a ring they would spill.
    """
    tall = 128
    spills = sizes.C > 0 and sizes.window > 0
    if tall != sizes.D or not tma(arch) or spills or sizes.deterministic or tall // 2 >= sizes.T:
        return False
    tiles = sizes.B * sizes.Hq * triton.cdiv(sizes.T, tall)
    return sizes.S + sizes.C <= 1024 or tiles <= (sizes.sms or max_multiprocessors(arch))


def _prefill_config(sizes: AttentionSizes, dtype: torch.dtype, arch: str) -> LaunchConfig:
    overlapped = dtype != torch.float32 and not sizes.quantized and _overlaps(sizes, arch)
    table = PREFILL_CODES if sizes.quantized else PREFILL
    tile = _select(table, sizes, dtype, arch, "overlapped" if overlapped else "")
    tiles = {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_D": _width(sizes)}
    return LaunchConfig(tiles, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _decode_config(sizes: AttentionSizes, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """Splits until every SM has two programs; their number changes where the keys double (`growing`)."""
    keys = min(sizes.S, sizes.window or sizes.S)
    programs = max(1, sizes.B * sizes.Hkv)
    sms = sizes.sms or max_multiprocessors(arch)
    most = 1 if keys <= SPLIT_KEYS else triton.cdiv(4 * keys, SPLIT_KEYS)
    splits = power_of_2(min(triton.cdiv(2 * sms, programs), most), high=64)
    if sizes.deterministic:
        splits = DETERMINISTIC_SPLITS
    tile = _select(DECODE_CODES if sizes.quantized else DECODE, sizes, dtype, arch)
    tiles = {"SPLITS": splits, "BLOCK_M": power_of_2(sizes.T * sizes.Hq // sizes.Hkv, low=16)}
    tiles |= {"BLOCK_N": tile.BLOCK_N, "BLOCK_D": _width(sizes)}
    warps, stages = tile.num_warps, tile.num_stages
    if dtype == torch.float32 and tiles["BLOCK_M"] * tiles["BLOCK_D"] > 8192:  # a sum that fewer warps would spill
        warps, stages = 2 * warps, 1
    return LaunchConfig(tiles, num_warps=warps, num_stages=stages)


def configs(sizes: AttentionSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    return {
        "attention_prefill_kernel": _prefill_config(sizes, dtype, arch),
        "attention_decode_kernel": _decode_config(sizes, dtype, arch),
        "attention_combine_kernel": LaunchConfig({"BLOCK_S": 8, "BLOCK_D": min(64, _width(sizes))}, num_warps=1),
    }
