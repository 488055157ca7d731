"""Kernels at sizes that nobody listed: none spills in a main loop, nor more outside of it than a few registers."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from mixtral_triton.bench.compile import collect, compile_launch
from mixtral_triton.kernels.operation.cases import runs_on
from mixtral_triton.kernels.registry import OPS

pytestmark = [pytest.mark.compiled, pytest.mark.slow]
TARGETS = ("sm_80", "sm_89", "sm_90", "gfx942")
SIZES_PER_TEST = 10


def draw_case(seed: int) -> tuple[str, dict[str, Any], torch.dtype]:
    """Return an operation, a case of it and a dtype: few tokens, odd sizes, any number of experts and heads."""
    draw = random.Random(seed)
    T, dtype = draw.choice([1, 2, 5, 16, 33, 48, 64]), draw.choice([torch.float32, torch.bfloat16])
    name = draw.choice(["expert_swiglu", "experts_add_rms_norm", "rope_append_attention", "attention", "linear"])
    if name in ("rope_append_attention", "attention"):
        Hkv, D = draw.choice([1, 2, 4, 8]), draw.choice([16, 64, 72, 80, 96, 128, 192, 256])
        heads = {"B": draw.choice([1, 8]), "Hq": Hkv * draw.choice([1, 2, 4, 7, 8, 16, 64 // Hkv]), "Hkv": Hkv, "D": D}
        S = draw.choice([70, 900, 4096])
        if name == "attention":
            return name, heads | {"T": min(T, S), "S": S, "window": draw.choice([0, 33])}, dtype
        ring = {"T": 1, "C": S, "past": S - 1, "window": draw.choice([0, S]), "cache": draw.choice([None, "int8"])}
        return name, heads | ring | {"norms": draw.choice([True, False])}, dtype
    quantized = draw.choice([None, "int4:128", "int4:32", "int8", "fp8"])
    unit = 128 if quantized == "int4:128" else 32 if quantized == "int4:32" else 1
    H, I = (unit * max(1, size // unit) for size in (draw.choice([96, 500, 2001, 2048, 4096]), draw.choice([500, 768])))
    if name == "linear":
        return name, {"T": T, "H": H, "N": draw.choice([37, 500, 2001]), "weight": quantized}, dtype
    E = draw.choice([8, 22, 64, 128])
    sizes = {"T": T, "H": H, "I": I, "E": E, "K": min(E, draw.choice([1, 2, 6, 8, 16, 22]))}
    return name, sizes | {"gate_up": quantized, "down": quantized}, dtype


INT4 = {"gate_up": "int4:128", "down": "int4:128"}
# What spilled before these sizes were drawn.
KNOWN: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("expert_swiglu", {"T": 48, "H": 4096, "I": 14336, "E": 8, "K": 2, **INT4}, torch.bfloat16),
    ("attention", {"B": 1, "T": 1, "S": 4096, "Hq": 64, "Hkv": 1, "D": 256}, torch.float32),
    ("expert_swiglu", {"T": 4, "H": 4096, "I": 512, "E": 32, "K": 22}, torch.bfloat16),
    ("expert_swiglu", {"T": 4, "H": 2001, "I": 500, "E": 8, "K": 2}, torch.bfloat16),
]


def check(name: str, sizes: dict[str, Any], dtype: torch.dtype, arch: str) -> None:
    op = OPS[name]
    case = op.case_of(sizes)
    if not runs_on(case, arch):
        return
    op = replace(op, bench_shapes=(case,), dtypes=(dtype,))
    for _, launch in collect([op], arch, True).values():
        compiled = compile_launch(launch, arch)
        assert compiled.fault is None, (name, sizes, dtype, compiled)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("first", [None, *range(0, 50, SIZES_PER_TEST)])
def test_known_and_random_sizes(first: int | None, arch: str) -> None:
    seeds = range(0) if first is None else range(first, first + SIZES_PER_TEST)
    for case in [draw_case(1000 * TARGETS.index(arch) + seed) for seed in seeds] or KNOWN:
        check(*case, arch)
