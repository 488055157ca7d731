"""Device kernels a layer, recorded on meta tensors at Mixtral 8x7B's sizes: the difference of three layers and two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from mixtral_triton import KVCache, Mixtral, MixtralConfig, ops
from mixtral_triton.generate import sample
from mixtral_triton.kernels import launch as door
from mixtral_triton.kernels.op import LaunchConfig
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.quantize.spec import select_specs
from mixtral_triton.weights import parameter_shapes

BATCHES = (1, 4, 32, 64, 200)
SYNCS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}


def model(layers: int, window: int | None, deterministic: bool = False, weights: Any = None) -> Mixtral:
    config = MixtralConfig(num_hidden_layers=layers, rope_theta=1e6, sliding_window=window)
    specs = select_specs(weights, parameter_shapes(config))
    return Mixtral(config, device="meta", deterministic=deterministic, specs=specs)


def recorded(mixtral: Mixtral, B: int, T: int, then: Callable[[Any], Any] = lambda h: h) -> Counter[str]:
    """Kernels of one forward of B x T tokens behind a cache, torch's own as aten::*."""
    cache = KVCache(mixtral.config, batch=B, max_len=8192, device="meta", dtype=torch.bfloat16)
    with record_launches() as launches:
        then(mixtral.hidden(torch.zeros(B, T, dtype=torch.int64, device="meta"), cache))
    return Counter(launch.kernel for launch in launches)


def ours(kernels: Counter[str]) -> int:
    return sum(count for name, count in kernels.items() if "::" not in name)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize(("phase", "T", "own", "every"), [("decode", 1, 8, 8), ("prefill", 512, 8, 10)])
def test_launches_a_layer(
    phase: str, T: int, own: int, every: int, window: int | None, deterministic: bool, covers: Any
) -> None:
    """At most 8 with torch's in decode, 10 in prefill, whatever the batch is.

    Deterministic decode goes prefill's way, and all of that is ours: a library's products would not do.
    """
    own, every = (10, 10) if deterministic else (own, every)
    two, three = (model(layers, window, deterministic) for layers in (2, 3))
    a_layer = [recorded(three, B, T) - recorded(two, B, T) for B in BATCHES]
    most, in_all = max(map(ours, a_layer)), max(kernels.total() for kernels in a_layer)
    assert most <= own and in_all <= every, a_layer
    what = f"{phase}, window {window}{', deterministic' * deterministic}"
    batches = ", ".join(map(str, BATCHES))
    covers("launches", f"{what}: at most {most} Triton, {in_all} in all, a layer; batch {batches}")


def test_a_second_launch_is_caught(monkeypatch: pytest.MonkeyPatch, covers: Any) -> None:
    """A norm of its own in front of the gate."""

    def apart(x: Any, residual: Any, weight: Any, eps: float, gate: Any, top_k: int, deterministic: bool) -> Any:
        y, total = ops.rms_norm(x, weight, eps, residual)
        return y, total, *ops.gate_route(y, gate, top_k, deterministic)

    monkeypatch.setattr(ops.unchecked, "rms_norm_gate_route", staticmethod(apart))
    for phase, T, own, every in (("decode", 1, 8, 8), ("prefill", 512, 8, 10)):
        with pytest.raises(AssertionError, match="'rms_norm_kernel': 1"):
            test_launches_a_layer(phase, T, own, every, None, False, covers)


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("phase", "T", "own", "every"), [("decode", 1, 8, 8), ("prefill", 512, 10, 10)])
def test_quantized_weights_take_no_more_launches(phase: str, T: int, own: int, every: int, format: str) -> None:
    """In prefill two more are ours: the library's products of attention, which it has not for these weights."""
    two, three = (model(n, None, weights={"experts": format, "linear": format}) for n in (2, 3))
    a_layer = [recorded(three, B, T) - recorded(two, B, T) for B in BATCHES]
    assert max(map(ours, a_layer)) <= own and max(kernels.total() for kernels in a_layer) <= every, a_layer


def waits(then: Callable[[Any], Any]) -> bool:
    """Whether a step that ends in `then` asks the device for a value: what is on the meta device has none to give."""
    try:
        kernels = recorded(model(2, None), 4, 1, then)
    except (RuntimeError, NotImplementedError):
        return True
    return any(name.removeprefix("aten::") in SYNCS for name in kernels)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_decode_step_never_waits_for_the_device(temperature: float) -> None:
    head = model(1, None).head
    assert not waits(lambda h: sample(head(h[:, 0]), temperature, 0.9))


@pytest.mark.parametrize(
    "wait", [torch.nonzero, torch.Tensor.cpu, lambda h: h.sum().item(), lambda h: torch.equal(h, h)]
)
def test_a_wait_is_caught(wait: Any) -> None:
    assert waits(wait)


class TooLarge:
    """A compiled kernel that asks for more than any GPU has."""

    __name__, arg_names = "large_kernel", ("BLOCK_M", "BLOCK_N")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(**arguments: Any) -> None:
            raise OutOfResources(300_000, 232_448, "shared memory")

        return run


def test_a_configuration_that_does_not_fit_is_refused_with_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "INTERPRETED", False)
    config = LaunchConfig({"BLOCK_M": 256, "BLOCK_N": 512}, num_warps=8, num_stages=4)
    sizes = "BLOCK_M 256, BLOCK_N 512, 8 warps and 4 stages takes 300000 of shared memory.*232448"
    with pytest.raises(ValueError, match=f"large_kernel: the launch configuration {sizes}"):
        door.launch(TooLarge(), (1,), {}, config)
