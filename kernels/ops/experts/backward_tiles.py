"""Launch configurations of `expert_swiglu_backward`: pure functions of sizes, dtype and architecture."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from ...launching.launch import LaunchConfig
from ...weights.formats import FORMATS, tile_columns
from ..sort import gather_config
from ..tiles import PrefillTile, Table, power_of_2, prefill_tile
from .tiles import ExpertSizes, prefill_configs

# Products with a transposed weight. BLOCK_N counts its columns, BLOCK_K its rows: the depth of the sum. A quantized
# weight's unit fixes BLOCK_N. No GPU has measured them: selected by FLOP per instruction.
TRANSPOSED: Mapping[int, Table[PrefillTile]] = {  # by the bits of a code; 16: dense
    16: {
        "sm_80": (
            PrefillTile(0, 64, 128, 64, 4, 3, "compiled: 168 registers, 2,621 FLOP"),
            PrefillTile(64, 128, 128, 64, 8, 3, "compiled: 178 registers, 2,819 FLOP", SHORT_M=64),
        ),
        "sm_90": (
            PrefillTile(0, 64, 128, 64, 4, 4, "compiled: 96 registers, 2,979 FLOP"),
            PrefillTile(64, 128, 256, 64, 8, 4, "compiled: 186 registers, 5,958 FLOP", SHORT_M=64),
        ),
        "sm_90 pointers": (PrefillTile(0, 64, 128, 64, 4, 3, "compiled: 168 registers, 2,621 FLOP"),),
        "gfx942": (
            PrefillTile(0, 64, 64, 64, 4, 2, "compiled: 128 registers"),
            PrefillTile(128, 128, 128, 64, 8, 2, "compiled: 128 registers", SHORT_M=64),
        ),
        "fp32": (PrefillTile(0, 32, 32, 32, 4, 2, "compiled: 48 registers"),),
    },
    4: {
        "sm_80": (PrefillTile(0, 64, 256, 32, 8, 2, "compiled: 250 registers, 1,796 FLOP"),),
        # With two stages, groups of 64 columns spill in the loop.
        "sm_80 sm_120": (PrefillTile(0, 64, 256, 32, 8, 3, "compiled: 237 registers, 1,833 FLOP"),),
        "sm_90": (
            PrefillTile(0, 64, 256, 64, 4, 2, "compiled: 237 registers, 1,295 FLOP"),
            PrefillTile(64, 128, 256, 128, 8, 2, "compiled: 246 registers, 2,341 FLOP", SHORT_M=64),
        ),
        "gfx942": (PrefillTile(0, 64, 256, 32, 8, 1, "compiled: 118 registers"),),
        "fp32": (PrefillTile(0, 32, 256, 16, 8, 2, "compiled: 184 registers"),),
        "gfx942 fp32": (PrefillTile(0, 32, 256, 16, 8, 1, "compiled: 190 registers"),),  # two stages spill on gfx950
    },
    8: {
        "sm_80": (
            PrefillTile(0, 64, 128, 32, 4, 2, "compiled: 167 registers, 790 FLOP"),
            PrefillTile(64, 128, 128, 32, 4, 2, "compiled: 255 registers, 1,448 FLOP", SHORT_M=64),
        ),
        # Odd sizes, in which four warps spill on sm_120 with Triton 3.7 and 3.9.
        "sm_80 pointers": (PrefillTile(0, 128, 128, 32, 8, 2, "compiled: 128 registers, 1,192 FLOP", SHORT_M=64),),
        "sm_90": (
            PrefillTile(0, 64, 128, 64, 4, 2, "compiled: 154 registers, 846 FLOP"),
            PrefillTile(128, 256, 128, 128, 8, 2, "compiled: 241 registers, 2,265 FLOP"),
        ),
        "gfx942": (PrefillTile(0, 64, 128, 32, 8, 1, "compiled: 89 registers"),),
        "fp32": (PrefillTile(0, 32, 128, 16, 8, 2, "compiled: 150 registers"),),
    },
}


def transposed_config(
    sizes: ExpertSizes, columns: int, depth: int, quantized: str | None, dtype: torch.dtype, arch: str
) -> LaunchConfig:
    """Configure the product with a transposed weight [E, depth, columns]. quantized: the name of its format."""
    slots, format = sizes.T * sizes.K, FORMATS[quantized.partition(":")[0]] if quantized else None
    table, variant = TRANSPOSED[format.bits if format else 16], "pointers" if sizes.by_pointers else arch
    tile = prefill_tile(table, slots // sizes.E, dtype, arch, variant)
    block_n = power_of_2(columns, low=16, high=tile.BLOCK_N)
    if format is not None:
        block_n = format.fields * (tile_columns(quantized, columns) or 0)
    tiles = {"BLOCK_M": power_of_2(slots, low=16, high=tile.BLOCK_M), "SHORT_M": tile.SHORT_M, "BLOCK_N": block_n}
    tiles["SHORT_M"] *= tiles["SHORT_M"] < tiles["BLOCK_M"]
    # A tile that divides the depth, where one of 32 does: a mask in the loop costs half.
    block_k = max(power_of_2(depth, low=16, high=32), min(depth & -depth, tile.BLOCK_K))
    tiles |= {"BLOCK_K": min(block_k, tile.BLOCK_K), "GROUP_M": tile.GROUP_M}
    return LaunchConfig(tiles, num_warps=tile.num_warps, num_stages=tile.num_stages)


def configs(sizes: ExpertSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    H, I = sizes.H, sizes.I
    gate_up = replace(sizes, H=2 * I, I=H, down=sizes.gate_up)  # as a down projection
    return {
        "gather_by_expert_kernel": gather_config(H),
        "experts_down_kernel": prefill_configs(gate_up, dtype, arch)["experts_down_kernel"],
        "experts_grad_h_kernel": transposed_config(sizes, I, H, sizes.down, dtype, arch),
        # An element for each thread, at least: another one that held it, too, might load it when it is overwritten.
        "swiglu_backward_kernel": LaunchConfig({"BLOCK_I": power_of_2(I, low=256, high=1024)}, num_warps=4),
        "experts_grad_x_kernel": transposed_config(sizes, H, 2 * I, sizes.gate_up, dtype, arch),
        "experts_combine_kernel": LaunchConfig({"BLOCK_H": power_of_2(H, high=1024)}, num_warps=4),
    }
