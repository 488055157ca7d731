"""Launch configurations of the expert kernels: pure functions of sizes, dtype and architecture.

The literals compile without a spill. Where a GPU has measured others as faster, they are these (tiles.py).
"""

from dataclasses import dataclass, replace

import torch
from triton import cdiv

from ...launching.arch import tma
from ...launching.launch import LaunchConfig
from ...weights.formats import multiplies_codes, parse_name
from ..sort import gather_config
from ..tiles import (
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
    tiles_for,
    weight_config,
)
from .kernels import main_rows


@dataclass(frozen=True)
class ExpertSizes:
    T: int
    H: int
    I: int
    E: int
    K: int
    gate_up: str | None  # the name of a quantized weight's format
    down: str | None
    by_pointers: bool  # TMA cannot read a weight whose values, or codes, it would bring
    deterministic: bool
    norm: bool  # the combine also normalizes


# Up to here the sort-free kernels run: the bytes of the weights bound the layer, whatever the tiles. With quantized
# weights they run for as many tokens as QUANTIZED_DECODE has a tile for (`decode_tokens`).
DECODE_TOKENS = 64
# And up to so many slots, which each program reads to find its expert's: of 512 the kernels spill. So the 33 to 64
# tokens of Qwen3-30B-A3B are for prefill's shortest tile: it reads no more bytes of the weights, and issues 4 rows for
# each that is used, where decode would issue BLOCK_T of 64 tokens, 32 for each 4.
DECODE_SLOTS = 256
# A fixed split, or fewer where the units of a small expert fill fewer: a row's sum has the same order in any batch.
SPLIT_K = 4

# Up and down take the same tiles. BLOCK_N counts gate and up rows together.
# Few tokens: tiles as deep as shared memory allows, and two programs an SM. BLOCK_T is half of the tokens where a
# skewed route (Zipf, exponent 1) lets at most 5 % of the weights' rows be read twice: up to 24 and 48 tokens.
_H200 = "measured: E=8,N=2048,device_name=NVIDIA_H200.json"
_A100 = "measured: E=8,N=3584,device_name=NVIDIA_A100-SXM4-80GB.json"
_MI300X = "measured: E=8,N=4096,device_name=AMD_Instinct_MI300X.json"
DECODE: Table[DecodeTile] = {
    "sm_80": (
        DecodeTile(24, 16, 64, 128, 4, 4, _A100),
        DecodeTile(48, 32, 64, 128, 4, 4, "compiled: 164 registers, 846 FLOP"),
        DecodeTile(64, 64, 64, 64, 4, 4, "compiled: 164 registers, 1,111 FLOP"),
    ),
    "sm_80 100 KB": (
        DecodeTile(24, 16, 64, 64, 4, 4, "compiled: 94 registers, 395 FLOP"),
        DecodeTile(48, 32, 64, 64, 4, 4, "compiled: 128 registers, 690 FLOP"),
        DecodeTile(64, 64, 64, 64, 4, 4, "compiled: 164 registers, 1,111 FLOP"),
    ),
    "sm_90": (
        DecodeTile(24, 16, 64, 128, 4, 5, _H200),
        DecodeTile(48, 32, 64, 128, 4, 4, "compiled: 164 registers, 846 FLOP"),
        DecodeTile(64, 64, 64, 64, 4, 5, "compiled: 144 registers, 1,214 FLOP"),
    ),
    "gfx942": (
        DecodeTile(24, 16, 64, 128, 2, 2, "measured: E=8,N=8192,device_name=AMD_Instinct_MI300X.json"),
        DecodeTile(48, 32, 64, 128, 8, 2, "measured: E=8,N=2048,device_name=AMD_Instinct_MI300X.json"),
        DecodeTile(64, 64, 64, 128, 8, 2, "measured: E=8,N=7168,device_name=AMD_Instinct_MI300X.json"),
    ),
    "fp32": (
        DecodeTile(16, 16, 64, 32, 4, 2, "compiled: 124 registers"),
        DecodeTile(32, 32, 64, 32, 4, 2, "compiled: 140 registers"),
        DecodeTile(64, 64, 64, 32, 4, 2, "compiled: 168 registers"),
    ),
}
# Many tokens. Experts of few rows take short tiles: where 4 rows are in use, one of 64 would be a 16th full. Where TMA
# cannot read a weight, the larger tiles of later GPUs spill: "pointers". Each is as deep as those of TMA: the depth is
# the order of a sum, and both give the same bits. Deterministic mode takes the tile for DETERMINISTIC_ROWS for any
# number of tokens, or has a table of its own.
PREFILL: Table[PrefillTile] = {
    "sm_80": (
        PrefillTile(0, 16, 128, 64, 4, 4, "compiled: 72 registers, 612 FLOP"),
        PrefillTile(8, 32, 128, 128, 4, 4, _A100),
        PrefillTile(48, 64, 256, 64, 8, 4, _A100),
        PrefillTile(512, 128, 128, 64, 8, 4, _A100),
    ),
    "sm_80 100 KB": (  # a stage fewer
        PrefillTile(0, 16, 128, 64, 4, 3, "compiled: 64 registers, 624 FLOP"),
        PrefillTile(8, 32, 128, 128, 4, 3, "compiled: 161 registers, 1,432 FLOP"),
        PrefillTile(48, 64, 256, 64, 8, 3, "compiled: 158 registers, 2,759 FLOP"),
        PrefillTile(512, 128, 128, 64, 8, 4, _A100),
    ),
    "sm_80 deterministic": (PrefillTile(0, 64, 128, 32, 4, 4, "compiled: 130 registers, 1,771 FLOP"),),
    "sm_90": (
        PrefillTile(0, 16, 128, 64, 4, 4, "compiled: 72 registers, 612 FLOP"),
        PrefillTile(8, 32, 128, 64, 4, 4, "compiled: 120 registers, 1,542 FLOP"),
        PrefillTile(20, 64, 128, 64, 4, 4, "compiled: 96 registers, 1,618 FLOP", SHORT_M=32),
        PrefillTile(24, 64, 128, 64, 4, 4, "compiled: 106 registers, 2,570 FLOP"),
        PrefillTile(64, 128, 256, 64, 8, 4, _H200, SHORT_M=64),
        # Nobody has measured 192 rows, with which a third less of the weight crosses L2.
        PrefillTile(112, 192, 256, 64, 8, 4, "compiled: 255 registers, 5,825 FLOP", SHORT_M=64),
    ),
    "sm_90 pointers": (
        PrefillTile(0, 16, 128, 64, 4, 4, "compiled: 72 registers, 612 FLOP"),
        PrefillTile(8, 32, 128, 64, 4, 4, "compiled: 120 registers, 1,542 FLOP"),
        PrefillTile(24, 64, 128, 64, 4, 4, "compiled: 106 registers, 2,570 FLOP"),
        PrefillTile(128, 64, 128, 64, 8, 3, "compiled: 60 registers, 1,394 FLOP"),
    ),
    "gfx942": (PrefillTile(0, 64, 64, 64, 4, 2, _MI300X), PrefillTile(128, 128, 128, 64, 8, 2, _MI300X, GROUP_M=1)),
    "fp32": (PrefillTile(0, 32, 32, 32, 4, 2, "compiled: 64 registers"),),
}


def decode_tokens(gate_up: str | None, down: str | None, K: int, dtype: torch.dtype, arch: str) -> int:
    """Return the most tokens of K experts for which the sort-free kernels run; weights by `QuantizedWeight.name`."""
    if multiplies_codes(gate_up) or multiplies_codes(down):
        return 0
    tokens = tiles_for(QUANTIZED_DECODE, dtype, arch)[-1].rows if gate_up and down else DECODE_TOKENS
    return min(tokens, DECODE_SLOTS // K)


def prefill_configs(sizes: ExpertSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    slots, dense = sizes.T * sizes.K, not (sizes.gate_up or sizes.down)
    rows = slots // sizes.E
    # Skewed, most of many experts have far fewer rows than the average: a third as many is what tiles are cut for.
    rows //= 3 if sizes.E > 16 and rows < 72 else 1
    rows = DETERMINISTIC_ROWS if sizes.deterministic else rows
    # TMA reads rows that were gathered in sorted order, of x or of codes.
    sorted_x = dense and tma(arch) and dtype.itemsize == 2 and not sizes.by_pointers

    variant = "deterministic" if sizes.deterministic else "pointers" if sizes.by_pointers else ""

    def config(columns: int, depth: int, quantized: str | None, halves: int = 1) -> LaunchConfig:
        table = quantized_prefill(quantized, arch) if quantized else PREFILL
        tile = prefill_tile(table, rows, dtype, arch, variant)
        block_m, short_m = tile.BLOCK_M, tile.SHORT_M
        by_tma = sorted_x or (multiplies_codes(quantized) and tma(arch) and not sizes.by_pointers)
        if not by_tma:  # pointers need tiles of one part, a power of 2
            block_m, short_m = main_rows(block_m, short_m), 0
            least = block_m if sizes.deterministic else least_rows(quantized, arch)
            block_m = power_of_2(slots, low=least, high=block_m)
        constexprs = {"BLOCK_M": block_m, "SHORT_M": short_m, "GROUP_M": tile.GROUP_M}
        return weight_config(tile, columns, depth, quantized, halves, **constexprs)

    kernels = {
        "experts_up_kernel": config(sizes.I, sizes.H, sizes.gate_up, halves=2),
        "experts_down_kernel": config(sizes.H, sizes.I, sizes.down),
    }
    if sorted_x:
        kernels["gather_by_expert_kernel"] = gather_config(sizes.H)
    return kernels


def _decode_configs(sizes: ExpertSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    def config(columns: int, depth: int, quantized: str | None, halves: int = 1, **constexprs: int) -> LaunchConfig:
        tile = decode_tile(QUANTIZED_DECODE if quantized else DECODE, sizes.T, dtype, arch)
        constexprs |= {"BLOCK_T": tile.BLOCK_T, "BLOCK_S": power_of_2(min(tile.rows * sizes.K, DECODE_SLOTS))}
        return weight_config(tile, columns, depth, quantized, halves, **constexprs)

    down = config(sizes.H, sizes.I if sizes.down else cdiv(sizes.I, SPLIT_K), sizes.down)
    fields = parse_name(sizes.down, sizes.I)[0].fields if sizes.down else 1
    units = cdiv(sizes.I, down.constexprs["BLOCK_K"] * fields)
    # Where the columns of a token's experts fill a GPU, a split has as many units as a pipeline needs.
    programs = cdiv(sizes.H, down.constexprs["BLOCK_N"]) * sizes.K
    units_of_split = max(cdiv(units, SPLIT_K), min(units, 3) if programs >= 128 else 1)
    splits = {"SPLIT_K": cdiv(units, units_of_split)}  # each has columns
    return {
        "experts_up_decode_kernel": config(sizes.I, sizes.H, sizes.gate_up, halves=2),
        "experts_down_decode_kernel": replace(down, constexprs={**down.constexprs, **splits}),
    }


def configs(sizes: ExpertSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    # The fused norm needs a full row.
    rows = 128 if sizes.deterministic else sizes.T  # the same in any batch
    block_h = power_of_2(sizes.H if sizes.norm else sizes.H * rows // 128, low=32, high=1 << 30 if sizes.norm else 1024)
    combine = LaunchConfig({"BLOCK_H": block_h}, 8 if sizes.norm else power_of_2(block_h // 128, high=4))
    decode = decode_tokens(sizes.gate_up, sizes.down, sizes.K, dtype, arch) >= sizes.T and not sizes.deterministic
    return {"experts_combine_kernel": combine} | (_decode_configs if decode else prefill_configs)(sizes, dtype, arch)
