"""Calls of operations in tests: their arguments, copies of these, and their results as one list."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend
from triton.tools.tensor_descriptor import TensorDescriptor

from mixtral_triton.kernels.launching.kernel_args import flatten
from mixtral_triton.kernels.launching.launch import LaunchConfig, override_configs
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.weights import offload
from mixtral_triton.kernels.weights.offload import OffloadedWeight
from mixtral_triton.kernels.weights.quantized import QuantizedWeight
from mixtral_triton.kernels.weights.quantized_cache import QuantizedCache

Args = dict[str, Any]
Sizes = Any  # a case of an operation, or a mapping of its fields


def selected_configs(
    name: str, sizes: Sizes, dtype: torch.dtype, arch: str = "sm_90", **changes: Any
) -> dict[str, LaunchConfig]:
    """The launch configurations of a call, by kernel; `changes`: other arguments."""
    with override_configs({}) as used, record_launches(arch):
        OPS[name].run(**inputs(name, sizes, "meta", dtype) | changes)
    return used


@contextmanager
def compilations() -> Iterator[list[tuple[str, threading.Thread]]]:
    """Record the kernels that Triton compiles for NVIDIA's GPUs within the block, and the threads that do."""
    compiled, make_cubin = list[tuple[str, threading.Thread]](), CUDABackend.make_cubin

    def record(self: Any, src: Any, metadata: Any, *args: Any) -> Any:
        compiled.append((metadata["name"], threading.current_thread()))
        return make_cubin(self, src, metadata, *args)

    with mock.patch.object(CUDABackend, "make_cubin", record):
        yield compiled


def inputs(name: str, sizes: Sizes, device: Any = "cpu", dtype: torch.dtype | None = None) -> Args:
    op = OPS[name]
    return op.inputs(sizes, dtype or op.dtypes[0], device, torch.Generator().manual_seed(0))


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def inputs_without_padding(name: str, sizes: Sizes, device: Any = "cpu", dtype: torch.dtype | None = None) -> Args:
    """`inputs` whose chunks have no padding, for which results are undefined."""
    args = inputs(name, sizes, device, dtype)
    return args | ({"new": args["new"] * 0 + args["q"].shape[1]} if name == "cached_attention" else {})


def tensors(args: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a call by name, and its caches of 8 bits."""
    return {name: value for name, value in args.items() if isinstance(value, (Tensor, QuantizedCache))}


def copies(args: Args) -> Args:
    return args | {name: value.clone() for name, value in tensors(args).items()}


def dense(x: Any) -> Tensor:
    return x.dequantize() if isinstance(x, QuantizedCache) else x


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else () if out is None else (out,)


def outputs(name: str, function: Callable[..., Any], args: Args) -> list[Tensor]:
    """Call `function` on copies of `args`; return its results and the caches that the operation writes into."""
    args = copies(args)
    return [*as_tuple(function(**args)), *(dense(args[cache]) for cache in OPS[name].mutates)]


def tensors_of_launch(args: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among a launch's arguments by path, including the bases of descriptors."""
    found = ((path, arg.base if isinstance(arg, TensorDescriptor) else arg) for path, arg in flatten(args))
    return {path: x for path, x in found if isinstance(x, Tensor)}


def _replace_values(args: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with those of these paths replaced."""

    def replaced(path: str, value: Any) -> Any:
        if not hasattr(value, "_fields"):
            return values.get(path, value)
        return type(value)(*(replaced(f"{path}.{name}", part) for name, part in value._asdict().items()))

    return {name: replaced(name, value) for name, value in args.items()}


def replace_tensors(args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Args:
    """Return the arguments of a launch with other tensors by path; a descriptor describes the other one."""
    known = dict(flatten(args))
    described = {path: arg for path, arg in known.items() if isinstance(arg, TensorDescriptor)}
    others = {path: replace(described[path], base=x) if path in described else x for path, x in tensors.items()}
    return _replace_values(args, others)


def memory_of(tensor: Tensor) -> Tensor:
    """Return all elements in memory from the tensor's first to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))


def offloaded(weight: Any, on_host: Any) -> OffloadedWeight:
    """A copy of a stacked weight, on its device, with these experts in host memory."""
    quantized = isinstance(weight, QuantizedWeight)
    like = weight.spec.empty(weight.shape, "meta") if quantized else weight.to("meta")
    copy = OffloadedWeight(like, on_host, weight.device)
    for expert, rows in enumerate(weight.data if weight.device.type != "meta" else ()):
        copy.rows(expert).copy_(rows)
    for name in ("scales", "zeros") if quantized else ():
        if getattr(weight, name) is not None:
            getattr(copy, name).copy_(getattr(weight, name))
    return copy


def with_offload(args: Args, on_host: Any) -> Args:
    """Arguments of `expert_swiglu` whose weights have these experts in host memory."""
    return args | {name: offloaded(args[name], on_host) for name in ("gate_up_proj", "down_proj")}


def find_weight(table: torch.Tensor) -> Any:
    """Return the OffloadedWeight that this table of addresses belongs to; None for another tensor."""
    return next((weight for weight in offload._weights.values() if weight.data is table), None)


def operand_name(path: str) -> str:
    """Return the path of an argument without its ending: of x_ptr, x.ptr and x_desc, "x"."""
    return path.removesuffix("ptr").removesuffix("desc").rstrip("._")
