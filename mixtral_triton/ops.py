"""The operations, each a registered custom operator (`torch.ops.mixtral_triton.*`): which way a tensor goes.

CUDA or ROCm tensor: the Triton kernel. CPU tensor with Triton's interpreter on (TRITON_INTERPRET=1 before import): the
same kernel, interpreted. Plain CPU tensor: `mixtral_triton.reference`. Shapes and dtypes stand in the signatures.

Every operation raises ValueError, naming the argument, on a wrong shape, dtype or device, and on a backward pass
(those that write into a cache, where a gradient is asked for).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import dispatch as _dispatch
from .kernels import embed as _embed
from .kernels import gate as _gate
from .kernels import linear as _linear
from .kernels import norm as _norm
from .kernels import plan
from .kernels import ring as _ring
from .kernels import rope as _rope
from .kernels import router as _router
from .kernels.attention import op as _attention
from .kernels.attention import step as _step
from .kernels.checks import in_range
from .kernels.checks import readable as readable  # whether the host may look: the shell asks, too
from .kernels.experts import op as _experts
from .kernels.launch import INTERPRETED
from .kernels.op import Op
from .kernels.pdl import pdl_region as pdl_region  # for the model's launches
from .kernels.plan import traits
from .kernels.quantized import QuantizedWeight
from .kernels.registry import OPS
from .kernels.signature import flatten_args, schema, unflatten_args

P = ParamSpec("P")
R = TypeVar("R")

# Tensors that nothing has to be told about: not a subclass that watches its operations.
PLAIN_TYPES: tuple[type[Tensor], ...] = (Tensor, nn.Parameter)
# Calls that passed the check, by all that it looks at, and what their integers have to be within, by place: a decode
# step asks the same a thousand times.
_passed: dict[tuple[Any, ...], tuple[tuple[int, int, int], ...]] = {}
_PASSED_MOST = 4096


def _check(op: Op[..., Any], args: tuple[Any, ...], traits: tuple[Any, ...]) -> None:
    key = (op.run, *traits)
    try:
        bounds = _passed.get(key)
    except TypeError:  # a list, say: nothing that can pass
        bounds = None
    if bounds is None:
        bounds = tuple((op.names.index(name), low, high) for name, low, high in op.bounds(op.by_name(*args)))
        if len(_passed) >= _PASSED_MOST:
            _passed.clear()
        _passed[key] = bounds
    for place, low, high in bounds:
        in_range(op.public or op.name, op.names[place], args[place], low, high)
    if op.ranges is not None:
        for more in op.ranges(op.by_name(*args)):
            in_range(op.public or op.name, *more)


def _go(op: Op[..., Any], *args: Any) -> Any:
    """Check, then run: all arguments by position. Results are contiguous, as the fake kernel says."""
    seen = traits(args)
    _check(op, args, seen)
    out = _by_place(op, args, seen)
    if isinstance(out, tuple):
        return tuple(x.contiguous() for x in out)
    return out if out is None else out.contiguous()


def _run(op: Op[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _by_place(op, op.by_place(*args, **kwargs) if kwargs else args)


def _by_place(op: Op[..., Any], args: tuple[Any, ...], seen: tuple[Any, ...] | None = None) -> Any:
    """`seen`: the traits of `args`, where they are known."""
    if INTERPRETED or args[0].device.type != "cpu":
        return plan.run(op, args, seen)
    if op.deterministic is not None and args[op.deterministic : op.deterministic + 1] == (True,):
        return _one_by_one(op, op.by_name(*args))
    return op.plain(*args)


def _one_by_one(op: Op[..., Any], given: dict[str, Any]) -> Any:
    """The plain way with bits that do not depend on the batch: torch's matmuls see one token, or one sequence."""
    first, letter = given[op.names[0]], op.arguments[0].letters.split()[0]
    batched = {
        argument.name: given[argument.name].reshape(-1, first.shape[-1]) if letter == "..." else given[argument.name]
        for argument in op.arguments
        if argument.letters.split()[:1] == [letter] and given[argument.name] is not None
    }
    n = len(batched[op.names[0]])
    parts = []
    for one in [slice(i, i + 1) for i in range(n)] or [slice(0, 0)]:
        own = {**given, **{name: value[one] for name, value in batched.items()}}
        own = own if op.truncate_sequence is None else op.truncate_sequence(own)
        # In memory of its own: a library's order of a sum may depend on where in memory rows begin.
        placed = {name: own[name] for name in batched if own[name] is not None}
        copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in placed.items()}
        parts.append(op.plain(**own | copies))
        for name in op.mutates:
            own[name].copy_(copies[name])
    return _joined(parts, first.shape[:-1])


def _joined(parts: list[Any], shape: torch.Size) -> Any:
    """The results of parts of a batch as those of the whole, which has `shape` but for the last dimension.

    A sequence that ended before the others is filled up with zeros.
    """
    if isinstance(parts[0], tuple):
        return tuple(_joined(list(same), shape) for same in zip(*parts, strict=True))
    if parts[0].dim() == 4:
        parts = [F.pad(part, (0, 0, 0, 0, 0, shape[1] - part.shape[1])) for part in parts]
    return torch.cat(parts).view(*shape, parts[0].shape[-1])


def untraced() -> bool:
    """Whether nothing watches torch's operations: no compiler, no dispatch mode."""
    return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


def _plain(values: Iterable[Any]) -> bool:
    """Whether nothing has to see the operator itself: no tracing, no dispatch mode, no gradient, no fake tensor, no
    sign that is yet to be applied (`torch.Tensor.is_neg`)."""
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


def _registered(op: Op[..., Any]) -> Any:
    """The operator in torch, with its fake kernel, and a backward that refuses."""

    def function(*args: Any) -> Any:
        return _go(op, *unflatten_args(op.arguments, args))

    def fake(*args: Any) -> Any:
        return op.empty(*unflatten_args(op.arguments, args))

    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(f"mixtral_triton.ops.{op.name} is for inference only: it has no backward pass")

    operator = torch.library.custom_op(
        f"mixtral_triton::{op.name}",
        function,
        mutates_args=op.mutates,
        schema=schema(op.run, op.arguments, len(op.results), op.mutates),
    )
    operator.register_fake(fake)
    if not op.mutates:
        operator.register_autograd(backward)
    return operator


def _operator(op: Op[P, R]) -> Callable[P, R]:
    """`op` as a function. A plain call goes straight to it, past torch's dispatcher, which would cost more host time
    than a decode step's kernels take."""
    operator, signature = _registered(op), op.signature

    @wraps(op.run)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        if op.mutates and torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise ValueError(f"mixtral_triton.ops.{op.name} is for inference only: it writes into a cache")
        if _plain(args):
            return _go(op, *args)
        quantized = any(isinstance(x, QuantizedWeight) for x in args)
        return operator(*(flatten_args(op.arguments, op.by_place(*args)) if quantized else args))

    _FUNCTIONS[op.name] = call
    return call


_FUNCTIONS: dict[str, Callable[..., Any]] = {}

_rms_norm = _operator(_norm.OP)
_add_rms_norm = _operator(_norm.ADD_OP)
embed_rms_norm = _operator(_embed.OP)
linear = _operator(_linear.OP)
route = _operator(_router.OP)
gate_route = _operator(_gate.OP)
rms_norm_gate_route = _operator(_gate.NORM_OP)
sort_by_expert = _operator(_dispatch.OP)
expert_swiglu = _operator(_experts.OP)
experts_add_rms_norm = _operator(_experts.NORM_OP)
rope = _operator(_rope.OP)
append = _operator(_ring.OP)
attention = _operator(_attention.OP)
cached_attention = _operator(_attention.CACHED_OP)
rope_append_attention = _operator(_step.OP)


def __getattr__(name: str) -> Any:
    """An operation of the registry that has no line above, which would only tell its types to a checker."""
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _FUNCTIONS[name]


for _name in OPS.keys() - _FUNCTIONS.keys():
    _operator(OPS[_name])


def reached_by(name: str, args: Mapping[str, Any]) -> Callable[..., Any]:
    """The operation as these arguments reach it: torch's operator, or where a weight is quantized, which is no argument
    of those, the function that takes it apart for them."""
    quantized = any(isinstance(value, QuantizedWeight) for value in args.values())
    return _FUNCTIONS[name] if quantized else getattr(torch.ops.mixtral_triton, name)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """x [..., H], weight [H] -> y, or (y, x + residual). See `reference.rms_norm`."""
    return _rms_norm(x, weight, eps) if residual is None else _add_rms_norm(x, residual, weight, eps)


class _Direct:
    """The operations without checks, for a caller that knows its shapes: a model, whose weights the loader checked."""

    def __init__(self) -> None:
        for name, op in OPS.items():
            if name != "rms_norm":  # a function of two operators, below
                setattr(self, name, partial(_run, op))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
        if residual is None:
            return _run(OPS["rms_norm"], x, weight, eps)
        return _run(OPS["add_rms_norm"], x, residual, weight, eps)


DIRECT = _Direct()
