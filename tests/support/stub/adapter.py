"""What the simulated GPU and the PTX emulator know of this project. Their other files run any Triton program."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mixtral_triton.bench import measure
from mixtral_triton.kernels.launching.interpret import interpreting as interpreting
from mixtral_triton.kernels.launching.launch import INTERPRETED as INTERPRETED
from mixtral_triton.kernels.operation import call, plan
from mixtral_triton.kernels.operation.torch_operator import unflatten_args
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.weights import offload
from mixtral_triton.kernels.weights.weight_args import Layout as Layout
from mixtral_triton.model import cuda_graph
from tests.support.calls import find_weight

OPERATORS = "mixtral_triton"  # the namespace of the project's operators, which have no kernel for simulated tensors
forget_launches = plan.clear  # remembered launches are of one driver


def call_operator(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator of the project as a caller of its Python function does."""
    op = OPS[name]
    return call.call_checked(op, op.bind(*unflatten_args(op.arguments, args), **kwargs))


def memories_of(table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return where the experts lie whose addresses a table holds: those on the device, and in host memory or a copy."""
    weight = find_weight(table)
    return getattr(table, "memories", ()) if weight is None else (weight.resident, weight.host)


def patches(tensor_class: type, call_runtime: Callable[..., int]) -> list[tuple[Any, str, Any]]:
    """Return what to patch while GPUs are simulated: module, name, value."""
    runtime = [(cuda_graph, "_call_runtime", call_runtime), (offload, "call_runtime", call_runtime)]
    runtime += [(cuda_graph, "_streams", {}), (cuda_graph, "_pools", defaultdict(list))]
    return [(call, "PLAIN_TYPES", (*call.PLAIN_TYPES, tensor_class)), *runtime]


def small_benchmarks() -> dict[str, Any]:
    """Return small values for what benchmarks make large, or repeat because of a real GPU's clocks: of `measure`."""
    measure_gpu = partial(measure.measure_gpu, memory=1 << 12, n=16)
    return {"time_call": partial(measure.wall_seconds, device="cuda"), "measure_gpu": measure_gpu}
