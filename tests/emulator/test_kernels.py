"""Every kernel, compiled by Triton's JIT for sm_90 and sm_80, executed from its PTX on the PTX emulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mixtral_triton.kernels.launch import override_configs
from mixtral_triton.kernels.op import Op, Shape
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.tolerance import measure
from tests.compile.test_jit import on_fake_gpu
from tests.compile.test_quantized_offline import FORMATS, OTHER_GROUPS, format_name
from tests.ops.test_deterministic import CASES, check

from .report import share

pytestmark = pytest.mark.emulator

GPU_DEVICE, BF16 = torch.device("cuda", 0), torch.bfloat16
ARCHS = ("sm_90", "sm_80")
BOUND = 0.97  # of the instructions of one variant with the tiles of 8x7B, for each kernel


def go(op: Op, sizes: Mapping[str, Any], dtype: torch.dtype, covers: Any, case: str) -> None:
    """`op` errs at most twice as much as plain torch, on the GPU; its worst error goes into the summary."""
    args = op.inputs(sizes, dtype, "cpu", torch.Generator().manual_seed(0))
    if op.name == "cached_attention" and int(args["new"].min()) < sizes["T"]:
        args["new"] = args["new"] * 0 + sizes["T"]  # rows past `new` mean nothing
    error, limit = measure(op.name, on_fake_gpu(args))
    assert error <= limit, case
    covers("GPU error", f"{op.name} {str(dtype)[6:]} {float(error):.1e} {float(limit):.1e}")


def kept(op: Op, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, if the operation takes it."""
    return dtype if dtype in op.dtypes else op.dtypes[0]


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OPS)
def test_every_operation_at_its_test_shapes(
    name: str, arch: str, dtype: torch.dtype, ptx_emulator: Any, covers: Any
) -> None:
    op = OPS[name]
    with ptx_emulator(arch):
        for sizes in op.test_shapes:
            go(op, sizes, kept(op, dtype), covers, f"{name} {dict(sizes)}")


LONG = [
    {"B": 1, "T": 300, "S": 300, "Hq": 2, "Hkv": 1, "D": D, "window": window}
    for D in (64, 128)
    for window in (0, 100, 200)
]


def with_keys(sizes: Shape) -> Shape:
    """With so many keys that every query of a tile sees some tiles of them."""
    window = 200 if sizes["window"] else 0
    more = {"C": window or 400, "past": 300} if "C" in sizes else {"S": 300}
    return sizes | more | {"window": window}


@pytest.mark.parametrize("dtype", OPS["attention"].dtypes, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_that_reaches_its_unmasked_loop(
    arch: str, dtype: torch.dtype, ptx_emulator: Any, covers: Any
) -> None:
    """The kernels of the test shapes, too: with their launch choices, more keys."""
    with ptx_emulator(arch):
        for name in ("attention", "cached_attention"):
            for sizes in (Shape(one) for one in OPS[name].test_shapes if one["T"] > 1):
                with override_configs(OPS[name].configs(sizes, dtype, arch)):
                    go(OPS[name], with_keys(sizes), dtype, covers, f"{name} {sizes.as_dict()} with keys")
        for sizes in LONG if dtype == BF16 else LONG[:1]:
            go(OPS["attention"], sizes, dtype, covers, f"{sizes}")


# Sizes with which a kernel's production tiles are filled, and its loops turn.
SMALL = {"H": 1024, "I": 512, "N": 320, "V": 100, "P": 512, "E": 2}
MANY_ROWS = {"H": 512, "I": 512, "N": 320, "E": 3}  # of experts and products; whole units of a quantized weight
TOKENS = 384  # of which K = 2 of 3 experts have 192 + 64 rows on average: some a short last tile, some a longer one
HEADS = {"Hq": 8, "Hkv": 2}  # of attention


def small(sizes: Mapping[str, Any]) -> Shape:
    """`sizes` of 8x7B, smaller: of one kind with them, so that the same kernels run."""
    told = Shape(sizes).as_dict()
    most = SMALL | (HEADS if "window" in told else MANY_ROWS if told.get("T", 0) > 64 and "I" in told else {})
    made = {key: min(most.get(key, size), size) for key, size in told.items() if isinstance(size, int)}
    made |= {key: value for key, value in told.items() if not isinstance(value, int)}
    if "T" in made:
        made["T"] = min(made["T"], 300 if "B" in made else TOKENS if "I" in made else 600 if "H" in made else 2048)
    if "B" in made:
        made["B"] = min(made["B"], 2)
    for key in ("S", "C"):
        if key in made:
            made[key] = min(made[key], 300 if made["T"] > 1 else 600)
    if "window" in made:
        made["window"] = min(made["window"], 200)
    if "past" in made:
        made["past"] = min(made["past"], made.get("C", 300) - 1)
    return Shape(made)


def of_8x7b(op: Op) -> list[Shape]:
    return [Shape(sizes) for sizes in op.bench_shapes if sizes.get("H", 4096) == 4096]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OPS)
def test_production_tiles(name: str, arch: str, ptx_emulator: Any, covers: Any) -> None:
    """The launch choices of 8x7B on small sizes: each kernel has a variant of which nearly all runs."""
    op, seen, kernels = OPS[name], set(), set()
    dtype = kept(op, BF16)
    with ptx_emulator(arch) as gpu:
        for sizes in of_8x7b(op):
            chosen, own = op.configs(sizes, dtype, arch), small(sizes)
            if (key := (str(chosen), str(own.as_dict()))) in seen:
                continue
            seen.add(key)
            kernels |= chosen.keys()
            with override_configs(chosen):
                go(op, own, dtype, covers, f"{name} {own.as_dict()} as {sizes.as_dict()}")
        codes_of = gpu.driver.execute.codes
        for kernel in kernels & codes_of.keys():  # others, as the sort before the experts, have their own operation
            codes = codes_of[kernel]
            best = max(share([code.ran]) for code in codes)
            assert best >= BOUND, f"{kernel}: {best:.1%} of its instructions run"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("format", [*FORMATS, *OTHER_GROUPS], ids=format_name)
def test_every_quantized_format(format: Any, arch: str, ptx_emulator: Any, covers: Any) -> None:
    name, group, _ = format
    weight = f"{name}:{group}" if group else name
    with ptx_emulator(arch):
        for T in (1, 7, 40):
            sizes = Shape(T=T, H=256, N=80, weight=weight)
            go(OPS["linear"], sizes, BF16, covers, f"linear {sizes.as_dict()}")
            sizes = Shape(T=T, H=256, I=128, E=4, K=2, gate_up=weight, down=weight)
            go(OPS["expert_swiglu"], sizes, BF16, covers, f"experts {sizes.as_dict()}")


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_deterministic_bits_on_compiled_code(name: str, sizes: Any, ptx_emulator: Any) -> None:
    with ptx_emulator("sm_90"):
        check(name, sizes, 8, kept(OPS[name], BF16), GPU_DEVICE)
