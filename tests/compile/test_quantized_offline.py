"""Kernels on quantized weights, compiled for GPUs that are not here, with the tiles of Mixtral 8x7B: no spill, all fit,
and few instructions beside what has to be done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from mixtral_triton.kernels.arch import ARCHS
from mixtral_triton.kernels.experts.op import expert_swiglu
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.linear import linear
from mixtral_triton.kernels.op import Launch
from mixtral_triton.kernels.quantized import BITS, SCALES, QuantizedWeight, unit_columns
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.tools.compiled import Compiled
from mixtral_triton.tools.offline import compile_launch

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles: needs a process without TRITON_INTERPRET")

FAMILIES = tuple(dict.fromkeys(known.family for known in ARCHS.values()))
H, I, E = 4096, 14336, 8
BF16 = torch.bfloat16
# Format, group (0: a scale a row), zeros.
FORMATS = [("int4", 128, False), ("int4", 128, True), ("int8", 0, False), ("fp8", 0, False)]
OTHERS = [("int4", 32, True), ("int4", 0, False), ("int8", 128, False), ("fp8", 128, False)]
Format = tuple[str, int, bool]


def named(format: Format) -> str:
    return "-".join(map(str, format))


def weight(format: Format, *shape: int) -> QuantizedWeight:
    """On the meta device."""
    name, group, zeros = format
    return QuantizedWeight.empty(name, shape, group or shape[-1], SCALES[name], zeros, "meta")


def launches(format: Format, T: int, arch: str, dtype: torch.dtype = BF16) -> list[Launch]:
    """Of the expert layer and of the attention's input projection: those that read weights."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with record_launches(arch) as found:
        weights = weight(format, E, 2 * I, H), weight(format, E, H, I)
        expert_swiglu(tensor(T, H), *weights, tensor(T, 2, dtype=torch.int32), tensor(T, 2, dtype=torch.float32))
        linear(tensor(T, H), weight(format, 6144, H))
    return [launch for launch in found if "LAYOUT" in launch.constexprs]


def compiled(launch: Launch, arch: str) -> Compiled:
    """As the GPU with the least shared memory of those that run it sees it."""
    least = min(known.shared_bytes for known in ARCHS.values() if known.family == arch)
    return replace(compile_launch(launch, arch), limit_bytes=least)


def weight_bytes(launch: Launch) -> int:
    """Of codes that one turn of a decode loop takes in."""
    rows = launch.constexprs["BLOCK_N"] * (2 if "_up_" in launch.kernel else 1)
    return 2 * rows * launch.constexprs["BLOCK_K"]


@pytest.mark.parametrize("T", [1, 32, 64, 300, 4096])
@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_no_spill_and_fits(format: Format, arch: str, T: int, covers: Any) -> None:
    kernels = [compiled(launch, arch) for launch in launches(format, T, arch)]
    assert len(kernels) == 3 and not [(kernel.fault, kernel) for kernel in kernels if kernel.fault]


@pytest.mark.parametrize("format", OTHERS, ids=named)
def test_other_groups(format: Format) -> None:
    kernels = [compiled(launch, "sm_90") for T in (1, 300, 4096) for launch in launches(format, T, "sm_90")]
    assert not [(kernel.fault, kernel) for kernel in kernels if kernel.fault]


@pytest.mark.parametrize(("format", "arch"), [(FORMATS[1], "sm_80"), (FORMATS[2], "sm_90"), (FORMATS[3], "gfx942")])
def test_fp32(format: Format, arch: str) -> None:
    kernels = [compiled(launch, arch) for T in (1, 64, 128) for launch in launches(format, T, arch, torch.float32)]
    assert not [(kernel.fault, kernel) for kernel in kernels if kernel.fault]


# Thread instructions a byte of codes; what full bandwidth affords is 8.6 on an H100, 9.6 on an A100.
# fp8: for any number of rows, which none is compiled for alone.
INSTRUCTIONS = {"int4-128-False": 6.0, "int4-128-True": 6.6, "int8-0-False": 4.0, "fp8-0-False": 4.1}
# Releases before the one they were counted with spend some more on addresses.
SLACK = 1.0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 1.1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_decode_spends_few_instructions_a_byte(format: Format, arch: str, covers: Any) -> None:
    for launch in launches(format, 1, arch):
        (loop,) = compiled(launch, arch).loops
        figure = loop.instructions_a_byte(launch.num_warps or 0, weight_bytes(launch))
        most = INSTRUCTIONS[named(format)] * SLACK
        assert figure <= most, (launch.kernel, figure)
        line = f"{launch.kernel}, {named(format)}, {arch}: {figure:.2f} thread instructions a byte (bound {most:.1f})"
        covers("main loops", line)


FLOP_PER_INSTRUCTION = {
    "sm_80": dict.fromkeys(("int4-128-False", "int4-128-True", "int8-0-False", "fp8-0-False"), 1400),
    "sm_90": {"int4-128-False": 2200, "int4-128-True": 2200, "int8-0-False": 2500, "fp8-0-False": 2500},
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_prefill_does_little_beside_its_dots(format: Format, arch: str, covers: Any) -> None:
    for launch in launches(format, 4096, arch):
        figure = compiled(launch, arch).loop_flop_per_instruction or 0.0
        least = FLOP_PER_INSTRUCTION[arch][named(format)]
        assert figure >= least, (launch.kernel, figure)
        line = f"{launch.kernel}, {named(format)}, {arch}: {figure:,.0f} FLOP per other instruction (bound {least:,})"
        covers("main loops", line)


def test_instructions_a_byte_are_counted_by_the_thread() -> None:
    """The gate bites: half the rows a program, with as many warps, costs more a byte."""
    launch = next(found for found in launches(FORMATS[0], 1, "sm_80") if "_up_" in found.kernel)
    fewer = replace(launch, constexprs={**launch.constexprs, "BLOCK_N": launch.constexprs["BLOCK_N"] // 2})
    figures = []
    for each in (launch, fewer):
        (loop,) = compiled(each, "sm_80").loops
        figures.append(loop.instructions_a_byte(each.num_warps or 0, weight_bytes(each)))
    assert figures[1] > 1.5 * figures[0] and figures[1] > INSTRUCTIONS["int4-128-False"]


@pytest.mark.parametrize("format", [FORMATS[1], FORMATS[2]], ids=named)
def test_launches_by_triton_s_own_jit(format: Format, gpu: Any) -> None:
    """Binder, specialization and launcher take what describes a quantized weight, on a simulated GPU."""
    name, group, zeros = format
    sizes = {"up": (2, 128, 256), "down": (2, 256, 64)}
    weights = []
    for E, N, K in sizes.values():
        groups = (E, N, K // (group or K) or 1)
        unit = unit_columns(name, K, group if group and K % group == 0 else K)
        data = torch.zeros(E, N, -(-K // unit) * unit * BITS[name] // 16, dtype=torch.int16)
        zero = torch.full(groups, 136.0, dtype=BF16) if zeros else None
        weights.append(QuantizedWeight(name, data, torch.ones(groups), zero, (E, N, K), K // groups[-1]).to("cuda:0"))
    gpu.driver.executes = False
    for T in (3, 70):
        begin = len(gpu.driver.launches)
        tensors = (torch.ones(T, 256, dtype=BF16), torch.zeros(T, 2, dtype=torch.int32), torch.ones(T, 2))
        x, ids, routing_weights = (tensor.to("cuda:0") for tensor in tensors)
        expert_swiglu(x, *weights, ids, routing_weights)
        linear(x, weights[0][1])
        assert len(gpu.driver.launches) - begin == (4 if T == 3 else 5)
