"""Attention of the drop-in: `ops.attention`, and its masks.

A mask is one interval of keys per query, int32 [B, 1, T, 2] = [lo, hi), where that is enough. int32 [B, 1, T, 3]: text
with padding behind it, whose queries' hi stays at the text's end, and the hi that their position alone would give.
int32 [B, 1, T, 0]: causal, every key valid, the last query at the last key. int64 [1, 1, 1, N + 1], on the host: the
bounds of N packed sequences among all tokens. Otherwise transformers' dense bool [B, 1, T, S]: padding with holes,
custom patterns, and what a tracer cannot read. transformers' models use a mask of four dimensions as it is.

B batch, T query tokens, Hq query heads, Hkv key/value heads, D head size, S keys
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask
from transformers.models.mixtral import modeling_mixtral as modeling
from transformers.utils.import_utils import is_tracing

from .. import ops
from ..kernels.call import transformed, untraced

PAGED = (
    "continuous batching (generate_batch) keeps keys and values in pages, which fused attention does not read; "
    "apply(model, attention=False), or revert(model)"
)
NAME = "mixtral_triton"  # among transformers' masks
# The keyword of a forward's cache, which transformers 5.24 renamed.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def checked_if_needed(operation: Any) -> Any:
    """Return the operation, without its checks unless a tracer, derivatives or autocast may change its arguments."""
    needed = not untraced() or torch.is_grad_enabled() or torch._C._is_any_autocast_enabled() or transformed()
    return operation if needed else operation.unchecked


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

    attention_mask: of `interval_mask`, or the user's 4-D mask; None: causal from the first key on, as in torch.
    Packed sequences run one after the other. A dense mask goes to torch's attention. The weights are those of
    transformers' eager attention, and the result does not depend on them.
    """
    mask, weights, (B, H, T, D) = attention_mask, None, query.shape
    if not getattr(module, "is_causal", True):
        need = "needs True, or apply(model, attention=False)"
        raise ValueError(f"mixtral_triton: is_causal of self_attn is {module.is_causal!r}, {need}")
    if output_attentions:
        dense = visible(mask, query, key, sliding_window)
        if dense.dtype == torch.bool:
            dense = torch.zeros_like(dense, dtype=query.dtype).masked_fill_(~dense, torch.finfo(query.dtype).min)
        weights = modeling.eager_attention_forward(module, query, key, value, dense, scaling)[1]
    if mask is None and 1 < T < key.shape[2]:
        key, value = key[:, :, :T], value[:, :, :T]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    attend = checked_if_needed(ops.attention)
    if mask is None or is_interval(mask):
        # From query to query intervals start no earlier and end one key later: the first start and the last end do.
        interval = None if mask is None or not mask.shape[-1] else mask[:, 0]
        starts, lengths = (None, None) if interval is None else (interval[:, 0, 0], interval[:, -1, -1])
        if interval is None or interval.shape[-1] == 2:
            return attend(q, k, v, window=sliding_window, scale=scaling, starts=starts, lengths=lengths), weights
        if sliding_window is None:  # padding sees the whole text, and nothing else
            text = attend(q, k, v, scale=scaling, starts=starts, lengths=lengths)
            padding = attend(q, k, v, causal=False, scale=scaling, starts=starts, lengths=interval[:, -1, 1])
            return torch.where((interval[..., 1] < interval[..., 2])[..., None, None], padding, text), weights
        mask = visible(mask, query, key, sliding_window)
    if sequences := packed_sequences(mask, B * T):
        rows = [x.flatten(0, 1)[None] for x in (q, k, v)]
        parts = ([x[:, begin:end] for x in rows] for begin, end in sequences)
        outs = [attend(*qkv, window=sliding_window, scale=scaling) for qkv in parts]
        return torch.cat(outs, dim=1).view(B, T, H, D), weights
    mask = check_dense(mask, query, key)
    return sdpa_attention_forward(module, query, key, value, mask, dropout=0.0, scaling=scaling)[0], weights


def check_dense(mask: Any, query: Tensor | None = None, key: Tensor | None = None) -> Tensor:
    """The user's 4-D mask; ValueError for another dtype, as integers would be read as this file's masks. With query and
    key it is as torch's attention takes it; ValueError for another shape."""
    tensor, fits, B, dense = isinstance(mask, Tensor), True, "B", "bool (True: visible) or float (added to the scores)"
    if query is not None and key is not None:
        need = (*query.shape[:3], key.shape[2])
        fits = tensor and mask.dim() == 4 and mask.shape[3] == need[3]
        fits = fits and all(size in (1, full) for size, full in zip(mask.shape, need, strict=True))
        B, dense = str(need[0]), f"{dense} that broadcasts to {list(need)}"
    if not fits or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        got = f"{mask.dtype} of shape {list(mask.shape)}" if tensor else f"a {type(mask).__name__}"
        raise ValueError(f"mixtral_triton: attention_mask is {got}, needs {dense}, or one value a token [{B}, tokens]")
    return mask if query is None or mask.dtype == torch.bool else mask.to(query.dtype)


class MaskConfig:
    """A model's config that selects `interval_mask` in transformers' mask functions. The config itself stays."""

    _attn_implementation = NAME

    def __init__(self, config: Any, **settings: Any) -> None:
        self.config = config
        for name, value in settings.items():  # one by one: no compiler of torch 2.11 follows an update of __dict__
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def causal_mask(config: Any, tokens: Tensor, mask: Any, position_ids: Any, cache: Any, is_causal: Any = None) -> Any:
    """Return the mask for `tokens` [B,T] or [B,T,H] of transformers' functions and `interval_mask`; a 4-D one stays."""
    if cache is not None and not hasattr(cache, "get_mask_sizes"):
        raise ValueError(f"mixtral_triton: {CACHE} is a {type(cache).__name__}, needs a Cache of transformers; {PAGED}")
    create = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    embeds = tokens if tokens.dim() == 3 else torch.empty((*tokens.shape, 0), device=tokens.device)
    kwargs = {"attention_mask": mask, "position_ids": position_ids, CACHE: cache}
    settings = {} if is_causal is None else {"is_causal": is_causal}
    return create(config=MaskConfig(config, **settings), inputs_embeds=embeds, **kwargs)


def interval_mask(batch_size: int, q_length: int, kv_length: int, **call: Any) -> Tensor:
    """What `AttentionMaskInterface` calls, once a forward. Queries are at q_offset + t, keys at kv_offset + j. The host
    reads `attention_mask` bool [B, N] and packed positions, as for transformers' own masks: one synchronization per
    forward, and none without them."""
    q_offset, kv_offset, device = call.get("q_offset", 0), call.get("kv_offset", 0), call["device"]
    attention_mask, local_size = call.get("attention_mask"), call.get("local_size")
    # transformers forbids the skip for packed sequences, which it looks for where there is neither padding mask nor
    # cache, and for static caches, which are causal all the same.
    packed = not call.get("allow_is_causal_skip", True) and attention_mask is None and kv_length == q_length != 1
    plain = not (call.get("use_vmap") or call.get("allow_is_bidirectional_skip"))
    first: Tensor | None = None
    last: Tensor | None = None
    if packed and plain:
        plain, bounds = sequence_bounds(call["mask_function"], batch_size, q_length, device)
        if bounds is not None:
            return bounds[None, None, None]
    if attention_mask is not None:
        static = isinstance(q_offset, Tensor)
        need, past = (q_length, "") if static else (q_offset + q_length, f" ({q_offset} past, {q_length} new)")
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < need:
            needs = f"needs [{batch_size}, {need}]{past}, one value a token, or a 4-D mask"
            raise ValueError(f"mixtral_triton: attention_mask is of shape {list(attention_mask.shape)}, {needs}")
        plain = plain and not is_tracing(attention_mask) and not attention_mask.is_meta
        if plain:
            valid = attention_mask[:, kv_offset : kv_offset + kv_length if static else need]
            plain, first = first_key(valid)
            if first is not None:  # the key after each text; all are the last query's unless padding follows
                last = valid.shape[1] - valid.flip(1).int().argmax(-1)
                last = last if bool((last < q_offset + q_length - kv_offset).any()) else None
    if not plain:
        call |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(batch_size, q_length, kv_length, **call)  # type: ignore[return-value]
    if first is None and not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length:
        return torch.empty((batch_size, 1, q_length, 0), dtype=torch.int32, device=device)
    hi = torch.arange(1, q_length + 1, device=device) + (q_offset - kv_offset)
    lo = torch.zeros_like(hi) if first is None else first[:, None]
    if local_size is not None:
        lo = torch.maximum(lo, hi - local_size)
    columns = (lo, hi) if last is None else (lo, torch.minimum(hi, last[:, None]), hi)
    interval = torch.stack(torch.broadcast_tensors(*columns), dim=-1)
    return interval.to(torch.int32).expand(batch_size, q_length, len(columns))[:, None]


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
    """bool [B, N] -> whether each row is one run of True, and where it starts, int64 [B]; None: all are True."""
    if valid.all():
        return True, None
    runs = (valid[:, 1:] & ~valid[:, :-1]).sum(-1) + valid[:, 0]
    return bool((runs <= 1).all()), valid.int().argmax(-1)


def is_interval(mask: Any) -> bool:
    """Whether `interval_mask` made it as an interval, the empty one included."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32


def packed_sequences(mask: Any, tokens: int) -> list[tuple[int, int]] | None:
    """Return (begin, end) of each packed sequence among all `tokens`; None for another mask."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64 or mask.shape[:3] != (1, 1, 1):
        return None
    bounds = mask.flatten().tolist()
    return list(pairwise(bounds)) if bounds[0] == 0 and bounds[-1] == tokens else None


def visible(mask: Any, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """bool [B or 1,1,T,S]: which keys each query sees by a mask of this file; the user's 4-D mask by `check_dense`. No
    mask at all is causal from the first key on, as it is in torch's attention."""
    (B, _, T, _), S = query.shape, key.shape[2]
    j, i = torch.arange(S, device=query.device), torch.arange(T, device=query.device)[:, None]
    if is_interval(mask) and mask.shape[-1]:
        return (mask[..., :1] <= j) & (j < mask[..., 1:2])
    if mask is None or is_interval(mask):
        i = i + (S - T if mask is not None or T == 1 else 0)
        return ((j <= i) & (j > i - (window or S)))[None, None]
    bounds = packed_sequences(mask, B * T)
    if bounds is None:
        return check_dense(mask, query, key)
    sizes = torch.tensor([end - begin for begin, end in bounds], device=query.device)
    row = torch.repeat_interleave(sizes).view(B, 1, T)
    return (row[..., None] == row[..., None, :]) & (j <= i) & (j > i - (window or S))


AttentionMaskInterface.register(NAME, interval_mask)
