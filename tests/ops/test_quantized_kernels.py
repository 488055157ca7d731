"""Quantized weights in interpreted matrix kernels: results, bits and bytes. Compiled: test_quantized_offline.py.

The reference computes (code - zero) * scale in fp64.
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
from tests.ops.test_quantized import evaluate, random_codes
from tests.support.traffic import count_traffic

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="interprets kernels: needs TRITON_INTERPRET=1")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STEP = {"int4": 0.3, "int8": 0.02, "fp8": 0.01}  # between codes, so that a row's values are about 1
UNGUARDED = launch.interpret
Pair = tuple[QuantizedWeight, Tensor]  # quantized, and in fp64


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


def random_weight(case: Case, *shape: int, seed: int = 0, scales: torch.dtype = torch.float16) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    codes, K, group = random_codes(case.format, *shape), shape[-1], case.group or shape[-1]
    groups = (*shape[:-1], K // group)
    scale = (torch.rand(groups, generator=generator) + 0.5).mul(STEP[case.format] * K**-0.5).to(scales)
    zero = torch.randint(0, 16, groups, generator=generator) if case.zeros else None
    values = {"int4": codes, "int8": codes.view(torch.int8), "fp8": codes.view(torch.float8_e4m3fn)}[case.format]
    minus = 0.0 if case.format != "int4" else 8.0 if zero is None else zero.double().repeat_interleave(group, -1)
    dense = (values.double() - minus) * scale.double().repeat_interleave(group, -1)
    stored = None if zero is None else (zero + 128).bfloat16()
    return QuantizedWeight(case.format, pack(codes, case.format, group), scale, stored, shape, group), dense


@dataclass(frozen=True)
class Layer:
    """Arguments of expert_swiglu."""

    gate_up: Pair
    down: Pair
    x: Tensor
    ids: Tensor
    weights: Tensor

    @classmethod
    def of(cls, case: Case, T: int, dtype: torch.dtype, E: int = 2) -> Layer:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(T, case.H, generator=generator).to(dtype)
        ids = torch.rand(T, E, generator=generator).argsort(-1)[:, :2].int()
        gate_up, down = (
            random_weight(case, E, 2 * case.I, case.H, seed=1),
            random_weight(case, E, case.H, case.I, seed=2),
        )
        return cls(gate_up, down, x, ids, torch.rand(T, 2, generator=generator).softmax(-1))

    def run(self, rows: slice = slice(None), deterministic: bool = False) -> Tensor:
        args = (self.ids[rows], self.weights[rows], deterministic)
        return expert_swiglu(self.x[rows], self.gate_up[0], self.down[0], *args)

    def reference(self, dtype: torch.dtype) -> Tensor:
        weights = (each[1].to(dtype) for each in (self.gate_up, self.down))
        return reference.expert_swiglu(self.x.to(dtype), *weights, self.ids, self.weights)


def check(got: Tensor, torch_result: Tensor, want: Tensor) -> None:
    """fp32 allows another order of a sum; 16 bits twice the error of plain torch, whose weights are rounded."""
    error, limit = ((y.double() - want).abs().max() / want.abs().max() for y in (got, torch_result))
    assert error <= (1e-5 if got.dtype == torch.float32 else max(2 * float(limit), torch.finfo(got.dtype).eps))


PATHS = [*((T, False, dtype) for T in (5, 70) for dtype in FLOATS), (5, True, torch.bfloat16)]


# For rows, experts and splits; `test_linear` has all formats.
@pytest.mark.parametrize(("T", "deterministic", "dtype"), PATHS)
@pytest.mark.parametrize("case", [CASES[number] for number in (0, 2, 4, 8)], ids=str)
def test_experts(case: Case, T: int, deterministic: bool, dtype: torch.dtype) -> None:
    layer = Layer.of(case, T, dtype)
    check(layer.run(deterministic=deterministic), layer.reference(dtype), layer.reference(torch.float64))


@pytest.mark.parametrize("T", [5, 70])
@pytest.mark.parametrize("dense", ["gate_up", "down"])
def test_one_dense_and_one_quantized_weight(dense: str, T: int) -> None:
    layer = Layer.of(CASES[0], T, torch.bfloat16)
    weights = [getattr(layer, name)[name == dense] for name in ("gate_up", "down")]
    weights = [each.bfloat16() if isinstance(each, Tensor) else each for each in weights]
    got = expert_swiglu(layer.x, *weights, layer.ids, layer.weights)
    check(got, layer.reference(torch.bfloat16), layer.reference(torch.float64))


@pytest.mark.parametrize("T", [5, 70])
def test_experts_with_the_next_norm(T: int) -> None:
    layer = Layer.of(CASES[0], T, torch.float32)
    residual, norm = torch.randn(T, 256, generator=torch.Generator().manual_seed(5)), torch.rand(256) + 0.5
    args = (layer.x, layer.gate_up[0], layer.down[0], layer.ids, layer.weights)
    normed, total = experts_add_rms_norm(*args, residual, norm, 1e-5)
    want = layer.reference(torch.float64) + residual
    check(total, total, want)
    check(normed, normed, reference.rms_norm(want, norm.double(), 1e-5))


@pytest.mark.parametrize(("T", "deterministic"), [(0, False), (3, False), (40, False), (3, True)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(case: Case, dtype: torch.dtype, T: int, deterministic: bool) -> None:
    """37 rows are no multiple of a tile."""
    quantized, dense = random_weight(case, 37, case.H, scales=torch.bfloat16)
    x = torch.randn(T, case.H, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = linear(x, quantized, deterministic)
    assert got.shape == (T, 37) and got.dtype == dtype
    if T:
        check(got, x @ dense.to(dtype).t(), x.double() @ dense.t())


def test_linear_of_views() -> None:
    """One expert, and rows that are apart in memory."""
    quantized, dense = random_weight(CASES[0], 4, 33, 256)
    x = torch.randn(3, 256)
    for part, want in ((quantized[2], dense[2]), (quantized[1][::2], dense[1, ::2])):
        got = linear(x, part)
        check(got, got, x.double() @ want.t())


@pytest.mark.parametrize("format", BITS)
def test_bits_of_a_token_do_not_depend_on_its_batch(
    format: str, ordered: Any, gates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "interpret", UNGUARDED)  # as in test_deterministic.py
    layer = Layer.of(Case(format, 64, 64, 32 if format == "int4" else 0), 9, torch.bfloat16)
    batch = layer.run(deterministic=True)
    for rows in (slice(7, 8), slice(2, 9)):
        assert batch[rows].equal(layer.run(rows, deterministic=True))
    down = layer.down[0][0]
    assert linear(layer.x, down, True)[7:8].equal(linear(layer.x[7:8], down, True))


def to_tile(numbers: Any, dtype: Any) -> Any:
    """A tile of the interpreter from uint16 bits."""
    from triton.runtime.interpreter import TensorHandle

    tl = triton.language
    bits = numbers.astype(np.uint16)
    handle = TensorHandle(bits if dtype == tl.bfloat16 else bits.view(np.float16), dtype)
    return tl.core.tensor(handle, tl.block_type(dtype, list(bits.shape)))


def to_words(tile: Any, shape: Any) -> Any:
    """One 32-bit word for each element, with another element in its high half."""
    bits = np.broadcast_to(tile.handle.data.view(np.uint16), shape).astype(np.uint32)
    return (bits | np.roll(bits, 1, axis=0) << 16).ravel()


@pytest.fixture
def ptx(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Interpreted kernels unpack as compiled ones do, by PTX that `evaluate` runs -> the PTX that ran."""
    ran: list[str] = []

    def run(asm: Any, shape: Any, dtype: Any, *words: Any) -> Any:
        ran.append(getattr(asm, "value", asm))
        return to_tile((evaluate(ran[-1], *words) & 0xFFFF).reshape(shape), dtype)

    def moved(tile: Any, shift: Any, asm: Any, dtype: Any) -> Any:
        bits, shape = np.uint32(int(getattr(getattr(shift, "handle", None), "data", shift))), tile.handle.data.shape
        return run(asm, shape, dtype, to_words(tile, shape), bits)

    def paired(a: Any, b: Any, asm: Any, dtype: Any) -> Any:
        shape = np.broadcast_shapes(a.handle.data.shape, b.handle.data.shape)
        return run(asm, shape, dtype, to_words(a, shape), to_words(b, shape))

    layout = Weight.layout
    monkeypatch.setattr(unpack, "_moved", moved)
    monkeypatch.setattr(unpack, "_paired", paired)
    monkeypatch.setattr(Weight, "layout", lambda self, arch: layout(self, arch)._replace(ptx=self.name is not None))
    return ran


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5], CASES[7]], ids=str)
def test_ptx_and_plain_arithmetic_agree(case: Case, dtype: torch.dtype, ptx: list[str], monkeypatch: Any) -> None:
    """Fields, zeros and scales are the same bit for bit."""
    layers = [Layer.of(case, T, dtype) for T in (2, 70)]
    got = [layer.run() for layer in layers]
    grouped = case.group not in (0, case.H)
    assert len(set(ptx)) == 1 + (case.format == "int4") + grouped
    monkeypatch.undo()
    assert all(torch.equal(a, layer.run()) for a, layer in zip(got, layers, strict=True))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4], CASES[8]], ids=str)
@pytest.mark.parametrize("T", [1, 4, 64])
def test_decode_reads_the_packed_experts_once(case: Case, T: int, covers: Any) -> None:
    """Decode reads codes, scales and zeros of the selected experts, and nothing of the rest."""
    case = Case(case.format, 256, 512, case.group, case.zeros)
    layer = Layer.of(case, T, torch.bfloat16, E=8)
    with count_traffic() as traffic:
        layer.run()
    packed = sum(pair[0][e].nbytes for pair in (layer.gate_up, layer.down) for e in layer.ids.unique().tolist())
    ratio = traffic.moved("gate_up", "down", "scales", "zeros") / packed
    assert ratio <= 1.05
    covers("traffic", f"{case} expert weights, T {T}: {ratio:.2f} of what is packed (bound 1.05)")


@pytest.mark.parametrize("fault", ["zeros are 8", "fields in another order", "scale of the next group"])
def test_wrong_unpacking_is_caught(fault: str) -> None:
    right, dense = random_weight(CASES[0], 33, 256)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    want, got = x.double() @ dense.t(), linear(x, right)
    check(got, got, want)
    data, scales, zeros = right.data, right.scales, right.zeros
    wrong = {
        "zeros are 8": (data, scales, None),
        "fields in another order": ((data << 4) | ((data >> 12) & 15), scales, zeros),
        "scale of the next group": (data, scales.roll(1, -1), zeros),
    }[fault]
    with pytest.raises(AssertionError):
        check(linear(x, QuantizedWeight("int4", *wrong, (33, 256), 128)), got, want)
