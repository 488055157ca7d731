"""The masks of the drop-in: one interval of keys per query, int32 [B, 1, Q, 2] = [lo, hi), where that is enough.

int32 [B, 1, Q, 0]: causal, every key valid, the last query at the last key. int64 [1, 1, 1, N + 1], on the host: the
bounds of N packed sequences among all tokens. Otherwise transformers' dense bool [B, 1, Q, K]: padding with holes,
custom patterns, and what a tracer cannot read. transformers' models use a mask of four dimensions as it is.

B batch, Q queries, K keys
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

PAGED = (
    "continuous batching (generate_batch) keeps keys and values in pages, which fused attention does not read; "
    "apply(model, attention=False), or revert(model)"
)
NAME = "mixtral_triton"  # among transformers' masks
# The keyword of a forward's cache, which transformers 5.24 renamed.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class MaskConfig:
    """A model's config that selects `interval_mask` in transformers' mask functions. The config itself stays."""

    _attn_implementation = NAME

    def __init__(self, config: Any, **settings: Any) -> None:
        self.config = config
        self.__dict__.update(settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def causal_mask(config: Any, tokens: Tensor, mask: Any, position_ids: Any, cache: Any, is_causal: Any = None) -> Any:
    """The mask for `tokens` [B,Q] or [B,Q,H], by transformers' functions and `interval_mask`; a 4-D `mask` stays."""
    if cache is not None and not hasattr(cache, "get_mask_sizes"):
        raise ValueError(f"mixtral_triton: {CACHE} is a {type(cache).__name__}, needs a Cache of transformers; {PAGED}")
    create = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    embeds = tokens if tokens.dim() == 3 else torch.empty((*tokens.shape, 0), device=tokens.device)
    kwargs = {"attention_mask": mask, "position_ids": position_ids, CACHE: cache}
    settings = {} if is_causal is None else {"is_causal": is_causal}
    return create(config=MaskConfig(config, **settings), inputs_embeds=embeds, **kwargs)


def interval_mask(batch_size: int, q_length: int, kv_length: int, **call: Any) -> Tensor:
    """What `AttentionMaskInterface` calls, once a forward. Queries are at q_offset + t, keys at kv_offset + j.

    The host reads `attention_mask` bool [B, N] and packed positions, as it does for transformers' own masks: one
    synchronization per forward, and none without them.
    """
    q_offset, kv_offset, device = call.get("q_offset", 0), call.get("kv_offset", 0), call["device"]
    attention_mask, local_size = call.get("attention_mask"), call.get("local_size")
    # transformers forbids the skip for packed sequences, which it looks for where there is neither padding mask nor
    # cache, and for static caches, which are causal all the same.
    packed = not call.get("allow_is_causal_skip", True) and attention_mask is None and kv_length == q_length != 1
    plain = not (call.get("use_vmap") or call.get("allow_is_bidirectional_skip"))
    first: Tensor | None = None
    if packed and plain:
        plain, bounds = sequence_bounds(call["mask_function"], batch_size, q_length, device)
        if bounds is not None:
            return bounds[None, None, None]
    if attention_mask is not None:
        need, past = q_length, ""
        if not isinstance(q_offset, Tensor):
            need, past = q_offset + q_length, f" ({q_offset} past, {q_length} new)"
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < need:
            needs = f"needs [{batch_size}, {need}]{past}, one value a token, or a 4-D mask"
            raise ValueError(f"mixtral_triton: attention_mask is of shape {list(attention_mask.shape)}, {needs}")
        plain = plain and not is_tracing(attention_mask) and not attention_mask.is_meta
        if plain:
            end = kv_offset + kv_length if isinstance(q_offset, Tensor) else q_offset + q_length
            plain, first = first_key(attention_mask[:, kv_offset:end])
    if not plain:
        call |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(batch_size, q_length, kv_length, **call)  # type: ignore[return-value]
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
    """Whether the host can read where packed sequences begin, and their bounds; None: each row is one sequence."""
    b, t = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length, device=device)
    # A token begins a sequence if it does not see the token before it. With a window of one, each is a sequence.
    begins = ~mask_function(b, 0, t, (t - 1).clamp(min=0)).expand(batch_size, q_length)
    if is_tracing(begins) or begins.is_meta:
        return False, None
    bounds = (begins | (t == 0)).flatten().nonzero().flatten().cpu()
    end = bounds.new_tensor([batch_size * q_length])
    return True, None if len(bounds) == batch_size else torch.cat((bounds, end))


def first_key(valid: Tensor) -> tuple[bool, Tensor | None]:
    """bool [B, N] -> whether each row is one run of True, and where it starts, int64 [B]; None: all are True.

    What follows the run is padding after the text: its keys are in the past of no real query.
    """
    if valid.all():
        return True, None
    runs = (valid[:, 1:] & ~valid[:, :-1]).sum(-1) + valid[:, 0]
    return bool((runs <= 1).all()), valid.int().argmax(-1)


def is_interval(mask: Any) -> bool:
    """Whether `interval_mask` made it as an interval, the empty one included."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.shape[-1] in (0, 2)


def packed_sequences(mask: Any, tokens: int) -> list[tuple[int, int]] | None:
    """(begin, end) of each packed sequence among all `tokens`; None for another mask."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64 or mask.shape[:3] != (1, 1, 1):
        return None
    bounds = mask.flatten().tolist()
    return list(pairwise(bounds)) if bounds[0] == 0 and bounds[-1] == tokens else None


def visible(mask: Any, like: Tensor, keys: int, window: int | None) -> Tensor | None:
    """bool [B or 1,1,T,keys]: which keys a query of `like` [B,H,T,D] sees by a mask of this file; None: another mask.

    No mask at all is causal from the first key on, as it is in torch's attention.
    """
    B, _, T, _ = like.shape
    j, i = torch.arange(keys, device=like.device), torch.arange(T, device=like.device)[:, None]
    if is_interval(mask) and mask.shape[-1]:
        return (mask[..., :1] <= j) & (j < mask[..., 1:])
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
