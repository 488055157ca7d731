"""The operations, each a registered custom operator (`torch.ops.mixtral_triton.*`): which way a tensor goes.

CUDA or ROCm tensor: the Triton kernel. CPU tensor with Triton's interpreter on (TRITON_INTERPRET=1 before import): the
same kernel, interpreted. Plain CPU tensor: `mixtral_triton.reference`. Shapes, dtypes and sources stand there.

Every operation raises ValueError, naming the argument, on a wrong shape, dtype or device, and on a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.launch import INTERPRETED
from .kernels.op import Op
from .kernels.registry import OPS


def _go(op: Op, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    op.check(*args, **kwargs)
    if INTERPRETED or device.type != "cpu":
        return op.run(*args, **kwargs)
    kwargs.pop("deterministic", None)
    return op.reference(*args, **kwargs)


def _register(name: str, custom: Any) -> Any:
    """Give the operator its fake kernel, and a backward that refuses."""
    op = OPS[name]

    def fake(*args: Any, **kwargs: Any) -> Any:
        op.check(*args, **kwargs)
        return op.empty(*args, **kwargs)

    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(f"mixtral_triton.ops.{name} is for inference only: it has no backward pass")

    custom.register_fake(fake)
    if not op.mutates:
        custom.register_autograd(backward)
    return custom


def _plain(values: Iterable[Any]) -> bool:
    """Whether nothing has to see the operator itself: no tracing, no dispatch mode, no gradient, no fake tensor."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    gradients = torch.is_grad_enabled()
    return not any(
        isinstance(x, Tensor)
        and (x.is_meta or type(x) not in (Tensor, nn.Parameter) or (gradients and x.requires_grad))
        for x in values
    )


def _custom(function: Any) -> Any:
    """Register `function` as the operator of its name. A plain call goes straight to it, past torch's dispatcher,
    which would cost more host time than a decode step's kernels take."""
    name = function.__name__.lstrip("_")
    mutates = OPS[name].mutates
    operator = _register(name, torch.library.custom_op(f"mixtral_triton::{name}", function, mutates_args=mutates))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        plain = _plain((*args, *kwargs.values()))
        return function(*args, **kwargs) if plain else operator(*args, **kwargs)

    return call


@_custom
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _go(OPS["rms_norm"], x.device, x, weight, eps)


@_custom
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _go(OPS["add_rms_norm"], x.device, x, residual, weight, eps)


@_custom
def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """logits [T,E] -> weights fp32 [T,K], ids int32 [T,K]. See `reference.route`."""
    return _go(OPS["route"], logits.device, logits, top_k)


@_custom
def sort_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """ids [T,K] -> order int32 [T*K], offsets int32 [E+1]. See `reference.sort_by_expert`."""
    return _go(OPS["sort_by_expert"], ids.device, ids, num_experts)


@_custom
def expert_swiglu(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor, deterministic: bool = False
) -> Tensor:
    """x [T,H], gate_up_proj [E,2I,H], down_proj [E,H,I], ids [T,K], weights fp32 [T,K] -> [T,H].

    See `reference.expert_swiglu`. `deterministic`: a token's bits do not depend on the other tokens.
    """
    op = OPS["expert_swiglu"]
    return _go(op, x.device, x, gate_up_proj, down_proj, ids, weights, deterministic=deterministic)


@_custom
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """q [B,T,Hq,D], k [B,T,Hkv,D], cos and sin fp32 [P,D/2], positions [B,T] -> q, k. See `reference.rope`."""
    return _go(OPS["rope"], q.device, q, k, cos, sin, positions)


@_custom
def append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, past: Tensor, new: Tensor) -> None:
    """Write the first new[b] tokens of k and v [B,T,Hkv,D] into the ring caches [B,Hkv,C,D]. See `reference.append`."""
    _go(OPS["append"], k.device, k, v, k_cache, v_cache, past, new)


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
    return _go(OPS["rope_append"], q.device, q, k, v, cos, sin, k_cache, v_cache, past, new)


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
    options = {"window": window, "causal": causal, "scale": scale, "starts": starts, "lengths": lengths}
    return _go(OPS["attention"], q.device, q, k, v, **options, deterministic=deterministic)


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
    op = OPS["cached_attention"]
    return _go(op, q.device, q, k, v, k_cache, v_cache, past, new, window, deterministic=deterministic)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """x [..., H], weight [H] -> y, or (y, x + residual). See `reference.rms_norm`."""
    return _rms_norm(x, weight, eps) if residual is None else _add_rms_norm(x, residual, weight, eps)
