"""A driver for Triton where there is no GPU: its own JIT runs up to the launch, which is checked instead of made.

Binder, specialization, compiler (ptxas included) and cache are Triton's. The launcher holds each launch against what
CUDA would demand, and, where asked, has Triton's interpreter do the kernel's work on the tensors' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.compiler.compiler import max_shared_mem
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from mixtral_triton.kernels import plan
from mixtral_triton.kernels.interpret import interpreting

from .tensors import stage

GRID_MOST = (2**31 - 1, 65535, 65535)
THREADS_MOST = 1024
BOX_MOST = 256  # elements a dimension of a TMA box
RANK_MOST = 5
SWIZZLE_SPANS = (None, 32, 64, 128)  # bytes, by cuTensorMap's number of the swizzle


class LaunchError(RuntimeError):
    """What CUDA would answer to a launch."""


@dataclass(frozen=True)
class Launched:
    """A launch that took the JIT's way."""

    kernel: str
    device: int
    stream: int
    grid: tuple[int, int, int]
    num_warps: int
    shared: int
    args: Mapping[str, Any] = field(repr=False)
    launcher: Launcher = field(repr=False, compare=False)
    binary: bytes = field(default=b"", repr=False, compare=False)

    @property
    def ptx(self) -> str:
        return self.binary.decode()

    def compiled(self) -> Any:
        """The compiled kernel: `compiled()[grid](*args)` launches it without the JIT's look at its arguments."""
        (found,) = (
            kernel
            for cache, *_ in self.launcher.fn.device_caches.values()
            for kernel in cache.values()
            if kernel._run is self.launcher
        )
        return found


def check_grid(grid: Sequence[int]) -> None:
    for axis, n, most in zip("xyz", grid, GRID_MOST, strict=True):
        if not 1 <= n <= most:
            raise LaunchError(f"invalid argument: grid.{axis} is {n}, needs 1..{most}")


def check_descriptor(name: str, descriptor: TensorDescriptor, meta: Mapping[str, Any]) -> None:
    """What `cuTensorMapEncodeTiled` demands of a tensor and of the box that one copy fetches."""
    base, size = descriptor.base.data_ptr(), descriptor.base.element_size()
    box, rank = meta["block_size"], len(descriptor.shape)
    span = SWIZZLE_SPANS[meta["swizzle"]]
    faults = {
        f"rank {rank}, needs 1..{RANK_MOST}": not 1 <= rank <= RANK_MOST,
        f"base {base:#x}, needs a multiple of 16 bytes": base % 16 != 0,
        f"sizes {list(descriptor.shape)}, needs 1..2^32 each": any(not 1 <= n <= 2**32 for n in descriptor.shape),
        f"strides {list(descriptor.strides)}, needs multiples of 16 bytes below 2^40, the last one element": any(
            not 0 < stride * size < 2**40 or stride * size % 16 for stride in descriptor.strides[:-1]
        )
        or descriptor.strides[-1] != 1,
        f"box {list(box)}, needs 1..{BOX_MOST} each": any(not 1 <= n <= BOX_MOST for n in box),
        f"box {list(box)} of {rank} dimensions, needs as many as the tensor": len(box) != rank,
        f"inner box of {box[-1] * size} bytes, needs a multiple of 16": box[-1] * size % 16 != 0,
        f"inner box of {box[-1] * size} bytes, needs at most its swizzle's {span}": span is not None
        and box[-1] * size > span,
    }
    if found := [what for what, wrong in faults.items() if wrong]:
        raise LaunchError(f"cuTensorMapEncodeTiled refuses {name}: {found[0]}")


class Launcher:
    """What Triton makes of a compiled kernel: called with a grid, a stream, hooks and all bound arguments."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.fn, self.metadata = src.fn, metadata
        triton.runtime.driver.active.kernels.add(src.fn)
        self.signature = list(src.signature.values())
        self.divisible = {at[0] for at, found in src.attrs.items() if ["tt.divisibility", 16] in found}
        self.constants = {(at if isinstance(at, tuple) else (at,))[0]: value for at, value in src.constants.items()}

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        # Between them and the arguments: metadata of kernel and launch, and two hooks.
        args = rest[4:]
        driver: Driver = triton.runtime.driver.active
        device = driver.get_current_device()
        driver.check_alive()
        check_grid((x, y, z))
        if self.metadata.num_warps * 32 > THREADS_MOST:
            raise LaunchError(f"invalid argument: {self.metadata.num_warps} warps, needs at most {THREADS_MOST // 32}")
        self._check_arguments(args, device)
        names = self.fn.arg_names
        launched = Launched(
            self.fn.__name__, device, stream, (x, y, z), self.metadata.num_warps, self.metadata.shared,
            dict(zip(names, args, strict=True)), self, function,
        )  # fmt: skip
        driver.launch(launched)

    def _check_arguments(self, args: Sequence[Any], device: int) -> None:
        """Each value is as the kernel was specialized for it, and each pointer leads to the GPU that runs it."""
        metas = iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        for at, (name, kind, value) in enumerate(zip(self.fn.arg_names, self.signature, args, strict=True)):
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, torch.Tensor) and tensor.device != torch.device("cuda", device):
                raise LaunchError(f"illegal memory access: {name} is on {tensor.device}, the launch on cuda:{device}")
            if kind == "constexpr":
                # None and 1 are compiled in, too; a jitted function or a dtype is no number to compare.
                if self.constants.get(at, value) != value:
                    raise LaunchError(f"{name} is {value}, and the kernel was compiled for {self.constants[at]}")
            elif isinstance(value, TensorDescriptor):
                check_descriptor(name, value, next(metas))
            elif (
                at in self.divisible
                and (tensor.data_ptr() if tensor is value and hasattr(value, "data_ptr") else value) % 16
            ):
                raise LaunchError(f"misaligned address: {name}, which the kernel was compiled to find at 16 bytes")


class Utils:
    """What Triton asks of the driver's library."""

    def __init__(self, properties: Any) -> None:
        self.properties = properties

    def get_device_properties(self, device: int) -> dict[str, int]:
        own = self.properties
        return {
            "max_shared_mem": own.shared_memory_per_block_optin,
            "multiprocessor_count": own.multi_processor_count,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1_980_000,
            "mem_clock_rate": 2_619_000,
            "mem_bus_width": 5120,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """-> module, function (what it was made of), registers, spills, threads at most."""
        return object(), kernel, 0, 0, THREADS_MOST

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""


class Driver(GPUDriver):
    """`launches`: what was launched, in order. `executes`: whether kernels do their work; `execute` does it.

    `breaks`: a kernel whose launch reads outside of memory: it and all that comes after it fail, as on a GPU.
    """

    launcher_cls = Launcher

    def __init__(self, gpu: Any) -> None:
        self.gpu, self.utils = gpu, Utils(gpu.properties)
        self.launches: list[Launched] = []
        self.kernels: set[JITFunction] = set()
        self.executes, self.breaks, self.broken = True, "", False
        self.execute: Callable[[Launched, Mapping[str, Any]], None] = interpret

    def get_current_device(self) -> int:
        return self.gpu.current

    def set_current_device(self, device: int) -> None:
        self.gpu.current = device

    def get_current_stream(self, device: int) -> int:
        return self.gpu.streams[device].cuda_stream

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return self.gpu.properties.major, self.gpu.properties.minor

    def get_current_target(self) -> GPUTarget:
        major, minor = self.get_device_capability(self.gpu.current)
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.gpu.current)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise LaunchError("the stub builds no launcher in C++")

    def get_benchmarker(self) -> Any:
        return triton.testing.do_bench

    @staticmethod
    def is_active() -> bool:
        return True

    def forget(self) -> None:
        """What was compiled for this GPU is not for the next one."""
        for fn in self.kernels:
            for cache, *_ in fn.device_caches.values():
                for kernel in cache.values():
                    kernel.module = None  # else it would ask a driver to unload it when it is collected
            fn.device_caches.clear()
        plan.clear()
        max_shared_mem.cache_clear()

    def check_alive(self) -> None:
        if self.broken:
            raise LaunchError("CUDA error: an illegal memory access was encountered (of an earlier launch)")

    def launch(self, launched: Launched) -> None:
        if launched.kernel == self.breaks:
            self.broken = True
            self.check_alive()
        self.launches.append(launched)
        if self.executes:
            args = {name: held(arg) for name, arg in launched.args.items()}
            with _disable_current_modes():  # a GPU's work is no operation of torch
                stage.run(lambda: self.execute(launched, args))


def held(arg: Any) -> Any:
    """An argument with the memory behind it in the place of a GPU's tensor."""
    if isinstance(arg, TensorDescriptor):
        return TensorDescriptor(held(arg.base), arg.shape, arg.strides, arg.block_shape)
    return getattr(arg, "held", arg)


def _called(fn: JITFunction, *args: Any, **kwargs: Any) -> Any:
    return interpreter.InterpretedFunction(fn.fn)(*args, **kwargs)


def interpret(launched: Launched, args: Mapping[str, Any]) -> None:
    """Run a kernel of a compiling process by Triton's interpreter, the device functions that it calls included."""
    if "PDL" in args:  # what it waits for has been done
        args = {**args, "PDL": False}
    # One scope for all that is patched, which the end of the kernel undoes: device functions never undo theirs.
    scope = interpreter._LangPatchScope()
    with (
        interpreting(),
        mock.patch.object(interpreter, "_LangPatchScope", lambda: scope),
        mock.patch.object(JITFunction, "__call__", _called),
    ):
        interpreter.InterpretedFunction(launched.launcher.fn.fn)[launched.grid](**args)
