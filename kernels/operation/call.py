"""Calling an operation: checked or unchecked, on the backend that its first tensor selects, and as torch's operator.

Backends: `triton` for a GPU's tensor; `interpreter`, the same kernels, for a CPU's where TRITON_INTERPRET=1 was set
before the import; `torch`, the reference, for any other CPU tensor.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from ..launching.launch import INTERPRETED, in_pdl_region, launch_context
from ..weights.composites import COMPOSITE_PARTS, COMPOSITES, Cache, compose, first_part
from . import plan
from .checks import Argument, check_values
from .declaration import Cost, Op, by_position, compile_binder, streaming_cost
from .inputs import random_inputs
from .plan import call_key
from .row_by_row import sequential

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
Case = TypeVar("Case")

# Tensor classes that need no dispatch: any other may watch the operations on it.
PLAIN_TYPES: tuple[type[Tensor], ...] = (Tensor, nn.Parameter)
# By everything that the check looks at but values: the indices and bounds of integer tensors. A decode step repeats the
# same check thousands of times.
_checked: dict[tuple[Any, ...], tuple[tuple[int, int, int], ...]] = {}
_CHECKED_MAX = 4096
_is_compiling, _dispatch_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack  # read at every call


def call_checked(op: Op, args: tuple[Any, ...]) -> Any:
    """Check the positional arguments, run the operation, and return contiguous results, as the fake kernel says.

    All launches are ordinary ones: within a model's layers the caller is a hook, which may just have written the weight
    that a dependent launch would read early.
    """
    if in_pdl_region():
        with launch_context(pdl=False):
            return call_checked(op, args)
    out = call_unchecked(op, args, _check(op, args))
    if isinstance(out, tuple):
        return tuple(x.contiguous() for x in out)
    return out if out is None else out.contiguous()


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
        return sequential(op, args)
    return op.call_reference(*args)


def _check(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
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
        check_values(op.public_name, op.names[index], args[index], low, high)
    return call


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


def _register(op: Op) -> Any:
    """Register the operation with torch: its fake kernel, and a backward that raises."""

    def function(*args: Any) -> Any:
        return call_checked(op, unflatten_args(op.arguments, args))

    def fake(*args: Any) -> Any:
        return op.empty(*unflatten_args(op.arguments, args))

    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(f"mixtral_triton.ops.{op.name} is for inference only: it has no backward pass")

    name, mutates = f"mixtral_triton::{op.name}", _mutated_arguments(op)
    operator = torch.library.custom_op(name, function, mutates_args=mutates, schema=_schema(op))
    operator.register_fake(fake)
    if mutates:
        _count_writes(operator._opoverload, operator._lib)
    else:
        operator.register_autograd(backward)
    return operator


def _count_writes(overload: Any, library: torch.library.Library) -> None:
    """Count the writes into the tensors that an operator mutates, in the place of torch's function, which before 2.13
    raises an IndexError where the last arguments have their defaults, as the scales of a cache that has none."""
    infos = [argument.alias_info for argument in overload._schema.arguments]
    mutated = [index for index, info in enumerate(infos) if info is not None and info.is_write]

    def count(keyset: Any, *args: Any) -> Any:
        increment_version([args[index] for index in mutated if index < len(args) and args[index] is not None])
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch's function is replaced
        library.impl(overload, count, "ADInplaceOrView", with_keyset=True, allow_override=True)


def _mutated_arguments(op: Op) -> list[str]:
    caches = (argument.name for argument in op.arguments if argument.kind == Cache and argument.name in op.mutates)
    return [*op.mutates, *(f"{name}_scales" for name in caches)]


def _schema(op: Op) -> str:
    signature = op.plain_signature(Tensor)
    parameters = [*signature.parameters.values()]
    for argument in op.arguments:
        for part, kind in COMPOSITE_PARTS.get(argument.kind, ()):
            field = inspect.Parameter(f"{argument.name}_{part}", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
            parameters.append(field.replace(annotation=kind | None))

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=_mutated_arguments(op))


def flatten_args(arguments: Sequence[Argument], args: Sequence[Any]) -> tuple[Any, ...]:
    """Turn all arguments of `run` into those of torch's operator, which are tensors: the codes of a composite take its
    place, and its other parts follow all other arguments."""
    parts: list[Any] = []
    for argument, x in zip(arguments, args, strict=True):
        for name, _ in COMPOSITE_PARTS.get(argument.kind, ()):
            parts.append(None if isinstance(x, Tensor) else getattr(x, name, None))
    return (*map(first_part, args), *parts)


def unflatten_args(arguments: Sequence[Argument], args: Sequence[Any]) -> tuple[Any, ...]:
    """Turn the arguments of torch's operator into those of `run`."""
    parts: Iterator[Any] = iter(args[len(arguments) :])
    return tuple(compose(argument.kind, x, parts) for argument, x in zip(arguments, args, strict=False))


def reject_transforms(name: str, args: Iterable[Any]) -> None:
    """Raise ValueError where torch.func (vmap, jvp, grad) or a forward derivative would see a tensor: no operation has
    a rule for them, and the kernels would not see them."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    if wrapped or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors if forward_ad._current_level >= 0):
        raise ValueError(f"{name} is for inference only: vmap, jvp, grad and forward derivatives have no rule for it")


class Operation(Protocol[P, R]):
    """An operation: a function that checks its arguments. `unchecked` takes the same ones, for a caller that knows them
    to be right, as a model whose weights the loader checked: none may be a lazy negation (`torch.Tensor.is_neg`), which
    kernels do not compute. `op` is what the registry lists."""

    op: Op
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @property
    def unchecked(self) -> Callable[P, R]: ...


def operation(
    *,
    case: type[Case],
    cost: Callable[[Case, torch.dtype], Cost] | None = None,
    flops: Callable[[Case], int] = lambda case: 0,
    inputs: Callable[..., dict[str, Any]] | None = None,
    name: str | None = None,
    **fields: Any,
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make the function below, which launches kernels on checked arguments, an operation, and register it with torch.

    cost    None: `flops`, and each required argument read once and each result written once (inputs.py)
    inputs  the arguments that `random_inputs` cannot draw from the annotations: indices, lengths, tables
    name    None: the function's
    fields  the other fields of an Op
    """

    def decorate(run: Callable[P, R]) -> Operation[P, R]:
        draw, count = random_inputs(run, inputs), streaming_cost(run, flops) if cost is None else cost
        fields["inputs"] = lambda sizes, *args, **kwargs: draw(op.case_of(sizes), *args, **kwargs)
        fields["cost"] = lambda sizes, dtype: count(op.case_of(sizes), dtype)
        op: Op = Op(name=name or run.__name__, run=by_position(run), case=case, **fields)
        checked, unchecked = _entry_points(op)
        for function in (checked, unchecked):
            wraps(run)(function)
            function.__signature__ = op.plain_signature()  # type: ignore[attr-defined]
        checked.unchecked, checked.op = unchecked, op  # type: ignore[attr-defined]
        return cast(Operation[P, R], checked)

    return decorate


def _entry_points(op: Op) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the operation as two functions: checked, and unchecked.

    Both skip torch's dispatcher, which would cost more host time than a decode step's kernels take, unless a trace, a
    dispatch mode or (checked) a gradient needs to see the operator.
    """
    operator, bind = _register(op), compile_binder(op.public_name, op.signature.parameters.values())
    arguments = op.arguments  # here: a compiler cannot trace the lock of a cached_property (Python < 3.12)

    def dispatch(args: tuple[Any, ...]) -> Any:
        quantized = any(isinstance(x, COMPOSITES) for x in args)
        return operator(*(flatten_args(arguments, args) if quantized else args))

    def checked(*args: Any, **kwargs: Any) -> Any:
        args = bind(*args, **kwargs)
        if untraced() and transformed():
            reject_transforms(f"mixtral_triton.ops.{op.name}", args)
        if op.mutates and torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise ValueError(f"mixtral_triton.ops.{op.name} is for inference only: it writes into a cache")
        if needs_no_dispatch(args):
            return call_checked(op, args)
        if not torch.compiler.is_compiling():
            op.check(*args)  # torch's operator raises a RuntimeError for another type, and takes 3 for True
        return dispatch(args)

    def unchecked(*args: Any, **kwargs: Any) -> Any:
        args = bind(*args, **kwargs)
        return call_unchecked(op, args) if untraced() else dispatch(args)

    return checked, unchecked
