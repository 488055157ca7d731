"""What a layer costs beside its arithmetic, of three layers minus two: device kernels at Mixtral 8x7B's sizes, recorded
on meta tensors; Python calls of the host between launches."""

import cProfile
import inspect
import itertools
import pstats
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton import KVCache, Mixtral, MixtralConfig, ops
from mixtral_triton.checkpoint.tensors import parameter_shapes
from mixtral_triton.kernels.operation import plan
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.quantize import select_specs
from tests.cli.commands import ROOT
from tests.support.models import WIDER_SIZES, cache_of, random_model

BATCHES = (1, 4, 32, 64, 200)
# Phase, tokens, and the most launches of a layer: Triton's, and all with torch's.
PHASES = [("decode", 1, 8, 8), ("prefill", 512, 8, 10)]


def of_a_layer(count: Callable[[int], Counter[Any]]) -> Counter[Any]:
    return count(3) - count(2)


def record(B: int, T: int, layers: int, cache: Any = torch.bfloat16, weights: Any = None, **options: Any) -> Counter:
    """Kernels of one forward of B x T tokens behind a cache; torch's are named aten::*."""
    sizes = options.pop("config", {})
    config = MixtralConfig(
        num_hidden_layers=layers, rope_theta=1e6, sliding_window=options.pop("window", None), **sizes
    )
    specs = select_specs(weights, parameter_shapes(config))
    activations = options.pop("activations", None)
    model = Mixtral(config, device="meta", specs=specs, **options)
    model.activations = activations
    kv_cache = KVCache(config, batch=B, max_len=8192, device="meta", dtype=cache)
    with record_launches() as launches:
        model.hidden(torch.zeros(B, T, dtype=torch.int64, device="meta"), kv_cache)
    return Counter(launch.kernel for launch in launches)


OPTIONS = [{"window": window, "deterministic": True} for window in (None, 4096)]
OPTIONS += [{"window": None}, {"window": 4096}]
OPTIONS += [{"cache": torch.int8}]
OPTIONS += [{"weights": {"experts": each, "linear": each}} for each in ("int4", "int8", "fp8")]
OPTIONS += [{"weights": {"experts": "fp8", "linear": "fp8"}, "activations": "fp8"}]


@pytest.mark.compiled
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("phase", "T", "triton_max", "total_max"), PHASES)
def test_launches_per_layer(phase: str, T: int, triton_max: int, total_max: int, options: Any, covers: Any) -> None:
    """Deterministic decode uses the kernels of prefill and no library, whose products would depend on the batch. In
    prefill Triton also computes attention's products with quantized weights, which the library lacks."""
    if "deterministic" in options or ("weights" in options and T > 1):
        triton_max, total_max = 10, 10
    if (
        "activations" in options
    ):  # one for each of the four products quantizes its rows, in a step of many sequences, too
        triton_max, total_max = 14, 14
    if "cache" in options and T > 1:  # a launch quantizes the chunk
        triton_max, total_max = triton_max + 1, total_max + 1
    layers = [of_a_layer(partial(record, B, T, **options)) for B in BATCHES]
    outside = record(BATCHES[1], T, 2, **options) - Counter({name: 2 * n for name, n in layers[1].items()})
    assert [name for name in outside if "::" not in name] == ["embed_rms_norm_kernel"]
    triton = max(sum(count for name, count in kernels.items() if "::" not in name) for kernels in layers)
    total = max(kernels.total() for kernels in layers)
    assert triton <= triton_max and total <= total_max, layers
    batches = ", ".join(map(str, BATCHES))
    covers("launches", f"{phase}, {options}: at most {triton} Triton, {total} in all, a layer; batch {batches}")


def test_additional_launch_is_caught(monkeypatch: pytest.MonkeyPatch, covers: Any) -> None:
    """The fault is a separate norm before the gate."""

    def separate(
        x: Any, residual: Any, weight: Any, eps: float, gate: Any, top_k: int, deterministic: bool, **_: Any
    ) -> Any:
        y, total = ops.rms_norm(x, weight, eps, residual)
        return y, total, *ops.gate_route(y, gate, top_k, deterministic)

    monkeypatch.setattr(ops.rms_norm_gate_route, "unchecked", separate)
    for phase in PHASES:
        with pytest.raises(AssertionError, match="'rms_norm_kernel': 1"):
            test_launches_per_layer(*phase, {}, covers)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_within_an_operation_are_recorded(mode: Any) -> None:
    """There, and in inference mode everywhere, `contiguous` and `reshape` are not yet `clone`."""
    x, weight = torch.empty(64, 4, device="meta").t(), torch.empty(64, device="meta")
    with mode(), record_launches() as launches:
        ops.rms_norm(x, weight, 1e-5)
        ops.rms_norm.unchecked(x, weight, 1e-5)
        x.reshape(256)
        x.reshape(2, 2, 64), weight.contiguous(), weight.to(torch.float32)  # views
    assert [launch.kernel.startswith("aten::") for launch in launches] == [True, False, True, False, True]


PACKAGE = (str(ROOT / "kernels"), str(ROOT / "mixtral_triton"))
CALLS_MAX = 80  # of this package's functions, a decode layer


def count_calls(T: int, layers: int) -> Counter[tuple[str, str]]:
    """Calls of this package's functions and of Triton's descriptors, by file and name, in a forward of T tokens whose
    launches are cached."""
    model = random_model("cuda", torch.bfloat16, num_hidden_layers=layers, **WIDER_SIZES)
    step = partial(model, torch.zeros(1, T, dtype=torch.int64).to("cuda"), cache=cache_of(model, 1, 512))
    step()
    profile, calls = cProfile.Profile(), Counter[tuple[str, str]]()
    profile.runcall(step)
    for (file, _, name), (_, count, *_) in pstats.Stats(profile).stats.items():
        if file.startswith(PACKAGE) or file.endswith("tensor_descriptor.py"):
            calls[Path(file).name, name] += count
    return calls


def test_decode_layer_uses_cached_launches(gpu: Any, covers: Any) -> None:
    gpu.driver.executes = False
    calls = of_a_layer(partial(count_calls, 1))
    functions = [inspect.unwrap(op.run) for op in OPS.values()]
    runs = {(Path(run.__code__.co_filename).name, run.__name__) for run in functions}
    assert not [name for name in calls if name in runs or name[1] in ("configs", "launch", "__post_init__")], calls
    assert calls.total() <= CALLS_MAX, calls
    covers("host", f"a decode layer: {calls.total()} calls of the package's functions")


def test_missing_plans_are_caught(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.driver.executes, numbers, call_key = False, itertools.count(), plan.call_key
    monkeypatch.setattr(plan, "call_key", lambda *args: (*call_key(*args), next(numbers)))
    calls = of_a_layer(partial(count_calls, 1))
    assert calls.total() > 2 * CALLS_MAX and any(name[1] == "configs" for name in calls)
