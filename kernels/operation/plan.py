"""The launch cache: a call that was seen before is launched again from its plan, with only the addresses replaced.

An operation looks at shapes, strides, dtypes, devices, flags and the alignment of addresses, never at a value. So
calls that agree in all of these compute the same grids, configurations and numbers. Of tensors that grow (`Op.growing`)
the numbers alone change. The first call runs the operation
under observation; later ones allocate what it allocated and hand the same compiled kernels the new addresses.

Not cached: calls in which torch itself computes (a copy, a library's product), or whose launches use an address that
belongs to neither an argument nor fresh memory; calls under `record_launches` or `override_configs`; interpreted calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launching import launch
from ..launching.launch import CompiledLaunch
from ..launching.relaunch import Step, can_relaunch, current_device, relaunch
from ..weights.composite_args import COMPOSITES
from .declaration import Op

PLANS_MAX = 4096
# torch operations that allocate memory and compute nothing.
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_ALIGNMENT = 16  # bytes: kernels are specialized on addresses that are multiples of it
_BUFFER_MAX = (1 << 31) - 1  # bytes that AMD's buffer instructions reach

_plans: dict[tuple[Any, ...], LaunchPlan | None] = {}  # None: not cached
clear = _plans.clear  # needed where there are too many plans, or the device that they are for was replaced


def call_key(args: Sequence[Any]) -> tuple[Any, ...]:
    """Return everything about the arguments that decides what a call launches: all but addresses and values."""
    key: list[Any] = []
    hip = torch.version.hip
    for x in args:
        if x is None:
            key.append(None)
        elif isinstance(x, Tensor):
            key += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % _ALIGNMENT)
            if hip:
                key.append(x.untyped_storage().size() <= _BUFFER_MAX)
        elif not isinstance(x, COMPOSITES):
            key += (type(x), x)  # True is not 1
        else:
            key += (type(x), *x.key, *call_key(x.tensors))
    return tuple(key)


def run(op: Op, args: tuple[Any, ...], key: tuple[Any, ...] | None = None) -> Any:
    """Run `op.run(*args)`, from its plan where there is one. `key`: the call key of `args`, where it is known."""
    context = launch.launch_context_key()
    if context is None or args[0].is_meta:
        return op.run(*args)
    names: Sequence[str] = ()
    numbers: tuple[int, ...] = ()
    if op.growing is not None and (grown := op.growing(args)) is not None:
        key, names, numbers = grown
        # What Triton compiles of an integer: whether it is 1 or a multiple of 16, and its width.
        key += tuple([(x >> 31 << 2) + (x == 1 if x & 15 else 2) for x in numbers])
    elif key is None:
        key = call_key(args)
    full = (op.run, context, knobs.runtime.debug, knobs.compilation.instrumentation_mode, key)
    try:
        plan = _plans[full]
    except KeyError:
        return _run_and_record(op.run, args, full, names)
    return op.run(*args) if plan is None else plan(args, numbers)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """The launches of a call, whose arguments are picked from one list of values.

    The list holds, in this order, the call's arguments, the tensors of its composite arguments, new memory, and
    constants.

    quantized    the positions of the composite arguments
    allocations  shape, stride and dtype of each new tensor
    descriptors  of each TMA descriptor, which replaces a constant: its position, its fields, its base's position
    numbers      the places of constants that grow from call to call, and theirs among the call's numbers
    steps        the launches
    results      picks what the call returns
    """

    device: torch.device
    quantized: tuple[int, ...]
    allocations: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    descriptors: tuple[tuple[int, dict[str, Any], int], ...]
    constants: tuple[Any, ...]
    numbers: tuple[tuple[int, int], ...]
    steps: tuple[Step, ...]
    results: Callable[[Sequence[Any]], Any]

    def __call__(self, args: Sequence[Any], numbers: Sequence[int] = ()) -> Any:
        current, device = current_device(), self.device
        if device.index not in (None, current):  # Triton launches on the current device
            with torch.cuda.device(device):
                return self(args, numbers)
        values = [*args]
        for index in self.quantized:
            values += args[index].tensors
        for shape, stride, dtype in self.allocations:  # with strides torch reads the arguments faster
            values.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
        values += self.constants
        for place, index in self.numbers:
            values[place] = numbers[index]
        for place, fields, base in self.descriptors:
            values[place] = _descriptor(fields, values[base])
        relaunch(self.steps, values, current)
        return self.results(values)


def _descriptor(fields: dict[str, Any], base: Tensor) -> TensorDescriptor:
    """Return the descriptor of another base that agrees in everything that the constructor checks."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__ = {**fields, "base": base}
    return descriptor


def _has_tensor(x: Any) -> bool:
    """Return whether x is a tensor, or a NamedTuple with one, however deep."""
    return isinstance(x, Tensor) or (isinstance(x, tuple) and any(map(_has_tensor, x)))


@cache  # over a cache that grows, each step makes a plan, and the places are those of the step before
def _make_pick(places: tuple[Any, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return a function that picks values into tuples nested as `places` are."""

    def expression(place: Any) -> str:
        return f"({''.join(f'{expression(part)}, ' for part in place)})" if isinstance(place, tuple) else f"v[{place}]"

    # 0.5 us a launch for 20 values in tuples, where a loop that walks `places` takes 3.7.
    return eval(f"lambda v: {expression(places)}")  # type: ignore[no-any-return]


class _AllocationRecorder(TorchDispatchMode):
    """Records the memory that a call allocates, and whether torch computes or makes a view at another address."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []  # kept alive until the end: no two share an address
        self.only_allocates = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func._opname == "_unsafe_view":
            views = out if isinstance(out, (list, tuple)) else (out,)
            self.only_allocates &= all(view.data_ptr() == args[0].data_ptr() for view in views)
        elif func._opname in MEMORY:
            self.allocated.append(out)
        else:
            self.only_allocates = False
        return out


def _run_and_record(
    function: Callable[..., Any], args: tuple[Any, ...], key: tuple[Any, ...], names: Sequence[str]
) -> Any:
    """Run `function(*args)` and cache its launches as a plan."""
    launches: list[CompiledLaunch] = []
    with launch.launch_context(compiled=launches), _AllocationRecorder() as recorder:
        out = function(*args)
    quantized = tuple(index for index, x in enumerate(args) if isinstance(x, COMPOSITES))
    inputs = [*args, *(part for index in quantized for part in args[index].tensors)]
    addresses = [x.data_ptr() for x in inputs if isinstance(x, Tensor) and x.numel()]
    if len(set(addresses)) == len(addresses):  # else an address does not identify an argument
        if len(_plans) >= PLANS_MAX:
            clear()
        device, allocated = args[0].device, recorder.allocated
        made = device, quantized, inputs, allocated, launches, out, names
        known = recorder.only_allocates and all(can_relaunch(x.kernel, x.fn) for x in launches)
        plan = _make_plan(*made) if known else None
        _plans[key] = plan
    return out


def _make_plan(
    device: torch.device,
    quantized: tuple[int, ...],
    inputs: Sequence[Any],
    allocated: Sequence[Tensor],
    launches: Sequence[CompiledLaunch],
    out: Any,
    names: Sequence[str],
) -> LaunchPlan | None:
    """Return the plan of a call; None where an address is unknown, or a result is not fresh memory as allocated."""
    sources = [*inputs, *allocated]
    indices = {x.data_ptr(): index for index, x in enumerate(sources) if isinstance(x, Tensor) and x.numel()}
    descriptors: list[tuple[int, dict[str, Any], int]] = []
    constants: list[Any] = []
    growing: list[tuple[int, int]] = []

    def locate(x: Any, path: str = "") -> Any:
        """Return the place of an argument among the plan's values; of a NamedTuple with tensors, those of its parts."""
        if isinstance(x, tuple) and _has_tensor(x):
            return tuple(locate(part, f"{path}.{field}") for field, part in zip(x._fields, x, strict=True))  # type: ignore[attr-defined]
        if isinstance(x, Tensor):
            index = indices[x.data_ptr()]
            if x.dtype != sources[index].dtype or x.device != device:
                raise KeyError(x.dtype)
            return index
        place = len(sources) + len(constants)
        if isinstance(x, TensorDescriptor):
            fields = {name: value for name, value in vars(x).items() if name != "base"}
            descriptors.append((place, fields, locate(x.base)))
            x = None  # a plan holds no memory
        if path in names:
            growing.append((place, names.index(path)))
        constants.append(x)
        return place

    results = out if isinstance(out, tuple) else () if out is None else (out,)
    steps: list[Step] = []
    try:
        for record in launches:
            places = tuple(locate(record.args.get(p.name, p.default), p.name) for p in record.fn.params)
            steps.append((record.kernel, record.grid, _make_pick(places)))
        outputs = [locate(x) for x in results]
    except KeyError:
        return None
    pairs = zip(outputs, results, strict=True)
    changed = (i < len(inputs) or x.shape != sources[i].shape or not x.is_contiguous() for i, x in pairs)
    if any(changed) or any(not x.is_contiguous() or x.data_ptr() % _ALIGNMENT for x in allocated):
        return None
    allocations = tuple((tuple(x.shape), x.stride(), x.dtype) for x in allocated)
    pick_results = itemgetter(*outputs) if outputs else lambda values: None
    parts = tuple(descriptors), tuple(constants), tuple(growing), tuple(steps)
    return LaunchPlan(device, quantized, allocations, *parts, pick_results)
