"""A Triton driver without a GPU: Triton's JIT runs up to the launch, which is checked against CUDA's requirements."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler.compiler import max_shared_mem
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .adapter import Layout, forget_launches, interpreting
from .tensors import stage

GRID_MOST = (2**31 - 1, 65535, 65535)
THREADS_MOST = 1024
BOX_MOST = 256  # elements a dimension of a TMA box
RANK_MOST = 5
SWIZZLE_SPANS = (None, 32, 64, 128)  # bytes, by cuTensorMap's number of the swizzle


class LaunchError(RuntimeError):
    """The error with which CUDA would answer a launch."""


@dataclass(frozen=True)
class Launched:
    kernel: str
    device: int
    stream: int
    grid: tuple[int, int, int]
    num_warps: int
    shared: int
    args: Mapping[str, Any] = field(repr=False)
    launcher: "Launcher" = field(repr=False, compare=False)
    binary: bytes = field(default=b"", repr=False, compare=False)

    @property
    def ptx(self) -> str:
        return self.binary.decode()

    def compiled(self) -> Any:
        """Return the compiled kernel; `compiled()[grid](*args)` launches it without the JIT's specialization."""
        caches = (cache for cache, *_ in self.launcher.fn.device_caches.values())
        (kernel,) = (kernel for cache in caches for kernel in cache.values() if kernel._run is self.launcher)
        return kernel


def check_descriptor(name: str, descriptor: TensorDescriptor, meta: Mapping[str, Any]) -> None:
    """Check what `cuTensorMapEncodeTiled` requires of a tensor and of the box of one copy."""
    base, size = descriptor.base.data_ptr(), descriptor.base.element_size()
    box, rank = meta["block_size"], len(descriptor.shape)
    inner, span = box[-1] * size, SWIZZLE_SPANS[meta["swizzle"]]
    outer_strides = [stride * size for stride in descriptor.strides[:-1]]
    bad_strides = any(not 0 < n < 2**40 or n % 16 for n in outer_strides) or descriptor.strides[-1] != 1
    descends = all(stride % following == 0 for stride, following in pairwise(outer_strides) if following)
    faults = {
        f"rank {rank}, needs 1..{RANK_MOST}": not 1 <= rank <= RANK_MOST,
        f"base {base:#x}, needs a multiple of 16 bytes": base % 16 != 0,
        f"sizes {list(descriptor.shape)}, needs 1..2^32 each": any(not 1 <= n <= 2**32 for n in descriptor.shape),
        f"strides {[*descriptor.strides]}, needs multiples of 16 bytes below 2^40, the last one element": bad_strides,
        f"strides {[*descriptor.strides]}, needs each a multiple of the next": not descends,
        f"box {list(box)}, needs 1..{BOX_MOST} each": any(not 1 <= n <= BOX_MOST for n in box),
        f"box {list(box)} of {rank} dimensions, needs as many as the tensor": len(box) != rank,
        f"inner box of {inner} bytes, needs a multiple of 16": inner % 16 != 0,
        f"inner box of {inner} bytes, needs at most its swizzle's {span}": span is not None and inner > span,
    }
    if found := [fault for fault, present in faults.items() if present]:
        raise LaunchError(f"cuTensorMapEncodeTiled refuses {name}: {found[0]}")


def with_kinds(
    names: Iterable[str], kinds: Iterable[Any], values: Iterable[Any], at: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], str, str, Any]]:
    """Yield each argument, those inside of tuples one by one: its place as Triton counts, path, type and value."""
    for index, (name, kind, value) in enumerate(zip(names, kinds, values, strict=True)):
        if isinstance(kind, tuple):
            yield from with_kinds([f"{name}.{field}" for field in kind._fields], kind, value, (*at, index))
        else:
            yield (*at, index), name, kind, value


def as_kind(kind: Any, value: Any) -> Any:
    """Return a tuple as the NamedTuple that the kernel was compiled for; a launcher takes any."""
    return type(kind)(*map(as_kind, kind, value)) if isinstance(kind, tuple) else value


class Launcher:
    """The launcher of a compiled kernel, which Triton calls with grid, stream, hooks and all bound arguments."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.fn, self.metadata = src.fn, metadata
        triton.runtime.driver.active.kernels.add(src.fn)
        self.signature = list(src.signature.values())
        self.divisible = {at for at, attrs in src.attrs.items() if ["tt.divisibility", 16] in attrs}
        self.constants = {at if isinstance(at, tuple) else (at,): value for at, value in src.constants.items()}

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        # After the metadata of kernel and launch, and two hooks.
        args = [as_kind(kind, value) for kind, value in zip(self.signature, rest[4:], strict=True)]
        driver: Driver = triton.runtime.driver.active
        device, num_warps = driver.get_current_device(), self.metadata.num_warps
        driver.check_alive()
        for axis, n, most in zip("xyz", (x, y, z), GRID_MOST, strict=True):
            if not 1 <= n <= most:
                raise LaunchError(f"invalid argument: grid.{axis} is {n}, needs 1..{most}")
        if num_warps * driver.gpu.properties.warp_size > THREADS_MOST:
            raise LaunchError(f"invalid argument: {num_warps} warps, needs at most {THREADS_MOST} threads")
        self._check_arguments(args, device)
        by_name = dict(zip(self.fn.arg_names, args, strict=True))
        shared, name = self.metadata.shared, self.fn.__name__
        driver.launch(Launched(name, device, stream, (x, y, z), num_warps, shared, by_name, self, function))

    def _check_arguments(self, args: Sequence[Any], device: int) -> None:
        """Check values against the kernel's specialization, and pointers against the GPU that runs it."""
        metas = iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        for at, name, kind, value in with_kinds(self.fn.arg_names, self.signature, args):
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, torch.Tensor) and tensor.device != torch.device("cuda", device):
                raise LaunchError(f"illegal memory access: {name} is on {tensor.device}, the launch on cuda:{device}")
            if kind == "constexpr":
                # Triton also makes None and 1 constexpr, which `constants` lacks.
                if self.constants.get(at, value) != value:
                    raise LaunchError(f"{name} is {value}, and the kernel was compiled for {self.constants[at]}")
            elif isinstance(value, TensorDescriptor):
                check_descriptor(name, value, next(metas))
            elif at in self.divisible and (value.data_ptr() if hasattr(value, "data_ptr") else value) % 16:
                raise LaunchError(f"misaligned address: {name}, which the kernel was compiled to find at 16 bytes")


class Driver(CudaDriver):
    """`launches`: all launches, in order. `executes`: whether kernels run, by `execute`.

    `breaks`: a kernel whose launch accesses invalid memory; it and all later work fail, as on a GPU.
    """

    launcher_cls = Launcher

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        fixed = {"max_num_regs": 65536, "sm_clock_rate": 1_980_000, "mem_clock_rate": 2_619_000}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": gpu.properties.shared_memory_per_block_optin,
                "multiprocessor_count": gpu.properties.multi_processor_count,
                "mem_bus_width": 5120,
                **fixed,
                "warpSize": gpu.properties.warp_size,
            },
            # module, function (the binary itself), registers, spills and the maximum of threads
            load_binary=lambda name, kernel, shared, device: (object(), kernel, 0, 0, THREADS_MOST),
            unload_module=lambda module: None,
        )
        self.get_current_device = lambda: gpu.current
        self.set_current_device = lambda device: setattr(gpu, "current", device)
        self.get_current_stream = lambda device: gpu.streams[device].cuda_stream
        self.get_device_capability = lambda device=None: (gpu.properties.major, gpu.properties.minor)
        self.launches: list[Launched] = []
        self.kernels: set[JITFunction] = set()
        self.executes, self.breaks, self.broken = True, "", False
        self.execute: Callable[[Launched, Mapping[str, Any]], None] = interpret

    def get_current_target(self) -> GPUTarget:
        arch = getattr(self.gpu.properties, "gcnArchName", None)
        return super().get_current_target() if arch is None else GPUTarget("hip", arch.split(":")[0], 64)

    def forget(self) -> None:
        """Clear the caches of kernels that were compiled for this GPU."""
        for fn in self.kernels:
            for cache, *_ in fn.device_caches.values():
                for kernel in cache.values():
                    kernel.module = None  # else its finalizer asks a driver to unload it
            fn.device_caches.clear()
        forget_launches()
        max_shared_mem.cache_clear()

    def check_alive(self) -> None:
        if self.broken:
            raise LaunchError("CUDA error: an illegal memory access was encountered (of an earlier launch)")

    def launch(self, launched: Launched) -> None:
        if launched.kernel == self.breaks:
            self.broken = True
            self.check_alive()
        self.launches.append(launched)
        stage.log(launched, launched.stream)
        if self.executes:
            args = {name: with_memory(arg) for name, arg in launched.args.items()}
            with _disable_current_modes():  # a GPU's work is no operation of torch
                stage.run(lambda: self.execute(launched, args))


def with_memory(arg: Any) -> Any:
    if isinstance(arg, tuple):
        values = map(with_memory, arg)
        return type(arg)(*values) if hasattr(arg, "_fields") else tuple(values)
    if isinstance(arg, TensorDescriptor):
        return TensorDescriptor(with_memory(arg.base), arg.shape, arg.strides, arg.block_shape)
    return getattr(arg, "held", arg)


def _call_interpreted(fn: JITFunction, *args: Any, **kwargs: Any) -> Any:
    return interpreter.InterpretedFunction(fn.fn)(*args, **kwargs)


def interpret(launched: Launched, args: Mapping[str, Any]) -> None:
    """Run a kernel of a compiling process in Triton's interpreter, including the device functions that it calls."""
    if "PDL" in args:  # all earlier launches are complete
        args = {**args, "PDL": False}
    # The interpreter knows no PTX: plain arithmetic unpacks the same values (tests/emulator runs the PTX).
    args = {name: arg._replace(ptx=False) if isinstance(arg, Layout) else arg for name, arg in args.items()}
    args |= {"PTX": False} if "PTX" in args else {}
    # One scope for all patches, undone at the end of the kernel: device functions do not undo theirs.
    scope = interpreter._LangPatchScope()
    with (
        interpreting(),
        mock.patch.object(interpreter, "_LangPatchScope", lambda: scope),
        mock.patch.object(JITFunction, "__call__", _call_interpreted),
    ):
        interpreter.InterpretedFunction(launched.launcher.fn.fn)[launched.grid](**args)
