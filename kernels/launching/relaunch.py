"""Launching compiled kernels again, past Triton's JIT, whose look-up takes most of a launch's host time.

What is private in Triton stands here, as read in 3.6, 3.7 and 3.9: `CompiledKernel.run`, of a grid, a stream, the
kernel's handle, metadata, hooks and arguments; and a JIT function's `params`. Where one of these is missing, the JIT
launches each time, with a warning once.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import triton
from triton import knobs

# A launch: the compiled kernel, its grid, and what picks its arguments from values, in the signature's order.
Step = tuple[Any, tuple[int, int, int], Callable[[Sequence[Any]], tuple[Any, ...]]]
OF_KERNEL = ("run", "function", "packed_metadata", "launch_metadata")
OF_FUNCTION = ("params",)


def current_device() -> int:
    return triton.runtime.driver.active.get_current_device()  # type: ignore[no-any-return]


def can_relaunch(kernel: Any, fn: Any) -> bool:
    """Return whether this Triton has what `relaunch` calls; warn once where it has not."""
    missing = [name for name in OF_KERNEL if not hasattr(kernel, name)]
    missing += [name for name in OF_FUNCTION if not hasattr(fn, name)]
    if missing:
        _warn(", ".join(missing))
    return not missing


@cache
def _warn(missing: str) -> None:
    text = f"mixtral_triton: kernels of Triton {triton.__version__} have no {missing}: each launch takes more host time"
    warnings.warn(text, stacklevel=2)


def relaunch(steps: Iterable[Step], values: Sequence[Any], device: int) -> None:
    """Launch each step, on the current stream of `device`, the current one."""
    stream = triton.runtime.driver.active.get_current_stream(device)
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook  # a profiler's
    if not (getattr(enter, "calls", enter) or getattr(leave, "calls", leave)):
        enter = leave = None
    for kernel, grid, pick in steps:
        picked = pick(values)
        metadata = None if enter is None else kernel.launch_metadata(grid, stream, *picked)
        kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, metadata, enter, leave, *picked)
