"""The launch cache: a call that differs from an earlier one only in addresses and values is launched from its plan.

On a simulated GPU (tests/support/stub), a plan's launches are compared with those of the operation.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from mixtral_triton.kernels.launching import launch, relaunch
from mixtral_triton.kernels.launching.launch import LaunchConfig
from mixtral_triton.kernels.operation import plan
from mixtral_triton.kernels.operation.cases import OpWithCases
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.weights.quantized import QuantizedWeight
from mixtral_triton.kernels.weights.quantized_cache import QuantizedCache
from tests.cli.commands import python
from tests.support.calls import as_tuple
from tests.support.stub.driver import LaunchError

pytestmark = pytest.mark.compiled

NORM, LINEAR, ATTENTION = OPS["rms_norm"], OPS["linear"], OPS["attention"]
CALL_KEY = plan.call_key
GPU_0, GPU_1 = torch.device("cuda", 0), torch.device("cuda", 1)


def to_gpu(x: Any, device: torch.device = GPU_0) -> Any:
    return x.to(device) if isinstance(x, (Tensor, QuantizedWeight, QuantizedCache)) else x


def arguments(op: OpWithCases, sizes: Any, seed: int = 0, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """All arguments of a call in the order of `run`, on the GPU."""
    dtype = dtype or (torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0])
    args = op.bind(**op.inputs(sizes, dtype, "cpu", torch.Generator().manual_seed(seed)))
    return tuple(map(to_gpu, args))


def tensors(args: tuple[Any, ...]) -> list[Tensor]:
    parts = [[*x.buffers()] if isinstance(x, QuantizedWeight) else getattr(x, "tensors", [x]) for x in args]
    return [x for part in parts for x in part if isinstance(x, Tensor)]


def launches(gpu: Any, call: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    """Kernel, device, stream, grid, warps and arguments of each launch of `call(*args)`, and the results. A tensor is
    represented by its place among the tensors of the call, or among those that the call allocated."""
    start, known = len(gpu.driver.launches), [x.data_ptr() for x in tensors(args)]
    fresh: list[int] = []

    def describe(x: Any) -> Any:
        if hasattr(x, "_fields"):
            return tuple(map(describe, x))
        if isinstance(x, TensorDescriptor):
            return "descriptor", describe(x.base), tuple(x.shape), tuple(x.strides), tuple(x.block_shape), x.padding
        if not isinstance(x, Tensor):
            return x
        address = x.data_ptr()
        if address in known:
            return "argument", known.index(address), x.dtype
        fresh.extend([address] * (address not in fresh))
        return "fresh", fresh.index(address), x.dtype

    results = as_tuple(call(*args))  # kept alive, so that no address occurs twice
    found = [
        (x.kernel, x.device, x.stream, x.grid, x.num_warps, {name: describe(value) for name, value in x.args.items()})
        for x in gpu.driver.launches[start:]
    ]
    return [*found, *map(describe, results)]


def planned(op: OpWithCases) -> Callable[..., Any]:
    return lambda *args: plan.run(op, args)


def count_plans() -> int:
    return sum(cached is not None for cached in plan._plans.values())


QUICK = 3  # test shapes of an operation in the quick run
PARTS = [pytest.param(name, slice(QUICK), id=name) for name in OPS]
PARTS += [
    pytest.param(name, slice(QUICK, None), id=f"{name}, other shapes", marks=pytest.mark.slow)
    for name, op in OPS.items()
    if len(op.test_shapes) > QUICK
]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_second_call_launches_what_the_operation_would(name: str, part: slice, gpu: Any) -> None:
    """The test passes other tensors: only addresses differ, and they are the new ones."""
    gpu.driver.executes, op = False, OPS[name]
    for sizes in op.test_shapes[part]:
        plan.run(op, arguments(op, sizes))
        args = arguments(op, sizes, seed=1)
        want = launches(gpu, op.run, args)
        with mock.patch.object(plan, "_run_and_record", side_effect=AssertionError("no plan was found")):
            assert launches(gpu, planned(op), args) == want, sizes
    assert 0 < count_plans() == len(plan._plans), "a call is not cached"


def with_wider_rows(args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    return (to_gpu(torch.cat((x.held, x.held), -1))[..., : x.shape[-1]], *args[1:])


def with_misaligned_tensor(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The second tensor starts 8 bytes behind a multiple of 16."""
    x, gap = args[1].held, 8 // args[1].element_size()
    memory = torch.zeros(x.numel() + gap, dtype=x.dtype)
    return (args[0], to_gpu(memory)[gap:].view(x.shape), *args[2:])


SIZES: dict[str, Any] = {
    "rms_norm": {"T": 4, "H": 64},
    "linear": {"T": 4, "H": 64, "N": 64},
    "attention": {"B": 2, "T": 40, "S": 40, "Hq": 4, "Hkv": 2, "D": 64, "window": 0},
}
# The first five are in the order of a tensor's elements in the key.
CHANGES: dict[str, Callable[[OpWithCases, tuple[Any, ...]], tuple[Any, ...]]] = {
    "shape": lambda op, args: (args[0][:, :2] if op is ATTENTION else args[0][:3], *args[1:]),
    "stride": lambda op, args: with_wider_rows(args),
    "dtype": lambda op, args: arguments(op, SIZES[op.name], dtype=torch.float32),
    "device": lambda op, args: tuple(to_gpu(x, GPU_1) for x in args),
    "alignment": lambda op, args: with_misaligned_tensor(args),
    "number": lambda op, args: (
        (*args[:3], 7, *args[4:]) if op is ATTENTION else (*args[:2], op is LINEAR or 0.5, *args[3:])
    ),
}


def check_change(gpu: Any, op: OpWithCases, change: str) -> None:
    """A call with `change` after the usual one launches what the operation would."""
    gpu.driver.executes, args = False, arguments(op, SIZES[op.name])
    plan.run(op, args)
    changed = CHANGES[change](op, args)
    assert launches(gpu, planned(op), changed) == launches(gpu, op.run, changed)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SIZES)
def test_changed_call_has_another_plan(name: str, change: str, gpu: Any) -> None:
    check_change(gpu, OPS[name], change)


GROWTH = {"B": 1, "T": 1, "Hq": 8, "Hkv": 2, "D": 64}


def cache_of(S: int, seed: int, **more: Any) -> tuple[Any, ...]:
    """Arguments of attention over keys as transformers' DynamicCache has them: [B, heads, S, D], concatenated."""
    q, k, v, *rest = arguments(ATTENTION, GROWTH | {"S": S, "window": 0} | more, seed=seed)
    k, v = (to_gpu(x.held.transpose(1, 2).contiguous()).transpose(1, 2) for x in (k, v))
    return (q, k, v, *rest)


@pytest.mark.parametrize("more", [{}, {"window": 40}, {"ragged": True, "B": 2}, {"deterministic": True}], ids=str)
def test_attention_over_a_growing_cache_has_a_plan_for_each_number_of_splits(more: Any, gpu: Any) -> None:
    """Each length launches what the operation would; the plans are as many as the splits, not as the lengths."""
    gpu.driver.executes = False
    lengths = [*range(17, 40), 255, 256, 257, 258, 512, 513, 700, 1024, 1025]
    for S in lengths:
        args = cache_of(S, S, **more)
        assert launches(gpu, planned(ATTENTION), args) == launches(gpu, ATTENTION.run, args), S
    grown = "window" not in more
    assert count_plans() == len(plan._plans) <= (8 if grown else 4)  # S may be a multiple of 16


def test_a_growing_cache_has_plans_for_its_windows_and_alignments(gpu: Any) -> None:
    """Two windows of as many splits, and values that start 8 bytes behind a multiple of 16."""
    gpu.driver.executes = False
    for S, window, gap in product((700, 701), (40, 41), (0, 4)):
        q, k, v, *rest = cache_of(S, S, window=window)
        held = v.held.transpose(1, 2)
        v = to_gpu(torch.cat((held.new_zeros(gap), held.flatten())))[gap:].view(held.shape).transpose(1, 2)
        args = q, k, v, *rest
        assert launches(gpu, planned(ATTENTION), args) == launches(gpu, ATTENTION.run, args), (S, window, gap)


@pytest.mark.parametrize("missing", CHANGES)
def test_incomplete_key_is_caught(missing: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def incomplete(args: Any) -> tuple[Any, ...]:
        key: list[Any] = []
        for x in args:
            parts = list(CALL_KEY((x,)))
            if isinstance(x, Tensor) and missing != "number":
                del parts[[*CHANGES].index(missing)]
            key += parts if isinstance(x, Tensor) or missing != "number" else ()
        return tuple(key)

    monkeypatch.setattr(plan, "call_key", incomplete)
    with pytest.raises((AssertionError, LaunchError)):
        for name in SIZES:
            check_change(gpu, OPS[name], missing)


def test_arch_and_multiprocessors_are_in_the_key(gpu: Any) -> None:
    gpu.driver.executes, args = False, arguments(ATTENTION, SIZES["attention"] | {"T": 1, "S": 4000})
    plan.run(ATTENTION, args)
    for arch, sms in (("sm_90", 2), ("sm_90", None)):
        with launch.launch_context(arch=arch, sms=sms):
            assert launches(gpu, planned(ATTENTION), args) == launches(gpu, ATTENTION.run, args)
    assert count_plans() == 3


def test_overridden_or_recorded_launches_use_no_plan(gpu: Any) -> None:
    gpu.driver.executes, args = False, arguments(NORM, SIZES["rms_norm"])
    plan.run(NORM, args)
    override = LaunchConfig({"BLOCK_M": 1, "BLOCK_H": 64}, num_warps=2)
    with launch.override_configs({"rms_norm_kernel": override}):
        assert launches(gpu, planned(NORM), args)[0][4] == 2
    with record_launches() as records:
        plan.run(NORM, arguments(NORM, SIZES["rms_norm"]))
    assert [x.kernel for x in records if x.grid] == ["rms_norm_kernel"]


def test_storage_beyond_amd_buffers_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    small = plan.call_key((x,))
    monkeypatch.setattr(plan, "_BUFFER_MAX", 16)
    assert plan.call_key((x,)) != small


@pytest.mark.slow
def test_plans_hold_no_memory_and_are_bounded(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.driver.executes = False
    monkeypatch.setattr(plan, "PLANS_MAX", 5)
    for T in range(1, 12):
        args = arguments(ATTENTION, SIZES["attention"] | {"T": T, "S": 40 + T})
        references = [weakref.ref(x.held) for x in (*tensors(args), plan.run(ATTENTION, args))]
        assert 1 <= len(plan._plans) <= 5
        gpu.driver.launches.clear()
        gpu.work.clear()
        del args
        gc.collect()
        assert not [x for x in references if x() is not None]


def test_tensor_that_is_two_arguments_is_not_cached(gpu: Any) -> None:
    """Its address does not identify an argument."""
    op, gpu.driver.executes = OPS["add_rms_norm"], False
    args = arguments(op, SIZES["rms_norm"])
    plan.run(op, (args[0], args[0], *args[2:]))
    assert not plan._plans
    assert launches(gpu, planned(op), args) == launches(gpu, op.run, args)


UNREPEATABLE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "copies": lambda x, weight, eps, *_: NORM.run(x, weight + 1, eps),
    "reads from the second row": lambda x, weight, eps, *_: NORM.run(x[1:], weight, eps),
    "returns its argument": lambda x, weight, eps, *_: (NORM.run(x, weight, eps), x)[1],
    "fills with zeros": lambda x, weight, eps, *_: NORM.run(x, torch.zeros_like(weight), eps),
}


@pytest.mark.parametrize("function", UNREPEATABLE)
def test_call_that_no_plan_can_repeat_is_not_cached(function: str, gpu: Any) -> None:
    op, args = replace(NORM, run=UNREPEATABLE[function]), arguments(NORM, SIZES["rms_norm"])
    gpu.driver.executes = False
    for _ in range(2):
        assert launches(gpu, planned(op), args) == launches(gpu, op.run, args)
    assert not count_plans()


def test_without_private_calls_the_jit_launches_each_time_and_warns_once(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaunch, "OF_KERNEL", (*relaunch.OF_KERNEL, "run_of_another_version"))
    gpu.driver.executes, args = False, arguments(NORM, SIZES["rms_norm"])
    with pytest.warns(UserWarning, match=r"Triton .* have no run_of_another_version") as warned:
        for _ in range(2):
            assert launches(gpu, planned(NORM), args) == launches(gpu, NORM.run, args)
        plan.run(LINEAR, arguments(LINEAR, SIZES["linear"]))
    assert not count_plans() and sum("have no" in str(each.message) for each in warned) == 1


@pytest.mark.slow
def test_package_is_imported_without_what_is_private_in_the_interpreter() -> None:
    """What the corrections replace, and the whole module, may be missing where kernels are compiled."""
    for change in ("del interpreter._get_np_dtype, interpreter.InterpreterOptions", "sys.modules[name] = None"):
        code = f"import sys; from triton.runtime import interpreter; name = interpreter.__name__; {change}"
        done = python("-c", f"{code}; del sys.modules['triton.runtime'].interpreter; import mixtral_triton.ops")
        assert done.returncode == 0, done.stderr


def test_rejected_launch_is_rejected_again(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.properties, "shared_memory_per_block_optin", 8)
    gpu.driver.forget()
    for _ in range(2):  # Triton finds it after it has compiled
        with pytest.raises(ValueError, match=r"rms_norm_kernel: the launch configuration .* takes \d+ of shared"):
            plan.run(NORM, arguments(NORM, SIZES["rms_norm"]))


def test_profiler_sees_planned_launches(gpu: Any) -> None:
    gpu.driver.executes, args, entered = False, arguments(NORM, SIZES["rms_norm"]), []
    plan.run(NORM, args)
    launcher = type(gpu.driver.launches[0].launcher)
    with (
        mock.patch.object(knobs.runtime, "launch_enter_hook", entered.append),
        mock.patch.object(launcher, "__call__", lambda self, *args: args[7](args[6])),
    ):
        plan.run(NORM, args)
    assert [x.get()["name"] for x in entered] == ["rms_norm_kernel"]


def test_launch_goes_to_the_current_stream(gpu: Any) -> None:
    gpu.driver.executes, args = False, arguments(NORM, SIZES["rms_norm"])
    plan.run(NORM, args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert launches(gpu, planned(NORM), args)[0][2] == stream.cuda_stream
