"""Remembered launches: a call alike in all traits launches what the first one did, any other call its own.

On a simulated GPU (tests/support/stub): a plan's launches are held against those of the operation itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from mixtral_triton import ops
from mixtral_triton.kernels import launch, norm, plan
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.op import LaunchConfig, Op
from mixtral_triton.kernels.quantized import QuantizedWeight
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from tests.support.stub.driver import LaunchError
from tests.verify.test_injected_faults import rewritten

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiled kernels: needs a process without TRITON_INTERPRET")

GPU_DEVICE = torch.device("cuda", 0)
NORM, LINEAR, ATTENTION = OPS["rms_norm"], OPS["linear"], OPS["attention"]


def on_fake_gpu(x: Any, device: torch.device = GPU_DEVICE) -> Any:
    return x.to(device) if isinstance(x, (Tensor, QuantizedWeight)) else x


def arguments(op: Op[..., Any], sizes: Any, seed: int = 0, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """All of a call, by place, on the GPU."""
    dtype = dtype or (torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0])
    made = op.inputs(sizes, dtype, "cpu", torch.Generator().manual_seed(seed))
    return tuple(map(on_fake_gpu, op.bind(**made)))


def tensors(args: tuple[Any, ...]) -> list[Tensor]:
    parts = [[*x.buffers()] if isinstance(x, QuantizedWeight) else [x] for x in args]
    return [x for part in parts for x in part if isinstance(x, Tensor)]


def launches(gpu: Any, call: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    """What `call(*args)` launched: kernel, grid, and each argument, of a tensor which argument of the call it is, or
    which of the memory that the call was given."""
    begin, known = len(gpu.driver.launches), [x.data_ptr() for x in tensors(args)]
    fresh: list[int] = []

    def told(x: Any) -> Any:
        if isinstance(x, TensorDescriptor):
            return "descriptor", told(x.base), tuple(x.shape), tuple(x.strides), tuple(x.block_shape), x.padding
        if not isinstance(x, Tensor):
            return x
        address = x.data_ptr()
        if address in known:
            return "argument", known.index(address), x.dtype
        fresh.extend([address] * (address not in fresh))
        return "fresh", fresh.index(address), x.dtype

    kept = call(*args)
    found = [
        (one.kernel, one.device, one.stream, one.grid, one.num_warps, {name: told(x) for name, x in one.args.items()})
        for one in gpu.driver.launches[begin:]
    ]
    del kept
    return found


def by_plan(op: Op[..., Any]) -> Callable[..., Any]:
    return lambda *args: plan.run(op, args)


def known() -> int:
    return sum(one is not None for one in plan._plans.values())


@pytest.mark.parametrize("name", OPS)
def test_a_second_call_launches_what_the_operation_would(name: str, gpu: Any) -> None:
    """Every operation at all its test shapes, with other tensors: only addresses differ, and they are the new ones."""
    gpu.driver.executes, op = False, OPS[name]
    for sizes in op.test_shapes:
        plan.run(op, arguments(op, sizes))
        args = arguments(op, sizes, seed=1)
        wanted = launches(gpu, op.run, args)
        with mock.patch.object(plan, "_watched", side_effect=AssertionError("no plan was found")):
            assert launches(gpu, by_plan(op), args) == wanted, sizes
    assert 0 < known() == len(plan._plans), "a call that is run each time"


@pytest.mark.parametrize(
    "name", ["rms_norm", "gate_route", "expert_swiglu", "rope_append_attention", "cached_attention"]
)
def test_a_second_call_computes_what_the_operation_would(name: str, gpu: Any) -> None:
    """Kernels executed, results and what is written into caches held bit for bit."""
    op = OPS[name]
    sizes = op.test_shapes[0]
    plan.run(op, arguments(op, sizes))
    first, second = (arguments(op, sizes, seed=1) for _ in range(2))
    outs = op.run(*first), plan.run(op, second)
    assert known() == 1
    for wanted, got in zip(*(out if isinstance(out, tuple) else (out,) for out in outs), strict=True):
        assert torch.equal(wanted.held, got.held)
    for wanted, got in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(wanted.held, got.held)


def strided(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same rows, farther apart."""
    x = args[0]
    return (on_fake_gpu(torch.cat((x.held, x.held), -1))[..., : x.shape[-1]], *args[1:])


def moved(args: tuple[Any, ...], bytes_on: int = 8) -> tuple[Any, ...]:
    """The second tensor at an address that is no multiple of 16."""
    x, gap = args[1].held, bytes_on // args[1].element_size()
    memory = torch.zeros(x.numel() + gap, dtype=x.dtype)
    return (args[0], on_fake_gpu(memory)[gap:].view(x.shape), *args[2:])


SIZES: dict[str, Any] = {
    "rms_norm": {"T": 4, "H": 64},
    "linear": {"T": 4, "H": 64, "N": 64},
    "attention": {"B": 2, "T": 40, "S": 40, "Hq": 4, "Hkv": 2, "D": 64, "window": 0},
}
CHANGES: dict[str, Callable[[Op[..., Any], tuple[Any, ...]], tuple[Any, ...]]] = {
    "a stride": lambda op, args: strided(args),
    "an alignment": lambda op, args: moved(args),
    "a dtype": lambda op, args: arguments(op, SIZES[op.name], dtype=torch.float32),
    "a device": lambda op, args: tuple(on_fake_gpu(x, torch.device("cuda", 1)) for x in args),
    "a shape": lambda op, args: (args[0][:, :2] if op is ATTENTION else args[0][:3], *args[1:]),
    "a number": lambda op, args: (*args[:3], 7, *args[4:]) if op is ATTENTION else (*args[:2], op is LINEAR or 0.5),
}
TRAITS = {  # what of a tensor, or of a call, a person would forget
    "a stride": "x.stride(), ",
    "an alignment": "x.data_ptr() % _ALIGNMENT",
    "a dtype": "x.dtype, ",
    "a device": "x.device, ",
    "a shape": "x.shape, ",
    "a number": "(type(x), x)",
}


def differs(gpu: Any, op: Op[..., Any], change: str) -> None:
    """A call with `change` after the usual one launches what the operation would."""
    gpu.driver.executes = False
    args = arguments(op, SIZES[op.name])
    plan.run(op, args)
    others = CHANGES[change](op, args)
    assert launches(gpu, by_plan(op), others) == launches(gpu, op.run, others)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SIZES)
def test_another_trait_is_another_plan(name: str, change: str, gpu: Any) -> None:
    differs(gpu, OPS[name], change)


@pytest.mark.parametrize("forgotten", TRAITS)
def test_a_forgotten_trait_is_caught(forgotten: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = TRAITS[forgotten]
    monkeypatch.setattr(plan, "call_key", rewritten(plan.call_key, old, "()" if old == TRAITS["a number"] else ""))
    with pytest.raises((AssertionError, LaunchError)):
        for name in SIZES:
            differs(gpu, OPS[name], forgotten)


def test_arch_and_multiprocessors_are_traits(gpu: Any) -> None:
    gpu.driver.executes, args = False, arguments(ATTENTION, SIZES["attention"] | {"T": 1, "S": 4000})
    plan.run(ATTENTION, args)
    for arch, sms in (("sm_90", 2), ("sm_90", None)):
        with launch.launch_context(arch=arch, sms=sms):
            assert launches(gpu, by_plan(ATTENTION), args) == launches(gpu, ATTENTION.run, args)
    assert known() == 3


def test_launches_that_are_chosen_or_recorded_are_their_own(gpu: Any) -> None:
    gpu.driver.executes, args = False, arguments(NORM, SIZES["rms_norm"])
    plan.run(NORM, args)
    chosen = LaunchConfig({"BLOCK_M": 1, "BLOCK_H": 64}, num_warps=2)
    with launch.override_configs({"rms_norm_kernel": chosen}):
        assert [one[4] for one in launches(gpu, by_plan(NORM), args)] == [2]
    with record_launches() as records:
        plan.run(NORM, arguments(NORM, SIZES["rms_norm"]))
    assert [one.kernel for one in records if one.grid] == ["rms_norm_kernel"]


def test_a_storage_beyond_amd_buffers_is_a_trait_there(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    small = plan.call_key((x,))
    monkeypatch.setattr(plan, "_SMALL_MOST", 16)
    assert plan.call_key((x,)) != small


def test_plans_hold_no_memory_and_are_bounded(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.driver.executes = False
    monkeypatch.setattr(plan, "PLANS_MOST", 5)
    for T in range(1, 12):
        args = arguments(ATTENTION, SIZES["attention"] | {"T": T, "S": 40 + T})
        watched = [weakref.ref(x.held) for x in (*tensors(args), plan.run(ATTENTION, args))]
        assert 1 <= len(plan._plans) <= 5
        gpu.driver.launches.clear()
        del args
        gc.collect()
        assert not [x for x in watched if x() is not None]


def test_one_tensor_given_twice_is_not_two(gpu: Any) -> None:
    """Which argument a launch's address is cannot be told then, so that nothing is remembered."""
    op, gpu.driver.executes = OPS["add_rms_norm"], False
    args = arguments(op, SIZES["rms_norm"])
    plan.run(op, (args[0], args[0], *args[2:]))
    assert not plan._plans
    assert launches(gpu, by_plan(op), args) == launches(gpu, op.run, args)


def run_each_time(gpu: Any, function: Callable[..., Any]) -> None:
    op, args = replace(NORM, run=function), arguments(NORM, SIZES["rms_norm"])
    gpu.driver.executes = False
    for _ in range(2):
        assert launches(gpu, by_plan(op), args) == launches(gpu, op.run, args)
    assert not known()


def copies(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm.rms_norm(x, weight + 1, eps)


def looks_further(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm.rms_norm(x[1:], weight, eps)


def gives_its_argument(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm.rms_norm(x, weight, eps)
    return x


def zeros_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm.rms_norm(x, torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device), eps)


@pytest.mark.parametrize("function", [copies, looks_further, gives_its_argument, zeros_first])
def test_what_a_plan_cannot_tell_is_run_each_time(function: Any, gpu: Any) -> None:
    run_each_time(gpu, function)


def test_a_launch_that_is_refused_is_refused_again(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.driver.utils.properties, "shared_memory_per_block_optin", 8)
    gpu.driver.forget()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the launch configuration .* takes \d+ of shared memory"):
            plan.run(NORM, arguments(NORM, SIZES["rms_norm"]))


def test_a_profiler_sees_remembered_launches(gpu: Any) -> None:
    gpu.driver.executes, args, seen = False, arguments(NORM, SIZES["rms_norm"]), []
    plan.run(NORM, args)
    launcher = type(gpu.driver.launches[0].launcher)
    with (
        mock.patch.object(knobs.runtime, "launch_enter_hook", seen.append),
        mock.patch.object(launcher, "__call__", lambda self, *told: told[7](told[6])),
    ):
        plan.run(NORM, args)
    assert [one.get()["name"] for one in seen] == ["rms_norm_kernel"]


def test_a_launch_goes_to_the_gpu_of_its_tensors(gpu: Any) -> None:
    gpu.driver.executes = False
    args = tuple(on_fake_gpu(x, torch.device("cuda", 1)) for x in arguments(NORM, SIZES["rms_norm"]))
    for _ in range(2):
        assert [one[1] for one in launches(gpu, by_plan(NORM), args)] == [1]
    assert torch.cuda.current_device() == 0 and known() == 1


def test_a_stream_of_the_moment_is_launched_on(gpu: Any) -> None:
    gpu.driver.executes, args = False, arguments(NORM, SIZES["rms_norm"])
    plan.run(NORM, args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert [one[2] for one in launches(gpu, by_plan(NORM), args)] == [stream.cuda_stream]


def test_the_public_way_goes_by_plans(gpu: Any) -> None:
    gpu.driver.executes, args = False, arguments(NORM, SIZES["rms_norm"])
    for call in (ops.rms_norm, ops.unchecked.rms_norm):
        call(*args)
    assert known() == 1
