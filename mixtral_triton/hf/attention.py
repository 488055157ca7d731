"""Attention of the drop-in: `ops.attention`, and torch's for what no interval of keys says.

B batch, T query tokens, Hq query heads, Hkv key/value heads, D head size, S keys
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .. import ops
from ..kernels.reference import with_sinks
from .experts import autocast_dtype, fused
from .masks import IntervalMask, check_dense
from .training import warn_of_gradients

MAX_HEAD = 256
# Keywords by which models add to a layer's attention what a causal mask does not say.
ADDED = {"sinks": "sinks", "softcap": "a soft cap of scores", "position_bias": "a position bias"}
INDICES = "indices", "block_indices"  # where no dense mask has these
ADDED |= dict.fromkeys(INDICES, "keys that an index chooses")


def check_attention(
    module: nn.Module, query: Tensor, value: Tensor, dense: bool, dropout: float, added: dict[str, Any]
) -> None:
    """Raise ValueError that names a layer's class and what `ops.attention` does not compute of its attention. dense:
    its mask is a user's."""
    D, columns = query.shape[-1], value.shape[-1]
    faults: list[str] = []  # torch's compiler does not follow a call of list[str]
    for key, given in added.items():
        if given is not None and key in ADDED and not (dense and key in INDICES):
            faults.append(ADDED[key])
    if not getattr(module, "is_causal", True) or (added.get("is_causal") is False and not dense):
        faults.append("attention that is not causal")
    if dropout and module.training:
        faults.append(f"dropout of {dropout} in training")
    if columns > D or D > MAX_HEAD:
        faults.append(f"heads of {D} and values of {columns} columns")
    if faults:
        layer = f" of layer {layer_idx}" if (layer_idx := getattr(module, "layer_idx", None)) is not None else ""
        needs = f'needs causal attention, at most {MAX_HEAD} columns, or another attn_implementation, as "eager"'
        raise ValueError(f"mixtral_triton: {type(module).__name__}{layer} has {', '.join(faults)}, {needs}")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: Any = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    output_attentions: bool = False,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [B,Hq,T,D], key [B,Hkv,S,D] and value [B,Hkv,S,at most D] -> [B,T,Hq,as value], and the weights [B,Hq,T,S]
    if `output_attentions`.

    attention_mask: an IntervalMask, encoded, or the user's 4-D mask; None: causal from the first key on, as in torch.
    s_aux [Hq]: sinks, as in `ops.attention`. A dense mask goes to torch's attention. The weights are those of
    transformers' eager attention, and the result does not depend on them. ValueError by `check_attention`.
    """
    if (dtype := autocast_dtype(query)) is not None:
        query, key, value = (x.to(dtype) for x in (query, key, value))
    attend, mask = fused(ops.attention, query, key, value, s_aux), IntervalMask.decode(attention_mask)
    check_attention(module, query, value, mask is None, 0.0 if attend is None else dropout, kwargs)
    (_, _, T, D), S = query.shape, key.shape[2]
    window = None if mask is None else mask.window(module, S, sliding_window)
    if attention_mask is None and 1 < T < S:
        key, value = key[:, :, :T], value[:, :, :T]
    if attend is not None:  # padding behind the text sees what no window says
        fits = mask is not None and (mask.text_ends is None or window is None)
    else:  # where gradients are recorded: torch's own causal attention
        fits = mask is not None and mask.starts is None and window is None and s_aux is None and T in (1, key.shape[2])
    weights = seen = None
    if output_attentions or not fits:
        seen = check_dense(attention_mask, query, key) if mask is None else mask.dense(query, key, window)
    if output_attentions:
        weights = pad(attention_weights(query, key, seen, scaling, s_aux), (0, S - key.shape[2]))
    if mask is None or attend is None or not fits:
        if attend is None and not is_compiling():  # a warning would end the graph
            warn_of_gradients()
        seen, dropout = None if fits else seen, dropout if attend is None else 0.0
        return dense_attention(module, query, key, value, seen, scaling, dropout, s_aux), weights
    if (columns := value.shape[-1]) < D:
        value = pad(value, (0, D - columns))
    starts, ends, text_ends = mask[:3]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = attend(q, k, v, window=window, scale=scaling, starts=starts, lengths=ends, sinks=s_aux)
    if ends is not None and text_ends is not None:  # padding sees the whole text, and nothing else
        padding = attend(q, k, v, causal=False, scale=scaling, starts=starts, lengths=text_ends, sinks=s_aux)
        behind = torch.arange(1 - T, 1, device=q.device) + ends[:, None] > text_ends[:, None]
        out = torch.where(behind[..., None, None], padding, out)
    return out if columns == D else out[..., :columns], weights


def attention_weights(query: Tensor, key: Tensor, seen: Any, scaling: Any, sinks: Tensor | None) -> Tensor:
    """The weights [B,Hq,T,S] of transformers' eager attention with a mask of `check_dense`."""
    if seen.dtype == torch.bool:
        seen = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, torch.finfo(query.dtype).min)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scaling
    scores += seen
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]


def dense_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any, dropout: float, sinks: Any
) -> Tensor:
    """torch's attention of query, key and value [B,heads,·,D] with a mask of `check_dense`, which sinks [Hq] need."""
    if sinks is not None and mask is not None:
        key, value, mask = with_sinks(key, value, mask.expand(-1, -1, query.shape[2], key.shape[2]), sinks)
        mask = mask.to(query.dtype)
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling)[0]
