"""The subclasses that `apply` gives to norms, routers and modules that rotate: they keep parameters, names, hooks and
signatures, and run the class's own forward where the operation does not serve a call.

B batch, T tokens, H hidden, D head size, R rotated columns of a head
"""

import inspect
from collections.abc import Callable
from functools import cache, update_wrapper
from types import CellType, FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import ops
from ..kernels.operation import call
from ..kernels.operation.checks import FLOATS
from .experts import fused
from .probes import Norm, Rotation, Router, half_columns, norm_of, rotary_functions, rotate, rotation_of, router_of

TABLES = "_mixtral_triton"  # attribute of a cos: sin, and what `rope` reads of both
Rotations = tuple[tuple[str, Rotation], ...]  # by the name of the function


class Replaced:
    """The base of classes that replace a class of transformers, their `original`.

    Who calls the class with arguments gets an instance of `original`, and a pickle of an instance names `original`.
    """

    original: ClassVar[Any]
    kind: ClassVar[Any]  # what the original computes, by probes.py

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.original(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (self.original, self.kind), *super().__reduce_ex__(protocol)[2:]


def rebuild(original: Any, kind: Any) -> Any:
    """Return, for pickle, an instance of the class that replaces `original`, without a state."""
    return Replaced.__new__(replacement(original, kind))


@cache
def replacement(original: Any, kind: Any) -> Any:
    """Return the subclass of `original` that runs operations, under the name by which transformers looks it up."""
    makes: dict[Any, Callable[..., Any]] = {Norm: norm_forward, Router: router_forward, tuple: rotary_forward}
    body = {name: getattr(original, name) for name in ("__module__", "__qualname__")}
    body |= {"original": original, "kind": kind, "forward": makes[type(kind)](original, kind)}
    return type(original.__name__, (Replaced, original), body)


def kind_of(module: nn.Module, tables: str | None, parts: Any) -> Norm | Router | Rotations | None:
    """Return what replaces a module's class, of the parts that are asked for; None: nothing. tables: how the model's
    rotary embeddings hold their angles."""
    weight = module._parameters.get("weight")
    if weight is not None:
        if type(weight) not in call.PLAIN_TYPES or weight.dtype not in FLOATS:
            return None
        if parts.rms_norm and weight.dim() == 1:
            return norm_of(module)
        return router_of(module) if parts.experts and weight.dim() == 2 else None
    if tables is None or not parts.rope:
        return None
    found = [(name, rotation_of(function, tables)) for name, function in rotary_functions(type(module))]
    return tuple((name, rotation) for name, rotation in found if rotation is not None) or None


def norm_forward(original: Any, kind: Norm) -> Any:
    (eps, offset), run_original = kind, original.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            x, weight = args[0], self.weight
            run = fused(ops.rms_norm, x, weight)
            if run is not None and x.dtype == weight.dtype:
                return run(x, weight, getattr(self, eps), None, offset)
        return run_original(self, *args, **kwargs)

    return update_wrapper(forward, run_original)


def router_forward(original: Any, kind: Router) -> Any:
    options, run_original = dict(kind.options), original.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not self.training and not torch._C._is_any_autocast_enabled():
            x, weight = args[0], self.weight
            run = fused(ops.gate_route, x, weight)
            if run is not None and x.dim() == 2 and (kind.wide or x.dtype == weight.dtype):
                x, weight = (x.float(), weight.float()) if kind.wide else (x, weight)
                logits, routing_weights, ids = run(x, weight, self.top_k, **options)
                logits = logits if kind.logits is None else logits.to(kind.logits)
                return logits, routing_weights, ids.long()  # int64, as hooks of the gate expect
        return run_original(self, *args, **kwargs)

    return update_wrapper(forward, run_original)


class Rotary(NamedTuple):
    """A function that rotates, the globals of its file, and its name and that of ours there."""

    original: Any
    file: dict[str, Any]
    name: str
    ours: str


def rotary_functions_of(original: Any, kind: Rotations) -> list[Rotary]:
    """The functions that a replaced class calls, for which its file gets ours under other names."""
    file = inspect.unwrap(original.forward).__globals__
    found = [Rotary(file[name], file, name, f"_mixtral_triton_{name}_{'_'.join(map(str, x))}") for name, x in kind]
    for rotary, (_, rotation) in zip(found, kind, strict=True):
        if rotary.ours not in file:
            file[rotary.ours] = rotary_function(rotary.original, rotation)
    return found


def rotary_forward(original: Any, kind: Rotations) -> Any:
    """The forward with our names of the functions that rotate: transformers has no hook of an instance, and what the
    file's own names mean stays for every other model."""
    return with_names(original.forward, {rotary.name: rotary.ours for rotary in rotary_functions_of(original, kind)})


def with_names(function: Any, names: dict[str, str]) -> Any:
    """A copy of a function, and of what it wraps, that reads other globals in the place of some."""
    code, cells = function.__code__, function.__closure__
    inner = vars(function).get("__wrapped__")
    renamed = inner and with_names(inner, names)
    if inner is None:
        code = code.replace(co_names=tuple(names.get(name, name) for name in code.co_names))
    else:
        cells = tuple(CellType(renamed) if cell.cell_contents is inner else cell for cell in cells)
    same: Any = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, cells)
    same.__kwdefaults__ = function.__kwdefaults__
    same = update_wrapper(same, function)
    if inner is None:
        del same.__wrapped__
    else:
        same.__wrapped__ = renamed
    return same


def rotary_function(original: Any, kind: Rotation) -> Any:
    """The function of q, k, cos and sin by `ops.rope`, which computes the original where it does not serve the call."""

    def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        by_heads = kwargs.get("unsqueeze_dim", 1) == 1
        columns = 2 * cos.shape[-1] if kind.tables == "once" else cos.shape[-1]
        serves = cos.dim() == 3 and columns <= q.shape[-1] and (kind.partial or columns == q.shape[-1])
        run = fused(ops.rope, q, k) if serves and not args and {*kwargs} <= {"unsqueeze_dim"} else None
        if run is None or q.dtype != k.dtype or q.shape[-1] != k.shape[-1]:
            return original(q, k, cos, sin, *args, **kwargs)
        tables = token_tables(cos, sin, q.shape[0], kind.tables)
        if by_heads:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = rotate(lambda q, k: run(q, k, *tables), q, k, kind, columns)
        return (q.transpose(1, 2), k.transpose(1, 2)) if by_heads else (q, k)

    return update_wrapper(apply_rotary, original)


def token_tables(cos: Tensor, sin: Tensor, batch: int, tables: str) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin [B or 1,T,R] of transformers -> what `rope` reads: fp32 [P,R/2], a row per token, and the rows'
    numbers [B,T]. Computed once a forward, whose layers share cos."""
    if not is_compiling():
        known = getattr(cos, TABLES, None)
        if known is not None and known[0] is sin and known[3].shape[0] == batch:
            return known[1:]
    rows = cos.shape[0] * cos.shape[1]
    numbers = torch.arange(rows, device=cos.device).view(cos.shape[:2]).expand(batch, cos.shape[1])
    halves = [half_columns(x, tables).reshape(rows, -1).float() for x in (cos, sin)]
    if not is_compiling():
        setattr(cos, TABLES, (sin, *halves, numbers))
    return halves[0], halves[1], numbers
