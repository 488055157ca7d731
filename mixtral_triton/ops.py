"""The operations, each a registered custom operator (`torch.ops.mixtral_triton.*`): which way a tensor goes.

CUDA or ROCm tensor: the Triton kernel. CPU tensor with Triton's interpreter on (TRITON_INTERPRET=1 before import): the
same kernel, interpreted. Plain CPU tensor: `mixtral_triton.reference`. Shapes, dtypes and sources stand there.

Every operation raises ValueError, naming the argument, on a wrong shape, dtype or device, and on a backward pass
(those that write into a cache, where a gradient is asked for).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.checks import in_range
from .kernels.checks import readable as readable  # whether the host may look: the shell asks, too
from .kernels.launch import INTERPRETED
from .kernels.op import Op
from .kernels.registry import OPS

# Tensors that nothing has to be told about: not a subclass that watches its operations.
PLAIN_TYPES: tuple[type[Tensor], ...] = (Tensor, nn.Parameter)
# Calls that passed the check, by all that it looks at: a decode step asks the same a thousand times.
_passed: set[tuple[Any, ...]] = set()
_PASSED_MOST = 4096


def _trait(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x)


def _check(op: Op, args: tuple[Any, ...]) -> None:
    traits = (op.name, *map(_trait, args))
    try:
        passed = traits in _passed
    except TypeError:  # a list, say: nothing that can pass
        passed = False
    if not passed:
        op.check(*args)
        if len(_passed) >= _PASSED_MOST:
            _passed.clear()
        _passed.add(traits)
    if op.ranges is not None:
        for bounds in op.ranges(*args):
            in_range(op.name, *bounds)


def _go(op: Op, *args: Any) -> Any:
    """Check, then run: all arguments by position. Results are contiguous, as the fake kernel says."""
    _check(op, args)
    out = _run(op, *args)
    if isinstance(out, tuple):
        return tuple(x.contiguous() for x in out)
    return out if out is None else out.contiguous()


def _run(op: Op, *args: Any, **kwargs: Any) -> Any:
    if kwargs:
        args = _by_position(op, args, kwargs)
    if INTERPRETED or args[0].device.type != "cpu":
        return op.run(*args)
    if op.name in _ALONE:
        place, parts = _ALONE[op.name]
        args, deterministic = args[:place], args[place:] == (True,)
        if deterministic:
            return _joined([op.reference(*part) for part in parts(*args)], args[0].shape[:-1])
    return op.reference(*args)


def _by_position(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    bound = inspect.signature(op.run).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args


def _joined(parts: list[Any], shape: torch.Size) -> Any:
    """The results of parts of a batch as those of the whole, which has `shape` but for the last dimension.

    A sequence that ended before the others is filled up with zeros.
    """
    if isinstance(parts[0], tuple):
        return tuple(_joined(list(same), shape) for same in zip(*parts, strict=True))
    if parts[0].dim() == 4:
        parts = [F.pad(part, (0, 0, 0, 0, 0, shape[1] - part.shape[1])) for part in parts]
    return torch.cat(parts).view(*shape, parts[0].shape[-1])


def _each(n: int) -> list[slice]:
    """One at a time; where there is none, none."""
    return [slice(i, i + 1) for i in range(n)] or [slice(0, 0)]


def _alone(x: Tensor | None) -> Tensor | None:
    """A part of a batch in memory of its own: a library's order of a sum may depend on where in memory rows begin."""
    return None if x is None else x.clone(memory_format=torch.contiguous_format)


def _rows(x: Tensor, *args: Any) -> Iterator[Any]:
    """The arguments of `linear`, or of `gate_route`, for one row at a time."""
    rows = x.reshape(-1, x.shape[-1])
    for one in _each(len(rows)):
        yield _alone(rows[one]), *args


def _tokens(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor, *norm: Any
) -> Iterator[Any]:
    """The arguments of `expert_swiglu`, or of `experts_add_rms_norm`, for one token at a time."""
    for one in _each(len(x)):
        rest = (norm[0][one], *norm[1:]) if norm else ()
        yield x[one], gate_up_proj, down_proj, ids[one], weights[one], *rest


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, window: Any, causal: Any, scale: Any, starts: Any, lengths: Any
) -> Iterator[Any]:
    """The arguments of `attention` for one sequence at a time, its keys cut at its length."""
    for one in _each(len(q)):
        end = None if lengths is None or len(q) == 0 else int(lengths[one])
        bounds = (x if x is None else x[one] for x in (starts, lengths))
        own = map(_alone, (q[one], k[one, :end], v[one, :end]))
        yield *own, window, causal, scale, *bounds


def _cached_sequences(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    past: Tensor,
    new: Tensor,
    *window: Any,
) -> Iterator[Any]:
    """The arguments of `cached_attention` for one sequence at a time, its queries cut where its new tokens end."""
    for one in _each(len(q)):
        t = slice(0, int(new[one].sum()))
        fresh = (x if x is None else x[one, t] for x in (q, k, v))
        yield *map(_alone, (*fresh, k_cache[one], v_cache[one])), past[one], new[one], *window


# On the plain way, bits that do not depend on the batch: torch's matmuls see one token, or one sequence, at a time.
# By operation: the place of its argument `deterministic`, and what cuts its arguments.
_ALONE: dict[str, tuple[int, Callable[..., Iterator[Any]]]] = {
    "linear": (2, _rows),
    "gate_route": (3, _rows),
    "expert_swiglu": (5, _tokens),
    "experts_add_rms_norm": (8, _tokens),
    "attention": (8, _sequences),
    "cached_attention": (8, _cached_sequences),
}


def untraced() -> bool:
    """Whether nothing watches torch's operations: no compiler, no dispatch mode."""
    return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


def _register(name: str, custom: Any) -> Any:
    """Give the operator its fake kernel, and a backward that refuses."""
    op = OPS[name]

    def fake(*args: Any) -> Any:
        op.check(*args)
        return op.empty(*args)

    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(f"mixtral_triton.ops.{name} is for inference only: it has no backward pass")

    custom.register_fake(fake)
    if not op.mutates:
        custom.register_autograd(backward)
    return custom


def _plain(values: Iterable[Any]) -> bool:
    """Whether nothing has to see the operator itself: no tracing, no dispatch mode, no gradient, no fake tensor."""
    if not untraced():
        return False
    gradients = torch.is_grad_enabled()
    for x in values:
        if not isinstance(x, Tensor):
            continue
        if type(x) not in PLAIN_TYPES or x.is_meta or (gradients and x.requires_grad):
            return False
    return True


def _custom(function: Any) -> Any:
    """Register `function` as the operator of its name. A plain call goes straight to it, past torch's dispatcher,
    which would cost more host time than a decode step's kernels take."""
    name = function.__name__.lstrip("_")
    op, signature = OPS[name], inspect.signature(function)
    operator = _register(name, torch.library.custom_op(f"mixtral_triton::{name}", function, mutates_args=op.mutates))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        if op.mutates and torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise ValueError(f"mixtral_triton.ops.{name} is for inference only: it writes into a cache")
        return _go(op, *args) if _plain(args) else operator(*args)

    return call


@_custom
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _go(OPS["rms_norm"], x, weight, eps)


@_custom
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _go(OPS["add_rms_norm"], x, residual, weight, eps)


@_custom
def embed_rms_norm(
    input_ids: Tensor,
    table: Tensor,
    weight: Tensor,
    eps: float,
    past: Tensor | None = None,
    new: Tensor | None = None,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """input_ids [B,T], table [V,H], weight [H] -> the norm y and the rows x, [B,T,H] each. See the reference.

    With past and new int [B]: sequence b stands at position past[b], and its first new[b] tokens are there, at most
    `limit` in all. On a GPU a sequence is NaN where an id, new or a position is out of range.
    """
    return _go(OPS["embed_rms_norm"], input_ids, table, weight, eps, past, new, limit)


@_custom
def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """logits [T,E] -> weights fp32 [T,K], ids int32 [T,K]. See `reference.route`."""
    return _go(OPS["route"], logits, top_k)


@_custom
def linear(x: Tensor, weight: Tensor, deterministic: bool = False) -> Tensor:
    """x [..., H], weight [N, H] -> [..., N]. `deterministic`: a row's bits do not depend on the other rows."""
    return _go(OPS["linear"], x, weight, deterministic)


@_custom
def gate_route(x: Tensor, gate: Tensor, top_k: int, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x [T,H], gate [E,H] -> logits [T,E], and the route of them: weights fp32 [T,K], ids int32 [T,K].

    See `reference.gate_route`. `deterministic`: a token's bits do not depend on the other tokens.
    """
    return _go(OPS["gate_route"], x, gate, top_k, deterministic)


@_custom
def sort_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """ids [T,K] -> order int32 [T*K], offsets int32 [E+1]. See `reference.sort_by_expert`."""
    return _go(OPS["sort_by_expert"], ids, num_experts)


@_custom
def expert_swiglu(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor, deterministic: bool = False
) -> Tensor:
    """x [T,H], gate_up_proj [E,2I,H], down_proj [E,H,I], ids [T,K], weights fp32 [T,K] -> [T,H].

    See `reference.expert_swiglu`. `deterministic`: a token's bits do not depend on the other tokens.
    """
    return _go(OPS["expert_swiglu"], x, gate_up_proj, down_proj, ids, weights, deterministic)


@_custom
def experts_add_rms_norm(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    ids: Tensor,
    weights: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """`expert_swiglu`, added to residual [T,H], and the norm of the sum -> y, sum. See the reference of this name."""
    args = (x, gate_up_proj, down_proj, ids, weights, residual, norm_weight, eps)
    return _go(OPS["experts_add_rms_norm"], *args, deterministic)


@_custom
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """q [B,T,Hq,D], k [B,T,Hkv,D], cos and sin fp32 [P,D/2], positions [B,T] -> q, k. See `reference.rope`."""
    return _go(OPS["rope"], q, k, cos, sin, positions)


@_custom
def append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, past: Tensor, new: Tensor) -> None:
    """Write the first new[b] tokens of k and v [B,T,Hkv,D] into the ring caches [B,Hkv,C,D]. See `reference.append`."""
    _go(OPS["append"], k, v, k_cache, v_cache, past, new)


@_custom
def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past: Tensor,
    new: Tensor,
) -> Tensor:
    """`rope` at positions past[b] + t, k and v straight into the caches -> q. See `reference.rope_append`."""
    return _go(OPS["rope_append"], q, k, v, cos, sin, k_cache, v_cache, past, new)


@_custom
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """q [B,T,Hq,D], k and v [B,S,Hkv,D] -> [B,T,Hq,D]. See `reference.attention`.

    `deterministic`: a sequence's bits do not depend on the rest of the batch.
    """
    return _go(OPS["attention"], q, k, v, window, causal, scale, starts, lengths, deterministic)


@_custom
def cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    past: Tensor,
    new: Tensor,
    window: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Attention over the ring caches and the fresh k, v, or over the caches alone. See `reference.cached_attention`."""
    return _go(OPS["cached_attention"], q, k, v, k_cache, v_cache, past, new, window, deterministic)


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
