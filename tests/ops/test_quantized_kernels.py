"""Quantized weights in interpreted matrix kernels: results and bytes.

Compiled kernels, which unpack by PTX: tests/emulator, and test_quantized_offline.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from mixtral_triton.kernels.experts.op import expert_swiglu
from mixtral_triton.kernels.quantized import QuantizedWeight
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.tolerance import Tolerance
from tests.ops.test_quantized import random_weight
from tests.support.calls import Args
from tests.support.traffic import count_traffic

pytestmark = pytest.mark.interpreted

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """group 0: a scale a row."""

    format: str
    H: int
    I: int
    group: int = 0
    zeros: bool = False

    def __str__(self) -> str:
        return f"{self.format}-{self.H}x{self.I}-g{self.group}{'-zeros' if self.zeros else ''}"

    def weight(self, *shape: int, **options: Any) -> QuantizedWeight:
        return random_weight(self.format, self.group, *shape, zeros=self.zeros, **options)


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


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def layer(case: Case, T: int, dtype: torch.dtype, E: int = 2) -> Args:
    """Arguments of expert_swiglu."""
    gate_up, down = case.weight(E, 2 * case.I, case.H, seed=1), case.weight(E, case.H, case.I, seed=2)
    ids = torch.rand(T, E, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :2].int()
    x, weights = randn(T, case.H, dtype=dtype), randn(T, 2).softmax(-1)
    return {"x": x, "gate_up_proj": gate_up, "down_proj": down, "ids": ids, "weights": weights}


def check(name: str, args: Args, **changes: Any) -> None:
    """The error is at most twice that of plain torch, whose weights are rounded. `changes`: for the kernel alone."""
    error, limit = Tolerance(name, args).measure(lambda **args: OPS[name].run(**args | changes))
    assert error <= limit


PATHS = [*((T, False, dtype) for T in (5, 70) for dtype in FLOATS), (5, True, torch.bfloat16)]


@pytest.mark.exhaustive
# For rows, experts and splits; `test_linear` has all formats.
@pytest.mark.parametrize(("T", "deterministic", "dtype"), PATHS)
@pytest.mark.parametrize("case", [CASES[number] for number in (0, 2, 4, 8)], ids=str)
def test_experts(case: Case, T: int, deterministic: bool, dtype: torch.dtype) -> None:
    check("expert_swiglu", layer(case, T, dtype) | {"deterministic": deterministic})


@pytest.mark.exhaustive
@pytest.mark.parametrize("T", [5, 70])
@pytest.mark.parametrize("dense", ["gate_up_proj", "down_proj"])
def test_one_dense_and_one_quantized_weight(dense: str, T: int) -> None:
    args = layer(CASES[0], T, torch.bfloat16)
    check("expert_swiglu", args | {dense: args[dense].dequantize().bfloat16()})


@pytest.mark.exhaustive
@pytest.mark.parametrize("T", [5, 70])
def test_experts_with_the_next_norm(T: int) -> None:
    norm = {"residual": randn(T, 256), "norm_weight": torch.rand(256) + 0.5, "eps": 1e-5}
    check("experts_add_rms_norm", layer(CASES[0], T, torch.float32) | norm)


@pytest.mark.parametrize(("T", "deterministic"), [(0, False), (3, False), (40, False), (3, True)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(case: Case, dtype: torch.dtype, T: int, deterministic: bool) -> None:
    """37 rows are no multiple of a tile."""
    args = {"x": randn(T, case.H, dtype=dtype), "weight": case.weight(37, case.H, scales=torch.bfloat16)}
    check("linear", args | {"deterministic": deterministic})


def test_linear_of_views() -> None:
    """One expert, and rows that are apart in memory."""
    weight = CASES[0].weight(4, 33, 256)
    for part in (weight[2], weight[1][::2]):
        check("linear", {"x": randn(3, 256), "weight": part})


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4], CASES[8]], ids=str)
@pytest.mark.parametrize("T", [1, 4, 64])
def test_decode_reads_the_packed_experts_once(case: Case, T: int, covers: Any) -> None:
    """Decode reads codes, scales and zeros of the selected experts, and nothing of the rest."""
    case = case._replace(H=256, I=512)
    args = layer(case, T, torch.bfloat16, E=8)
    with count_traffic() as traffic:
        expert_swiglu(**args)
    packed = sum(args[name][e].nbytes for name in ("gate_up_proj", "down_proj") for e in args["ids"].unique().tolist())
    ratio = traffic.moved("gate_up", "down", "scales", "zeros") / packed
    assert ratio <= 1.05
    covers("traffic", f"{case} expert weights, T {T}: {ratio:.2f} of what is packed (bound 1.05)")


@pytest.mark.parametrize("fault", ["zeros are 8", "fields in another order", "scale of the next group"])
def test_wrong_unpacking_is_caught(fault: str) -> None:
    right = CASES[0].weight(33, 256)
    data, scales, zeros = right.data, right.scales, right.zeros
    wrong = {
        "zeros are 8": (data, scales, None),
        "fields in another order": ((data << 4) | ((data >> 12) & 15), scales, zeros),
        "scale of the next group": (data, scales.roll(1, -1), zeros),
    }[fault]
    args = {"x": randn(3, 256), "weight": right}
    check("linear", args)
    with pytest.raises(AssertionError):
        check("linear", args, weight=QuantizedWeight("int4", *wrong, (33, 256), 128))
