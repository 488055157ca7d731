"""A toy operation with a shape letter and a flag of its own and two results, added to a copy of the repository as
CONTRIBUTING.md describes, passes what iterates over the registry, and breaks nothing else."""

import re
import shutil
from pathlib import Path

import pytest

from mixtral_triton.kernels.launching.launch import INTERPRETED
from tests.cli.commands import ROOT, python

TOY = '''"""gated_silu: silu(a) * b, and its negative. T rows, N columns, Z planes; a has the planes side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..operation.cases import operation
from ..launching.launch import LaunchConfig, launch, select_configs

@triton.jit
def gated_silu_kernel(a_ptr, b_ptr, y_ptr, negative_ptr, N, BLOCK: tl.constexpr, SQUARED: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    y = a / (1.0 + tl.exp(-a)) * b
    if SQUARED:
        y = y * y
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < N)
    tl.store(negative_ptr + offs, (-y).to(y_ptr.dtype.element_ty), mask=offs < N)

def reference(a: Tensor, b: Tensor, squared: bool = False) -> tuple[Tensor, Tensor]:
    y = F.silu(a).view(b.shape) * b
    y = y * y if squared else y
    return y, -y

@dataclass(frozen=True)
class SiluSizes:
    T: int
    N: int
    Z: int
    squared: bool = False

def configs(sizes: SiluSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    return {"gated_silu_kernel": LaunchConfig({"BLOCK": 64}, num_warps=1)}

Planes = Annotated[Tensor, "T N Z"]

@operation(
    reference=reference,
    case=SiluSizes,
    flops=lambda case: 4 * case.T * case.N * case.Z,
    test_shapes=(SiluSizes(3, 70, 2), SiluSizes(3, 7, 5, squared=True)),
    bench_shapes=(SiluSizes(64, 14336, 1),),
)
def gated_silu(a: Annotated[Tensor, "T N*Z"], b: Planes, squared: bool = False) -> tuple[Planes, Planes]:
    """Returns silu(a) * b, where `squared` its square, and the negative.

    >>> ops.gated_silu(torch.zeros(1, 6), torch.ones(1, 2, 3), squared=True)[0].sum()
    tensor(0.)
    """
    a, b = a.contiguous(), b.contiguous()
    y, negative = torch.empty_like(b), torch.empty_like(b)
    config = select_configs(configs, SiluSizes(*b.shape, squared), a.dtype, a.device)["gated_silu_kernel"]
    args = {"a_ptr": a, "b_ptr": b, "y_ptr": y, "negative_ptr": negative, "N": a.numel()}
    launch(gated_silu_kernel, (triton.cdiv(a.numel(), 64),), config, **args, SQUARED=squared)
    return y, negative
'''
GATES = ("ops/test_registry.py", "ops/test_operators.py", "ops/test_strides.py")
COMPILED = ("ops/test_plan.py", "compile/test_offline.py", "compile/test_jit.py")


def rename_rows(code: str) -> str:
    """Every other operation calls its rows T, or its sequences B."""
    return re.sub(r"\bT\b", "R", code)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository with the toy operation."""
    for name in ("kernels", "mixtral_triton", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "kernels" / "ops" / "gated_silu.py").write_text(rename_rows(TOY))
    registry = tmp_path / "kernels" / "registry.py"
    line = "from .ops.gated_silu import gated_silu as gated_silu\n"
    registry.write_text(registry.read_text().replace("from .ops.linear import", f"{line}from .ops.linear import"))
    return tmp_path


def run(folder: Path, *command: str) -> str:
    switch = {"TRITON_INTERPRET": "1"} if INTERPRETED else {}
    done = python(*command, cwd=folder, PYTHONPATH=str(folder), TRITON_CACHE_DIR=str(folder / "cache"), **switch)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_toy_operation_passes_the_tests_of_every_operation(copy: Path) -> None:
    options = ("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    files = [f"tests/{name}" for name in (GATES if INTERPRETED else (*GATES, *COMPILED))]
    out = run(copy, *options, "-k", "gated_silu", *files)
    passed = int(out.rpartition(" passed")[0].split()[-1])
    assert passed >= (10 if INTERPRETED else 20), out
