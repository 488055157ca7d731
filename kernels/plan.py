"""Calls that were seen before: what an operation launched is launched again, and only the addresses are new.

An operation looks at shapes, strides, dtypes, devices, switches and the alignment of addresses, and never at a value.
So for arguments alike in all of these it computes the same grids, configurations and numbers: the first call runs the
operation and is watched; later ones allocate what it allocated, and hand the same compiled kernels the new addresses.

What cannot be told so is run each time: a call in which torch itself computes (a copy, a library's product), or whose
launches take an address that is neither an argument's nor fresh memory's. Nothing is remembered of a call that is
recorded or has launch choices of its own (`record_launches`, `override_configs`), nor where kernels are interpreted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .launch import Launched
from .op import Op
from .quantized import QuantizedWeight

PLANS_MOST = 4096
# torch operations that give memory, and compute nothing.
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_ALIGNMENT = 16  # bytes: what a kernel is compiled to know of an address
_SMALL_MOST = (1 << 31) - 1  # bytes that AMD's buffer instructions reach

_plans: dict[tuple[Any, ...], Plan | None] = {}  # None: to be run each time


def traits(args: Sequence[Any]) -> tuple[Any, ...]:
    """All of a call's arguments that decide what it launches: everything but addresses and values."""
    found: list[Any] = []
    for x in args:
        if isinstance(x, Tensor):
            found += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % _ALIGNMENT)
            if torch.version.hip:
                found.append(x.untyped_storage().size() <= _SMALL_MOST)
        elif isinstance(x, QuantizedWeight):
            found += (x.format, x.group, x.shape, *traits(_parts(x)))
        else:
            found += (type(x), x)  # True is not 1
    return tuple(found)


def _parts(weight: QuantizedWeight) -> tuple[Tensor | None, ...]:
    return tuple(weight._buffers.values())  # data, scales, zeros: an attribute of a module is found more slowly


def run(op: Op[..., Any], args: tuple[Any, ...], seen: tuple[Any, ...] | None = None) -> Any:
    """`op.run(*args)`, by its plan where there is one. `seen`: the traits of `args`, where they are known."""
    around = launch.launch_context_key()
    if around is None or args[0].is_meta:
        return op.run(*args)
    key = (op.run, around, knobs.runtime.debug, knobs.compilation.instrumentation_mode, seen or traits(args))
    try:
        plan = _plans[key]
    except KeyError:
        return _watched(op.run, args, key)
    return op.run(*args) if plan is None else plan(args)


def forget() -> None:
    """All plans: there are too many, or another GPU stands in the place of the one that they are for."""
    _plans.clear()


@dataclass(frozen=True, slots=True)
class _Step:
    """One launch: `pick` takes its arguments, in the order of the kernel's signature, from a plan's values."""

    kernel: Any  # compiled
    grid: tuple[int, int, int]
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of a call. The values that their arguments are taken from stand in this order:

    the call's arguments; the tensors of its quantized weights, whose places are `quantized`; fresh memory, by `made`'s
    shapes and dtypes; descriptors, each the fields but the base, and where that is; and `numbers`, whatever is left.
    """

    device: torch.device
    quantized: tuple[int, ...]
    made: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    described: tuple[tuple[dict[str, Any], int], ...]
    numbers: tuple[Any, ...]
    steps: tuple[_Step, ...]
    results: Callable[[Sequence[Any]], Any]

    def __call__(self, args: Sequence[Any]) -> Any:
        driver = triton.runtime.driver.active
        current, device = driver.get_current_device(), self.device
        if device.index not in (None, current):  # Triton launches on the current device
            with torch.cuda.device(device):
                return self(args)
        values = [*args]
        for at in self.quantized:
            values += _parts(args[at])
        for shape, dtype in self.made:
            values.append(torch.empty(shape, dtype=dtype, device=device))
        for fields, at in self.described:
            values.append(_descriptor(fields, values[at]))
        values += self.numbers
        stream, (enter, leave) = driver.get_current_stream(current), _hooks()
        for step in self.steps:
            kernel, given = step.kernel, step.pick(values)
            told = None if enter is None else kernel.launch_metadata(step.grid, stream, *given)
            kernel.run(*step.grid, stream, kernel.function, kernel.packed_metadata, told, enter, leave, *given)
        return self.results(values)


def _hooks() -> tuple[Any, Any]:
    """What a profiler has put around launches; None twice where there is nothing."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return (enter, leave) if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) else (None, None)


def _descriptor(fields: dict[str, Any], base: Tensor) -> TensorDescriptor:
    """As it was made before, of another base, alike in all that its constructor looks at."""
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {**fields, "base": base}
    return made


class _Watch(TorchDispatchMode):
    """Notes the memory that a call is given, and whether torch computes, or leads a view to another address."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []  # kept until the end: no two have the same address
        self.only_memory = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func._opname == "_unsafe_view":
            views = out if isinstance(out, (list, tuple)) else (out,)
            self.only_memory &= all(view.data_ptr() == args[0].data_ptr() for view in views)
        elif func._opname in MEMORY:
            self.made.append(out)
        else:
            self.only_memory = False
        return out


def _watched(function: Callable[..., Any], args: tuple[Any, ...], key: tuple[Any, ...]) -> Any:
    """`function(*args)`, and what it launched as a plan."""
    launched: list[Launched] = []
    token = launch.launched.set(launched)
    try:
        with _Watch() as watch:
            out = function(*args)
    finally:
        launch.launched.reset(token)
    weights = tuple(at for at, x in enumerate(args) if isinstance(x, QuantizedWeight))
    given = [*args, *(part for at in weights for part in _parts(args[at]))]
    held = [x.data_ptr() for x in given if isinstance(x, Tensor) and x.numel()]
    if len(set(held)) == len(held):  # else a launch's address does not say which argument it is
        if len(_plans) >= PLANS_MOST:
            forget()
        _plans[key] = _plan(args[0].device, weights, given, watch.made, launched, out) if watch.only_memory else None
    return out


def _plan(
    device: torch.device,
    quantized: tuple[int, ...],
    given: Sequence[Any],
    made: Sequence[Tensor],
    launched: Sequence[Launched],
    out: Any,
) -> Plan | None:
    """None where an address is not known, or a result is no fresh memory as it was made."""
    sources = [*given, *made]
    places = {x.data_ptr(): at for at, x in enumerate(sources) if isinstance(x, Tensor) and x.numel()}
    described: list[tuple[dict[str, Any], int]] = []
    numbers: list[Any] = []
    taken: list[list[tuple[str, int]]] = []  # by launch, of each argument which list it is in, and where

    def place(x: Any) -> tuple[str, int]:
        if isinstance(x, Tensor):
            at = places[x.data_ptr()]
            if x.dtype != sources[at].dtype or x.device != device:
                raise KeyError(x.dtype)
            return "source", at
        if isinstance(x, TensorDescriptor):
            described.append(({name: value for name, value in vars(x).items() if name != "base"}, place(x.base)[1]))
            return "described", len(described) - 1
        numbers.append(x)
        return "number", len(numbers) - 1

    results = out if isinstance(out, tuple) else () if out is None else (out,)
    try:
        for each in launched:
            taken.append([place(each.args.get(name, default)) for name, default in _parameters(each.fn)])
        ends = [place(x)[1] for x in results]
    except KeyError:
        return None
    for x, at in zip(results, ends, strict=True):
        if at < len(given) or x.shape != sources[at].shape or not x.is_contiguous():
            return None
    if any(not x.is_contiguous() or x.data_ptr() % _ALIGNMENT for x in made):
        return None
    begin = {"source": 0, "described": len(sources), "number": len(sources) + len(described)}
    steps = [
        _Step(each.kernel, each.grid, _picker([begin[kind] + at for kind, at in where]))
        for each, where in zip(launched, taken, strict=True)
    ]
    shapes = tuple((tuple(x.shape), x.dtype) for x in made)
    one = itemgetter(*ends) if ends else lambda values: None
    return Plan(device, quantized, shapes, tuple(described), tuple(numbers), tuple(steps), one)


def _parameters(fn: Any) -> list[tuple[str, Any]]:
    """Of a kernel, each with its default."""
    return [(parameter.name, parameter.default) for parameter in fn.params]


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    return itemgetter(*places) if len(places) > 1 else lambda values: (values[places[0]],)
