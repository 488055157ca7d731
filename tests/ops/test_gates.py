"""Each gate of interpreted launches (conftest.py) catches an injected fault. Spills: test_offline.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from mixtral_triton.kernels.launching import interpret
from mixtral_triton.kernels.launching.interpret import bf16_to_f32, f32_to_bf16
from mixtral_triton.kernels.launching.launch import LaunchConfig, launch

pytestmark = pytest.mark.interpreted

ONE = LaunchConfig({}, num_warps=1)


@triton.jit
def double_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0) if MASK_LOAD else tl.load(x_ptr + offs)
    total = x + tl.sum(x, axis=0)
    if MASK_STORE:
        tl.store(y_ptr + offs, total, mask=offs < N)
    else:
        tl.store(y_ptr + offs, total)


@triton.jit
def race_kernel(y_ptr):
    tl.store(y_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def overflow_kernel(y_ptr, N):
    tl.store(y_ptr, N * N)


def run_double(rows: int, n: int, x: Any = None, y: Any = None, load: bool = True, store: bool = True) -> torch.Tensor:
    x, y = torch.ones(n) if x is None else x, torch.empty(n) if y is None else y
    launch(double_kernel, (rows,), ONE, x_ptr=x, y_ptr=y, N=n, BLOCK=8, MASK_LOAD=load, MASK_STORE=store)
    return y


def test_right_kernel_passes_and_unwritten_output_is_nan() -> None:
    assert run_double(2, 11).tolist() == [9.0] * 8 + [4.0] * 3
    assert run_double(1, 11).isnan().tolist() == [False] * 8 + [True] * 3


Y = {"y_ptr": torch.zeros(1, dtype=torch.int32), "N": 1 << 17}
FAULTS: list[tuple[str, Callable[[], Any]]] = [
    ("double_kernel stored outside y_ptr", lambda: run_double(2, 11, store=False)),
    ("double_kernel stored outside y_ptr", lambda: run_double(1, 8, y=torch.zeros(4, 8)[:, :5])),
    ("double_kernel loads from outside its tensors", lambda: run_double(2, 11, load=False)),
    ("depends on program order or on what lies outside", lambda: run_double(1, 8, x=torch.zeros(4, 8)[:, :5])),
    ("race_kernel: y_ptr depends on program order", lambda: launch(race_kernel, (2,), ONE, y_ptr=torch.empty(1))),
    ("overflow", lambda: launch(overflow_kernel, (1,), ONE, **Y)),
]


@pytest.mark.parametrize(("message", "run"), FAULTS)
def test_fault_is_caught(message: str, run: Callable[[], Any]) -> None:
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError), match=message):
        run()


def test_interpreter_without_what_is_replaced_runs_uncorrected_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpret, "_replacements", lambda builder: [(builder, "cast_of_another_version", None)])
    with pytest.warns(UserWarning, match=r"Triton .* has no cast_of_another_version: .* bfloat16 is wrong") as warned:
        assert [run_double(1, 8).tolist() for _ in range(2)] == [[9.0] * 8] * 2
    assert len(warned) == 1


def test_bf16_rounding_is_to_nearest_even() -> None:
    special = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3.4e38, -1e-40, float("inf"), float("-inf"), float("nan")]
    values = np.concatenate([special, np.random.default_rng(0).normal(size=999)]).astype(np.float32)
    got = torch.from_numpy(bf16_to_f32(f32_to_bf16(values)))
    torch.testing.assert_close(got, torch.from_numpy(values).bfloat16().float(), rtol=0, atol=0, equal_nan=True)
