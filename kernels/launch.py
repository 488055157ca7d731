"""The one door to a Triton launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from .arch import dependent_launch
from .interpret import interpreting
from .op import Launch, LaunchConfig
from .pdl import in_pdl_region

# `triton.jit` reads the switch when it decorates, so one process either interprets or compiles.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
DEFAULT_ARCH = "sm_90"
Configs = Mapping[str, LaunchConfig]  # by the name of a kernel
GRID_MOST = 65535  # programs along the second and the third axis of a grid; those of the first are hardly bounded


@dataclass(frozen=True)
class Launched:
    """A launch that was made: the compiled kernel, the function it is of, its arguments by name, constants included."""

    kernel: Any
    fn: Any
    grid: tuple[int, int, int]
    args: Mapping[str, Any]


_arch: ContextVar[str | None] = ContextVar("arch", default=None)
_sms: ContextVar[int | None] = ContextVar("sms", default=None)
records: ContextVar[list[Launch] | None] = ContextVar("records", default=None)  # see record.py
launched: ContextVar[list[Launched] | None] = ContextVar("launched", default=None)  # see plan.py
_overrides: ContextVar[tuple[Configs, dict[str, LaunchConfig]] | None] = ContextVar("overrides", default=None)


def target_arch(device: torch.device | None = None) -> str:
    """The architecture whose launch choices apply: the one asked for, else the device's, else sm_90."""
    chosen = _arch.get()
    if chosen is not None:
        return chosen
    if device is None or device.type != "cuda":
        return DEFAULT_ARCH
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def select_configs(configs: Callable[..., Configs], sizes: Any, dtype: torch.dtype, device: torch.device) -> Configs:
    """What an operation's `configs` says for the current GPU, or what `override_configs` has put in its place."""
    chosen, overrides = configs(sizes, dtype, target_arch(device)), _overrides.get()
    if overrides is not None:
        others, made = overrides
        chosen = {kernel: others.get(kernel, one) for kernel, one in chosen.items()}
        made.update(chosen)
    return chosen


def launch_context_key() -> tuple[Any, ...] | None:
    """What decides a launch beside its arguments; None where it is one of its own: recorded, chosen, interpreted."""
    if INTERPRETED or records.get() is not None or _overrides.get() is not None:
        return None
    return _arch.get(), _sms.get(), in_pdl_region()


@contextmanager
def override_configs(others: Configs) -> Iterator[dict[str, LaunchConfig]]:
    """Within the block, kernels named in `others` launch as it says, whatever the sizes -> what was chosen of all."""
    made: dict[str, LaunchConfig] = {}
    token = _overrides.set((others, made))
    try:
        yield made
    finally:
        _overrides.reset(token)


def is_overridden(kernel: str) -> bool:
    """Whether `override_configs` names it: then it does the work, where it can, also if another way would be chosen."""
    overrides = _overrides.get()
    return overrides is not None and kernel in overrides[0]


def multiprocessors(device: torch.device) -> int | None:
    """How many of them the current GPU has; of one that is not at hand those told, or None."""
    if _arch.get() is not None or device.type != "cuda":
        return _sms.get()
    return torch.cuda.get_device_properties(device).multi_processor_count


def tensors(args: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among a launch's arguments by name, those that descriptors describe included."""
    plain = {name: arg.base if isinstance(arg, TensorDescriptor) else arg for name, arg in args.items()}
    return {name: arg for name, arg in plain.items() if isinstance(arg, torch.Tensor)}


def replace_base(arg: Any, tensor: torch.Tensor) -> Any:
    """A launch's argument with another tensor in its place, where it is a descriptor: behind it."""
    return replace(arg, base=tensor) if isinstance(arg, TensorDescriptor) else tensor


def launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], config: LaunchConfig, **constexprs: Any) -> None:
    """Run `kernel` over `grid`, or only record it where its tensors are on the meta device.

    `args` are the run-time arguments by name; `config.constexprs` and `constexprs` the compile-time ones.
    """
    if 0 in grid:
        return
    if max(grid[1:], default=1) > GRID_MOST:
        programs = " x ".join(f"{n:,}" for n in grid)
        raise ValueError(
            f"{kernel.__name__}: {programs} programs, needs at most {GRID_MOST:,} along the second and third"
        )
    constants = {**config.constexprs, **constexprs}
    first = next((arg for arg in args.values() if isinstance(arg, torch.Tensor)), None)
    dependent = False
    if "PDL" in kernel.arg_names:
        constants["PDL"] = not INTERPRETED and dependent_launch(target_arch(None if first is None else first.device))
        dependent = constants["PDL"] and in_pdl_region()
    noted = records.get()
    if noted is not None:
        noted.append(
            Launch(kernel.__name__, grid, config.num_warps, config.num_stages, constants, kernel, dict(args), dependent)
        )
    if first is not None and first.is_meta:
        return
    if INTERPRETED:
        interpret(kernel, grid, {**args, **constants})
    elif first is not None and first.is_cuda and first.device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever device its pointers lead to.
        with torch.cuda.device(first.device):
            _compiled(kernel, grid, {**args, **constants}, config, dependent)
    else:
        _compiled(kernel, grid, {**args, **constants}, config, dependent)


def _compiled(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], config: LaunchConfig, dependent: bool = False
) -> None:
    """Compile on first use, then launch; ValueError, before anything runs, where the GPU cannot hold it."""
    try:
        # FP fusion is named because its default differs between releases of Triton.
        more = {"launch_pdl": True} if dependent else {}  # an option that AMD's backend does not know
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True, **more}
        compiled = kernel[grid](**args, **options)
    except OutOfResources as error:
        tiles = ", ".join(f"{name} {value}" for name, value in config.constexprs.items())
        raise ValueError(
            f"{kernel.__name__}: the launch configuration {tiles}, {config.num_warps} warps and {config.num_stages} "
            f"stages takes {error.required} of {error.name}, needs at most this GPU's {error.limit}"
        ) from error
    made = launched.get()
    if made is not None:
        x, y, z = (*grid, 1, 1)[:3]
        made.append(Launched(compiled, kernel, (x, y, z), args))


def interpret(kernel: Any, grid: tuple[int, ...], args: dict[str, Any]) -> None:
    """Run an interpreted kernel. The tests put their guard around this."""
    with interpreting():
        kernel[grid](**args)


@contextmanager
def using_arch(arch: str, sms: int | None = None) -> Iterator[None]:
    """Within the block, launch choices are those of `arch` ("sm_80", "gfx942", ...), of a GPU with `sms`
    multiprocessors; None: of its largest GPU."""
    tokens = _arch.set(arch), _sms.set(sms)
    try:
        yield
    finally:
        _arch.reset(tokens[0])
        _sms.reset(tokens[1])
