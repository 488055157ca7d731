"""The mask of the drop-in: an interval of keys a query, int32 [B, 1, Q, 2] = [lo, hi), where that says it all.

int32 [B, 1, Q, 0]: causal, every key valid, the last query at the last key. int64 [1, 1, 1, N + 1], on the host: N
packed sequences, by where they begin and end among all tokens. A dense bool [B, 1, Q, K], transformers' own, for the
rest: padding with holes, custom patterns, and what a tracer cannot look at. All have four dimensions: transformers'
models take such a mask as it is, and make none of their own.

B batch, Q queries, K keys
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from .release import cache_keyword

PAGED = (
    "continuous batching (generate_batch) keeps keys and values in pages, which fused attention does not read; "
    "apply(model, attention=False), or revert(model)"
)
NAME = "mixtral_triton"  # among transformers' masks
CACHE = cache_keyword()


class Masking:
    """A model's config as transformers' mask functions read it, with `interval_mask` selected; the config stays."""

    _attn_implementation = NAME

    def __init__(self, config: Any, is_causal: bool | None) -> None:
        self.config = config
        if is_causal is not None:
            self.is_causal = is_causal

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def causal_mask(config: Any, tokens: Tensor, mask: Any, position_ids: Any, cache: Any, is_causal: Any = None) -> Any:
    """`interval_mask`'s for `tokens` [B,Q] or [B,Q,H], by way of transformers' functions; a 4-D `mask` as it is."""
    if cache is not None and not hasattr(cache, "get_mask_sizes"):
        raise ValueError(f"mixtral_triton: {CACHE} is a {type(cache).__name__}, needs a Cache of transformers; {PAGED}")
    make = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    shape = tokens if tokens.dim() == 3 else torch.empty((*tokens.shape, 0), device=tokens.device)
    given = {"attention_mask": mask, "position_ids": position_ids, CACHE: cache}
    return make(config=Masking(config, is_causal), inputs_embeds=shape, **given)


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """What `AttentionMaskInterface` calls, once a forward. Queries stand at q_offset + t, keys at kv_offset + j.

    `attention_mask` bool [B, N] (and packed positions) are looked at on the host, as transformers' own masks are: one
    synchronization a forward, and none without them.
    """
    # Causal, with the window `local_size`, and nothing else? transformers forbids the skip for packed sequences, which
    # it looks for where there is no padding mask and no cache; for static caches too, which are causal all the same.
    packed = not allow_is_causal_skip and attention_mask is None and kv_length == q_length and q_length != 1
    plain = not (use_vmap or kwargs.get("allow_is_bidirectional_skip"))
    first: Tensor | None = None
    if packed and plain:
        known, bounds = sequence_bounds(mask_function, batch_size, q_length, device)
        if bounds is not None:
            return bounds[None, None, None]
        plain = known
    if attention_mask is not None:
        check_padding(attention_mask, batch_size, q_length, q_offset)
        if plain and not is_tracing(attention_mask) and not attention_mask.is_meta:
            end = kv_offset + kv_length if isinstance(q_offset, Tensor) else q_offset + q_length
            plain, first = first_key(attention_mask[:, kv_offset:end])
        else:
            plain = False
    if not plain:
        dense: Any = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # a tensor, for a static cache
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return dense
    if first is None and not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length:
        return torch.empty((batch_size, 1, q_length, 0), dtype=torch.int32, device=device)
    hi = torch.arange(1, q_length + 1, device=device) + (q_offset - kv_offset)
    lo = torch.zeros_like(hi) if first is None else first[:, None]
    if local_size is not None:
        lo = torch.maximum(lo, hi - local_size)
    interval = torch.stack(torch.broadcast_tensors(lo, hi), dim=-1)
    return interval.to(torch.int32).expand(batch_size, q_length, 2)[:, None]


def sequence_bounds(
    mask_function: Callable[..., Tensor], batch_size: int, q_length: int, device: torch.device | str
) -> tuple[bool, Tensor | None]:
    """Whether the sequences packed into the rows could be told apart, and their bounds; None: a row is a sequence.

    A token that does not see the one before it begins a sequence (or has a window of one: then each is by itself).
    """
    b, t = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length, device=device)
    begins = ~mask_function(b, 0, t, (t - 1).clamp(min=0)).expand(batch_size, q_length)
    if is_tracing(begins) or begins.is_meta:
        return False, None
    begins = begins | (t == 0)
    bounds = begins.flatten().nonzero().flatten().cpu()
    end = bounds.new_tensor([batch_size * q_length])
    return True, None if len(bounds) == batch_size else torch.cat((bounds, end))


def first_key(valid: Tensor) -> tuple[bool, Tensor | None]:
    """bool [B, N] -> whether each row is one run of True, and where it starts, int64 [B]; None: all are True.

    What follows the run is padding behind the text: its keys are in no real query's past.
    """
    if valid.all():
        return True, None
    starts = valid[:, 1:] & ~valid[:, :-1]
    one_run = (starts.sum(-1) + valid[:, 0]) <= 1
    return bool(one_run.all()), valid.int().argmax(-1)


def check_padding(attention_mask: Tensor, batch_size: int, q_length: int, q_offset: int | Tensor) -> None:
    """The mask names every sequence, and each token up to the last query."""
    past = "" if isinstance(q_offset, Tensor) else f" ({q_offset} past, {q_length} new)"
    need = q_length if isinstance(q_offset, Tensor) else q_offset + q_length
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < need:
        raise ValueError(
            f"mixtral_triton: attention_mask is of shape {list(attention_mask.shape)}, needs [{batch_size}, {need}]"
            f"{past}, one value a token, or a 4-D mask"
        )


def is_interval(mask: Any) -> bool:
    """Whether it is one of `interval_mask`'s, the empty one included."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.shape[-1] in (0, 2)


def interval_bounds(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """An interval mask as `ops.attention` takes it: starts [B] and lengths [B].

    Intervals start and end no earlier from query to query, one key more a query: the first start and the last end
    (and the window) give all of them.
    """
    return (None, None) if mask is None or not mask.shape[-1] else (mask[:, 0, 0, 0], mask[:, 0, -1, 1])


def packed_sequences(mask: Any, tokens: int) -> list[tuple[int, int]] | None:
    """(begin, end) of each sequence among all `tokens`, if that is what the mask says."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64 or mask.shape[:3] != (1, 1, 1):
        return None
    bounds = mask.flatten().tolist()
    return list(pairwise(bounds)) if bounds[0] == 0 and bounds[-1] == tokens else None


def visible(mask: Any, like: Tensor, keys: int, window: int | None) -> Tensor | None:
    """bool [B or 1,1,T,keys]: which key a query of `like` [B,H,T,D] sees by a mask of this file; None: another mask.

    No mask at all is causal from the first key on, as it is to torch's attention.
    """
    B, _, T, _ = like.shape
    j = torch.arange(keys, device=like.device)
    if mask is not None and is_interval(mask) and mask.shape[-1]:
        return (mask[..., :1] <= j) & (j < mask[..., 1:])
    i = torch.arange(T, device=like.device)[:, None]
    if mask is None or is_interval(mask):
        i = i + (keys - T if mask is not None or T == 1 else 0)
        return ((j <= i) & (j > i - (window or keys)))[None, None]
    bounds = packed_sequences(mask, B * T)
    if bounds is None:
        return None
    sizes = torch.tensor([end - begin for begin, end in bounds], device=like.device)
    row = torch.repeat_interleave(sizes).view(B, 1, T)
    return (row[..., None] == row[..., None, :]) & (j <= i) & (j > i - (window or keys))


AttentionMaskInterface.register(NAME, interval_mask)
