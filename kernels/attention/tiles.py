"""Launch configurations of the attention kernels: pure functions of sizes, dtype and architecture.

The literals compile without a spill; not measured on a GPU.
"""

from collections import namedtuple
from dataclasses import dataclass

import torch
import triton

from ..arch import amd, family, max_multiprocessors, tma
from ..launch import LaunchConfig, power_of_2


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
PrefillTile = namedtuple("PrefillTile", "BLOCK_M BLOCK_N num_warps num_stages")
# By the greatest head size, for 16-bit types and for fp32. None spills a register; on AMD none spills a scalar register
# into a vector one.
_PREFILL = {
    "sm_80": (
        {128: PrefillTile(128, 32, 8, 3), 256: PrefillTile(64, 32, 8, 2)},
        {64: PrefillTile(32, 64, 8, 1), 128: PrefillTile(16, 32, 4, 1), 256: PrefillTile(32, 16, 8, 1)},
    ),
    "sm_90": (
        {
            32: PrefillTile(32, 64, 4, 2),  # without wgmma, on which ptxas crashes with Triton 3.6 and no window
            64: PrefillTile(128, 128, 8, 3),
            128: PrefillTile(128, 128, 8, 2),
            256: PrefillTile(64, 32, 8, 2),
        },
        {64: PrefillTile(64, 32, 8, 1), 128: PrefillTile(32, 16, 8, 1), 256: PrefillTile(16, 32, 8, 1)},
    ),
    "gfx942": (
        {128: PrefillTile(128, 16, 4, 1), 256: PrefillTile(64, 16, 4, 1)},
        {128: PrefillTile(64, 16, 8, 1), 256: PrefillTile(32, 16, 8, 1)},
    ),
}
_PREFILL["sm_100"] = _PREFILL["sm_90"]
# Of keys in 8 bits, whose codes and numbers take registers side by side. fp32 has one tile for all head sizes.
_PREFILL_CODES = {
    "sm_80": {128: PrefillTile(128, 32, 8, 2), 256: PrefillTile(64, 32, 8, 2)},
    "sm_90": {128: PrefillTile(128, 64, 8, 2), 256: PrefillTile(64, 32, 8, 2)},
    "gfx942": {128: PrefillTile(128, 16, 8, 1), 256: PrefillTile(64, 16, 8, 1)},
}
_PREFILL_CODES["sm_100"] = _PREFILL_CODES["sm_90"]
TWO_PER_SM = PrefillTile(64, 128, 4, 1)  # an SM holds two of these: one computes its softmax while the other multiplies


def _least_width(sizes: AttentionSizes) -> int:
    """A product's depth is at least 16: that of a head, or in 8 bits of its half."""
    return 32 if sizes.quantized else 16


def _prefill_config(sizes: AttentionSizes, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """Tiles by head size; a short window takes short tiles, since a tile sees window + BLOCK_M keys."""
    D, window = power_of_2(sizes.D, low=_least_width(sizes)), sizes.window
    if sizes.quantized:
        return _prefill_codes_config(sizes, dtype, arch, D)
    table = _PREFILL[family(arch)][dtype == torch.float32]
    block_m, block_n, warps, stages = table[min(size for size in table if size >= D)]
    # Head sizes that are no multiple of 16 need masks, which take registers.
    odd = sizes.D % 16 > 0 and D <= 128 and not amd(arch) and dtype != torch.float32
    if odd and tma(arch):
        block_m, block_n, warps, stages = 64, 64, 8, 2
    elif _two_per_sm(sizes, dtype, arch, block_m):
        block_m, block_n, warps, stages = TWO_PER_SM
    elif 0 < window <= 256 and block_m > 64:
        block_m, block_n, warps = 64, min(block_n, 64 if tma(arch) else 32), 8 if family(arch) == "sm_80" else 4
    # Half the rows take half the warps; heads of 256 would spill.
    if not sizes.deterministic and block_m // 2 >= sizes.T and (D < 256 or not tma(arch)):
        rows = 16 if sizes.T <= 16 else block_m // 2  # not every power of two: each compiles a kernel
        block_m, block_n, warps = rows, 32 if odd and tma(arch) else block_n, max(4, warps * rows // block_m)
        warps = 8 if odd and rows == 32 else warps
    if sizes.D < D and tma(arch) and dtype != torch.float32:
        # ptxas of CUDA 12.8 and 12.9 crashes where tiles of padded heads meet 128 keys, or 64 rows of 128 have 4 warps.
        block_n = min(block_n, 64) if (block_m, D) in ((64, 128), (128, 64)) else block_n
        warps = 8 if (block_m, D) == (64, 128) else warps
    elif odd and block_m == 64:
        warps = 8
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": D}
    return LaunchConfig(tiles, num_warps=warps, num_stages=stages)


def _prefill_codes_config(sizes: AttentionSizes, dtype: torch.dtype, arch: str, D: int) -> LaunchConfig:
    """Tiles of a chunk beside keys in 8 bits; few queries take 16 rows."""
    table = _PREFILL_CODES[family(arch)]
    block_m, block_n, warps, stages = table[128 if D <= 128 else 256]
    if dtype == torch.float32:
        block_m, block_n, stages = 16, 16, 1 if amd(arch) else 2
    elif sizes.T <= 16 and not sizes.deterministic:
        block_m, block_n, warps = 16, min(block_n, 32), 4
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": D}
    return LaunchConfig(tiles, num_warps=warps, num_stages=stages)


def _two_per_sm(sizes: AttentionSizes, dtype: torch.dtype, arch: str, block_m: int) -> bool:
    """Return whether TWO_PER_SM suits: each SM gets at most one tile of block_m rows, whose softmax nothing hides, or
    the keys are few.

    Else tiles of half the rows would read the keys through L2 too often. With a window over a ring they would spill.
    """
    spills = sizes.C > 0 and sizes.window > 0
    if sizes.D != 128 or not tma(arch) or dtype == torch.float32 or spills or sizes.deterministic:
        return False
    tiles = sizes.B * sizes.Hq * triton.cdiv(sizes.T, block_m)
    keys = sizes.S + sizes.C
    few = keys <= 1024 or tiles <= (sizes.sms or max_multiprocessors(arch))
    return block_m // 2 < sizes.T and few


def _decode_config(sizes: AttentionSizes, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """Splits until every SM has two programs, each of at least 256 keys."""
    rows = sizes.T * sizes.Hq // sizes.Hkv
    keys = min(sizes.S, sizes.window or sizes.S)
    programs = max(1, sizes.B * sizes.Hkv)
    sms = sizes.sms or max_multiprocessors(arch)
    splits = power_of_2(min(triton.cdiv(2 * sms, programs), triton.cdiv(keys, 256)), high=64)
    if sizes.deterministic:
        splits = DETERMINISTIC_SPLITS
    D, fp32, cdna = power_of_2(sizes.D, low=_least_width(sizes)), dtype == torch.float32, amd(arch)
    # Head sizes that are no multiple of 16 need masks, which take registers.
    block_n = 16 if fp32 and (D > 128 or not cdna) else 32 if cdna or D > 128 or sizes.D % 16 else 64
    block_n = 16 if cdna and sizes.D < D else block_n
    stages = 2 if fp32 or cdna else 3
    if sizes.quantized:  # codes and numbers take registers side by side
        block_n = 16 if cdna else 128 if sizes.D == 128 and not fp32 else block_n
        stages = 1 if (fp32 and not cdna) or (cdna and sizes.D < D) else 2
    tiles = {"SPLITS": splits, "BLOCK_M": power_of_2(rows, low=16), "BLOCK_N": block_n, "BLOCK_D": D}
    more_warps = (fp32 and not cdna) or (cdna and not fp32 and sizes.D % 16 > 0)
    return LaunchConfig(tiles, num_warps=8 if more_warps else 4, num_stages=stages)


def configs(sizes: AttentionSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    return {
        "attention_prefill_kernel": _prefill_config(sizes, dtype, arch),
        "attention_decode_kernel": _decode_config(sizes, dtype, arch),
        "attention_combine_kernel": LaunchConfig({"BLOCK_D": power_of_2(sizes.D, low=16)}, num_warps=2),
    }
