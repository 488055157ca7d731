"""Launch configurations of the expert kernels: pure functions of sizes, dtype and architecture.

The literals compile without a spill and are the best by the cost model; not measured on a GPU.
"""

from dataclasses import dataclass

import torch

from ..arch import tma
from ..launch import LaunchConfig
from ..quantized import W8A8
from ..sort import gather_config
from ..tiles import (
    GROUP_M,
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
# A fixed split: a row's sum has the same order in any batch.
SPLIT_K = 4

# Up and down take the same tiles. BLOCK_N counts gate and up rows together.
# Few tokens: tiles as deep as shared memory allows. With 32 tokens five stages would leave room for one program an SM.
_DECODE_HOPPER = (
    DecodeTile(16, 16, 64, 128, 4, 5),
    DecodeTile(32, 32, 64, 128, 4, 4),
    DecodeTile(64, 64, 64, 64, 4, 5),
)
DECODE: Table[DecodeTile] = {
    "sm_80": (
        DecodeTile(16, 16, 64, 128, 4, 4),
        DecodeTile(32, 32, 64, 128, 4, 4),
        DecodeTile(64, 64, 64, 64, 4, 4),
    ),
    "sm_90": _DECODE_HOPPER,
    "sm_100": _DECODE_HOPPER,
    "gfx942": (DecodeTile(16, 16, 64, 64, 4, 2), DecodeTile(32, 32, 64, 64, 4, 2), DecodeTile(64, 64, 64, 64, 4, 2)),
    "fp32": (DecodeTile(16, 16, 64, 32, 4, 2), DecodeTile(32, 32, 64, 32, 4, 2), DecodeTile(64, 64, 64, 32, 4, 2)),
}
# Many tokens. Where TMA cannot read a weight, the larger tiles of later GPUs spill: "pointers". Each is as deep as
# those of TMA: the depth is the order of a sum, and offloaded experts give the bits of resident ones.
_TMA = (
    PrefillTile(0, 64, 128, 64, 4, 4),
    PrefillTile(64, 128, 256, 64, 8, 4, SHORT_M=64),
    PrefillTile(112, 192, 256, 64, 8, 4, SHORT_M=64),
)
_POINTERS = PrefillTile(0, 64, 128, 64, 4, 4), PrefillTile(128, 64, 128, 64, 8, 3)
PREFILL: Table[PrefillTile] = {
    "sm_80": (PrefillTile(0, 64, 128, 32, 4, 4), PrefillTile(128, 64, 128, 64, 8, 3)),
    "sm_90": _TMA,
    "sm_90 pointers": _POINTERS,
    "sm_100": _TMA,
    "sm_100 pointers": _POINTERS,
    "gfx942": (PrefillTile(0, 64, 64, 64, 4, 2), PrefillTile(256, 128, 128, 32, 8, 2)),
    "fp32": (PrefillTile(0, 32, 32, 32, 4, 2),),
}


def decode_tokens(gate_up: str | None, down: str | None, dtype: torch.dtype, arch: str) -> int:
    """Return the most tokens for which the sort-free kernels run, for weights of these `QuantizedWeight.name`s."""
    if W8A8 in (gate_up, down):
        return 0
    return tiles_for(QUANTIZED_DECODE, dtype, arch)[-1].rows if gate_up and down else DECODE_TOKENS


def _prefill_configs(sizes: ExpertSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    slots, dense = sizes.T * sizes.K, not (sizes.gate_up or sizes.down)
    rows = 0 if sizes.deterministic else slots // sizes.E
    # TMA reads rows that were gathered in sorted order, of x or of codes.
    sorted_x = dense and tma(arch) and dtype.itemsize == 2 and not sizes.by_pointers

    def config(columns: int, depth: int, quantized: str | None, halves: int = 1) -> LaunchConfig:
        table = quantized_prefill(quantized, arch) if quantized else PREFILL
        tile = prefill_tile(table, rows, dtype, arch, "pointers" if sizes.by_pointers else "")
        block_m, short_m = tile.BLOCK_M, tile.SHORT_M
        by_tma = sorted_x or (quantized == W8A8 and tma(arch) and not sizes.by_pointers)
        if not by_tma:  # pointers need tiles of one part, a power of 2
            block_m, short_m = main_rows(block_m, short_m), 0
            block_m = block_m if sizes.deterministic else power_of_2(slots, low=least_rows(quantized), high=block_m)
        more = {"BLOCK_M": block_m, "SHORT_M": short_m, "GROUP_M": GROUP_M}
        return weight_config(tile, columns, depth, quantized, halves, **more)

    kernels = {
        "experts_up_kernel": config(sizes.I, sizes.H, sizes.gate_up, halves=2),
        "experts_down_kernel": config(sizes.H, sizes.I, sizes.down),
    }
    if sorted_x:
        kernels["gather_by_expert_kernel"] = gather_config(slots, sizes.E, sizes.H)
    return kernels


def _decode_configs(sizes: ExpertSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    def config(columns: int, depth: int, quantized: str | None, halves: int = 1, **more: int) -> LaunchConfig:
        tile = decode_tile(QUANTIZED_DECODE if quantized else DECODE, sizes.T, dtype, arch)
        more |= {"BLOCK_T": tile.BLOCK_T, "BLOCK_S": power_of_2(tile.rows * sizes.K)}
        return weight_config(tile, columns, depth, quantized, halves, **more)

    span = sizes.I if sizes.down else -(-sizes.I // SPLIT_K)
    return {
        "experts_up_decode_kernel": config(sizes.I, sizes.H, sizes.gate_up, halves=2),
        "experts_down_decode_kernel": config(sizes.H, span, sizes.down, SPLIT_K=SPLIT_K),
    }


def configs(sizes: ExpertSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    # The fused norm needs a full row.
    norm = sizes.norm
    combine = LaunchConfig({"BLOCK_H": power_of_2(sizes.H, high=1 << 30 if norm else 1024)}, 8 if norm else 4)
    decode = decode_tokens(sizes.gate_up, sizes.down, dtype, arch) >= sizes.T and not sizes.deterministic
    return {"experts_combine_kernel": combine} | (_decode_configs if decode else _prefill_configs)(sizes, dtype, arch)
