"""Attention of the drop-in: `ops.attention` with the masks that `mask.py`, transformers or the user make.

B batch, T query tokens, Hq query heads, Hkv key/value heads, D head size, S keys
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.mixtral import modeling_mixtral as theirs

from .. import ops
from .mask import is_interval, packed_sequences, visible


def operations() -> Any:
    """The operations; without checks where there is no tracer, gradient or autocast, so dtypes are the weights'."""
    return ops if not ops.untraced() or torch.is_grad_enabled() or torch.is_autocast_enabled() else ops.unchecked


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: Any = None,
    sliding_window: int | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [B,Hq,T,D], key and value [B,Hkv,S,D] -> [B,T,Hq,D], and the weights [B,Hq,T,S] if `output_attentions`.

    attention_mask  of `mask.interval_mask`, or the user's 4-D mask; None: causal from the first key on, as in torch
    Packed sequences run one after the other. A dense mask goes to torch's attention. The weights are those of
    transformers' eager attention, and the result does not depend on them.
    """
    mask, weights, (B, H, T, D) = attention_mask, None, query.shape
    if output_attentions:
        dense = visible(mask, query, key.shape[2], sliding_window)
        dense = _check_dense(mask, query, key) if dense is None else dense
        if dense.dtype == torch.bool:
            dense = torch.zeros_like(dense, dtype=query.dtype).masked_fill_(~dense, torch.finfo(query.dtype).min)
        weights = theirs.eager_attention_forward(module, query, key, value, dense, scaling)[1]
    if mask is None and 1 < T < key.shape[2]:
        key, value = key[:, :, :T], value[:, :, :T]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if mask is None or is_interval(mask):
        # From query to query intervals start no earlier and end one key later: the first start and the last end do.
        bounds = (None, None) if mask is None or not mask.shape[-1] else (mask[:, 0, 0, 0], mask[:, 0, -1, 1])
        return operations().attention(q, k, v, sliding_window, True, scaling, *bounds), weights
    if sequences := packed_sequences(mask, B * T):
        rows = [x.flatten(0, 1)[None] for x in (q, k, v)]
        parts = [[x[:, begin:end] for x in rows] for begin, end in sequences]
        outs = [operations().attention(*part, sliding_window, True, scaling) for part in parts]
        return torch.cat(outs, dim=1).view(B, T, H, D), weights
    mask = _check_dense(mask, query, key)
    return sdpa_attention_forward(module, query, key, value, mask, dropout=0.0, scaling=scaling)[0], weights


def _check_dense(mask: Any, query: Tensor, key: Tensor) -> Tensor:
    """The user's 4-D mask as torch's attention takes it; ValueError for another shape or dtype."""
    B, H, T, _ = query.shape
    need = (B, H, T, key.shape[2])
    tensor = isinstance(mask, Tensor)
    fits = tensor and mask.dim() == 4 and mask.shape[3] == need[3]
    fits = fits and all(size in (1, full) for size, full in zip(mask.shape, need, strict=True))
    if not fits or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        got = f"{mask.dtype} of shape {list(mask.shape)}" if tensor else f"a {type(mask).__name__}"
        dense = f"bool (True: visible) or float (added to the scores) that broadcasts to {list(need)}"
        raise ValueError(f"mixtral_triton: attention_mask is {got}, needs {dense}, or one value a token [{B}, tokens]")
    return mask if mask.dtype == torch.bool else mask.to(query.dtype)
