"""QuantizedWeight: its layout, its checks, and its use in operations; and the PTX that unpacks it.

The PTX emulator runs the strings that are compiled, for every pair of 16-bit halves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mixtral_triton import ops
from mixtral_triton.kernels import unpack as ptx_unpack
from mixtral_triton.kernels.quantized import BITS, QuantizedWeight, pack, sample_quantized, unit_columns, unpack
from tests.emulator.harness import run
from tests.support.calls import Args, as_tuple, inputs, tensors

CASES = [("int4", 256, 128), ("int4", 256, 64), ("int4", 128, 32), ("int4", 96, 32), ("int4", 80, 80)]
CASES += [("int8", 80, 80), ("fp8", 300, 300), ("fp8", 256, 128)]


def random_codes(format: str, *shape: int) -> torch.Tensor:
    codes = torch.randint(0, 1 << BITS[format], shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return codes.where((codes & 127) != 127, 0) if format == "fp8" else codes  # those are NaN


STEP = {"int4": 0.3, "int8": 0.02, "fp8": 0.01}  # between codes, so that a row's values are about 1


def random_weight(
    format: str, group: int, *shape: int, zeros: bool = False, scales: torch.dtype = torch.float16, seed: int = 0
) -> QuantizedWeight:
    """Group 0: a scale a row."""
    generator, K, group = torch.Generator().manual_seed(seed), shape[-1], group or shape[-1]
    groups = (*shape[:-1], K // group)
    scale = (torch.rand(groups, generator=generator) + 0.5).mul(STEP[format] * K**-0.5).to(scales)
    zero = (torch.randint(0, 16, groups, generator=generator) + 128).bfloat16() if zeros else None
    return QuantizedWeight(format, pack(random_codes(format, *shape), format, group), scale, zero, shape, group)


@pytest.mark.parametrize(("format", "K", "group"), CASES)
def test_unpack_inverts_pack_and_a_field_is_a_tile_of_neighbouring_columns(format: str, K: int, group: int) -> None:
    codes, bits = random_codes(format, 3, 5, K), BITS[format]
    data, unit = pack(codes, format, group), unit_columns(format, K, group)
    assert data.dtype == torch.int16 and torch.equal(unpack(data, format, K, group), codes)
    J = unit * bits // 16
    for k in (0, 1, K // 2, K - 1):
        element = int(data[2, 4, k // unit * J + k % unit % J]) & 0xFFFF
        assert element >> (bits * (k % unit // J)) & ((1 << bits) - 1) == int(codes[2, 4, k])


def test_dequantize_is_code_minus_zero_times_scale() -> None:
    """Slices and conversions keep the values."""
    weight = random_weight("int4", 128, 3, 5, 256, zeros=True)
    codes, values = random_codes("int4", 3, 5, 256), weight.dequantize()
    for e, n, k in ((0, 0, 0), (1, 4, 127), (2, 3, 128), (2, 4, 255)):
        zero, scale = (part[e, n, k // 128].float() for part in (weight.zeros, weight.scales))
        assert values[e, n, k] == (int(codes[e, n, k]) - (zero - 128)) * scale
    for format, read in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        codes, one = random_codes(format, 3, 80).view(read).float(), random_weight(format, 0, 3, 80)
        assert torch.equal(one.dequantize(), codes * one.scales.float())
    codes, one = random_codes("int4", 3, 96).float(), random_weight("int4", 0, 3, 96)
    assert torch.equal(one.dequantize(), (codes - 8) * one.scales.float())
    assert torch.equal(weight[1].dequantize(), values[1]) and len(weight[1:]) == 2
    assert torch.equal(torch.nn.Sequential(weight).to(torch.bfloat16)[0].dequantize(), values)
    assert weight.to("meta").data.is_meta


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("K", [80, 128, 300])
def test_product_of_codes_is_as_exact_as_that_of_dequantized_values(K: int, rows: int) -> None:
    weight = random_weight("int8", 0, 3, 5, K)[1]
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = x.double() @ weight.dequantize().double().T
    dequantized = torch.nn.functional.linear(x, weight.dequantize().bfloat16())
    error, limit = ((y.double() - exact).abs().max() for y in (weight.product(x.view(1, rows, K))[0], dequantized))
    assert error <= max(2 * limit, 2.0**-7 * exact.abs().max())  # two roundings to bf16
    assert torch.equal(weight.product(x.float()), x.float() @ weight.dequantize().T)


WRONG: dict[str, dict[str, object]] = {
    "format is 'int3'": {"format": "int3"},
    "32, 64 or 128 that divide 128": {"group": 48},
    "group is 16": {"group": 16},
    "data has shape": {"data": torch.zeros(3, 5, 7, dtype=torch.int16)},
    "int16": {"data": torch.zeros(3, 5, 32, dtype=torch.int32)},
    "scales has shape": {"scales": torch.zeros(3, 5, 3)},
    "bfloat16": {"zeros": torch.zeros(3, 5, 4)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_part_raises_value_error(message: str) -> None:
    args = {"format": "int4", "data": torch.zeros(3, 5, 32, dtype=torch.int16), "scales": torch.zeros(3, 5, 4)}
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**args | {"zeros": None, "shape": (3, 5, 128), "group": 32} | WRONG[message])


EXPERTS = {"T": 5, "H": 128, "I": 96, "E": 4, "K": 2, "gate_up": "int4:32", "down": "int8"}
LINEAR = {"T": 3, "H": 128, "N": 40, "weight": "int4:64"}
SIZES = {"linear": LINEAR, "expert_swiglu": EXPERTS, "experts_add_rms_norm": EXPERTS}


def arguments(name: str, device: str = "cpu") -> Args:
    return inputs(name, SIZES[name], device, torch.float32)


def first(out: Any) -> torch.Tensor:
    return as_tuple(out)[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SIZES)
def test_operation_of_a_quantized_weight_equals_that_of_its_values(name: str) -> None:
    args = arguments(name)
    dense = {key: x.dequantize() if isinstance(x, QuantizedWeight) else x for key, x in args.items()}
    got, want = (first(getattr(ops, name)(**one)) for one in (args, dense))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(got, first(getattr(ops, name).unchecked(**args)))
    for weight in args.values():
        if isinstance(weight, QuantizedWeight):
            weight.data = weight.data.mT.contiguous().mT
    assert torch.equal(got, first(getattr(ops, name)(**args)))


@pytest.mark.compiled
@pytest.mark.parametrize("name", SIZES)
def test_compiled_operation_of_a_quantized_weight(name: str) -> None:
    args, call = arguments(name), getattr(ops, name)
    parts = {key: x for key, x in args.items() if key not in tensors(args)}
    compiled = torch.compile(lambda args: first(call(**args, **parts)) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors(args)), first(call(**args)) * 2)


def test_wrong_quantized_weight_raises_value_error() -> None:
    x = torch.ones(3, 128)
    ops.linear(**arguments("linear"))  # a cached check must not let another layout pass
    for weights, columns in (("int8", 96), ("int4:64", 64)):
        message = rf"linear: argument 'weight' is of shape \[40, {columns}\], needs \[N H\] with H = 128"
        with pytest.raises(ValueError, match=message):
            ops.linear(x, sample_quantized(weights, 40, columns, device="cpu"))
    with pytest.raises(ValueError, match="linear: argument 'weight' is on meta"):
        ops.linear(x, sample_quantized("int8", 40, 128, device="meta"))
    with pytest.raises(ValueError, match="route: argument 'logits' is a QuantizedWeight"):
        ops.route(sample_quantized("int8", 3, 8, device="cpu"), 2)  # type: ignore[arg-type]


HALVES = np.arange(1 << 16, dtype=np.uint32)
FLOATS = {"BF16": torch.bfloat16, "FP16": torch.float16}
BIAS = {"BF16": 128, "FP16": 1024}  # of int4


def to_halves(words: Any, dtype: torch.dtype) -> torch.Tensor:
    """The low and high halves of words as floats, [2, words] in fp64."""
    return torch.from_numpy(words.view(np.int16).reshape(-1, 2).copy()).view(dtype).double().T


def to_words(low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype) -> Any:
    return torch.stack((low, high), -1).to(dtype).view(torch.int16).numpy().view(np.uint32).ravel()


def evaluate(ptx: str, *words: Any) -> Any:
    """Compute $0 of a piece of PTX for arrays $1, $2, ... of 32-bit words, or one word for all, in the emulator."""
    size = max(word.size for word in words)
    padded = {f"%r{at}": np.resize(word, -(-size // 1024) * 1024) for at, word in enumerate(words, 1)}
    return run(ptx.replace("$", "%r"), padded, {"%r0": 32}, threads=1024, blocks=-(-size // 1024))["%r0"][:size]


def expected_field(format: str, number: int) -> torch.Tensor:
    """The value of field `number` of each half, as torch reads it; of int4 the code."""
    if format == "INT4":
        return torch.from_numpy(HALVES >> (4 * number) & 15).double()
    codes = torch.from_numpy((HALVES >> (8 * number) & 255).astype(np.uint8))
    return codes.view(torch.int8).double() if format == "INT8" else codes.view(torch.float8_e4m3fn).double()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("format", ["INT4", "INT8", "FP8"])
def test_ptx_unpacks_every_half(format: str, name: str) -> None:
    """Each of the 65,536 values is the low half and the high half beside another value: no bit leaks."""
    ptx = getattr(ptx_unpack, f"{format}_{name}").value
    neighbours = np.random.default_rng(0).permutation(HALVES)
    for number in range(4 if format == "INT4" else 2):
        shift = np.uint32(8 - 8 * number if format == "FP8" else (4 if format == "INT4" else 8) * number)
        want = expected_field(format, number) + (BIAS[name] if format == "INT4" else 0)
        finite = want.isfinite()  # codes 0x7F and 0xFF of fp8 are NaN, and rejected where weights are made
        for place, words in enumerate((HALVES | neighbours << 16, neighbours | HALVES << 16)):
            got = to_halves(evaluate(ptx, words, shift), FLOATS[name])[place]
            assert torch.equal(got[finite], want[finite])


@pytest.mark.parametrize("name", FLOATS)
def test_ptx_subtracts_zeros_and_multiplies_by_scales(name: str) -> None:
    """The difference is exact, the product rounded once."""
    dtype, bias = FLOATS[name], BIAS[name]
    codes, zeros = (x.flatten() for x in torch.meshgrid(*[torch.arange(16.0).double()] * 2, indexing="ij"))
    words = (to_words(x + bias, x.flip(0) + bias, dtype) for x in (codes, zeros))
    minus = evaluate(getattr(ptx_unpack, f"MINUS_{name}").value, *words)
    assert torch.equal(to_halves(minus, dtype)[0], codes - zeros)
    scales = torch.rand(256, generator=torch.Generator().manual_seed(0)).to(dtype)
    times = evaluate(getattr(ptx_unpack, f"TIMES_{name}").value, minus, to_words(scales, scales, dtype))
    assert torch.equal(to_halves(times, dtype)[0].to(dtype), ((codes - zeros) * scales.double()).to(dtype))


@pytest.mark.parametrize(
    ("right", "wrong"), [("0x43004300", "0x43004380"), ("0xEA", "0xE8"), ("0x000F000F", "0x000F001F")]
)
def test_wrong_constant_in_the_ptx_is_caught(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert right in ptx_unpack.INT4_BF16.value
    monkeypatch.setattr(ptx_unpack.INT4_BF16, "value", ptx_unpack.INT4_BF16.value.replace(right, wrong))
    with pytest.raises(AssertionError):
        test_ptx_unpacks_every_half("INT4", "BF16")
