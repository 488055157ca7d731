"""Kernels on quantized weights, compiled offline with the tiles of Mixtral 8x7B: no spill, and few instructions."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from mixtral_triton.bench.compile import compile_launch
from mixtral_triton.bench.sass import main_loops
from mixtral_triton.kernels.launching.launch import Launch
from mixtral_triton.kernels.ops.attention.op import rope_append_attention
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.weights import formats
from mixtral_triton.kernels.weights import weight_args as kernel_weight
from mixtral_triton.kernels.weights.fp8 import W8A8
from mixtral_triton.kernels.weights.quantized import QuantSpec
from tests.compile.test_offline import FAMILIES, launches_of, members
from tests.support.calls import inputs, offloaded

pytestmark = pytest.mark.compiled

BF16 = torch.bfloat16
Format = tuple[str, int, bool]
# Format, group (0: a scale a row), zeros.
FORMATS: list[Format] = [("int4", 128, False), ("int4", 128, True), ("int8", 0, False), ("fp8", 0, False)]
OTHER_GROUPS: list[Format] = [("int4", 32, True), ("int4", 0, False), ("int8", 128, False), ("fp8", 128, False)]


def format_name(format: Format) -> str:
    return "-".join(map(str, format))


by_format = pytest.mark.parametrize("format", FORMATS, ids=format_name)


def launches(format: Format, T: int, arch: str, dtype: torch.dtype = BF16, offload: bool = False) -> list[Launch]:
    """Of the expert layer and of the attention's input projection: those that read weights. Format "dense": in bf16."""
    name, group, zeros = format

    def weight(dense: Tensor) -> Any:
        if name == "dense":
            empty: Any = dense
        else:
            spec = QuantSpec(name, group or dense.shape[-1], formats.FORMATS[name].scale_dtype, zeros)
            empty = spec.empty(tuple(dense.shape), "meta")
        return offloaded(empty, [0, 1]) if offload and dense.dim() == 3 else empty

    with record_launches(arch) as found:
        for op, sizes in (("expert_swiglu", {"I": 14336, "E": 8, "K": 2}), ("linear", {"N": 6144})):
            args = inputs(op, {"T": T, "H": 4096, **sizes}, "meta", dtype)
            OPS[op].run(
                **{key: weight(x) if key in ("gate_up_proj", "down_proj", "weight") else x for key, x in args.items()}
            )
    return [launch for launch in found if "LAYOUT" in launch.constexprs]


CASES = [(format, arch, T, BF16) for format in FORMATS for arch in FAMILIES for T in (1, 32, 64, 128, 300, 4096)]
CASES += [(format, "sm_90", T, BF16) for format in OTHER_GROUPS for T in (1, 128, 300, 4096)]
FP32 = [(FORMATS[1], "sm_80"), (FORMATS[2], "sm_90"), (FORMATS[3], "gfx942")]
CASES += [(format, arch, T, torch.float32) for format, arch in FP32 for T in (1, 64, 128)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("format", "arch", "T", "dtype"), CASES)
def test_no_spill_and_fits(format: Format, arch: str, T: int, dtype: torch.dtype) -> None:
    for member in members(arch):
        kernels = [compile_launch(launch, member) for launch in launches(format, T, member, dtype)]
        assert len(kernels) == 3 and not [(kernel.fault, kernel) for kernel in kernels if kernel.fault]


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", [("dense", 0, False), *FORMATS], ids=format_name)
@pytest.mark.parametrize(
    ("arch", "T"), [("sm_90", 1), ("sm_80", 1), ("sm_90", 64), ("sm_90", 128), ("sm_90", 4096), ("gfx942", 1)]
)
def test_table_of_addresses(format: Format, arch: str, T: int) -> None:
    """No spill, and in decode instructions within 4 % of a stacked weight's: the compiler knows the alignment.

    A decode loop schedules a few instructions of the prefetch, which a table has none of, in either direction.
    """
    stacked, offloaded = (
        [compile_launch(launch, arch) for launch in launches(format, T, arch, offload=offload)]
        for offload in (False, True)
    )
    assert len(stacked) == len(offloaded) and not [kernel.fault for kernel in offloaded if kernel.fault]
    counted = [*stacked, *offloaded] if T <= 64 and arch != "gfx942" else []
    loops = main_loops([kernel.stages["cubin"] for kernel in counted], arch)  # together: the disassembler starts slowly
    for kernel, found in zip(counted, loops, strict=True):
        vars(kernel)["loops"] = found  # where the cached property looks
    for one, other in zip(stacked, offloaded, strict=True) if T <= 64 else ():
        counts = one.loop_flop_per_instruction, other.loop_flop_per_instruction  # None: not counted for this target
        assert counts == (None, None) or counts[1] > 0.96 * counts[0] > 0
        assert other.constexprs["LAYOUT"].table or one.kernel.startswith("linear")


# Thread instructions a byte of codes; what full bandwidth affords is 8.6 on an H100, 9.6 on an A100.
# fp8: for any number of rows, which none is compiled for alone.
INSTRUCTIONS = {"int4-128-False": 6.0, "int4-128-True": 6.6, "int8-0-False": 4.0, "fp8-0-False": 4.1}
# Earlier releases of Triton spend some more on addresses.
SLACK = 1.0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 1.1


def instructions_a_byte(launch: Launch, arch: str) -> float:
    """Return the thread instructions of one turn of a decode loop, by the bytes of codes that it loads."""
    rows = launch.constexprs["BLOCK_N"] * (2 if "_up_" in launch.kernel else 1)
    (loop,) = compile_launch(launch, arch).loops
    return 32 * (launch.num_warps or 0) * (loop.tensor + loop.other) / (2 * rows * launch.constexprs["BLOCK_K"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@by_format
def test_decode_spends_few_instructions_a_byte(format: Format, arch: str, covers: Any) -> None:
    most = INSTRUCTIONS[format_name(format)] * SLACK
    for launch in launches(format, 1, arch):
        figure = instructions_a_byte(launch, arch)
        assert figure <= most, (launch.kernel, figure)
        case = f"{launch.kernel}, {format_name(format)}, {arch}"
        covers("main loops", f"{case}: {figure:.2f} thread instructions a byte (bound {most:.1f})")


def cache_instructions_a_byte(arch: str, sizes: Any) -> float:
    """Thread instructions of a turn of a decode step's loop, by the bytes of codes and scales that it loads."""
    step = next(shape for shape in rope_append_attention.op.bench_shapes if vars(shape).items() >= sizes.items())
    op = replace(rope_append_attention.op, bench_shapes=(step,))
    (launch,) = (each for each in launches_of(op, arch, BF16) if each.kernel == "attention_decode_kernel")
    kernel, size = compile_launch(launch, arch), 1 + 4 / 128 if step.cache else 2
    (loop,) = kernel.loops
    assert kernel.fault is None and kernel.spills == 0
    keys = 2 * launch.constexprs["BLOCK_N"] * 128
    return 32 * (launch.num_warps or 0) * (loop.tensor + loop.other) / (keys * size)


@pytest.mark.exhaustive
@pytest.mark.parametrize("window", [0, 4096])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_cache_of_8_bits_spends_few_instructions_a_byte(arch: str, window: int, covers: Any) -> None:
    """Three times those of 16 bits, for half of the bytes: full bandwidth affords 8.6 on an H100, 6.0 on an H200."""
    figure = cache_instructions_a_byte(arch, {"window": window, "cache": "int8"})
    assert figure <= 6.2 * SLACK and figure < 3.1 * cache_instructions_a_byte(arch, {"window": window, "cache": None})
    covers("main loops", f"decode over 8 bits, window {window}, {arch}: {figure:.2f} instructions a byte (bound 6.2)")


def test_half_the_rows_a_program_exceed_the_instruction_limit() -> None:
    """Injected fault: as many warps for half the rows."""
    launch = next(found for found in launches(FORMATS[0], 1, "sm_80") if "_up_" in found.kernel)
    fewer = replace(launch, constexprs={**launch.constexprs, "BLOCK_N": launch.constexprs["BLOCK_N"] // 2})
    figures = [instructions_a_byte(each, "sm_80") for each in (launch, fewer)]
    assert figures[1] > 1.5 * figures[0] and figures[1] > INSTRUCTIONS["int4-128-False"]


CODES: Format = (W8A8, 0, False)
# FLOP per other instruction at 4,096 tokens: of linear, which has tiles of one part, and of the experts. Each 128
# columns a tensor core's sum is added to fp32, an instruction for 8,192 FLOP. Those of sm_100 are not counted.
CODE_FLOP = {"sm_89": (3000, 3000), "sm_90": (3400, 4200), "sm_100": None, "sm_120": (3700, 3900)}
CODE_CASES = [(arch, *more) for arch in CODE_FLOP for more in ((70, BF16, False), (4096, BF16, False))]
CODE_CASES += [(arch, 4096, *more) for arch in CODE_FLOP for more in ((torch.float32, False), (BF16, True))]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("arch", "T", "dtype", "offload"), CODE_CASES)
def test_products_of_codes_do_not_spill(arch: str, T: int, dtype: torch.dtype, offload: bool, covers: Any) -> None:
    for launch in launches(CODES, T, arch, dtype, offload):
        kernel = compile_launch(launch, arch)
        assert kernel.fault is None, (launch.kernel, kernel.fault)
        if (bounds := CODE_FLOP[arch]) and (T, dtype, offload) == (4096, BF16, False):
            least, figure = bounds[launch.kernel != "linear_kernel"], kernel.loop_flop_per_instruction or 0.0
            assert figure >= least, (launch.kernel, figure)
            text = f"{figure:,.0f} FLOP per other instruction (bound {least:,})"
            covers("main loops", f"{launch.kernel}, {W8A8}, {arch}: {text}")


@pytest.mark.parametrize("promoted", [True, False])
def test_sums_of_codes_are_promoted_every_128_columns(
    promoted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum of its own begins with each tile, one addition for each of its numbers ends it, and the product waits once
    for a tile. The fault is a GPU that is taken to keep all bits."""
    if not promoted:
        monkeypatch.setattr(kernel_weight, "sums_fp8_exactly", lambda arch: True)
    launch = next(each for each in launches(CODES, 4096, "sm_90") if each.kernel == "linear_kernel")
    loops = compile_launch(launch, "sm_90", out=tmp_path).loops
    sass = next(tmp_path.glob("*.sass")).read_text()
    begins = re.findall(r"QGMMA.64x128x32.F32.E4M3.E4M3 \S+ gdesc\S+ RZ, !UPT", sass)
    sums = launch.constexprs["BLOCK_M"] * launch.constexprs["BLOCK_N"] // (32 * (launch.num_warps or 1))
    assert launch.constexprs["BLOCK_K"] == 128 and [loop.tensor for loop in loops] == [4]
    assert (len(begins) == 1 and len(re.findall("FADD|FFMA", sass)) >= sums) == promoted
    assert sass.count("WARPGROUP.DEPBAR") == 1 or not promoted


FLOP_PER_INSTRUCTION = {"sm_80": 1100, "int4": 2300, "int8": 3400, "fp8": 3400}  # of sm_90 by the format


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@by_format
def test_prefill_does_little_beside_its_dots(format: Format, arch: str, covers: Any) -> None:
    for launch in launches(format, 4096, arch):
        least = FLOP_PER_INSTRUCTION[arch if arch == "sm_80" else format[0]]
        if launch.kernel == "experts_down_kernel" and arch != "sm_80":
            least -= 150  # of int4 with zeros 2,185, of fp8 3,339
        figure = compile_launch(launch, arch).loop_flop_per_instruction or 0.0
        assert figure >= least, (launch.kernel, figure)
        case = f"{launch.kernel}, {format_name(format)}, {arch}"
        covers("main loops", f"{case}: {figure:,.0f} FLOP per other instruction (bound {least:,})")
