"""Quantized weights in the matrix kernels: results, bits, bytes. Compiled ones: test_quantized_offline.py.

The oracle computes (code - zero) * scale itself, in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from mixtral_triton.kernels import launch, reference, unpack
from mixtral_triton.kernels.experts.op import expert_swiglu, experts_add_rms_norm
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.linear import linear
from mixtral_triton.kernels.quantized import BITS, QuantizedWeight, pack
from mixtral_triton.kernels.weight import Weight
from mixtral_triton.tools.traffic import count_traffic
from tests.ops.test_unpack import evaluate

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="interprets kernels: needs TRITON_INTERPRET=1")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STEP = {"int4": 0.3, "int8": 0.02, "fp8": 0.01}  # of a code, so that a row's numbers are about 1
UNGUARDED = launch.interpret
Both = tuple[QuantizedWeight, Tensor]


@dataclass(frozen=True)
class Case:
    """group 0: a scale a row."""

    format: str
    H: int
    I: int
    group: int = 0
    zeros: bool = False

    def __str__(self) -> str:
        return f"{self.format}-{self.H}x{self.I}-g{self.group}{'-zeros' if self.zeros else ''}"


CASES = [
    Case("int4", 256, 384, 128, zeros=True),  # units of 256 and of 128 columns
    Case("int4", 256, 64, 64),
    Case("int4", 96, 32, 32, zeros=True),  # neither is whole units
    Case("int4", 80, 48, zeros=True),
    Case("int8", 80, 96),
    Case("int8", 256, 128, 128),
    Case("int8", 96, 64, 32),
    Case("fp8", 96, 80),
    Case("fp8", 256, 128, 128),
    Case("int4", 384, 128, 128),
]


def weight(case: Case, *shape: int, seed: int = 0, scales: torch.dtype = torch.float16) -> Both:
    """A random weight, and what it stands for in fp64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << BITS[case.format], shape, dtype=torch.uint8, generator=generator)
    if case.format == "fp8":
        codes = codes.where((codes & 127) != 127, 0)  # those are NaN
    K, group = shape[-1], case.group or shape[-1]
    groups = (*shape[:-1], K // group)
    scale = (torch.rand(groups, generator=generator) + 0.5).mul(STEP[case.format] * K**-0.5).to(scales)
    zero = torch.randint(0, 16, groups, generator=generator) if case.zeros else None
    numbers = {"int4": codes, "int8": codes.view(torch.int8), "fp8": codes.view(torch.float8_e4m3fn)}[case.format]
    less = 0.0 if case.format != "int4" else 8.0 if zero is None else zero.double().repeat_interleave(group, -1)
    dense = (numbers.double() - less) * scale.double().repeat_interleave(group, -1)
    stored = None if zero is None else (zero + 128).bfloat16()
    return QuantizedWeight(case.format, pack(codes, case.format, group), scale, stored, shape, group), dense


@dataclass(frozen=True)
class Layer:
    """Arguments of expert_swiglu: quantized, and in fp64."""

    gate_up: Both
    down: Both
    x: Tensor
    ids: Tensor
    weights: Tensor

    @classmethod
    def of(cls, case: Case, T: int, dtype: torch.dtype, E: int = 2) -> Layer:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(T, case.H, generator=generator).to(dtype)
        ids = torch.rand(T, E, generator=generator).argsort(-1)[:, :2].int()
        gate_up, down = weight(case, E, 2 * case.I, case.H, seed=1), weight(case, E, case.H, case.I, seed=2)
        return cls(gate_up, down, x, ids, torch.rand(T, 2, generator=generator).softmax(-1))

    def plain(self, dtype: torch.dtype) -> Tensor:
        weights = (each[1].to(dtype) for each in (self.gate_up, self.down))
        return reference.expert_swiglu(self.x.to(dtype), *weights, self.ids, self.weights)


def check(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """fp32: another order of a sum. 16 bits: twice the error of plain torch, whose weights are rounded."""
    error, theirs = ((y.double() - truth).abs().max() / truth.abs().max() for y in (got, plain))
    assert error <= (1e-5 if got.dtype == torch.float32 else max(2 * float(theirs), torch.finfo(got.dtype).eps))


WAYS = [
    *((T, False, dtype) for T in (5, 70) for dtype in FLOATS),
    (5, True, torch.bfloat16),
]


# Which row, which expert, which split; `test_linear` has all formats.
@pytest.mark.parametrize(("T", "deterministic", "dtype"), WAYS)
@pytest.mark.parametrize("case", [CASES[number] for number in (0, 2, 4, 8)], ids=str)
def test_experts(case: Case, T: int, deterministic: bool, dtype: torch.dtype) -> None:
    layer = Layer.of(case, T, dtype)
    got = expert_swiglu(layer.x, layer.gate_up[0], layer.down[0], layer.ids, layer.weights, deterministic)
    check(got, layer.plain(dtype), layer.plain(torch.float64))


@pytest.mark.parametrize("T", [5, 70])
@pytest.mark.parametrize("dense", ["gate_up", "down"])
def test_one_of_two_weights_may_be_dense(dense: str, T: int) -> None:
    layer = Layer.of(CASES[0], T, torch.bfloat16)
    weights = [getattr(layer, name)[name == dense] for name in ("gate_up", "down")]
    weights = [each.bfloat16() if isinstance(each, Tensor) else each for each in weights]
    got = expert_swiglu(layer.x, *weights, layer.ids, layer.weights)
    check(got, layer.plain(torch.bfloat16), layer.plain(torch.float64))


@pytest.mark.parametrize("T", [5, 70])
def test_experts_with_the_norm_that_follows(T: int) -> None:
    layer = Layer.of(CASES[0], T, torch.float32)
    residual, norm = torch.randn(T, 256, generator=torch.Generator().manual_seed(5)), torch.rand(256) + 0.5
    args = (layer.x, layer.gate_up[0], layer.down[0], layer.ids, layer.weights)
    normed, total = experts_add_rms_norm(*args, residual, norm, 1e-5)
    want = layer.plain(torch.float64) + residual
    check(total, total, want)
    check(normed, normed, reference.rms_norm(want, norm.double(), 1e-5))


@pytest.mark.parametrize(("T", "deterministic"), [(0, False), (3, False), (40, False), (3, True)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(case: Case, dtype: torch.dtype, T: int, deterministic: bool) -> None:
    """Of 37 rows: no whole tile."""
    quantized, dense = weight(case, 37, case.H, scales=torch.bfloat16)
    x = torch.randn(T, case.H, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = linear(x, quantized, deterministic)
    assert got.shape == (T, 37) and got.dtype == dtype
    if T:
        check(got, x @ dense.to(dtype).t(), x.double() @ dense.t())


def test_a_part_of_a_weight() -> None:
    """Views: of experts, and of rows that lie apart."""
    case = CASES[0]
    quantized, dense = weight(case, 4, 33, case.H)
    x = torch.randn(3, case.H)
    for part, want in ((quantized[2], dense[2]), (quantized[1][::2], dense[1, ::2])):
        got = linear(x, part)
        check(got, got, x.double() @ want.t())


@pytest.mark.parametrize("format", BITS)
def test_a_token_s_bits_do_not_depend_on_its_batch(
    format: str, ordered: Any, gates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "interpret", UNGUARDED)  # as in test_deterministic.py
    layer = Layer.of(Case(format, 64, 64, 32 if format == "int4" else 0), 9, torch.bfloat16)
    args = (layer.gate_up[0], layer.down[0])
    every = expert_swiglu(layer.x, *args, layer.ids, layer.weights, True)
    for rows in (slice(7, 8), slice(2, 9)):
        assert every[rows].equal(expert_swiglu(layer.x[rows], *args, layer.ids[rows], layer.weights[rows], True))
    row, every = layer.x[7:8], linear(layer.x, layer.down[0][0], True)
    assert every[7:8].equal(linear(row, layer.down[0][0], True))


def _by_evaluation(numbers: Any, dtype: Any) -> Any:
    """A tile of the interpreter's from uint16 bits."""
    from triton.runtime.interpreter import TensorHandle

    tl = triton.language
    bits = numbers.astype(np.uint16)
    handle = TensorHandle(bits if dtype == tl.bfloat16 else bits.view(np.float16), dtype)
    return tl.core.tensor(handle, tl.block_type(dtype, list(bits.shape)))


def _words(tile: Any, shape: Any) -> Any:
    """A 32-bit word an element, with another element in its high half."""
    bits = np.broadcast_to(tile.handle.data.view(np.uint16), shape).astype(np.uint32)
    return (bits | np.roll(bits, 1, axis=0) << 16).ravel()


@pytest.fixture
def ptx(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Interpreted kernels take the road of compiled ones, their PTX evaluated -> what was."""
    ran: list[str] = []

    def run(asm: Any, shape: Any, *inputs: Any) -> Any:
        ran.append(getattr(asm, "value", asm))
        return (evaluate(ran[-1], *inputs) & 0xFFFF).reshape(shape)

    def moved(tile: Any, shift: Any, asm: Any, dtype: Any) -> Any:
        how_far = np.uint32(int(getattr(getattr(shift, "handle", None), "data", shift)))
        shape = tile.handle.data.shape
        return _by_evaluation(run(asm, shape, _words(tile, shape), how_far), dtype)

    def paired(a: Any, b: Any, asm: Any, dtype: Any) -> Any:
        shape = np.broadcast_shapes(a.handle.data.shape, b.handle.data.shape)
        return _by_evaluation(run(asm, shape, _words(a, shape), _words(b, shape)), dtype)

    layout = Weight.layout
    monkeypatch.setattr(unpack, "_moved", moved)
    monkeypatch.setattr(unpack, "_paired", paired)
    monkeypatch.setattr(Weight, "layout", lambda self, arch: (*layout(self, arch)[:2], self.name is not None))
    return ran


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5], CASES[7]], ids=str)
def test_ptx_gives_the_same_bits(case: Case, dtype: torch.dtype, ptx: list[str], monkeypatch: Any) -> None:
    """Which field, which zero, which scale: what compiled kernels do, beside the plain arithmetic."""
    layers = [Layer.of(case, T, dtype) for T in (2, 70)]

    def results() -> list[Tensor]:
        return [expert_swiglu(each.x, each.gate_up[0], each.down[0], each.ids, each.weights) for each in layers]

    by_ptx = results()
    grouped = case.group not in (0, case.H)
    assert len(set(ptx)) == 1 + (case.format == "int4") + grouped
    monkeypatch.undo()
    assert all(map(torch.equal, by_ptx, results()))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4], CASES[8]], ids=str)
@pytest.mark.parametrize("T", [1, 4, 64])
def test_decode_reads_what_is_packed_once(case: Case, T: int, covers: Any) -> None:
    """Codes, scales and zeros of the chosen experts, and nothing of another."""
    case = Case(case.format, 256, 512, case.group, case.zeros)
    layer = Layer.of(case, T, torch.bfloat16, E=8)
    with count_traffic() as traffic:
        expert_swiglu(layer.x, layer.gate_up[0], layer.down[0], layer.ids, layer.weights)
    chosen = layer.ids.unique().tolist()
    packed = sum(each[0][expert].nbytes for each in (layer.gate_up, layer.down) for expert in chosen)
    ratio = traffic.moved("gate_up", "down", "scales", "zeros") / packed
    assert ratio <= 1.05
    covers("traffic", f"{case} expert weights, T {T}: {ratio:.2f} of what is packed (bound 1.05)")


def test_the_limits_bite() -> None:
    """Zeros taken as 8, fields in another order, a scale of the next group."""
    quantized, dense = weight(CASES[0], 33, 256)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    truth = x.double() @ dense.t()
    assert quantized.zeros is not None
    faults = {
        "zeros": (quantized.data, quantized.scales, None),
        "fields": ((quantized.data << 4) | ((quantized.data >> 12) & 15), quantized.scales, quantized.zeros),
        "groups": (quantized.data, quantized.scales.roll(1, -1), quantized.zeros),
    }
    right = linear(x, quantized)
    check(right, right, truth)
    for data, scales, zeros in faults.values():
        wrong = QuantizedWeight("int4", data, scales, zeros, (33, 256), 128)
        with pytest.raises(AssertionError):
            check(linear(x, wrong), right, truth)
