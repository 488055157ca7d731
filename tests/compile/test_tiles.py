"""Where the tiles of products come from: measurements of others, what the compiler says; and how often decode tiles
read a weight again where a route is skewed."""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby, product
from typing import Any, NamedTuple

import pytest
import torch
import triton

from mixtral_triton.bench.compile import Compiled, collect, compile_launch
from mixtral_triton.kernels.launching.arch import ARCHS
from mixtral_triton.kernels.ops import linear, tiles
from mixtral_triton.kernels.ops.experts import backward_tiles
from mixtral_triton.kernels.ops.experts import tiles as experts
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.weights import weight_args as kernel_weight
from mixtral_triton.kernels.weights.fp8 import W8A8
from tests.cli.commands import ROOT

pytestmark = pytest.mark.compiled

TABLES: dict[str, Any] = {
    "experts decode": experts.DECODE,
    "experts prefill": experts.PREFILL,
    "linear decode": linear.DECODE,
    "linear prefill": linear.PREFILL,
    "quantized decode": tiles.QUANTIZED_DECODE,
    "int4 prefill": tiles.QUANTIZED_PREFILL[4],
    "8 bits prefill": tiles.QUANTIZED_PREFILL[8],
    "fp8 products prefill": tiles.FP8_PREFILL,
    "16 bits transposed": backward_tiles.TRANSPOSED[16],
    "int4 transposed": backward_tiles.TRANSPOSED[4],
    "8 bits transposed": backward_tiles.TRANSPOSED[8],
}
FORMATS = {"quantized": ("int4:128", "int8", "fp8"), "int4": ("int4:128",), "8": ("int8", "fp8"), "fp8": (W8A8,)}


class Row(NamedTuple):
    """A row of a table, and the names of the architectures and variants that have it."""

    table: str
    tile: Any
    names: Sequence[str]


def rows() -> Iterator[Row]:
    for table, by_name in TABLES.items():
        for family, (earlier, *_) in tiles.EARLIER.items():
            if family not in by_name:
                taken = {name: found for name, found in by_name.items() if name.startswith(earlier)}
                by_name = {name.replace(earlier, family): found for name, found in taken.items()} | by_name
        pairs = sorted((tile, name) for name, found in by_name.items() for tile in found)
        for tile, group in groupby(pairs, key=lambda pair: pair[0]):
            yield Row(table, tile, [name for _, name in group])


def row_id(row: Row) -> str:
    return f"{row.table} {row.names[0]} {row.tile.rows}"


@cache
def measured() -> dict[str, set[str]]:
    """The tiles by file, as ROWSxNxK wWARPS sSTAGES."""
    found: dict[str, set[str]] = {}
    lines = (ROOT / "benchmarks/tiles/measured.csv").read_text().splitlines()
    for line in csv.DictReader(line for line in lines if not line.startswith("#")):
        cells = [re.sub(r" g\d+", "", cell) for name, cell in line.items() if name.isdigit() and cell]
        found.setdefault(line["file"], set()).update(cells)
    for file in (ROOT / "benchmarks/results").glob("*.csv"):
        cells = [re.sub(r" g\d+", "", line["tile"]) for line in csv.DictReader(file.open())]
        found.setdefault(file.name, set()).update(cells)
    return found


@pytest.mark.parametrize("row", [row for row in rows() if not row.tile.source.startswith("compiled")], ids=row_id)
def test_a_measured_tile_is_in_the_file_that_it_names(row: Row) -> None:
    kind, _, file = row.tile.source.partition(": ")
    tile = "{}x{}x{} w{} s{}".format(*row.tile[1:6])
    assert kind == "measured" and tile in measured()[file] and "48x96x64 w8 s4" not in measured()[file]
    cards = {"sm_80": "A100|RTX_4090", "sm_90": "H100|H200", "sm_100": "H100|H200", "gfx942": "MI300X|MI325X"}
    assert any(re.search(cards[name.split()[0]], file, re.IGNORECASE) for name in row.names)


def kernels_of(row: Row, monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """Compile the kernels that take the row, in each format and for each architecture that has it."""
    kind, stage = row.table.split()[0], row.table.split()[-1]
    tile, tiles_for = row.tile._replace(rows=row.tile.rows * (stage == "decode")), tiles.tiles_for

    def select(table: Any, *args: Any) -> Sequence[Any]:
        found, transposed = tiles_for(table, *args), any(table is each for each in backward_tiles.TRANSPOSED.values())
        return (tile,) if isinstance(found[0], type(tile)) and transposed == (stage == "transposed") else found

    monkeypatch.setattr(tiles, "tiles_for", select)
    monkeypatch.setattr(linear, "use_skinny_kernel", lambda *args: stage == "decode")
    found = []
    for name in row.names:
        family, _, variant = name.rpartition(" ") if name.endswith("fp32") else name.partition(" ")
        smaller = variant == "100 KB" or (kind == "fp8" and family == "sm_80")
        arch = "sm_89" if smaller else variant if variant in ARCHS else family or "sm_90"
        dtype = torch.float32 if variant == "fp32" else torch.bfloat16
        if variant == "pointers":
            monkeypatch.setattr(kernel_weight.Weight, "takes_tma", lambda *args: False)
        T = row.tile.rows if stage == "decode" else max(129, 4 * row.tile.rows)
        more = {"T": T, "H": 4096, "deterministic": variant == "deterministic" or kind == "linear"}
        for format in FORMATS.get(kind, (None,)):
            op, shape = OPS["expert_swiglu"], {"I": 14336, "E": 8, "K": 2, "gate_up": format, "down": format}
            if stage == "transposed":
                op = OPS["expert_swiglu_backward"]
                more["deterministic"] = False
            if kind == "linear":
                op, shape = OPS["linear"], {"N": 6144}
                more["deterministic"] = stage == "prefill"
            op = replace(op, bench_shapes=(op.case(**more, **shape),), dtypes=(dtype,))
            launches = [launch for _, launch in collect([op], arch).values() if "BLOCK_K" in launch.constexprs]
            launches = [launch for launch in launches if "LAYOUT" in launch.constexprs]
            if stage == "transposed":
                launches = [launch for launch in launches if "_grad_" in launch.kernel]
            found += [compile_launch(launch, arch) for launch in launches]
    return found


def source_of(kernels: Sequence[Compiled]) -> str:
    counts = [kernel.loop_flop_per_instruction for kernel in kernels if kernel.loop_flop_per_instruction]
    text = f"compiled: {max(kernel.registers for kernel in kernels)} registers"
    return f"{text}, {min(counts):,.0f} FLOP" if counts else text


@pytest.mark.exhaustive
@pytest.mark.parametrize("row", list(rows()), ids=row_id)
def test_no_tile_spills_in_a_main_loop_and_its_figures_are_the_compiler_s(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = kernels_of(row, monkeypatch)
    assert kernels and not [kernel for kernel in kernels if kernel.error or kernel.loop_spills]
    assert all(kernel.shared_bytes <= kernel.limit_bytes for kernel in kernels)
    assert all(
        kernel.num_warps == row.tile.num_warps and kernel.num_stages == row.tile.num_stages for kernel in kernels
    )
    if triton.__version__.startswith("3.9") and row.tile.source.startswith("compiled"):
        assert row.tile.source == source_of(kernels)


def reread(T: int, rows: int, exponent: float, E: int = 8, K: int = 2, routes: int = 2000) -> float:
    """The share of the chosen experts' weight rows that decode reads again, by random routes of this Zipf exponent."""
    generator = torch.Generator().manual_seed(0)
    likely = -exponent * torch.arange(1, E + 1).log()
    gumbel = -(-torch.rand(routes, T, E, generator=generator).log()).log()
    ids = (likely + gumbel).topk(K, -1).indices
    counts = torch.stack([(ids == expert).sum((1, 2)) for expert in range(E)], -1)
    passes, used = -(-counts // rows), (counts > 0).sum(-1)
    return float(((passes.sum(-1) - used) / used).mean())


MOST_REREAD = 0.05


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_decode_tiles_read_few_rows_of_a_weight_twice(arch: str) -> None:
    """Half as many rows of x as tokens, up to where a skewed route makes too many experts read their weight again."""
    for tile in experts.DECODE[arch]:
        assert reread(tile.rows, tile.BLOCK_T, 1.0) <= MOST_REREAD and reread(tile.rows, tile.BLOCK_T, 0.0) < 1e-3
        # With twice as many tokens a row, which is what uniform routing would allow, it would be too many.
        assert tile.BLOCK_T == 64 or reread(2 * tile.BLOCK_T, tile.BLOCK_T, 1.0) > MOST_REREAD


QWEN3, OLMOE, DEEPSEEK = (
    {"H": 2048, "I": 768, "E": 128},
    {"H": 2048, "I": 1024, "E": 64},
    {"H": 7168, "I": 2048, "E": 256},
)
CARDS = {"sm_89": 128, "sm_120": 170, "sm_90": 132}  # multiprocessors of an RTX 4090, an RTX 5090, an H100


def record_experts(arch: str, format: str | None, **sizes: int) -> dict[str, Any]:
    op = OPS["expert_swiglu"]
    case = op.case(K=8, gate_up=format, down=format, **sizes)
    return {
        x.kernel: x for _, x in collect([replace(op, bench_shapes=(case,), dtypes=(torch.bfloat16,))], arch).values()
    }


def issued(counts: torch.Tensor, tile: Any) -> int:
    """Rows that the row tiles of groups of `counts` multiply (experts/kernels.py)."""
    M, short = tile["BLOCK_M"], tile["SHORT_M"]
    rest, main = counts % M, experts.main_rows(M, short)
    last = torch.where(rest <= short, short, torch.where(rest <= main, main, M)) * (rest > 0)
    return int((counts - rest + last).sum())


@pytest.mark.parametrize("format", [None, "int4:128", "int8", "fp8"])
@pytest.mark.parametrize(("T", "most"), [(64, 4.5), (256, 2.2), (1024, 1.5)])
def test_rows_issued_for_each_row_of_many_experts(T: int, most: float, format: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    for arch, exponent in product(("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"), (0, 1)):
        likely = -exponent * torch.arange(1, 129).log()
        gumbel = -(-torch.rand(T, 128, generator=generator).log()).log()
        counts = (likely + gumbel).topk(8, -1).indices.flatten().bincount(minlength=128)
        for kernel in ("experts_up_kernel", "experts_down_kernel"):
            tile = record_experts(arch, format, T=T, **QWEN3)[kernel].constexprs
            assert issued(counts, tile) <= most * 8 * T, (arch, exponent, kernel)


@pytest.mark.parametrize("format", [None, "int4:128", "int8"])
@pytest.mark.parametrize("model", [QWEN3, OLMOE, DEEPSEEK], ids=str)
@pytest.mark.parametrize("arch", CARDS)
def test_decode_has_a_program_for_each_multiprocessor_and_no_split_without_columns(
    arch: str, model: Any, format: str | None
) -> None:
    launches = record_experts(arch, format, T=1, **model)
    for kernel in ("experts_up_decode_kernel", "experts_down_decode_kernel"):
        assert math.prod(launches[kernel].grid) >= CARDS[arch]
    down = launches["experts_down_decode_kernel"].constexprs
    unit, splits = down["BLOCK_K"] * down["LAYOUT"].fields, down["SPLIT_K"]
    span = -(-model["I"] // (splits * unit)) * unit
    assert (splits - 1) * span < model["I"] <= splits * span


@pytest.mark.exhaustive
@pytest.mark.parametrize(("format", "arch"), [*product([None, "int4:128", "int8"], ["sm_89", "sm_86", "sm_120"])])
def test_decode_tiles_leave_100_kb_two_programs(arch: str, format: str | None) -> None:
    for T in (1, 32):
        for kernel, launch in record_experts(arch, format, T=T, **QWEN3).items():
            if kernel.endswith("_decode_kernel"):
                compiled = compile_launch(launch, arch)
                assert compiled.fault is None and (compiled.programs_per_sm or 0) >= 2, compiled


# Of the kernel that compared all ids with all experts in each program, at the issue rate of an H100 (132 SMs, 4 warp
# instructions a clock, 1.755 GHz): 1.1 and 17.8 ms. A tenth and a fiftieth of that.
@pytest.mark.exhaustive
@pytest.mark.parametrize(("T", "most"), [(4096, 102e6), (16384, 330e6)])
def test_a_gather_of_many_tokens_issues_few_instructions(T: int, most: float, covers: Any) -> None:
    launch = record_experts("sm_90", None, T=T, **QWEN3)["gather_by_expert_kernel"]
    tile, slots = launch.constexprs, 8 * T
    # It counts ids, then places them, both over all ids in each program, then copies a few rows at a time.
    count, place, copy = (loop.other for loop in compile_launch(launch, "sm_90").loops)
    passes = math.prod(launch.grid) * -(-slots // tile["BLOCK_N"]) * (count + place)
    issued = 8 * (passes + slots / tile["BLOCK_S"] * -(-tile["H"] // tile["BLOCK_H"]) * copy)
    covers("main loops", f"gather of T {T:,}, E 128: {issued / 1e6:.0f} M warp instructions (bound {most / 1e6:.0f})")
    assert launch.num_warps == 8 and issued <= most
