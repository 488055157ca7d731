"""QuantizedWeight: its layout, its checks, its use in operations and in interpreted matrix kernels.

The PTX that unpacks it: test_formats.py. Compiled kernels: tests/emulator, and test_quantized_offline.py.
"""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch

from mixtral_triton import ops
from mixtral_triton.kernels.launching.kernel_args import Groups, Rows
from mixtral_triton.kernels.operation.cases import sample_quantized
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.weights import formats
from mixtral_triton.kernels.weights.fp8 import encode_rows, with_fp8_activations
from mixtral_triton.kernels.weights.fp8_rows import quantize_rows
from mixtral_triton.kernels.weights.quantized import QuantizedWeight
from mixtral_triton.verification.tolerance import Tolerance
from tests.support.calls import Args, as_tuple, inputs, randn
from tests.support.traffic import count_traffic

FORMATS = [("int4", 256, 128), ("int4", 256, 64), ("int4", 128, 32), ("int4", 96, 32), ("int4", 80, 80)]
FORMATS += [("int8", 80, 80), ("fp8", 300, 300), ("fp8", 256, 128)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def random_weight(name: str, *shape: int, zeros: bool = False, scales: Any = torch.float16, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    weight = sample_quantized(name, *shape, device="cpu", generator=generator)
    weight.scales = weight.scales.to(scales)
    if zeros:
        weight.zeros = (torch.randint(16, weight.scales.shape, generator=generator) + 128).bfloat16()
    return weight


@pytest.mark.parametrize(("format", "K", "group"), FORMATS)
def test_unpack_inverts_pack_and_a_field_is_a_tile_of_neighbouring_columns(format: str, K: int, group: int) -> None:
    kind = formats.FORMATS[format]
    bits, unit = kind.bits, kind.unit_columns(K, group)
    codes = torch.randint(1 << bits, (3, 5, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = kind.pack(codes, group)
    assert data.dtype == torch.int16 and torch.equal(kind.unpack(data, K, group), codes)
    J = unit * bits // 16
    for k in (0, 1, K // 2, K - 1):
        element = int(data[2, 4, k // unit * J + k % unit % J]) & 0xFFFF
        assert element >> (bits * (k % unit // J)) & ((1 << bits) - 1) == int(codes[2, 4, k])


@pytest.mark.parametrize("name", ["int4:128", "int4", "int8", "fp8"])
def test_dequantize_is_code_minus_zero_times_scale(name: str) -> None:
    """Slices and conversions keep the values."""
    weight = random_weight(name, 3, 5, 256, zeros=name == "int4:128")
    codes, values = weight.codes, weight.dequantize()
    read = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(name, torch.uint8)
    zeros = 8 * (name == "int4") if weight.zeros is None else weight.zeros.float()[..., None] - 128
    by_group = codes.view(read).float().unflatten(-1, (-1, weight.group))
    assert torch.equal(values, ((by_group - zeros) * weight.scales.float()[..., None]).flatten(-2))
    assert torch.equal(weight[1].dequantize(), values[1]) and len(weight[1:]) == 2
    assert torch.equal(torch.nn.Sequential(weight).to(torch.bfloat16)[0].dequantize(), values)
    assert weight.to("meta").data.is_meta


def rows_of_many_magnitudes(K: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows [9, K]: of zeros, tiny, large, with one large value, with ties between two codes."""
    x = randn(9, K)
    x[0], x[1], x[2], x[3, 0], x[4] = 0.0, x[1] * 1e-30, x[2] * 100, 3e4, 8.5 * (torch.arange(K) % 53)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("K", [48, 100, 300])
def test_fp8_weight_with_fp8_activations_multiplies_codes(K: int, dtype: torch.dtype) -> None:
    """In exact arithmetic, from codes that are found by search among all of e4m3."""
    weight, x = random_weight("fp8", 2, 37, K), rows_of_many_magnitudes(K, dtype)
    view = with_fp8_activations(weight)
    every = torch.arange(256, dtype=torch.uint8)[(torch.arange(256) & 127) != 127].view(torch.float8_e4m3fn).double()
    every = every.unique()  # ascending, one zero
    largest = x.double().abs().amax(-1, keepdim=True).clamp(min=448 * 2.0**-126)
    scaled = x.float() * torch.div(torch.tensor(448.0), largest.float())
    above = torch.searchsorted(every, scaled.double().clamp(-448, 448)).clamp(max=len(every) - 1)
    low, high = every[(above - 1).clamp(min=0)], every[above]
    codes = torch.where((scaled - low) < (high - scaled), low, high)
    codes, scales = (
        codes.where((scaled - low) != (high - scaled), scaled.to(torch.float8_e4m3fn).double()),
        largest / 448,
    )
    assert (
        (codes.float().view(torch.int32) >> 20 & 1 == 0) | ((scaled - low) != (high - scaled))
    ).all()  # ties to even
    for index in range(2):
        exact = codes @ weight[index].values().double().T * scales * weight[index].scales.double().T
        got = view[index].product(x)
        assert got.dtype == dtype and torch.allclose(
            got.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-5 * float(exact.abs().max())
        )
    assert torch.equal(view.dequantize(), weight.dequantize()) and view.name == "fp8_w8a8"


def test_fp8_activations_keep_a_row_that_is_not_finite_visible() -> None:
    weight, x = with_fp8_activations(random_weight("fp8", 33, 100)), randn(3, 100)
    x[0, 3], x[1, 7] = float("nan"), float("-inf")
    assert weight.product(x)[:2].isnan().all() and weight.product(x)[2].isfinite().all()


def test_view_with_fp8_activations_follows_its_weight() -> None:
    """It is made once, and shares whatever tensors the weight has; no state, copy or pickle has it as a part."""
    weight, x = random_weight("fp8", 33, 100), randn(5, 100)
    keys, view = weight.state_dict().keys(), with_fp8_activations(weight)
    assert with_fp8_activations(weight) is view and view.data is weight.data and not [*weight.children()]
    other = random_weight("fp8", 33, 100, seed=1)
    weight.load_state_dict(other.state_dict())
    assert weight.state_dict().keys() == keys
    assert torch.equal(view.product(x), with_fp8_activations(other).product(x))
    for copied in (deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        copied.data = copied.data.clone()
        assert with_fp8_activations(copied).data is copied.data
    assert with_fp8_activations(torch.nn.Sequential(weight).to("meta")[0]).data.is_meta
    for other in (random_weight("fp8:128", 3, 256), random_weight("int8", 3, 256), x):
        assert with_fp8_activations(other) is other


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [16, 48, 100, 300, 1000])
def test_kernel_quantizes_rows_to_the_codes_of_the_reference(K: int, dtype: torch.dtype) -> None:
    """Bit for bit, in the byte order of the weight; rows that are not finite stay so."""
    x = rows_of_many_magnitudes(K, dtype)
    x[7, 3], x[8, 1] = float("nan"), float("inf")
    (codes, _, scales), (want, exact) = quantize_rows(Rows.of(x)), encode_rows(x)
    packed = formats.FORMATS["fp8"].pack(want.view(torch.uint8), K)
    assert torch.equal(codes[:7].view(torch.int16), packed[:7]) and torch.equal(scales[:7], exact[:7, 0])
    assert codes[7:].float().isnan().any(-1).all() and scales[8].isinf()


@pytest.mark.interpreted
def test_kernel_quantizes_the_tokens_of_slots_in_the_order_of_experts() -> None:
    x, ids = randn(5, 100), torch.tensor([[1, 0], [2, 1], [0, 7], [-1, 2], [1, 2]])  # 3 experts, two ids out of range
    order, offsets = ops.sort_by_expert(ids.clamp(0, 2), 3)[0] * 0, torch.tensor([0, 2, 5, 8])
    order[:8] = torch.tensor([1, 4, 0, 3, 8, 2, 7, 9])
    codes, _, scales = quantize_rows(Rows.of(x), Groups(order, offsets.int(), 3), 2)
    want, _, exact = quantize_rows(Rows.of(x[order[:8] // 2]))
    assert torch.equal(codes[:8].view(torch.int16), want.view(torch.int16)) and torch.equal(scales[:8], exact)


WRONG: dict[str, dict[str, object]] = {
    "format is 'int3'": {"format": "int3"},
    "128 or 64 or 32 that divide 128": {"group": 48},
    "group is 16": {"group": 16},
    r"data of int4 are .*int16 \[3, 5, 7\]": {"data": torch.zeros(3, 5, 7, dtype=torch.int16)},
    "need torch.int16": {"data": torch.zeros(3, 5, 32, dtype=torch.int32)},
    "scales of int4 are": {"scales": torch.zeros(3, 5, 3)},
    "need torch.bfloat16": {"zeros": torch.zeros(3, 5, 4)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_part_raises_value_error(message: str) -> None:
    args = {"format": "int4", "data": torch.zeros(3, 5, 32, dtype=torch.int16), "scales": torch.zeros(3, 5, 4)}
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**args | {"zeros": None, "shape": (3, 5, 128), "group": 32} | WRONG[message])


EXPERTS = {"T": 5, "H": 128, "I": 96, "E": 4, "K": 2, "gate_up": "int4:32", "down": "int8"}
LINEAR = {"T": 3, "H": 128, "N": 40, "weight": "int4:64"}
SIZES = {"linear": LINEAR, "expert_swiglu": EXPERTS, "experts_add_rms_norm": EXPERTS}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SIZES)
def test_operation_of_a_quantized_weight_equals_that_of_its_values(name: str) -> None:
    args = inputs(name, SIZES[name])
    dense = {key: x.dequantize() if isinstance(x, QuantizedWeight) else x for key, x in args.items()}
    got, want = (as_tuple(getattr(ops, name)(**one))[0] for one in (args, dense))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(got, as_tuple(getattr(ops, name).unchecked(**args))[0])
    for weight in args.values():
        if isinstance(weight, QuantizedWeight):
            weight.data = weight.data.mT.contiguous().mT
    assert torch.equal(got, as_tuple(getattr(ops, name)(**args))[0])


def test_wrong_quantized_weight_raises_value_error() -> None:
    x = torch.ones(3, 128)
    ops.linear(**inputs("linear", LINEAR))  # a cached check must not let another layout pass
    for weights, columns in (("int8", 96), ("int4:64", 64)):
        message = rf"linear: argument 'weight' is of shape \[40, {columns}\], needs \[N H\] with H = 128"
        with pytest.raises(ValueError, match=message):
            ops.linear(x, sample_quantized(weights, 40, columns, device="cpu"))
    with pytest.raises(ValueError, match="linear: argument 'weight' is on meta"):
        ops.linear(x, sample_quantized("int8", 40, 128, device="meta"))
    with pytest.raises(ValueError, match="route: argument 'logits' is a QuantizedWeight"):
        ops.route(sample_quantized("int8", 3, 8, device="cpu"), 2)  # type: ignore[arg-type]


# Names, H, I, and whether there are zeros.
CASES = [
    ("int4:128", 256, 384, True),  # units of 256 and of 128 columns
    ("int4:64", 256, 64, False),
    ("int4:32", 96, 32, True),  # neither is whole units
    ("int4", 80, 48, True),
    ("int8", 80, 96, False),
    ("int8:128", 256, 128, False),
    ("int8:32", 96, 64, False),
    ("fp8", 96, 80, False),
    ("fp8:128", 256, 128, False),
    ("int4:128", 384, 128, False),
    ("fp8_w8a8", 300, 80, False),
    ("fp8_w8a8", 48, 256, False),
]


def layer(name: str, H: int, I: int, zeros: bool, T: int, dtype: torch.dtype, E: int = 2) -> Args:
    """Arguments of expert_swiglu."""
    gate_up, down = (random_weight(name, E, *s, zeros=zeros, seed=s[0]) for s in ((2 * I, H), (H, I)))
    ids = torch.rand(T, E, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :2].int()
    x, weights = randn(T, H).to(dtype), randn(T, 2).softmax(-1)
    return {"x": x, "gate_up_proj": gate_up, "down_proj": down, "ids": ids, "weights": weights}


def check(name: str, args: Args, **changes: Any) -> None:
    """The error is at most twice that of plain torch, whose weights are rounded. `changes`: for the kernel alone."""
    error, limit = Tolerance(name, args).measure(lambda **args: OPS[name].run(**args | changes))
    assert error <= limit


PATHS = [*((T, False, dtype) for T in (5, 70) for dtype in FLOATS), (5, True, torch.bfloat16)]
PATHS += [(T, False, torch.bfloat16) for T in (65, 128, 129)]  # of few tokens up to 128


@pytest.mark.exhaustive
@pytest.mark.interpreted
# For rows, experts and splits; `test_linear` has all formats.
@pytest.mark.parametrize(("T", "deterministic", "dtype"), PATHS)
@pytest.mark.parametrize("case", [CASES[number] for number in (0, 2, 4, 8, 10)], ids=str)
def test_experts(case: Any, T: int, deterministic: bool, dtype: torch.dtype) -> None:
    check("expert_swiglu", layer(*case, T, dtype) | {"deterministic": deterministic})


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize("zeros", [True, False])
def test_experts_whose_splits_have_several_units(zeros: bool) -> None:
    """Two of 256 columns each, with a scale, and perhaps a zero, for 128."""
    check("expert_swiglu", layer("int4:128", 128, 2048, zeros, 3, torch.bfloat16))


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    ("dense", "dtype", "deterministic", "limit"),
    [
        (None, torch.bfloat16, False, 128),
        (None, torch.float16, False, 128),
        (None, torch.float32, False, 64),
        ("down_proj", torch.bfloat16, False, 64),
        ("gate_up_proj", torch.bfloat16, False, 64),
        (None, torch.bfloat16, True, 0),
    ],
)
def test_the_most_tokens_of_the_kernels_without_a_sort(
    arch: str, dense: str | None, dtype: torch.dtype, deterministic: bool, limit: int
) -> None:
    for T in (1, 64, 65, 128, 129):
        args = inputs("expert_swiglu", {"T": T, "H": 256, "I": 256, "E": 8, "K": 2}, "meta", dtype)
        for name in {"gate_up_proj", "down_proj"} - {dense}:
            args[name] = sample_quantized("int4:128", *args[name].shape, device="meta")
        with record_launches(arch) as launches:
            ops.expert_swiglu(**args, deterministic=deterministic)
        decode = any(launch.kernel == "experts_up_decode_kernel" for launch in launches)
        assert decode == (limit >= T) != any(launch.kernel == "experts_up_kernel" for launch in launches), T


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize("T", [5, 70])
@pytest.mark.parametrize("dense", ["gate_up_proj", "down_proj", None])
def test_experts_with_the_next_norm_and_with_one_dense_weight(dense: str | None, T: int) -> None:
    args = layer(*CASES[0], T, torch.bfloat16 if dense else torch.float32)
    if dense:
        check("expert_swiglu", args | {dense: args[dense].dequantize().bfloat16()})
    else:
        norm = {"residual": randn(T, 256), "norm_weight": torch.rand(256) + 0.5, "eps": 1e-5}
        check("experts_add_rms_norm", args | norm)


@pytest.mark.interpreted
@pytest.mark.parametrize(("T", "deterministic"), [(0, False), (3, False), (40, False), (3, True)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "H", "I", "zeros"), CASES, ids=str)
def test_linear(name: str, H: int, I: int, zeros: bool, dtype: torch.dtype, T: int, deterministic: bool) -> None:
    """37 rows are no multiple of a tile."""
    args = {"x": randn(T, H).to(dtype), "weight": random_weight(name, 37, H, zeros=zeros, scales=torch.bfloat16)}
    check("linear", args | {"deterministic": deterministic})


@pytest.mark.interpreted
def test_linear_of_views() -> None:
    """One expert, and rows that are apart in memory."""
    weight = random_weight("int4:128", 4, 33, 256, zeros=True)
    for part in (weight[2], weight[1][::2]):
        check("linear", {"x": randn(3, 256), "weight": part})


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("name", "zeros"), [("int4:128", True), ("int4:64", False), ("int8", False), ("fp8:128", False)]
)
@pytest.mark.parametrize("T", [1, 4, 64, 128])
def test_decode_reads_the_packed_experts_once(name: str, zeros: bool, T: int, covers: Any) -> None:
    """Decode reads codes, scales and zeros of the selected experts, and nothing of the rest."""
    args = layer(name, 256, 512, zeros, T, torch.bfloat16, E=8)
    with count_traffic() as traffic:
        OPS["expert_swiglu"].run(**args)
    packed = sum(args[name][e].nbytes for name in ("gate_up_proj", "down_proj") for e in args["ids"].unique().tolist())
    ratio = traffic.moved("gate_up", "down", "scales", "zeros") / packed
    assert ratio <= 1.05
    covers("traffic", f"{name} expert weights, T {T}: {ratio:.2f} of what is packed (bound 1.05)")


@pytest.mark.interpreted
@pytest.mark.parametrize("fault", ["zeros are 8", "fields in another order", "scale of the next group"])
def test_wrong_unpacking_is_caught(fault: str) -> None:
    right = random_weight("int4:128", 33, 256, zeros=True)
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
