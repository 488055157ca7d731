"""QuantizedWeight: its layout, its checks, and that no conversion touches its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtral_triton import ops
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.op import Shape
from mixtral_triton.kernels.quantized import BITS, QuantizedWeight, pack, sample_quantized, unit_columns, unpack
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS

CASES = [("int4", 256, 128), ("int4", 256, 64), ("int4", 128, 32), ("int4", 96, 32), ("int4", 80, 80)]
CASES += [("int8", 80, 80), ("fp8", 300, 300), ("fp8", 256, 128)]


def codes_of(format: str, *shape: int) -> torch.Tensor:
    codes = torch.randint(0, 1 << BITS[format], shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return codes.where((codes & 127) != 127, 0) if format == "fp8" else codes  # those are NaN


def weight_of(format: str, K: int, group: int, zeros: torch.Tensor | None = None) -> QuantizedWeight:
    codes = codes_of(format, 3, 5, K)
    scales = torch.rand(3, 5, K // group, generator=torch.Generator().manual_seed(1)).half()
    return QuantizedWeight(format, pack(codes, format, group), scales, zeros, (3, 5, K), group)


@pytest.mark.parametrize(("format", "K", "group"), CASES)
def test_each_code_comes_back(format: str, K: int, group: int) -> None:
    codes = codes_of(format, 3, 5, K)
    data = pack(codes, format, group)
    assert data.dtype == torch.int16 and torch.equal(unpack(data, format, K, group), codes)


@pytest.mark.parametrize(("format", "K", "group"), CASES)
def test_a_field_is_a_tile_of_neighbouring_columns(format: str, K: int, group: int) -> None:
    codes, bits = codes_of(format, K), BITS[format]
    data, unit = pack(codes, format, group), unit_columns(format, K, group)
    J = unit * bits // 16
    for k in (0, 1, K // 2, K - 1):
        element = int(data[k // unit * J + k % unit % J]) & 0xFFFF
        assert element >> (bits * (k % unit // J)) & ((1 << bits) - 1) == int(codes[k])


def test_dequantize_is_code_minus_zero_times_scale() -> None:
    zeros = torch.randint(0, 16, (3, 5, 2)) + 128.0
    weight = weight_of("int4", 256, 128, zeros.bfloat16())
    codes, values = codes_of("int4", 3, 5, 256), weight.dequantize()
    for e, n, k in ((0, 0, 0), (1, 4, 127), (2, 3, 128), (2, 4, 255)):
        want = (int(codes[e, n, k]) - (zeros[e, n, k // 128] - 128)) * weight.scales[e, n, k // 128].float()
        assert values[e, n, k] == want
    assert weight_of("int8", 80, 80).dequantize().min() < 0 < weight_of("int4", 96, 32).dequantize().max()


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("K", [80, 128, 300])
def test_a_product_of_codes_errs_no_more_than_one_of_dequantized_numbers(K: int, rows: int) -> None:
    weight = weight_of("int8", K, K)[1]
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = x.double() @ weight.dequantize().double().T
    plain = torch.nn.functional.linear(x, weight.dequantize().bfloat16())
    got = weight.product(x.view(1, rows, K))[0]
    error, limit = ((y.double() - exact).abs().max() for y in (got, plain))
    assert error <= max(2 * limit, 2.0**-8 * exact.abs().max())
    assert torch.equal(weight.product(x.float()), x.float() @ weight.dequantize().T)


def test_a_part_is_the_same_weight() -> None:
    weight = weight_of("int4", 96, 32)
    assert torch.equal(weight[1].dequantize(), weight.dequantize()[1]) and len(weight[1:]) == 2


def test_no_conversion_rounds_it() -> None:
    weight = weight_of("int4", 96, 32)
    before = weight.dequantize()
    assert torch.equal(torch.nn.Sequential(weight).to(torch.bfloat16)[0].dequantize(), before)
    assert weight.to("meta").data.is_meta


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "int3"}, "format is 'int3'"),
        ({"group": 48}, "do not divide"),
        ({"group": 16}, "32, 64, 128"),
        ({"data": torch.zeros(3, 5, 7, dtype=torch.int16)}, "data has shape"),
        ({"data": torch.zeros(3, 5, 32, dtype=torch.int32)}, "int16"),
        ({"scales": torch.zeros(3, 5, 3)}, "scales has shape"),
        ({"zeros": torch.zeros(3, 5, 4)}, "bfloat16"),
    ],
)
def test_a_wrong_part_is_named(changes: dict[str, object], says: str) -> None:
    args = {"format": "int4", "data": torch.zeros(3, 5, 32, dtype=torch.int16), "scales": torch.zeros(3, 5, 4)}
    with pytest.raises(ValueError, match=says):
        QuantizedWeight(**args | {"zeros": None, "shape": (3, 5, 128), "group": 32} | changes)  # type: ignore[arg-type]


# as an argument of operations


def call(name: str, device: str = "cpu") -> dict[str, Any]:
    sizes = {"linear": Shape(T=3, H=128, N=40, weight="int4:64")}
    experts = Shape(T=5, H=128, I=96, E=4, K=2, gate_up="int4:32", down="int8")
    return OPS[name].inputs(sizes.get(name, experts), torch.float32, device, torch.Generator().manual_seed(0))


NAMES = ("linear", "expert_swiglu", "experts_add_rms_norm")


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_takes_it_as_it_takes_the_dense_one(name: str) -> None:
    args = call(name)
    dense = {key: x.dequantize() if isinstance(x, QuantizedWeight) else x for key, x in args.items()}
    got, want = (first(getattr(ops, name)(**given)) for given in (args, dense))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    direct = first(getattr(ops.unchecked, name)(**args))
    assert torch.equal(got, direct)


@pytest.mark.skipif(INTERPRETED, reason="what a graph holds are the operators, whatever runs in them")
@pytest.mark.parametrize("name", NAMES)
def test_the_compiler_sees_one_operator(name: str) -> None:
    args = call(name)
    tensors = {key: x for key, x in args.items() if isinstance(x, torch.Tensor)}
    rest = {key: x for key, x in args.items() if key not in tensors}
    compiled = torch.compile(
        lambda given: first(getattr(ops, name)(**given, **rest)) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(tensors), first(getattr(ops, name)(**args)) * 2)


@pytest.mark.parametrize("name", NAMES)
def test_its_launches_are_recorded(name: str) -> None:
    with record_launches() as launches:
        getattr(ops, name)(**call(name, "meta"))
    formats = {launch.constexprs["LAYOUT"][0] for launch in launches if "LAYOUT" in launch.constexprs}
    assert formats == ({"int4"} if name == "linear" else {"int4", "int8"})


def test_a_wrong_one_is_named() -> None:
    x = torch.ones(3, 128)
    with pytest.raises(
        ValueError, match=r"linear: argument 'weight' is of shape \[40, 96\], needs \[N H\] with H = 128"
    ):
        ops.linear(x, sample_quantized("int8", 40, 96, device="cpu"))
    with pytest.raises(ValueError, match="linear: argument 'weight' is on meta"):
        ops.linear(x, sample_quantized("int8", 40, 128, device="meta"))
    with pytest.raises(ValueError, match="route: argument 'logits' is a QuantizedWeight"):
        ops.route(sample_quantized("int8", 3, 8, device="cpu"), 2)  # type: ignore[arg-type]


def test_a_check_that_passed_does_not_let_another_layout_pass() -> None:
    args = call("linear")
    ops.linear(**args)
    with pytest.raises(ValueError, match="'weight'"):
        ops.linear(args["x"], sample_quantized("int4:64", 40, 64, device="cpu"))
