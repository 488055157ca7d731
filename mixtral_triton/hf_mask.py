"""The mask of the drop-in: an interval of keys a query, int32 [B, 1, Q, 2] = [lo, hi), where that says it all.

None: causal, every key valid, the last query at the last key. int64 [N + 1], on the host: N packed sequences, by where
they begin and end among all tokens. A dense bool [B, 1, Q, K], transformers' own, for the rest: padding with holes,
custom patterns, and what a tracer cannot look at.

B batch, Q queries, K keys
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing


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
) -> Tensor | None:
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
        if known:
            return bounds
        plain = False
    if attention_mask is not None:
        check_padding(attention_mask, batch_size, q_length, q_offset)
        if plain and not is_tracing(attention_mask) and not attention_mask.is_meta:
            end = kv_offset + kv_length if isinstance(q_offset, Tensor) else q_offset + q_length
            plain, first = first_key(attention_mask[:, kv_offset:end])
        else:
            plain = False
    if not plain:
        return sdpa_mask(
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
    if first is None and not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length:
        return None
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


def interval_bounds(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`interval_mask`'s result as `ops.attention` takes it: starts [B] and lengths [B].

    Intervals start and end no earlier from query to query, one key more a query: the first start and the last end
    (and the window) give all of them.
    """
    return (None, None) if mask is None else (mask[:, 0, 0, 0], mask[:, 0, -1, 1])
