"""The subclasses that `apply` gives to norms, routers and modules that rotate: they keep parameters, names, hooks and
signatures, and run the class's own forward where the operation does not serve a call.

B batch, T tokens, H hidden, D head size, R rotated columns of a head
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, update_wrapper
from types import CellType, FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import ops
from ..kernels.operation import call
from ..kernels.operation.checks import FLOATS
from .experts import fused
from .probes import ARGUMENT, Norm, Rotation, Rotations, Router, half_columns, norm_of, rotate, rotations_of, router_of

TABLES = "_mixtral_triton"  # attribute of a cos: sin, and what `rope` reads of both
OURS = "_mixtral_triton"  # how the names of our functions that rotate begin, in transformers' files


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


def replacement(original: Any, kind: Any) -> Any:
    """Return the subclass of `original` that runs operations, under the name by which transformers looks it up."""
    return _replacement(original, kind, original.forward)  # which a user may have patched since


@cache
def _replacement(original: Any, kind: Any, forward: Any) -> Any:
    makes: dict[Any, Callable[..., Any]] = {Norm: norm_forward, Router: router_forward, tuple: rotary_forward}
    body = {name: getattr(original, name) for name in ("__module__", "__qualname__")}
    body |= {"original": original, "kind": kind, "forward": makes[type(kind)](forward, kind)}
    return type(original.__name__, (Replaced, original), body)


def kind_of(module: nn.Module, tables: str | None, rms_norm: bool, experts: bool) -> Any:
    """Return what a module's class computes, of the parts that are asked for, or None. tables: how the model's rotary
    embeddings hold their angles; None: rotations are not asked for."""
    weight = module._parameters.get("weight")
    if weight is None:
        return (tables and rotations_of(type(module), tables)) or None
    if type(weight) not in call.PLAIN_TYPES or weight.dtype not in FLOATS:
        return None
    if weight.dim() == 1:
        return norm_of(module) if rms_norm else None
    return router_of(module) if experts and weight.dim() == 2 and hasattr(module, "top_k") else None


def norm_forward(run_original: Any, kind: Norm) -> Any:
    eps, offset = kind

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            x, weight = args[0], self.weight
            run = fused(ops.rms_norm, x, weight)
            if run is not None and x.dtype == weight.dtype:
                return run(x, weight, getattr(self, eps), None, offset)
        return run_original(self, *args, **kwargs)

    return update_wrapper(forward, run_original)


def selection_bias(module: Any, args: Sequence[Any]) -> Tensor | None:
    """The bias by which a call of a replaced router selects experts, in fp32."""
    name = module.kind.bias
    bias = None if name is None else args[1] if name == ARGUMENT else getattr(module, name)
    return bias if bias is None else bias.float()


def router_forward(run_original: Any, kind: Router) -> Any:
    options = dict(kind.options)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = len(args) == (2 if kind.bias == ARGUMENT else 1) and args[-1] is not None and not kwargs
        if given and not self.training and not torch._C._is_any_autocast_enabled():
            x, weight, bias = args[0], self.weight, selection_bias(self, args)
            run = fused(ops.gate_route, x, weight, bias)
            if run is not None and (x.dim() == 2 or kind.flattens) and (kind.wide or x.dtype == weight.dtype):
                x = x.reshape(-1, x.shape[-1])
                x, weight = (x.float(), weight.float()) if kind.wide else (x, weight)
                logits, routing_weights, ids = run(x, weight, self.top_k, bias=bias, **options)
                logits = logits if kind.logits is None else logits.to(kind.logits)
                return logits, routing_weights, ids.long()  # int64, as hooks of the gate expect
        return run_original(self, *args, **kwargs)

    return update_wrapper(forward, run_original)


def rotary_forward(forward: Any, kind: Rotations) -> Any:
    """The forward with other names of the functions that rotate, under which its file has ours: transformers has no
    hook of an instance, and what the file's own names mean stays for every other model."""
    file, names = inspect.unwrap(forward).__globals__, dict[str, str]()
    for name, rotations in kind:
        names[name] = "_".join((OURS, name, *(str(int(x)) if isinstance(x, bool) else x for x in rotations[0])))
        file.setdefault(names[name], rotary_function(file[name], rotations))
    return with_names(forward, names)


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


def rotary_function(original: Any, rotations: tuple[Rotation, ...]) -> Any:
    """The function of q, k, cos and sin by `ops.rope`, which computes the original where it does not serve the call."""
    kinds, tables = {kind.partial: kind for kind in rotations}, rotations[0].tables

    def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        columns, D = cos.shape[-1] * (2 if tables == "once" else 1), q.shape[-1]
        kind = kinds.get(columns < D) if cos.dim() == 3 and columns <= D == k.shape[-1] and not args else None
        run = None if kind is None or {*kwargs} - {"unsqueeze_dim"} else fused(ops.rope, q, k)
        if kind is None or run is None or q.dtype != k.dtype:
            return original(q, k, cos, sin, *args, **kwargs)
        by_heads, found = kwargs.get("unsqueeze_dim", 1) == 1, token_tables(cos, sin, q.shape[0], tables)
        if by_heads:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = rotate(lambda q, k: run(q, k, *found), q, k, kind, columns)
        return (q.transpose(1, 2), k.transpose(1, 2)) if by_heads else (q, k)

    return update_wrapper(apply_rotary, original, updated=())  # not what a module holds


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
