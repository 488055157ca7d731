"""Row tiles of the prefill experts: whole, in two parts, short; and which of them the cost model prefers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtral_triton.kernels import reference
from mixtral_triton.kernels.experts import tiles as expert_tiles
from mixtral_triton.kernels.launch import INTERPRETED, override_configs
from mixtral_triton.kernels.op import LaunchConfig, Shape
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.traffic import count_traffic
from tests.tools.test_predict import BF16, LARGE, LAYER, Tile, foreseen, microseconds, once, tiles

TALL: Tile = (192, 256, 64, 8, 4)


@once
@pytest.mark.parametrize("T", [128, 256, 384, 512, 1024, 1536, 4096])
@pytest.mark.parametrize("width", [(4096, 14336), (6144, 16384)])
def test_prefill_uses_the_best_of_three_tiles(T: int, width: tuple[int, int]) -> None:
    sizes = LAYER | {"T": T, "H": width[0], "I": width[1]}
    times = [microseconds("expert_swiglu", sizes, **tiles((64, 128, 64, 4, 4)))]
    times += [microseconds("expert_swiglu", sizes, **tiles(tile, 64)) for tile in (LARGE, TALL)]
    assert microseconds("expert_swiglu", sizes) <= 1.005 * min(times)


@once
@pytest.mark.parametrize(("T", "least"), [(512, 0.80), (1024, 0.55), (1536, 0.50), (4096, 0.65), (8192, 0.65)])
@pytest.mark.parametrize("name", ["expert_swiglu", "experts_add_rms_norm"])
def test_share_of_the_floor(name: str, T: int, least: float, covers: Any) -> None:
    share = foreseen(name, LAYER | {"T": T}).share
    covers("predicted shares", f"{name}, T {T}, H100: {100 * share:.0f} % of the floor (bound {100 * least:.0f} %)")
    assert share >= least


@once
def test_a_whole_last_tile_takes_longer() -> None:
    """A group of 160 rows on average: 128 and 64, or twice 128."""
    sizes = LAYER | {"T": 640}
    short, whole = (microseconds("expert_swiglu", sizes, **tiles(LARGE, rows)) for rows in (64, 0))
    assert whole > 1.05 * short


GROUPS = (0, 1, 64, 65, 128, 129, 192, 193, 257, 330, 384)  # rows of an expert: short, upper part, whole, and more
SIZES = {"H": 64, "I": 48}


def routed(groups: tuple[int, ...]) -> torch.Tensor:
    """ids [T, 1] that give each expert so many tokens, shuffled."""
    ids = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups)).int()
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))][:, None]


def short_tiles(block_m: int) -> dict[str, LaunchConfig]:
    rows = {"BLOCK_M": block_m, "SHORT_M": 64, "BLOCK_K": 64, "GROUP_M": 2}
    return {
        "experts_up_kernel": LaunchConfig({**rows, "BLOCK_N": 16}, 8, 4),
        "experts_down_kernel": LaunchConfig({**rows, "BLOCK_N": 32}, 8, 4),
    }


@pytest.mark.skipif(not INTERPRETED, reason="the arithmetic of the kernels: needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("block_m", [128, 192])
def test_every_height_of_a_last_tile(block_m: int) -> None:
    ids = routed(GROUPS)
    sizes = Shape(SIZES, T=len(ids), E=len(GROUPS), K=1)
    args = OPS["expert_swiglu"].inputs(sizes, BF16, "cpu", torch.Generator().manual_seed(1)) | {"ids": ids}
    with override_configs(short_tiles(block_m)):
        got = OPS["expert_swiglu"].run(**args)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in args.items()}
    exact, plain = reference.expert_swiglu(**wide), reference.expert_swiglu(**args)
    error, allowed = ((x.double() - exact).abs().max() for x in (got, plain))
    assert error <= 2 * allowed


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter: needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("block_m", [128, 192])
def test_flops_issued_are_those_of_the_shortest_tiles(block_m: int) -> None:
    """A group's last tile rounds up to 64 rows, or to 128 where they fit a tile's upper part."""
    ids = routed(GROUPS)
    sizes = Shape(SIZES, T=len(ids), E=len(GROUPS), K=1)
    args = OPS["expert_swiglu"].inputs(sizes, BF16, "cpu", torch.Generator().manual_seed(1)) | {"ids": ids}
    with override_configs(short_tiles(block_m)), count_traffic() as traffic:
        OPS["expert_swiglu"].run(**args)
    rows = sum(-(-group // 64) * 64 for group in GROUPS)  # for tiles of 128 and 192 alike
    assert traffic.flops == rows * 2 * (64 * 96 + 64 * 64)  # H x 2I, and I in a depth of 64 x H


@once
def test_x_is_gathered_where_tma_reads_it() -> None:
    """Elsewhere a sort without x: by pointers, of quantized weights, on GPUs without TMA, and in fp32."""
    layer = LAYER | {"T": 512}
    for arch, sizes, dtype, gathered in (
        ("sm_90", layer, BF16, True),
        ("sm_100", layer, BF16, True),
        ("sm_90", layer | {"by_pointers": True}, BF16, False),
        ("sm_90", layer | {"gate_up": "int8", "down": "int8"}, BF16, False),
        ("sm_80", layer, BF16, False),
        ("gfx942", layer, BF16, False),
        ("sm_90", layer, torch.float32, False),
    ):
        assert ("gather_by_expert_kernel" in expert_tiles.configs(sizes, dtype, arch)) == gathered, (arch, sizes, dtype)
