"""Attention of tensors [B, heads, T, D], which transformers has: a plan spares each call the three views."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

from torch import Tensor

from ...operation.call import call_unchecked
from .launches import growing
from .op import attention


def _of_heads_first(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def transposed(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *args, **kwargs)

    return transposed


OP = replace(
    attention.op,
    run=_of_heads_first(attention.op.run),
    reference=_of_heads_first(attention.op.reference),
    growing=partial(growing, heads_first=True),
)


def attend_heads_first(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scale: float | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """`ops.attention.unchecked` of query [B,Hq,T,D] and key and value [B,Hkv,S,D], causal -> [B,T,Hq,D]."""
    return call_unchecked(OP, (query, key, value, window, True, scale, starts, lengths, sinks, False))  # type: ignore[no-any-return]
