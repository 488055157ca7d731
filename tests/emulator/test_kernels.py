"""The PTX emulator executes every kernel, compiled by Triton's JIT for sm_90 and sm_80, with the expected results."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton.kernels.launch import override_configs
from mixtral_triton.kernels.op import Op, Shape
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.offline import compile_launch
from mixtral_triton.tools.tolerance import measure
from tests.compile.test_jit import on_fake_gpu
from tests.compile.test_quantized_offline import FORMATS, OTHER_GROUPS, format_name
from tests.ops.test_deterministic import CASES, check

pytestmark = pytest.mark.emulator

GPU_DEVICE, BF16 = torch.device("cuda", 0), torch.bfloat16
ARCHS = ("sm_90", "sm_80")
BOUND = 0.97  # of the instructions of one variant with the tiles of 8x7B, for each kernel


def check_error(op: Op, sizes: Mapping[str, Any], dtype: torch.dtype) -> float:
    """Check that the error is at most twice that of the torch backend; return its share of this limit."""
    args = op.inputs(sizes, dtype, "cpu", torch.Generator().manual_seed(0))
    if op.name == "cached_attention" and int(args["new"].min()) < sizes["T"]:
        args["new"] = args["new"] * 0 + sizes["T"]  # rows past `new` are undefined
    error, limit = measure(op.name, on_fake_gpu(args))
    assert error <= limit, f"{op.name} {dict(sizes)}"
    return float(error) / max(float(limit), 1e-30)


def supported(op: Op, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype` if the operation supports it, else one that it supports."""
    return dtype if dtype in op.dtypes else op.dtypes[0]


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OPS)
def test_every_operation_at_its_test_shapes(
    name: str, arch: str, dtype: torch.dtype, ptx_emulator: Any, covers: Any
) -> None:
    op = OPS[name]
    with ptx_emulator(arch):
        worst = max(check_error(op, sizes, supported(op, dtype)) for sizes in op.test_shapes)
    covers("errors in the PTX emulator", f"{name} {str(dtype)[6:]} {arch}: at most {worst:.0%} of the limit")


LONG = list(itertools.product((64, 128), (0, 100, 200)))  # D, window


def with_keys(sizes: Shape) -> Shape:
    """Return sizes with so many keys that every query of a tile attends to several tiles of them."""
    window = 200 if sizes["window"] else 0
    more = {"C": window or 400, "past": 300} if "C" in sizes else {"S": 300}
    return sizes | more | {"window": window}


@pytest.mark.parametrize("dtype", OPS["attention"].dtypes, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_with_a_maskless_loop(arch: str, dtype: torch.dtype, ptx_emulator: Any) -> None:
    """The configs of the test shapes with more keys, and long prompts."""
    with ptx_emulator(arch):
        for name in ("attention", "cached_attention"):
            for sizes in (Shape(shape) for shape in OPS[name].test_shapes if shape["T"] > 1):
                with override_configs(OPS[name].configs(sizes, dtype, arch)):
                    check_error(OPS[name], with_keys(sizes), dtype)
        for D, window in LONG if dtype == BF16 else LONG[:1]:
            sizes = Shape(B=1, T=300, S=300, Hq=2, Hkv=1, D=D, window=window)
            check_error(OPS["attention"], sizes, dtype)


# Sizes that fill a kernel's production tiles and repeat its loops.
SMALL = {"H": 1024, "I": 512, "N": 320, "V": 100, "P": 512, "E": 2}
MANY_ROWS = {"H": 512, "I": 512, "N": 320, "E": 3}  # of experts and linears; complete units of a quantized weight
TOKENS = 384  # of experts: on average 256 rows for each of 3, with short and long last tiles
HEADS = {"Hq": 8, "Hkv": 2}  # of attention


def small(sizes: Mapping[str, Any]) -> Shape:
    """Reduce sizes of 8x7B so that the same kernels run."""
    full = Shape(sizes).as_dict()
    most = SMALL | (HEADS if "window" in full else MANY_ROWS if full.get("T", 0) > 64 and "I" in full else {})
    reduced = {key: min(most.get(key, size), size) for key, size in full.items() if isinstance(size, int)}
    reduced |= {key: value for key, value in full.items() if not isinstance(value, int)}
    if "T" in reduced:
        tokens = 300 if "B" in reduced else TOKENS if "I" in reduced else 600 if "H" in reduced else 2048
        reduced["T"] = min(reduced["T"], tokens)
    keys = 300 if reduced.get("T", 1) > 1 else 600
    bounds = {"B": 2, "S": keys, "C": keys, "window": 200, "past": min(keys, full.get("C", 300)) - 1}
    return Shape(reduced | {key: min(reduced[key], most) for key, most in bounds.items() if key in reduced})


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OPS)
def test_production_tiles(name: str, arch: str, ptx_emulator: Any) -> None:
    """The configs of 8x7B on small sizes: nearly all instructions of one variant of each kernel run."""
    op, tested, kernels = OPS[name], set(), set()
    dtype = supported(op, BF16)
    with ptx_emulator(arch) as gpu:
        for sizes in (Shape(sizes) for sizes in op.bench_shapes if sizes.get("H", 4096) == 4096):  # of 8x7B
            configs, reduced = op.configs(sizes, dtype, arch), small(sizes)
            if (key := (str(configs), str(reduced.as_dict()))) in tested:
                continue
            tested.add(key)
            kernels |= configs.keys()
            with override_configs(configs):
                check_error(op, reduced, dtype)
        codes_of = gpu.driver.execute.codes
        for kernel in kernels & codes_of.keys():  # without the sort, which has an operation of its own
            best = max(code.ran.mean() for code in codes_of[kernel])
            assert best >= BOUND, f"{kernel}: {best:.1%} of its instructions run"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("format", [*FORMATS, *OTHER_GROUPS], ids=format_name)
def test_every_quantized_format(format: Any, arch: str, ptx_emulator: Any) -> None:
    name, group, _ = format
    weight = f"{name}:{group}" if group else name
    with ptx_emulator(arch):
        for T in (1, 7, 40):
            sizes = Shape(T=T, H=256, N=80, weight=weight)
            check_error(OPS["linear"], sizes, BF16)
            sizes = Shape(T=T, H=256, I=128, E=4, K=2, gate_up=weight, down=weight)
            check_error(OPS["expert_swiglu"], sizes, BF16)


@pytest.mark.parametrize("order", ["compile emulate", "emulate compile emulate"])
def test_emulator_and_compiler_keep_their_caches_apart(
    order: str, ptx_emulator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator's cubins are PTX: in the compiler's cache a GPU would load them, and it would read machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    op, sizes = OPS["rms_norm"], OPS["rms_norm"].test_shapes[0]
    with record_launches() as launches:
        op.run(**op.inputs(sizes, BF16, "meta"))
    for step in order.split():
        if step == "compile":
            compiled = compile_launch(launches[0], "sm_90")
            assert compiled.stages["cubin"].parent.parent == tmp_path
        else:
            with ptx_emulator("sm_90"):
                check_error(op, sizes, BF16)
    assert all(file.read_bytes()[:4] == b"\x7fELF" for file in tmp_path.glob("[!p]*/*.cubin"))


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_compiled_kernels_are_deterministic(name: str, sizes: Any, ptx_emulator: Any) -> None:
    with ptx_emulator("sm_90"):
        check(name, sizes, 8, supported(OPS[name], BF16), GPU_DEVICE)
