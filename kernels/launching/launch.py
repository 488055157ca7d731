"""The only entry point to a Triton launch, its configuration and context, and TMA's descriptors."""

import inspect
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from .arch import amd, check_arch, supports_pdl, tma
from .interpret import interpreting
from .kernel_args import flatten

# `triton.jit` reads the flag when it decorates, so one process either interprets or compiles.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
DEFAULT_ARCH = "sm_90"
PREFETCH = True  # weights into L2, before the wait of a dependent launch (pdl.py)


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched: tile constants, warps per program and software pipeline stages."""

    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1


Configs = Mapping[str, LaunchConfig]  # by kernel name


@dataclass(frozen=True)
class Launch:
    """One device kernel as `record_launches` saw it.

    `grid`, `num_warps` and `num_stages` are None for torch's own kernels. `fn` and `args`, the JIT function and its
    run-time arguments by name, are what the offline compiler needs to build the same kernel without a GPU.
    `dependent`: a programmatic dependent launch, see pdl.py.
    """

    kernel: str
    grid: tuple[int, ...] | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    fn: Any = field(default=None, repr=False, compare=False)
    args: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    dependent: bool = False


# A launch that ran: the compiled kernel, its JIT function, and its arguments by name, constexprs included.
CompiledLaunch = namedtuple("CompiledLaunch", "kernel fn grid args")


@dataclass(frozen=True)
class LaunchContext:
    """What surrounds a launch.

    arch, sms  the architecture and multiprocessors that launch configurations are selected for; None: the device's
    pdl        launches are dependent where the kernel and the architecture allow it (`pdl_region`)
    no_pdl     no launch is dependent, whatever `pdl_region` says
    records    lists that receive every launch (`record_launches`, which may be nested)
    compiled   receives every launch that ran on a GPU (plan.py)
    overrides  configurations by kernel that replace the selected ones; `selected` receives what was used
    """

    arch: str | None = None
    sms: int | None = None
    pdl: bool = False
    no_pdl: bool = False
    records: tuple[list[Launch], ...] = ()
    compiled: list[CompiledLaunch] | None = None
    overrides: Configs | None = None
    selected: dict[str, LaunchConfig] | None = None


_context: ContextVar[LaunchContext] = ContextVar("launch_context", default=LaunchContext())  # noqa: B039  # it is frozen


@contextmanager
def launch_context(**changes: Any) -> Iterator[None]:
    """Replace fields of the current LaunchContext within the block, such as the architecture: `arch="sm_80"`."""
    token = _context.set(replace(_context.get(), **changes))
    try:
        yield
    finally:
        _context.reset(token)


def launch_context_key() -> tuple[Any, ...] | None:
    """Return the cache key of the launch context (architecture, multiprocessors, in a `pdl_region`, prefetch), or None
    where launches must not be cached."""
    context = _context.get()
    if INTERPRETED or context.records or context.overrides is not None:
        return None
    return context.arch, context.sms, context.pdl, PREFETCH


@contextmanager
def override_configs(overrides: Configs) -> Iterator[dict[str, LaunchConfig]]:
    """Launch the kernels named in `overrides` with those configurations -> the configurations used, by kernel."""
    selected: dict[str, LaunchConfig] = {}
    with launch_context(overrides=overrides, selected=selected):
        yield selected


@contextmanager
def pdl_region() -> Iterator[None]:
    """Launch dependently within the block where the kernel and the architecture allow it.

    All launches go to one stream and none writes a weight: a kernel may read weights before the launch in front of it
    has ended. The first launch of the block follows an ordinary one, so everything before that one has ended.
    """
    with launch_context(pdl=not _context.get().no_pdl):
        yield


def launches_dependently(device: torch.device) -> bool:
    """Return whether kernels that know PDL use it on the device."""
    return not INTERPRETED and supports_pdl(target_arch(device))


def unpacks_by_ptx(arch: str) -> bool:
    """Return whether codes become numbers by PTX (weights/packing.py)."""
    return not (INTERPRETED or amd(arch))


def in_pdl_region() -> bool:
    return _context.get().pdl


def target_arch(device: torch.device | None = None) -> str:
    """Return the architecture to select configurations for: the context's, else the device's, else sm_90."""
    arch = _context.get().arch
    if arch is not None:
        return arch
    if device is None or device.type != "cuda":
        return DEFAULT_ARCH
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return check_arch(f"sm_{properties.major}{properties.minor}")


def multiprocessors(device: torch.device) -> int | None:
    """Return the device's multiprocessors; without a GPU the context's, or None."""
    context = _context.get()
    if context.arch is not None or device.type != "cuda":
        return context.sms
    return torch.cuda.get_device_properties(device).multi_processor_count


def select_configs(configs: Callable[..., Configs], sizes: Any, dtype: torch.dtype, device: torch.device) -> Configs:
    """Return `configs(sizes, dtype, arch)` for the current GPU, overrides applied."""
    selected, context = configs(sizes, dtype, target_arch(device)), _context.get()
    if context.overrides is not None and context.selected is not None:
        selected = {kernel: context.overrides.get(kernel, config) for kernel, config in selected.items()}
        context.selected.update(selected)
    return selected


def _strides(x: torch.Tensor) -> list[int]:
    """Return the strides of x; that of a dimension of one element, which can be anything, becomes its neighbour's."""
    strides, sizes = list(x.stride()), x.shape[:-1]
    known = next((stride for size, stride in zip(sizes, strides, strict=False) if size > 1), strides[0])
    for axis, size in enumerate(sizes):
        strides[axis] = known = strides[axis] if size > 1 else known
    return strides


def tma_can_read(x: torch.Tensor, arch: str) -> bool:
    """Return whether TMA of `arch` can read x: of 8 or 16 bits, not empty, the last dimension contiguous, the base and
    the other strides multiples of 16 bytes, each a multiple of the next, no stride 0."""
    if not tma(arch) or x.dtype.itemsize > 2 or x.numel() == 0 or x.stride(-1) != 1 or x.data_ptr() % 16:
        return False
    outer = _strides(x)[:-1]
    fits = all(stride > 0 and stride * x.dtype.itemsize % 16 == 0 for stride in outer)
    return fits and all(stride % inner == 0 for stride, inner in pairwise(outer))


def describe(x: torch.Tensor, block: Sequence[int], arch: str) -> TensorDescriptor | None:
    """Return a descriptor that loads tiles of shape `block`, zero outside x; None where pointers must read."""
    return TensorDescriptor(x, list(x.shape), _strides(x), list(block)) if tma_can_read(x, arch) else None


@cache
def _constexprs(kernel: Any) -> frozenset[str]:
    parameters = inspect.signature(kernel.fn).parameters.values()
    return frozenset(parameter.name for parameter in parameters if "constexpr" in str(parameter.annotation))


def launch(kernel: Any, grid: tuple[int, ...], config: LaunchConfig, /, **arguments: Any) -> None:
    """Run `kernel` over `grid`, or only record it where its tensors are on the meta device.

    `arguments` are the kernel's, by name, constexprs among them; `config` has the other constexprs. A kernel with a
    constexpr PDL receives it from here: whether the GPU supports dependent launches (pdl.py).
    """
    if 0 in grid:
        return
    constants, args = dict(config.constexprs), dict[str, Any]()
    for name, value in arguments.items():
        (constants if name in _constexprs(kernel) else args)[name] = value
    device = next(arg.device for _, arg in flatten(args) if isinstance(arg, torch.Tensor))
    context, dependent = _context.get(), False
    if "PDL" in kernel.arg_names:
        constants["PDL"] = launches_dependently(device)
        dependent = constants["PDL"] and context.pdl
    for records in context.records:
        name, warps, stages = kernel.__name__, config.num_warps, config.num_stages
        records.append(Launch(name, grid, warps, stages, constants, kernel, dict(args), dependent))
    if device.type == "meta":
        return
    if INTERPRETED:
        interpret(kernel, grid, {**args, **constants})
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever device its pointers lead to.
        with torch.cuda.device(device):
            _launch_compiled(kernel, grid, {**args, **constants}, config, dependent)
    else:
        _launch_compiled(kernel, grid, {**args, **constants}, config, dependent)


def _launch_compiled(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], config: LaunchConfig, dependent: bool
) -> None:
    """Compile on first use, then launch; raise ValueError before anything runs where the GPU's limits are exceeded."""
    try:
        options: dict[str, Any] = {"launch_pdl": True} if dependent else {}  # AMD's backend does not know the option
        # FP fusion is named because its default differs between releases of Triton.
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
        compiled = kernel[grid](**args, **options)
    except OutOfResources as error:
        tiles = ", ".join(f"{name} {value}" for name, value in config.constexprs.items())
        raise ValueError(
            f"{kernel.__name__}: the launch configuration {tiles}, {config.num_warps} warps and {config.num_stages} "
            f"stages takes {error.required} of {error.name}, needs at most this GPU's {error.limit}"
        ) from error
    launches = _context.get().compiled
    if launches is not None:
        launches.append(CompiledLaunch(compiled, kernel, (*grid, 1, 1)[:3], args))


_interpreter_lock = threading.Lock()  # the interpreter's state is global: its threads take turns


def interpret(kernel: Any, grid: tuple[int, ...], args: dict[str, Any]) -> None:
    """Run an interpreted kernel. The tests put their guard around this."""
    with _interpreter_lock, interpreting():
        kernel[grid](**args)
