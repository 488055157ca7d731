"""Experts in host memory: the same bits as a stacked weight, each byte read where it lies, and wrong addresses seen."""

from typing import Any

import pytest
import torch

from mixtral_triton import ops
from mixtral_triton.kernels.operation.plan import call_key
from mixtral_triton.kernels.registry import dispatched
from mixtral_triton.kernels.weights.fp8 import with_fp8_activations
from mixtral_triton.kernels.weights.offload import empty_on_host
from mixtral_triton.kernels.weights.quantized import QuantizedWeight
from mixtral_triton.quantize import quantize
from tests.support.calls import Args, inputs, offloaded, with_offload
from tests.support.traffic import count_traffic

E = 5
ON_HOST = (1, 4)


def arguments(format: str | None, T: int, dtype: torch.dtype, H: int = 64) -> Args:
    sizes = {"T": T, "H": H, "I": H, "E": E, "K": 2, "gate_up": format, "down": format}
    return inputs("expert_swiglu", sizes, dtype=dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", [None, "int4", "int8", "fp8", "fp8_w8a8"])
@pytest.mark.parametrize(("T", "deterministic"), [*((T, False) for T in (1, 4, 70, 112, 130, 200, 512)), (3, True)])
def test_same_bits_as_stacked(format: str | None, T: int, deterministic: bool, request: Any) -> None:
    """Of many rows, resident weights are read by TMA's tiles and offloaded ones by pointers', in the same order of each
    sum; there without the guard, under which they take minutes."""
    if T >= 112:
        request.getfixturevalue("unguarded")
    for dtype in (torch.float32, torch.bfloat16) if T < 112 else (torch.bfloat16,):
        args = arguments(format, T, dtype, 64 if T < 112 else 128) | {"deterministic": deterministic}
        expected = ops.expert_swiglu(**args)
        assert torch.equal(ops.expert_swiglu(**with_offload(args, ON_HOST)), expected)
        flattened = dispatched("expert_swiglu", with_offload(args, ON_HOST))
        assert torch.equal(flattened(**with_offload(args, (0,))), expected)
        assert torch.equal(ops.expert_swiglu(**with_offload(args, (3, 0))), expected), "experts in any order"


@pytest.mark.interpreted
@pytest.mark.parametrize("address", [lambda own: own + 16, lambda own: torch.empty(1 << 16).data_ptr(), lambda own: 0])
def test_address_outside_an_expert_is_seen(address: Any) -> None:
    """Some elements behind its own, in freed memory, or null."""
    args = with_offload(arguments(None, 3, torch.float32), ON_HOST)
    args["down_proj"].data[1] = address(args["down_proj"].data[1])
    args["ids"] = torch.tensor([[1, 2]] * 3).int()
    assert not torch.equal(args["down_proj"].data, args["down_proj"]._table())
    with pytest.raises(Exception, match="loads from outside its tensors"):
        ops.expert_swiglu(**args)


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize("format", [None, "int4"])
@pytest.mark.parametrize("T", [1, 4, 16, 64])
def test_each_selected_byte_crosses_the_link_once(format: str | None, T: int, covers: Any) -> None:
    args = arguments(format, T, torch.bfloat16)
    on_host = with_offload(args, ON_HOST)
    for ids in (args["ids"], *(torch.tensor([pair] * T).int() for pair in ([0, 2], ON_HOST))):
        with count_traffic() as traffic:
            ops.expert_swiglu(**on_host | {"ids": ids})
        crossed, selected = traffic.moved("gate_up host", "down host"), set(ids.unique().tolist())
        of_expert = sum(on_host[name].host[0].nbytes for name in ("gate_up_proj", "down_proj"))
        assert crossed == len(selected & set(ON_HOST)) * of_expert
        assert traffic.moved("gate_up resident", "down resident") == len(selected - set(ON_HOST)) * of_expert
    covers("traffic", f"link, {format or 'bf16'}, T {T}: 1.00 of the selected offloaded experts' bytes (bound 1.00)")


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize("T", [1, 4, 16, 64])
def test_each_token_s_row_of_the_embedding_crosses_the_link_once(T: int, covers: Any) -> None:
    """An id out of range reads no row, and makes its sequence NaN."""
    V = 100
    table, weight = empty_on_host((V, 64), torch.bfloat16, torch.device("cpu")), torch.ones(64).bfloat16()
    table.copy_(torch.randn(V, 64, generator=torch.Generator().manual_seed(0)))
    ids, bounds = torch.arange(2 * T).view(2, T) * 7 % V, (torch.tensor([0, 0]), torch.tensor([T, T]), T)
    for bad in (None, -1, V, 1 << 40):
        if bad is not None:
            ids[1, -1] = bad
        with count_traffic() as traffic:
            _, x = ops.embed_rms_norm.unchecked(ids, table, weight, 1e-5, *bounds)
        sequences = 2 if bad is None else 1
        assert traffic.moved("table") == sequences * T * 64 * 2
        assert torch.equal(x[:sequences], table[ids[:sequences]]) and x[sequences:].isnan().all()
    covers("traffic", f"link, embedding, T {T}: 1.00 of the bytes of the tokens' rows (bound 1.00)")


W = torch.ones(E, 64, 128)
INT8, INT4 = quantize(W, "int8"), quantize(W, "int4")
FP8 = QuantizedWeight("fp8", INT8.data, INT8.scales, None, INT8.shape, INT8.group)
WITH_ZEROS = QuantizedWeight("int4", INT4.data, INT4.scales, INT4.scales + 8, INT4.shape, INT4.group)
HALF_SCALES = QuantizedWeight("int8", INT8.data, INT8.scales.half(), None, INT8.shape, INT8.group)
PAIRS = {  # those of tensors and numbers: test_plan.py
    "a weight's class": (INT8, offloaded(INT8, ON_HOST)),
    "its format": (INT8, FP8),
    "its group": (INT4, quantize(W, "int4", 32)),
    "its columns": (quantize(W[..., :96], "int8"), quantize(W[..., :100], "int8")),
    "its zeros": (INT4, WITH_ZEROS),
    "the dtype of its scales": (INT8, HALF_SCALES),
    "the format of an offloaded weight": (offloaded(INT8, ON_HOST), offloaded(FP8, ON_HOST)),
    "the dtype of a dense one": (offloaded(W, ON_HOST), offloaded(W.bfloat16(), ON_HOST)),
    "two 16-bit dtypes": (offloaded(W.half(), ON_HOST), offloaded(W.bfloat16(), ON_HOST)),
    "its rows": (offloaded(W, ON_HOST), offloaded(W[:, :32], ON_HOST)),
    "a number's class": (True, 1),
    "no argument": (None, W),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_calls_that_differ_in_one_attribute_have_different_keys(pair: str) -> None:
    one, other = PAIRS[pair]
    assert call_key((W, one)) == call_key((W, one)) != call_key((W, other))


def test_misaligned_rows_are_rejected() -> None:
    with pytest.raises(ValueError, match="OffloadedWeight: an expert's rows take 18 bytes, needs a multiple of 16"):
        offloaded(torch.zeros(4, 3, 3).bfloat16(), (1,))


@pytest.mark.parametrize("stacked", [torch.arange(5.0).repeat_interleave(8).view(E, 2, 4), INT4])
def test_index_selects_what_a_tensor_s_does_or_is_refused(stacked: Any) -> None:
    weight = offloaded(stacked, (3,))
    whole = weight.dequantize()
    for index in (0, 3, -1, -2, slice(3, 4), slice(-1, None), (slice(4, 5), slice(0, 1)), (3, slice(1, 2))):
        part = weight[index]
        assert torch.equal(part.dequantize() if isinstance(part, QuantizedWeight) else part, whole[index]), index
    for wrong in (slice(0, 2), slice(None), slice(0, 0), slice(None, None, 2)):
        with pytest.raises(ValueError, match="values to unpack"):
            weight[wrong]
    with pytest.raises(IndexError):
        weight[E]
    assert len([*weight]) == E


@pytest.mark.slow
def test_view_with_fp8_activations_of_offloaded_experts() -> None:
    """It has the weight's addresses and its buffer, and torch's operator finds it by its id."""
    args = arguments("fp8", 70, torch.bfloat16)
    on_host = with_offload(args, ON_HOST)
    views, stacked = (
        one | {name: with_fp8_activations(one[name]) for name in ("gate_up_proj", "down_proj")}
        for one in (on_host, args)
    )
    expected, view = ops.expert_swiglu(**stacked), views["down_proj"]
    assert torch.equal(ops.expert_swiglu(**views), expected) and not torch.equal(ops.expert_swiglu(**args), expected)
    assert torch.equal(dispatched("expert_swiglu", views)(**views), expected)
    assert with_fp8_activations(on_host["down_proj"]) is view
    assert view.data_for_many_rows() is on_host["down_proj"].data
