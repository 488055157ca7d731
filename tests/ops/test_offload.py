"""Experts in host memory: the same bits as a stacked weight, each byte read where it lies, and wrong addresses seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtral_triton import ops
from mixtral_triton.kernels import norm
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.offload import OffloadedWeight, empty_on_host
from mixtral_triton.kernels.plan import call_key
from mixtral_triton.kernels.quantized import QuantizedWeight
from mixtral_triton.kernels.registry import dispatched
from mixtral_triton.quantize import quantize
from mixtral_triton.tools.trace import RouteRecorder
from tests.support.calls import offloaded
from tests.support.models import random_model, tokens
from tests.support.traffic import count_traffic

E, K, H, I = 5, 2, 64, 64
ON_HOST = (1, 4)


def arguments(format: str | None, T: int, dtype: torch.dtype, H: int = H, I: int = I) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(T)
    weights = [torch.randn(shape, generator=generator).to(dtype) * H**-0.5 for shape in ((E, 2 * I, H), (E, H, I))]
    stacked = [weight if format is None else quantize(weight, format) for weight in weights]
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]).int()
    routes = {"ids": ids, "weights": torch.rand(T, K, generator=generator)}
    x = torch.randn(T, H, generator=generator).to(dtype)
    return {"x": x, "gate_up_proj": stacked[0], "down_proj": stacked[1], **routes}


def with_offload(args: dict[str, Any], *on_host: int) -> dict[str, Any]:
    names, on_host = ("gate_up_proj", "down_proj"), on_host or ON_HOST
    return args | {name: offloaded(args[name], on_host) for name in names}


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", [None, "int4", "int8", "fp8"])
@pytest.mark.parametrize(("T", "deterministic"), [(1, False), (4, False), (70, False), (3, True)])
def test_same_bits_as_stacked(format: str | None, T: int, deterministic: bool, ordered: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = arguments(format, T, dtype) | {"deterministic": deterministic}
        expected = ops.expert_swiglu(**args)
        assert torch.equal(ops.expert_swiglu(**with_offload(args)), expected)
        flattened = dispatched("expert_swiglu", with_offload(args))
        assert torch.equal(flattened(**with_offload(args, 0)), expected)
        assert torch.equal(ops.expert_swiglu(**with_offload(args, 3, 0)), expected), "experts in any order"


@pytest.mark.interpreted
def test_a_model_gives_the_logits_and_text_of_a_resident_one(ordered: Any) -> None:
    model, resident = (random_model(num_hidden_layers=2, on_host=experts) for experts in (((0, 2), ()), ()))
    ids = tokens(1, 5)
    assert torch.equal(model(ids), resident(ids)) and torch.equal(model.generate(ids, 2), resident.generate(ids, 2))


@pytest.mark.interpreted
@pytest.mark.parametrize("T", [1, 4, 16, 64])
@pytest.mark.parametrize("weights", [None, pytest.param("int4", marks=pytest.mark.slow)])
def test_selected_experts_and_the_tokens_rows_cross_the_link_once(weights: str | None, T: int, covers: Any) -> None:
    """Layers with none, one and two experts in host memory, and the embedding there."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "weights": weights}
    dtype = torch.bfloat16 if weights else torch.float32  # in fp32 a tile of a quantized weight takes 16 rows
    model = random_model(dtype=dtype, on_host=((), (3,), (1, 2)), embedding=True, **sizes)
    with torch.no_grad(), count_traffic() as traffic, RouteRecorder() as routes:
        model(tokens(1, T))
    selected, need = [set(layer.unique().tolist()) for layer in routes.ids], T * 32 * dtype.itemsize
    for layer, experts in zip(model.layers[1:], selected[1:], strict=True):
        each = layer.gate_up_proj.host[0].nbytes + layer.down_proj.host[0].nbytes
        need += len(experts & {*layer.down_proj.on_host}) * each
    assert traffic.moved("gate_up host", "down host", "table") == need
    assert not isinstance(model.layers[0].down_proj, OffloadedWeight)
    covers("traffic", f"link, model, {weights or 'fp32'}, T {T}: 1.00 of the selected experts' and rows' bytes")


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize("format", [None, "int4", "int8", "fp8"])
@pytest.mark.parametrize("T", [112, 130, 200, 512])
def test_same_bits_as_stacked_for_many_rows(format: str | None, T: int, ordered: Any, unguarded: None) -> None:
    """Resident weights are read by TMA's tiles and offloaded ones by pointers', in the same order of each sum."""
    args = arguments(format, T, torch.bfloat16, H=128, I=128)
    assert torch.equal(ops.expert_swiglu(**with_offload(args)), ops.expert_swiglu(**args))


def test_unselected_experts_are_not_read() -> None:
    """NaN in every expert that no token selects, wherever it lies."""
    args = arguments(None, 3, torch.float32)
    args["ids"] = torch.tensor([[1, 2]] * 3).int()
    expected = ops.expert_swiglu(**args)
    args = with_offload(args)
    for name in ("gate_up_proj", "down_proj"):
        for expert in (0, 3, 4):
            args[name].rows(expert).fill_(float("nan"))
    assert torch.equal(ops.expert_swiglu(**args), expected)


@pytest.mark.interpreted
@pytest.mark.parametrize("fault", ["one element off", "freed memory", "null"])
def test_address_outside_an_expert_is_seen(fault: str) -> None:
    args = with_offload(arguments(None, 3, torch.float32))
    table = args["down_proj"].data
    table[1] = {"one element off": table[1] + 16, "freed memory": torch.empty(1 << 16).data_ptr(), "null": 0}[fault]
    args["ids"] = torch.tensor([[1, 2]] * 3).int()
    assert not args["down_proj"].is_intact()
    with pytest.raises(Exception, match="loads from outside its tensors"):
        ops.expert_swiglu(**args)


def test_address_of_another_expert_is_seen() -> None:
    args = arguments(None, 3, torch.float32)
    wrong = with_offload(args)
    wrong["down_proj"].data[1] = wrong["down_proj"].data[2]
    assert not wrong["down_proj"].is_intact()
    if INTERPRETED:
        wrong["ids"] = args["ids"] = torch.tensor([[1, 2]] * 3).int()
        assert not torch.equal(ops.expert_swiglu(**wrong), ops.expert_swiglu(**args))


@pytest.mark.interpreted
@pytest.mark.parametrize("format", [None, "int4"])
@pytest.mark.parametrize("T", [1, 4, 16, 64])
def test_each_selected_byte_crosses_the_link_once(format: str | None, T: int, covers: Any) -> None:
    args = arguments(format, T, torch.bfloat16)
    on_host = with_offload(args)
    for ids in (args["ids"], *(torch.tensor([pair] * T).int() for pair in ([0, 2], ON_HOST))):
        with count_traffic() as traffic:
            ops.expert_swiglu(**on_host | {"ids": ids})
        crossed, selected = traffic.moved("gate_up host", "down host"), set(ids.unique().tolist())
        of_expert = sum(on_host[name].host[0].nbytes for name in ("gate_up_proj", "down_proj"))
        assert crossed == len(selected & set(ON_HOST)) * of_expert
        assert traffic.moved("gate_up resident", "down resident") == len(selected - set(ON_HOST)) * of_expert
    covers("traffic", f"link, {format or 'bf16'}, T {T}: 1.00 of the selected offloaded experts' bytes (bound 1.00)")


@pytest.mark.interpreted
@pytest.mark.parametrize("T", [1, 4, 16, 64])
def test_each_token_s_row_of_the_embedding_crosses_the_link_once(T: int, covers: Any) -> None:
    """An id out of range reads no row, and makes its sequence NaN."""
    V, H = 100, 64
    table, weight = empty_on_host((V, H), torch.bfloat16, torch.device("cpu")), torch.ones(H, dtype=torch.bfloat16)
    table.copy_(torch.randn(V, H, generator=torch.Generator().manual_seed(0)))
    ids = torch.arange(2 * T).view(2, T) * 7 % V
    for bad in (None, -1, V, 1 << 40):
        if bad is not None:
            ids[1, -1] = bad
        with count_traffic() as traffic:
            _, x = ops.embed_rms_norm.unchecked(ids, table, weight, 1e-5)
        sequences = 2 if bad is None else 1
        assert traffic.moved("table") == sequences * T * H * 2
        assert torch.equal(x[:sequences], table[ids[:sequences]]) and x[sequences:].isnan().all()
    covers("traffic", f"link, embedding, T {T}: 1.00 of the bytes of the tokens' rows (bound 1.00)")


@pytest.mark.interpreted
def test_a_row_outside_the_embedding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected: the ids are compared with a larger vocabulary's."""
    table, launch = empty_on_host((9, 64), torch.float32, torch.device("cpu")), norm.launch
    args = torch.tensor([[3, 900]]), table, torch.ones(64), 1e-5
    assert ops.embed_rms_norm.unchecked(*args)[1].isnan().all()

    def unlimited(kernel: Any, grid: Any, args: Any, config: Any) -> None:
        launch(kernel, grid, args | {"V": 999}, config)

    monkeypatch.setattr(norm, "launch", unlimited)
    with pytest.raises(Exception, match="loads from outside its tensors"):
        ops.embed_rms_norm.unchecked(*args)


def test_wrong_dtype_is_rejected() -> None:
    args = with_offload(arguments(None, 3, torch.float32))
    with pytest.raises(ValueError, match="argument 'down_proj' is float32, needs bfloat16"):
        ops.expert_swiglu(**args | {"x": args["x"].bfloat16()})


def test_wrong_dtype_is_rejected_after_a_right_call(ordered: Any) -> None:
    """What the check remembers of the right call is not that of one whose experts have half the bytes."""
    right, wrong = (with_offload(arguments(None, 3, dtype)) for dtype in (torch.float32, torch.bfloat16))
    weights = {name: wrong[name] for name in ("gate_up_proj", "down_proj")}
    for _ in range(2):
        ops.expert_swiglu(**right)
        with pytest.raises(ValueError, match="argument 'down_proj' is bfloat16, needs float32"):
            ops.expert_swiglu(**right | weights)
    ops.expert_swiglu(**wrong)


W = torch.ones(E, 64, 128)
INT8, INT4 = quantize(W, "int8"), quantize(W, "int4")
FP8 = QuantizedWeight("fp8", INT8.data, INT8.scales, None, INT8.shape, INT8.group)
WITH_ZEROS = QuantizedWeight("int4", INT4.data, INT4.scales, INT4.scales + 8, INT4.shape, INT4.group)
HALF_SCALES = QuantizedWeight("int8", INT8.data, INT8.scales.half(), None, INT8.shape, INT8.group)
PAIRS = {
    "a tensor's shape": (W, W[:4]),
    "its strides": (W, W.mT.contiguous().mT),
    "its dtype": (W, W.bfloat16()),
    "its device": (W, W.to("meta")),
    "its alignment": (W.flatten()[:64], W.flatten()[1:65]),
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
    "a number": (1, 2),
    "no argument": (None, W),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_calls_that_differ_in_one_attribute_have_different_keys(pair: str) -> None:
    one, other = PAIRS[pair]
    assert call_key((W, one)) == call_key((W, one)) != call_key((W, other))


def test_misaligned_rows_are_rejected() -> None:
    with pytest.raises(ValueError, match="OffloadedWeight: an expert's rows take 18 bytes, needs a multiple of 16"):
        offloaded(torch.zeros(4, 3, 3, dtype=torch.bfloat16), (1,))


@pytest.mark.parametrize("on_host", [(1, 1), (-1,), (E,), (0, 1, E)])
def test_wrong_experts_are_rejected(on_host: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"on_host is \[.*\], needs distinct experts of 0\.\.4"):
        offloaded(W, on_host)


@pytest.mark.parametrize("stacked", [torch.arange(5.0).repeat_interleave(8).view(E, 2, 4), INT4])
def test_index_selects_what_a_tensor_s_does_or_is_refused(stacked: Any) -> None:
    weight = offloaded(stacked, (3,))
    whole = weight.dequantize()
    for index in (0, 3, -1, -2, slice(3, 4), slice(-1, None), (slice(4, 5), slice(0, 1)), (3, slice(1, 2))):
        part = weight[index]
        assert torch.equal(part.dequantize() if isinstance(part, QuantizedWeight) else part, whole[index]), index
    for wrong in (slice(0, 2), slice(None), slice(0, 0), slice(None, None, 2), True, None, ..., [1], torch.tensor(1)):
        with pytest.raises(ValueError, match="needs a number or a slice that is one expert"):
            weight[wrong]
    with pytest.raises(IndexError):
        weight[E]
    assert len([*weight]) == E
