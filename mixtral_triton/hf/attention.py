"""Attention of the drop-in: `ops.attention` behind the masks that transformers, the user or `hf_mask` make.

B batch, T query tokens, Hq query heads, Hkv key/value heads, D head size, S keys
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.mixtral import modeling_mixtral as theirs

from .. import ops
from .mask import interval_bounds, is_interval, packed_sequences, visible


def operations() -> Any:
    """The operations, without their checks where nothing watches and every dtype is the weights' own."""
    watched = not ops.untraced() or torch.is_grad_enabled() or torch.is_autocast_enabled()
    return ops if watched else ops.unchecked


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [B,Hq,T,D], key and value [B,Hkv,S,D] -> [B,T,Hq,D], and the weights [B,Hq,T,S] where they are wanted.

    The mask is one of `hf_mask.interval_mask`: packed sequences, which no cache holds, go one after the other, a dense
    one to torch's attention. Or it is the user's own 4-D one. None is what it is to torch's attention: causal from the
    first key on. The weights are those of transformers' eager attention, beside the result, which stays this one's.
    """
    weights = None
    if output_attentions:
        weights = attention_weights(module, query, key, value, attention_mask, scaling, sliding_window)
    if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if attention_mask is None or is_interval(attention_mask):
        starts, lengths = interval_bounds(attention_mask)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return operations().attention(q, k, v, sliding_window, True, scaling, starts, lengths), weights
    mask = attention_mask
    B, H, T, D = query.shape
    if sequences := packed_sequences(mask, B * T):
        rows = [x.transpose(1, 2).flatten(0, 1)[None] for x in (query, key, value)]
        parts = [[x[:, begin:end] for x in rows] for begin, end in sequences]
        outs = [operations().attention(*part, sliding_window, True, scaling) for part in parts]
        return torch.cat(outs, dim=1).view(B, T, H, D), weights
    mask = _dense(mask, query, key)
    return sdpa_attention_forward(module, query, key, value, mask, dropout=0.0, scaling=scaling)[0], weights


def attention_weights(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: Any,
    sliding_window: int | None,
) -> Tensor:
    """The weights of the same attention in plain torch, [B,Hq,T,S] in query's dtype, 0 where a query does not look."""
    mask = visible(attention_mask, query, key.shape[2], sliding_window)
    mask = _dense(attention_mask, query, key) if mask is None else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    return theirs.eager_attention_forward(module, query, key, value, mask, scaling)[1]


def _dense(mask: Any, query: Tensor, key: Tensor) -> Tensor:
    """The user's own mask, if it is one that torch's attention takes."""
    B, H, T, _ = query.shape
    need = (B, H, T, key.shape[2])
    good = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[3] == need[3]
    good = good and all(size in (1, whole) for size, whole in zip(mask.shape, need, strict=True))
    if not good or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        tensor = isinstance(mask, Tensor)
        got = f"{mask.dtype} of shape {list(mask.shape)}" if tensor else f"a {type(mask).__name__}"
        raise ValueError(
            f"mixtral_triton: attention_mask is {got}, needs bool (True: seen) or float (added to the scores) that "
            f"broadcasts to {list(need)}, or one value a token [{B}, tokens]"
        )
    return mask if mask.dtype == torch.bool else mask.to(query.dtype)
