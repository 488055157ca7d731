"""Calling an operation: checked or unchecked, on the backend that its first tensor selects, and as torch's operator.

Backends: `triton` for a GPU's tensor; `interpreter`, the same kernels, for a CPU's where TRITON_INTERPRET=1 was set
before the import; `torch`, the reference, for any other CPU tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import plan
from .checks import Argument, Matrix, check_values
from .launch import INTERPRETED, in_pdl_region, launch_context
from .offload import OFFLOADED, OffloadedWeight
from .op import Op
from .plan import call_key
from .quantized import QuantizedWeight

# Tensor classes that need no dispatch: any other may watch the operations on it.
PLAIN_TYPES: tuple[type[Tensor], ...] = (Tensor, nn.Parameter)
# By everything that the check looks at but values: the places and bounds of integer tensors. A decode step repeats the
# same check thousands of times.
_checked: dict[tuple[Any, ...], tuple[tuple[int, int, int], ...]] = {}
_CHECKED_MAX = 4096


def call_checked(op: Op[..., Any], args: tuple[Any, ...]) -> Any:
    """Check the positional arguments, run the operation, and return contiguous results, as the fake kernel says.

    All launches are ordinary ones: within a model's layers the caller is a hook, which may just have written the weight
    that a dependent launch would read early.
    """
    if in_pdl_region():
        with launch_context(pdl=False):
            return call_checked(op, args)
    try:
        key = call_key(args)
    except RuntimeError:  # a sparse tensor has no strides, and the check says so
        op.check(*args)
        raise
    _check(op, args, key)
    out = call_unchecked(op, args, key)
    if isinstance(out, tuple):
        return tuple(x.contiguous() for x in out)
    return out if out is None else out.contiguous()


def call_unchecked(op: Op[..., Any], args: tuple[Any, ...], key: tuple[Any, ...] | None = None) -> Any:
    """Run the operation on the backend that its first tensor selects. `key`: the call key of `args`, where known."""
    if INTERPRETED or args[0].device.type != "cpu":
        return plan.run(op, args, key)
    at = op.deterministic_place
    if at is not None and len(args) > at and args[at] is True:
        return sequential(op, args)
    return op.call_reference(*args)


def _check(op: Op[..., Any], args: tuple[Any, ...], call: tuple[Any, ...]) -> None:
    key = (op.run, *call)
    try:
        bounds = _checked.get(key)
    except TypeError:  # an unhashable argument, which the full check rejects
        bounds = None
    if bounds is None:
        bounds = tuple((op.names.index(name), low, high) for name, low, high in op.bounds(op.bind_by_name(*args)))
        if len(_checked) >= _CHECKED_MAX:
            _checked.clear()
        _checked[key] = bounds
    for place, low, high in bounds:
        check_values(op.error_name, op.names[place], args[place], low, high)
    if op.constraints.ranges is not None:
        for name, values, low, high in op.constraints.ranges(op.bind_by_name(*args)):
            check_values(op.error_name, name, values, low, high)


def sequential(op: Op[..., Any], args: tuple[Any, ...]) -> Any:
    """Run the torch backend for one token, or one sequence, at a time: its bits then do not depend on the batch."""
    values = op.bind_by_name(*args)
    first, letter = values[op.names[0]], op.arguments[0].shape_spec.split()[0]
    batched = {
        argument.name: values[argument.name].reshape(-1, first.shape[-1]) if letter == "..." else values[argument.name]
        for argument in op.arguments
        if argument.shape_spec.split()[:1] == [letter] and values[argument.name] is not None
    }
    parts = []
    for i in range(max(1, len(batched[op.names[0]]))):  # an empty batch runs once, for the results' shapes
        row = {**values, **{name: value[i : i + 1] for name, value in batched.items()}}
        if op.constraints.truncate_sequence is not None:
            row = op.constraints.truncate_sequence(row)
        # Copies: a library's order of a sum may depend on where in memory rows start.
        copies = {
            name: row[name].clone(memory_format=torch.contiguous_format) for name in batched if row[name] is not None
        }
        parts.append(op.call_reference(**row | copies))
        for name in op.mutates:
            row[name].copy_(copies[name])
    return _concatenate(parts, first.shape[:-1])


def _concatenate(parts: list[Any], shape: torch.Size) -> Any:
    """Join the parts of a batch to results of `shape`, the last dimension aside; pad shorter sequences with zeros."""
    if isinstance(parts[0], tuple):
        return tuple(_concatenate(list(same), shape) for same in zip(*parts, strict=True))
    if parts[0].dim() == 4:
        parts = [F.pad(part, (0, 0, 0, 0, 0, shape[1] - part.shape[1])) for part in parts]
    return torch.cat(parts).view(*shape, parts[0].shape[-1])


def untraced() -> bool:
    """Return whether nothing watches torch's operations: no compiler, no dispatch mode."""
    return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


def needs_no_dispatch(values: Iterable[Any]) -> bool:
    """Return whether torch's dispatcher may be skipped: no trace, gradient, fake tensor or lazy negation
    (`torch.Tensor.is_neg`)."""
    if not untraced():
        return False
    gradients = torch.is_grad_enabled()
    for x in values:
        if isinstance(x, QuantizedWeight):
            x = x.data
        if not isinstance(x, Tensor):
            continue
        if type(x) not in PLAIN_TYPES or x.is_meta or x.is_neg() or (gradients and x.requires_grad):
            return False
    return True


# A quantized weight is several tensors, and torch's operators take tensors: its codes take the place of the weight; its
# scales, zeros and layout follow all other arguments.
_PARTS = (("scales", Tensor), ("zeros", Tensor), ("layout", str))


def register(op: Op[..., Any]) -> Any:
    """Register the operation with torch: its fake kernel, and a backward that raises."""

    def function(*args: Any) -> Any:
        return call_checked(op, unflatten_args(op.arguments, args))

    def fake(*args: Any) -> Any:
        return op.empty(*unflatten_args(op.arguments, args))

    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(f"mixtral_triton.ops.{op.name} is for inference only: it has no backward pass")

    name, mutates = f"mixtral_triton::{op.name}", op.mutates
    operator = torch.library.custom_op(name, function, mutates_args=mutates, schema=_schema(op))
    operator.register_fake(fake)
    if not mutates:
        operator.register_autograd(backward)
    return operator


def _schema(op: Op[..., Any]) -> str:
    parameters = [*op.plain_signature(Tensor).parameters.values()]
    for argument in op.arguments:
        for part, kind in _PARTS if argument.kind == Matrix else ():
            more = inspect.Parameter(f"{argument.name}_{part}", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
            parameters.append(more.replace(annotation=kind | None))
    results = len(op.results)
    returned = {0: None, 1: Tensor}.get(results, tuple[(Tensor,) * results])  # type: ignore[misc]

    def prototype() -> None: ...

    prototype.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=op.mutates)


def flatten_args(arguments: Sequence[Argument], args: Sequence[Any]) -> tuple[Any, ...]:
    """Turn all arguments of `run` into those of torch's operator."""
    tensors = [x.data if isinstance(x, QuantizedWeight) else x for x in args]
    parts: list[Any] = []
    for argument, x in zip(arguments, args, strict=True):
        if argument.kind == Matrix:
            parts += (x.scales, x.zeros, x.layout) if isinstance(x, QuantizedWeight) else (None, None, None)
    return (*tensors, *parts)


def unflatten_args(arguments: Sequence[Argument], args: Sequence[Any]) -> tuple[Any, ...]:
    """Turn the arguments of torch's operator into those of `run`."""
    values: list[Any] = list(args[: len(arguments)])
    parts: Iterator[Any] = iter(args[len(arguments) :])
    for place, argument in enumerate(arguments):
        if argument.kind == Matrix:
            scales, zeros, layout = (next(parts, None) for _ in _PARTS)
            if layout is not None:
                weight_of: Any = OffloadedWeight.of if layout.startswith(OFFLOADED) else QuantizedWeight.of
                values[place] = weight_of(values[place], scales, zeros, layout)
    return tuple(values)


def _reject_transforms(op: Op[..., Any], args: tuple[Any, ...]) -> None:
    """ValueError where torch.func (vmap, jvp, grad) or a forward derivative would see a tensor: no operation has a rule
    for them, and the kernels would not see them."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    if wrapped or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors if forward_ad._current_level >= 0):
        name = f"mixtral_triton.ops.{op.name}"
        raise ValueError(f"{name} is for inference only: vmap, jvp, grad and forward derivatives have no rule for it")


def entry_points(op: Op[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the operation as two functions: checked, and unchecked.

    Both skip torch's dispatcher, which would cost more host time than a decode step's kernels take, unless a trace, a
    dispatch mode or (checked) a gradient needs to see the operator.
    """
    operator = register(op)

    def dispatch(args: tuple[Any, ...]) -> Any:
        quantized = any(isinstance(x, QuantizedWeight) for x in args)
        return operator(*(flatten_args(op.arguments, op.bind(*args)) if quantized else args))

    def checked(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args = op.bind(*args, **kwargs)
        if untraced() and (forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None):
            _reject_transforms(op, args)
        if op.mutates and torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise ValueError(f"mixtral_triton.ops.{op.name} is for inference only: it writes into a cache")
        return call_checked(op, args) if needs_no_dispatch(args) else dispatch(args)

    def unchecked(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args = op.bind(*args, **kwargs)
        return call_unchecked(op, args) if untraced() else dispatch(args)

    return checked, unchecked
