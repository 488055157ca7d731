"""QuantizedCache: its layout and its checks, in operations, in a model and in graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import KVCache, Mixtral, ops, reference
from mixtral_triton.checkpoint.config import SMALL
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.weights import quantized_cache
from mixtral_triton.kernels.weights.quantized_cache import QuantizedCache, quantize
from tests.support.calls import Args, copies, inputs, outputs, randn
from tests.support.models import WIDER_SIZES, perplexity, random_model, tokens

SIZES: dict[str, Any] = {} if INTERPRETED else WIDER_SIZES
NAN, INF = float("nan"), float("inf")
CHUNK = {"B": 3, "T": 5, "Hq": 4, "Hkv": 2, "D": 32, "C": 16, "window": 16, "past": 20, "cache": "int8"}
INPUTS = {
    "append": {key: size for key, size in CHUNK.items() if key not in ("Hq", "window")},
    "cached_attention": CHUNK,
    "rope_append_attention": {**CHUNK, "T": 1},
}


def test_codes_and_scales() -> None:
    """A code is the nearest one, and a scale is the largest / 127."""
    x = randn(6, 10) * torch.tensor([1e-3, 1.0, 1e4, 1e-30, 1e30, 0.0])[:, None]
    x = torch.cat((x, torch.full((1, 10), 3.4e38)))
    cache = QuantizedCache.of(x)
    codes = cache.codes.double()
    assert cache.shape == x.shape and torch.equal(cache.dequantize(), codes.float() * cache.scales[:, None])
    assert codes.abs().amax(1).tolist() == [127.0] * 5 + [0.0, 127.0]
    assert torch.allclose(cache.scales[:5].double(), x[:5].abs().amax(1).double() / 127, rtol=1e-7)
    exact = x.double() / cache.scales.double()[:, None]
    assert (codes - exact).abs().max() <= 0.5 + 1e-5 and cache.scales.isfinite().all()
    halves = torch.tensor([127.0, 0.5, 1.5, -2.5])  # ties go to even codes
    assert QuantizedCache.of(halves).dequantize().tolist() == [127.0, 0.0, 2.0, -2.0]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("argument", "bad"), [("k", NAN), ("k", -INF), ("v", NAN), ("v", INF)])
@pytest.mark.parametrize("name", INPUTS)
def test_nan_of_a_key_reaches_its_own_sequence_alone(name: str, argument: str, bad: float, device: Any) -> None:
    args = inputs(name, INPUTS[name], device, torch.bfloat16)
    args["new"] = args["new"] * 0 + INPUTS[name]["T"]
    args[argument][1, 0, 0, 3] = bad
    found = outputs(name, getattr(ops, name), args)
    right = outputs(name, OPS[name].call_reference, args)
    out = found[0]
    if name == "append":  # the value that a query reads later
        out = found[argument == "v"].transpose(1, 2).flatten(2)
    assert out[1].isnan().any() and not out[[0, 2]].isnan().any()
    for got, want in zip(found, right, strict=True):
        assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_vectors_and_small_values(dtype: torch.dtype, device: Any) -> None:
    """In fp16 the product of a probability and a small value's scale would lose bits."""
    sizes = {**CHUNK, "T": 1, "C": 300, "window": 0, "past": 280, "B": 2}
    args = inputs("rope_append_attention", sizes, "cpu", dtype)
    args["new"] = args["new"] * 0 + 1
    args["v"] = args["v"] * 1e-3
    args["v_cache"] = QuantizedCache.of(args["v_cache"].dequantize() * 1e-3)
    args["k"][0], args["k_cache"][0] = 0.0, torch.zeros(args["k_cache"].shape[1:])
    args = {key: x.to(device) if hasattr(x, "to") else x for key, x in args.items()}
    in_fp32 = {key: x.float() if key in "qkv" else x for key, x in args.items()}
    calls = (ops.rope_append_attention, args), (OPS["rope_append_attention"].call_reference, in_fp32)
    got, want = (outputs("rope_append_attention", *call)[0] for call in calls)
    assert (got - want).abs().max() <= (2e-3 if dtype == torch.float16 else 1e-5) * want.abs().max()


def wrong_caches(args: Args) -> dict[str, tuple[Args, str]]:
    """Changed arguments of a call, and what the error says."""
    k_cache = args["k_cache"]
    codes, scales = k_cache.tensors
    meta = k_cache.to("meta")
    cases = {
        "dense values": ({"v_cache": args["v_cache"].dequantize()}, "v_cache' is a Tensor, needs a QuantizedCache"),
        "bare codes": ({"k_cache": codes}, "k_cache' is int8, needs float32"),
        "other codes": ({"k_cache": QuantizedCache(codes.int(), scales)}, "int32 .*needs int8 codes"),
        "other scales": ({"k_cache": QuantizedCache(codes, scales.half())}, "float16 .* a float32 scale"),
        "few scales": ({"k_cache": QuantizedCache(codes, scales[..., 1:])}, "needs .* for each vector a"),
        "strides": ({"k_cache": QuantizedCache(codes, scales.mT.contiguous().mT)}, "of the codes' strides"),
        "heads": ({"k_cache": k_cache[:, :1]}, "k_cache|v_cache"),
        "head size": ({"k_cache": QuantizedCache.of(k_cache.dequantize()[..., 2:])}, "k_cache|k' is"),
        "device": ({"k_cache": meta, "v_cache": meta}, "on meta, needs to be on cpu"),
    }
    return {case: (args | change, message) for case, (change, message) in cases.items()}


@pytest.mark.parametrize("case", wrong_caches(inputs("append", INPUTS["append"])))
@pytest.mark.parametrize("name", INPUTS)
def test_wrong_cache_raises_value_error(name: str, case: str) -> None:
    args, message = wrong_caches(inputs(name, INPUTS[name]))[case]
    with pytest.raises(ValueError, match=message) as caught:
        getattr(ops, name)(**args)
    assert str(caught.value).startswith(f"{name}: argument '") and "\n" not in str(caught.value)
    k = inputs(name, INPUTS[name])["k_cache"]
    with pytest.raises(ValueError, match="argument 'q' is a QuantizedCache, needs a tensor"):
        ops.attention(k, k, k)


def logits_with_cache(model: Mixtral, ids: Tensor, sizes: Any, **options: Any) -> Tensor:
    cache = KVCache(model.config, batch=len(ids), max_len=ids.shape[1], device=ids.device, dtype=torch.int8)
    return torch.cat([model(part, cache=cache, **options) for part in ids.split(sizes, 1)], dim=1)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("window", [None, 5])
def test_model_over_8_bits_equals_the_reference(window: int | None, device: Any) -> None:
    """In chunks and token by token, behind a ring that wraps: every key takes part as it is read later."""
    model = random_model(device, num_hidden_layers=2, sliding_window=window, **SIZES)
    ids = tokens(2, 9, device=device)
    attend = reference.uncached_attention(window, model.cos, model.sin, quantized=True)
    x = model.embed_tokens[ids]
    for layer in model.layers:
        x = reference.block(layer, model.config, x, attend).output
    want = reference.linear(reference.rms_norm(x, model.norm, model.config.rms_norm_eps), model.lm_head)
    for sizes in ([9], [4, 2, 1, 2]):
        got = logits_with_cache(model, ids, sizes)
        assert (got - want).norm() <= 1e-3 * want.norm(), sizes
    assert (model(ids) - want).norm() > 1e-3 * want.norm()  # without a cache nothing is quantized


@pytest.mark.parametrize("bad", [torch.int16, torch.float64, torch.float8_e4m3fn, torch.float16, "int8"])
def test_wrong_cache_dtype_raises_value_error(bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setattr(torch, "zeros", None)  # nothing is allocated
    with pytest.raises(ValueError, match=r"^generate: cache_dtype is .*, needs None or .* or torch\.int8"):
        model.generate(tokens(1, 3), 2, cache_dtype=bad)
    if bad is not torch.float16:
        with pytest.raises(ValueError, match=rf"^Mixtral\.from_pretrained: cache_dtype is {bad!r}, needs .*int8"):
            Mixtral.from_pretrained(SMALL, "meta", cache_dtype=bad)


@pytest.mark.slow
@pytest.mark.compiled
def test_perplexity_is_within_a_thousandth() -> None:
    model = Mixtral.from_pretrained(SMALL, "cpu", torch.float32)
    quantized, without = (perplexity(model, cache_dtype=cache_dtype) for cache_dtype in (torch.int8, None))
    assert 0 < abs(quantized / without - 1) < 1e-3


FAULTS = {
    "one scale for all heads": lambda scales: scales.amax(1, keepdim=True).expand_as(scales),
    "a scale for 128 codes": lambda scales: scales * 127 / 128,
}


@pytest.mark.interpreted
@pytest.mark.parametrize("fault", FAULTS)
def test_another_quantization_of_the_reference_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel and the reference agree on every code, so a difference between them shows."""
    args, plain = inputs("append", INPUTS["append"]), quantize

    def faulty(x: Tensor) -> Any:
        codes, scales = plain(x)
        return codes, FAULTS[fault](scales[None] if scales.dim() < 2 else scales).view_as(scales)

    got, want = (outputs("append", f, copies(args)) for f in (ops.append, OPS["append"].call_reference))
    assert all(map(torch.equal, got, want))
    monkeypatch.setattr(quantized_cache, "quantize", faulty)
    assert not all(map(torch.equal, got, outputs("append", OPS["append"].call_reference, args)))
