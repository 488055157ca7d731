"""Device kernels per layer at Mixtral 8x7B's sizes, recorded on meta tensors: three layers minus two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from mixtral_triton import KVCache, Mixtral, MixtralConfig, ops
from mixtral_triton.generate import sample
from mixtral_triton.kernels import launch
from mixtral_triton.kernels.op import LaunchConfig
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.quantize.spec import select_specs
from mixtral_triton.weights import parameter_shapes

BATCHES = (1, 4, 32, 64, 200)
SYNCS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}
# Phase, tokens, and the most launches of a layer: Triton's, and all with torch's.
PHASES = [("decode", 1, 8, 8), ("prefill", 512, 8, 10)]


def make_model(layers: int, window: int | None = None, deterministic: bool = False, weights: Any = None) -> Mixtral:
    config = MixtralConfig(num_hidden_layers=layers, rope_theta=1e6, sliding_window=window)
    specs = select_specs(weights, parameter_shapes(config))
    return Mixtral(config, device="meta", deterministic=deterministic, specs=specs)


def record(model: Mixtral, B: int, T: int, head: Callable[[Any], Any] = lambda h: h) -> Counter[str]:
    """Kernels of one forward of B x T tokens behind a cache; torch's are named aten::*."""
    cache = KVCache(model.config, batch=B, max_len=8192, device="meta", dtype=torch.bfloat16)
    with record_launches() as launches:
        head(model.hidden(torch.zeros(B, T, dtype=torch.int64, device="meta"), cache))
    return Counter(launch.kernel for launch in launches)


def count_launches(T: int, **options: Any) -> tuple[int, int, list[Counter[str]]]:
    """The most launches of a layer in any batch: Triton's, and all; and the kernels."""
    two, three = (make_model(layers, **options) for layers in (2, 3))
    layers = [record(three, B, T) - record(two, B, T) for B in BATCHES]
    triton = [sum(count for name, count in kernels.items() if "::" not in name) for kernels in layers]
    return max(triton), max(kernels.total() for kernels in layers), layers


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize(("phase", "T", "triton_max", "total_max"), PHASES)
def test_launches_per_layer(
    phase: str, T: int, triton_max: int, total_max: int, window: int | None, deterministic: bool, covers: Any
) -> None:
    """Deterministic decode uses the kernels of prefill and no library, whose products would depend on the batch."""
    limits = (10, 10) if deterministic else (triton_max, total_max)
    triton, total, kernels = count_launches(T, window=window, deterministic=deterministic)
    assert triton <= limits[0] and total <= limits[1], kernels
    case = f"{phase}, window {window}{', deterministic' * deterministic}"
    batches = ", ".join(map(str, BATCHES))
    covers("launches", f"{case}: at most {triton} Triton, {total} in all, a layer; batch {batches}")


def test_additional_launch_is_caught(monkeypatch: pytest.MonkeyPatch, covers: Any) -> None:
    """The fault is a separate norm before the gate."""

    def separate(x: Any, residual: Any, weight: Any, eps: float, gate: Any, top_k: int, deterministic: bool) -> Any:
        y, total = ops.rms_norm(x, weight, eps, residual)
        return y, total, *ops.gate_route(y, gate, top_k, deterministic)

    monkeypatch.setattr(ops.unchecked, "rms_norm_gate_route", staticmethod(separate))
    for phase in PHASES:
        with pytest.raises(AssertionError, match="'rms_norm_kernel': 1"):
            test_launches_per_layer(*phase, None, False, covers)


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("T", "triton_max", "total_max"), [(1, 8, 8), (512, 10, 10)])
def test_launches_per_layer_of_quantized_weights(T: int, triton_max: int, total_max: int, format: str) -> None:
    """In prefill Triton also computes attention's products, which the library lacks for these weights."""
    triton, total, kernels = count_launches(T, weights={"experts": format, "linear": format})
    assert triton <= triton_max and total <= total_max, kernels


def synchronizes(head: Callable[[Any], Any]) -> bool:
    """Whether a step that ends in `head` reads a value from the device: a meta tensor has none."""
    try:
        kernels = record(make_model(2), 4, 1, head)
    except (RuntimeError, NotImplementedError):
        return True
    return any(name.removeprefix("aten::") in SYNCS for name in kernels)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_decode_step_never_waits_for_the_device(temperature: float) -> None:
    head = make_model(1).head
    assert not synchronizes(lambda h: sample(head(h[:, 0]), temperature, 0.9))


@pytest.mark.parametrize(
    "function", [torch.nonzero, torch.Tensor.cpu, lambda h: h.sum().item(), lambda h: torch.equal(h, h)]
)
def test_synchronization_is_caught(function: Any) -> None:
    assert synchronizes(function)


class TooLarge:
    """A compiled kernel that needs more than any GPU has."""

    __name__, arg_names = "large_kernel", ("BLOCK_M", "BLOCK_N")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(**arguments: Any) -> None:
            raise OutOfResources(300_000, 232_448, "shared memory")

        return run


def test_configuration_beyond_shared_memory_raises_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    config = LaunchConfig({"BLOCK_M": 256, "BLOCK_N": 512}, num_warps=8, num_stages=4)
    sizes = "BLOCK_M 256, BLOCK_N 512, 8 warps and 4 stages takes 300000 of shared memory.*232448"
    with pytest.raises(ValueError, match=f"large_kernel: the launch configuration {sizes}"):
        launch.launch(TooLarge(), (1,), {}, config)
