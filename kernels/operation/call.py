"""A call of an operation, in its order: bind the arguments, check them, select the backend, run.

    ops.linear(x, weight)                Operation.__call__
      compile_binder (declaration.py)    all arguments, in the order of `run`
      call_checked, check                of what was checked before, integer tensors' values alone
      call_unchecked                     the backend of the first tensor
        plan.run (plan.py)               `linear` of kernels/ops/linear.py launches kernels, or a plan does

Backends: `triton` for a GPU's tensor; `interpreter`, the same kernels, for a CPU's where TRITON_INTERPRET=1 was set
before the import; `torch`, the reference, for any other CPU tensor. `ops.linear.unchecked` leaves out the check. Where
a trace, a dispatch mode or a gradient needs to see it, torch's operator is called (torch_operator.py), which runs
`call_checked`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..launching.launch import INTERPRETED, in_pdl_region, launch_context
from ..weights.composite_args import COMPOSITES
from . import plan
from .checks import check_values
from .declaration import Op, SignatureError, compile_binder
from .plan import call_key
from .torch_operator import flatten_args, register

P = ParamSpec("P")
R = TypeVar("R")

# Tensor classes that need no dispatch: any other may watch the operations on it.
PLAIN_TYPES: tuple[type[Tensor], ...] = (Tensor, nn.Parameter)
# By everything that the check looks at but values: the indices and bounds of integer tensors. A decode step repeats the
# same check thousands of times.
_checked: dict[tuple[Any, ...], tuple[tuple[int, int, int], ...]] = {}
_CHECKED_MAX = 4096
_is_compiling, _dispatch_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack  # read at every call


class Unchecked(Generic[P, R]):
    """An operation without the checks, for a caller that knows the arguments to be right, as a model whose weights the
    loader checked: none may be a lazy negation (`torch.Tensor.is_neg`), which kernels do not compute."""

    def __init__(self, op: Op, operator: Any) -> None:
        self.op, self.operator = op, operator
        self.bind = compile_binder(op.name, op.signature.parameters.values())
        self.arguments = op.arguments  # a compiler cannot trace the lock of a cached_property (Python < 3.12)
        self.__name__, self.__doc__, self.__module__ = op.run.__name__, op.run.__doc__, op.run.__module__
        self.__signature__ = op.public_signature

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = self.bind(*args, **kwargs)
        except TypeError as error:
            raise SignatureError(f"{self.op.name}: {error}") from None
        return call_unchecked(self.op, bound) if untraced() else self.dispatch(bound)  # type: ignore[no-any-return]

    def dispatch(self, args: tuple[Any, ...]) -> Any:
        """Call torch's operator."""
        quantized = any(isinstance(x, COMPOSITES) for x in args)
        return self.operator(*(flatten_args(self.arguments, args) if quantized else args))

    def __reduce__(self) -> str:
        return self.__name__  # a copy is the operation itself


class Operation(Unchecked[P, R]):
    """An operation: a function that checks its arguments. `unchecked` takes the same ones, `op` is what it declares.

    Both skip torch's dispatcher, which would cost more host time than a decode step's kernels take, unless a trace, a
    dispatch mode or, here, a gradient needs to see the operator.
    """

    def __init__(self, op: Op) -> None:
        super().__init__(op, register(op, lambda args: call_checked(op, args)))
        self.unchecked: Unchecked[P, R] = Unchecked(op, self.operator)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        op = self.op
        try:
            bound = self.bind(*args, **kwargs)
        except TypeError as error:
            raise SignatureError(f"{op.name}: {error}") from None
        if untraced() and transformed():
            reject_transforms(f"mixtral_triton.ops.{op.name}", bound)
        if op.mutates and torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in bound):
            raise ValueError(f"mixtral_triton.ops.{op.name} is for inference only: it writes into a cache")
        if needs_no_dispatch(bound):
            return call_checked(op, bound)  # type: ignore[no-any-return]
        if not torch.compiler.is_compiling():
            op.check(*bound)  # torch's operator raises a RuntimeError for another type, and takes 3 for True
        return self.dispatch(bound)  # type: ignore[no-any-return]


def call_checked(op: Op, args: tuple[Any, ...]) -> Any:
    """Check the positional arguments, run the operation, and return contiguous results, as the fake kernel says.

    All launches are ordinary ones: within a model's layers the caller is a hook, which may just have written the weight
    that a dependent launch would read early.
    """
    if in_pdl_region():
        with launch_context(pdl=False):
            return call_checked(op, args)
    out = call_unchecked(op, args, check(op, args))
    if isinstance(out, tuple):
        return tuple(x.contiguous() for x in out)
    return out if out is None else out.contiguous()


def check(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check the positional arguments, and return their call key."""
    try:
        call = call_key(args)
        bounds = _checked.get(key := (op.run, *call))
    except (RuntimeError, TypeError):  # a sparse tensor has no strides, a list no hash, and the full check says so
        op.check(*args)
        raise
    if bounds is None:
        bounds = tuple((op.names.index(name), low, high) for name, low, high in op.bounds(op.bind_by_name(*args)))
        if len(_checked) >= _CHECKED_MAX:
            _checked.clear()
        _checked[key] = bounds
    for index, low, high in bounds:
        check_values(op.name, op.names[index], args[index], low, high)
    return call


def call_unchecked(op: Op, args: tuple[Any, ...], key: tuple[Any, ...] | None = None) -> Any:
    """Run the operation on the backend that its first tensor selects. `key`: the call key of `args`, where known."""
    kind = args[0].device.type
    # Torch would compute in another dtype. The meta device knows no autocast.
    if torch._C._is_any_autocast_enabled() and kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return call_unchecked(op, args, key)
    if INTERPRETED or kind != "cpu":
        return plan.run(op, args, key)
    index = op.deterministic_index
    if index is not None and len(args) > index and args[index]:
        return _call_row_by_row(op, args)
    return op.call_reference(*args)


def _call_row_by_row(op: Op, args: tuple[Any, ...]) -> Any:
    """Run the reference for one token, or one sequence, at a time: its bits then do not depend on the batch."""
    values = op.bind_by_name(*args)
    first, letter = values[op.names[0]], op.arguments[0].shape_spec.split()[0]
    batched = {
        argument.name: values[argument.name].reshape(-1, first.shape[-1]) if letter == "..." else values[argument.name]
        for argument in op.arguments
        if argument.shape_spec.split()[:1] == [letter] and values[argument.name] is not None
    }
    parts = []
    for i in range(max(1, len(batched[op.names[0]]))):  # an empty batch runs once, for the results' shapes
        # Copies: a library's order of a sum may depend on where in memory rows start.
        row = {name: x[i : i + 1].clone(memory_format=torch.contiguous_format) for name, x in batched.items()}
        parts.append(op.call_reference(**values | row))
        for name in op.mutates:
            batched[name][i : i + 1].copy_(row[name])
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(same).view(*first.shape[:-1], same[0].shape[-1]) for same in zip(*parts, strict=True))
    return torch.cat(parts).view(*first.shape[:-1], parts[0].shape[-1])


def untraced() -> bool:
    """Return whether nothing watches torch's operations: no compiler, no dispatch mode."""
    return not (_is_compiling() or _dispatch_modes())


def transformed() -> bool:
    """Return whether torch.func (vmap, jvp, grad) or a level of forward derivatives is active."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def needs_no_dispatch(values: Iterable[Any]) -> bool:
    """Return whether torch's dispatcher may be skipped: no trace, gradient, fake tensor or lazy negation
    (`torch.Tensor.is_neg`)."""
    if not untraced():
        return False
    gradients = torch.is_grad_enabled()
    for x in values:
        if not isinstance(x, Tensor):
            if isinstance(x, COMPOSITES) and not needs_no_dispatch(x.tensors):
                return False
        elif type(x) not in PLAIN_TYPES or x.is_meta or x.is_neg() or (gradients and x.requires_grad):
            return False
    return True


def reject_transforms(name: str, args: Iterable[Any]) -> None:
    """Raise ValueError where torch.func (vmap, jvp, grad) or a forward derivative would see a tensor: no operation has
    a rule for them, and the kernels would not see them."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    if wrapped or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors if forward_ad._current_level >= 0):
        raise ValueError(f"{name} is for inference only: vmap, jvp, grad and forward derivatives have no rule for it")
