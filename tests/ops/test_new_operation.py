"""A toy operation, added as CONTRIBUTING says, passes what iterates over the registry, and breaks nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_triton.kernels.launch import INTERPRETED

ROOT = Path(__file__).parents[2]
TOY = '''"""swiglu: silu(a) * b. T rows, N columns."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, select_configs
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, sampler


@triton.jit
def swiglu_kernel(
    a_ptr,  # [T, N]
    b_ptr,  # [T, N]
    y_ptr,  # [T, N] out
    N,
    stride_at,
    stride_bt,
    BLOCK_N: tl.constexpr,
):
    t, offs_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a = tl.load(a_ptr + t * stride_at + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + t * stride_bt + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * N + offs_n, (a / (1.0 + tl.exp(-a)) * b).to(y_ptr.dtype.element_ty), mask=offs_n < N)


def reference(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    return {"swiglu_kernel": LaunchConfig({"BLOCK_N": 64}, num_warps=1)}


def swiglu(a: Annotated[Tensor, "T N"], b: Annotated[Tensor, "T N"]) -> Annotated[Tensor, "T N"]:
    """silu(a) * b."""
    a, b = dense_rows(a), dense_rows(b)
    (T, N), y = a.shape, torch.empty(a.shape, dtype=a.dtype, device=a.device)
    config = select_configs(configs, {"T": T, "N": N}, a.dtype, a.device)["swiglu_kernel"]
    args = {"a_ptr": a, "b_ptr": b, "y_ptr": y, "N": N, "stride_at": a.stride(0), "stride_bt": b.stride(0)}
    launch(swiglu_kernel, (T, triton.cdiv(N, 64)), args, config)
    return y


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    draw = sampler(dtype, device, generator)
    return {"a": draw(sizes["T"], sizes["N"]), "b": draw(sizes["T"], sizes["N"])}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    return Cost(flops=4 * sizes["T"] * sizes["N"], bytes=3 * sizes["T"] * sizes["N"] * dtype.itemsize)


OP = Op(
    run=swiglu,
    reference=reference,
    inputs=inputs,
    configs=configs,
    cost=cost,
    test_shapes=({"T": 3, "N": 70},),
    bench_shapes=({"T": 64, "N": 14336},),
)
'''
# Registers the toy operation, as its line in the registry would, before anything iterates over it.
PLUGIN = """import importlib.util, sys
import mixtral_triton.kernels.registry as registry
spec = importlib.util.spec_from_file_location("mixtral_triton.kernels.toy", {file!r})
toy = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = toy
spec.loader.exec_module(toy)
registry.OPS["swiglu"] = toy.OP
"""
TESTS = ("ops/test_registry.py", "ops/test_operators.py", "ops/test_strides.py")
ONCE = ("compile/test_offline.py", "verify/test_verify.py", "compile/test_jit.py")


def test_toy_operation_passes_the_gates_of_the_registry(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy_plugin.py").write_text(PLUGIN.format(file=str(tmp_path / "toy.py")))
    paths = [f"tests/{name}" for name in (TESTS if INTERPRETED else (*TESTS, *ONCE))]
    # The gates of the toy, and every test that demands something of all operations together.
    select = "swiglu- or swiglu] or [swiglu or every_operation or right_model or registry"
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "toy_plugin", "-k", select]
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import pytest; sys.exit(pytest.main({[*paths, *options]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = int(done.stdout.rpartition(" passed")[0].rpartition("\n")[2].rpartition(" ")[2] or 0)
    assert passed >= (5 if INTERPRETED else 10)


@pytest.mark.skipif(INTERPRETED, reason="runs no kernel: once, without the interpreter")
def test_verify_and_the_command_line_skip_or_accept_it(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    code = PLUGIN.format(file=str(tmp_path / "toy.py")) + (
        "import torch\n"
        "from mixtral_triton import Mixtral, ops, verify\n"
        "from mixtral_triton.cli import SMALL, main\n"
        "a, b = torch.randn(2, 3, 5)\n"
        "assert torch.equal(ops.swiglu(a, b), torch.nn.functional.silu(a) * b)\n"
        "assert verify(Mixtral.from_pretrained(SMALL)).rows\n"
        "assert main(['compile', 'swiglu', '--arch', 'sm_90']) == 0\n"
        "assert main(['bench', 'swiglu', '--gpu', 'h100']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
