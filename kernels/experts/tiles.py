"""Launch configurations of the expert kernels: pure functions of sizes, dtype and architecture.

The literals compile without a spill and are the best by the cost model; not measured on a GPU.
"""

from collections import namedtuple
from dataclasses import dataclass, replace

import torch

from ..arch import amd, family, tma
from ..dispatch import gather_config
from ..launch import LaunchConfig, power_of_2
from ..linear import skinny_config, wide_config


@dataclass(frozen=True)
class ExpertSizes:
    T: int
    H: int
    I: int
    E: int
    K: int
    gate_up: str | None  # the name of a quantized weight's format
    down: str | None
    by_pointers: bool  # TMA cannot read a dense weight
    deterministic: bool
    norm: bool  # the combine also normalizes


# Up to here the sort-free kernels run: the bytes of the weights bound the layer, whatever the tiles.
DECODE_TOKENS = 64
# A fixed split: a row's sum has the same order in any batch.
SPLIT_K = 4
# SHORT_M: see kernels.py; 0: every tile is full.
PrefillTile = namedtuple("PrefillTile", "BLOCK_M SHORT_M UP_BLOCK_N DOWN_BLOCK_N BLOCK_K num_warps num_stages")
DecodeTile = namedtuple("DecodeTile", "BLOCK_K num_stages")
# For 16-bit types, by the average rows of a group.
_PREFILL = {
    "sm_80": {0: PrefillTile(64, 0, 64, 128, 32, 4, 4), 128: PrefillTile(64, 0, 64, 128, 64, 8, 3)},
    "sm_90": {
        0: PrefillTile(64, 0, 64, 128, 64, 4, 4),
        64: PrefillTile(128, 64, 128, 256, 64, 8, 4),
        112: PrefillTile(192, 64, 128, 256, 64, 8, 4),
    },
    "gfx942": {0: PrefillTile(64, 0, 32, 64, 64, 4, 2), 256: PrefillTile(128, 0, 64, 128, 32, 8, 2)},
}
# The same, by the rows of x in a tile. With 32 tokens five stages would leave room for one program an SM.
_DECODE = {
    "sm_80": {16: DecodeTile(128, 4), 32: DecodeTile(128, 4), 64: DecodeTile(64, 4)},
    "sm_90": {16: DecodeTile(128, 5), 32: DecodeTile(128, 4), 64: DecodeTile(64, 5)},
    "gfx942": {16: DecodeTile(64, 2), 32: DecodeTile(64, 2), 64: DecodeTile(64, 2)},
}
_PREFILL["sm_100"], _DECODE["sm_100"] = _PREFILL["sm_90"], _DECODE["sm_90"]
# fp32 has no tensor cores at this precision: registers bound the tile.
_PREFILL_FP32, _DECODE_FP32 = PrefillTile(32, 0, 16, 32, 32, 4, 2), DecodeTile(32, 2)


def _prefill(sizes: ExpertSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    deterministic, by_pointers = sizes.deterministic, sizes.by_pointers
    slots, dense = sizes.T * sizes.K, not (sizes.gate_up or sizes.down)
    rows = 0 if deterministic else slots // sizes.E
    table = _PREFILL[family(arch)]
    if by_pointers and not amd(arch):
        # The larger tiles of later GPUs spill. Each is as deep as TMA's for as many rows: the depth is the order of a
        # sum, and offloaded experts give the bits of resident ones.
        table = {**_PREFILL["sm_80"], 0: table[0]}
    tile = _PREFILL_FP32 if dtype == torch.float32 else table[max(key for key in table if key <= rows)]
    block_m, short_m = tile.BLOCK_M, tile.SHORT_M
    # TMA reads x where it was gathered in sorted order.
    sorted_x = dense and tma(arch) and dtype.itemsize == 2 and not by_pointers
    if not sorted_x:  # pointers need tiles of one part, a power of 2
        block_m, short_m = min(block_m, 128), 0
        block_m = block_m if deterministic else power_of_2(slots, low=16, high=block_m)

    def config(columns: int, block_n: int, depth: int, weights: str | None, halves: int) -> LaunchConfig:
        if weights:
            shared = None if deterministic else (rows, slots)
            wide = wide_config(weights, columns, depth, shared, dtype, arch, halves)
            return replace(wide, constexprs={**wide.constexprs, "SHORT_M": 0})
        tiles = {"BLOCK_M": block_m, "SHORT_M": short_m, "BLOCK_N": power_of_2(columns, low=16, high=block_n)}
        tiles |= {"BLOCK_K": power_of_2(depth, low=16, high=tile.BLOCK_K), "GROUP_M": 8}
        return LaunchConfig(tiles, num_warps=tile.num_warps, num_stages=tile.num_stages)

    kernels = {
        "experts_up_kernel": config(sizes.I, tile.UP_BLOCK_N, sizes.H, sizes.gate_up, 2),
        "experts_down_kernel": config(sizes.H, tile.DOWN_BLOCK_N, sizes.I, sizes.down, 1),
    }
    if sorted_x:
        kernels["gather_by_expert_kernel"] = gather_config(slots, sizes.E, sizes.H)
    return kernels


def _decode(sizes: ExpertSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """64 weight rows a program, tiles as deep as shared memory allows."""
    block_t = power_of_2(sizes.T, low=16, high=DECODE_TOKENS)
    block_k, stages = _DECODE_FP32 if dtype == torch.float32 else _DECODE[family(arch)][block_t]
    tiles = {"BLOCK_T": block_t, "BLOCK_S": power_of_2(block_t * sizes.K)}

    def config(columns: int, depth: int, weights: str | None, halves: int, **split: int) -> LaunchConfig:
        if weights:
            skinny = skinny_config(weights, columns, depth, block_t, dtype, arch, halves)
            return replace(skinny, constexprs={**tiles, **split, **skinny.constexprs})
        span = -(-depth // split.get("SPLIT_K", 1))
        tile = {"BLOCK_N": power_of_2(columns, low=16, high=64 // halves), "BLOCK_K": power_of_2(span, 16, block_k)}
        return LaunchConfig(tiles | tile | split, num_warps=4, num_stages=stages)

    return {
        "experts_up_decode_kernel": config(sizes.I, sizes.H, sizes.gate_up, 2),
        "experts_down_decode_kernel": config(sizes.H, sizes.I, sizes.down, 1, SPLIT_K=SPLIT_K),
    }


def configs(sizes: ExpertSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    # The fused norm needs a full row.
    norm = sizes.norm
    combine = LaunchConfig({"BLOCK_H": power_of_2(sizes.H, high=1 << 30 if norm else 1024)}, 8 if norm else 4)
    prefill = sizes.T > DECODE_TOKENS or sizes.deterministic
    return {"experts_combine_kernel": combine} | (_prefill if prefill else _decode)(sizes, dtype, arch)
