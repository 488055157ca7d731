"""Device kernels per layer at Mixtral 8x7B's sizes, recorded on meta tensors: three layers minus two."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from mixtral_triton import KVCache, Mixtral, MixtralConfig, ops
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.quantize import select_specs
from mixtral_triton.weights import parameter_shapes

BATCHES = (1, 4, 32, 64, 200)
# Phase, tokens, and the most launches of a layer: Triton's, and all with torch's.
PHASES = [("decode", 1, 8, 8), ("prefill", 512, 8, 10)]


def make_model(layers: int, window: int | None = None, deterministic: bool = False, weights: Any = None) -> Mixtral:
    config = MixtralConfig(num_hidden_layers=layers, rope_theta=1e6, sliding_window=window)
    specs = select_specs(weights, parameter_shapes(config))
    return Mixtral(config, device="meta", deterministic=deterministic, specs=specs)


def record(model: Mixtral, B: int, T: int, dtype: torch.dtype) -> Counter[str]:
    """Kernels of one forward of B x T tokens behind a cache; torch's are named aten::*."""
    cache = KVCache(model.config, batch=B, max_len=8192, device="meta", dtype=dtype)
    with record_launches() as launches:
        model.hidden(torch.zeros(B, T, dtype=torch.int64, device="meta"), cache)
    return Counter(launch.kernel for launch in launches)


def count_launches(T: int, **options: Any) -> tuple[int, int, list[Counter[str]]]:
    """The most launches of a layer in any batch: Triton's, and all; and the kernels."""
    dtype = options.pop("cache", torch.bfloat16)
    two, three = (make_model(layers, **options) for layers in (2, 3))
    layers = [record(three, B, T, dtype) - record(two, B, T, dtype) for B in BATCHES]
    triton = [sum(count for name, count in kernels.items() if "::" not in name) for kernels in layers]
    return max(triton), max(kernels.total() for kernels in layers), layers


OPTIONS = [{"window": window, "deterministic": True} for window in (None, 4096)]
OPTIONS += [{"window": None}, {"window": 4096}]
OPTIONS += [{"cache": torch.int8}]
OPTIONS += [{"weights": {"experts": each, "linear": each}} for each in ("int4", "int8", "fp8")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("phase", "T", "triton_max", "total_max"), PHASES)
def test_launches_per_layer(phase: str, T: int, triton_max: int, total_max: int, options: Any, covers: Any) -> None:
    """Deterministic decode uses the kernels of prefill and no library, whose products would depend on the batch. In
    prefill Triton also computes attention's products with quantized weights, which the library lacks."""
    if "deterministic" in options or ("weights" in options and T > 1):
        triton_max, total_max = 10, 10
    if "cache" in options and T > 1:  # a launch quantizes the chunk
        triton_max, total_max = triton_max + 1, total_max + 1
    triton, total, kernels = count_launches(T, **options)
    assert triton <= triton_max and total <= total_max, kernels
    batches = ", ".join(map(str, BATCHES))
    covers("launches", f"{phase}, {options}: at most {triton} Triton, {total} in all, a layer; batch {batches}")


def test_additional_launch_is_caught(monkeypatch: pytest.MonkeyPatch, covers: Any) -> None:
    """The fault is a separate norm before the gate."""

    def separate(x: Any, residual: Any, weight: Any, eps: float, gate: Any, top_k: int, deterministic: bool) -> Any:
        y, total = ops.rms_norm(x, weight, eps, residual)
        return y, total, *ops.gate_route(y, gate, top_k, deterministic)

    monkeypatch.setattr(ops.rms_norm_gate_route, "unchecked", separate)
    for phase in PHASES:
        with pytest.raises(AssertionError, match="'rms_norm_kernel': 1"):
            test_launches_per_layer(*phase, {}, covers)
