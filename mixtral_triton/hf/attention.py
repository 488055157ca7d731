"""Attention of the drop-in: `ops.attention`, and its masks.

A mask of this file is uint32 [B, 1 or 2, C, S], as no user's mask is: 2 where keys have left the window, which the
layer knows. C = 0: causal, every key valid, the last query at the last key. C = 2: the first valid key, and the key
after the last query. C = 3: between the two the key after the text, where padding follows it. Its values are equal
along S, and take no memory. Otherwise transformers' dense [B, 1, T, S], bool, or additive for an index: holes, packed
sequences, other patterns, and what a tracer cannot read. transformers' models use a mask of four dimensions as it is.

B batch, T query tokens, Hq query heads, Hkv key/value heads, D head size, S keys
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.compiler import is_compiling
from torch.nn.functional import pad
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, eager_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from .. import ops
from ..kernels.reference import with_sinks
from .experts import NAME, fused
from .training import warn_of_gradients

MAX_HEAD = 256
# Keywords by which models add to a layer's attention what a causal mask does not say.
ADDED = {"sinks": "sinks", "softcap": "a soft cap of scores", "position_bias": "a position bias"}
INDICES = "indices", "block_indices"  # where no dense mask has these
ADDED |= dict.fromkeys(INDICES, "keys that an index chooses")
# The functions that transformers' causal masks are made of.
CAUSAL = {"causal_mask_function", "sliding_window_overlay", "and_masks"}
# The keyword of a forward's cache, which transformers 5.24 renamed.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def check_attention(
    module: nn.Module, query: Tensor, value: Tensor, dense: bool, dropout: float, added: dict[str, Any]
) -> None:
    """Raise ValueError that names a layer's class and what `ops.attention` does not compute of its attention. dense:
    its mask is none of this file."""
    D = query.shape[-1]
    faults: list[str] = []  # torch's compiler does not follow a call of list[str]
    for key in ADDED:
        if key in added and added[key] is not None and not (dense and key in INDICES):
            faults.append(ADDED[key])
    if not getattr(module, "is_causal", True) or (added.get("is_causal") is False and not dense):
        faults.append("attention that is not causal")
    if dropout and module.training:
        faults.append(f"dropout of {dropout} in training")
    if max(D, value.shape[-1]) > MAX_HEAD or value.shape[-1] > D:
        faults.append(f"heads of {D} and values of {value.shape[-1]} columns")
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

    attention_mask: of `interval_mask`, or the user's 4-D mask; None: causal from the first key on, as in torch.
    s_aux [Hq]: sinks, as in `ops.attention`. A dense mask goes to torch's attention. The weights are those of
    transformers' eager attention, and the result does not depend on them. ValueError by `check_attention`.
    """
    if is_autocast_available(device := query.device.type) and torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    attend, mask, weights, (_, H, T, D) = (
        fused(ops.attention, query, key, value, s_aux),
        attention_mask,
        None,
        query.shape,
    )
    interval = is_interval(mask)
    dense = mask is not None and not interval
    check_attention(module, query, value, dense, 0.0 if attend is None else dropout, kwargs)
    window = sliding_window if mask is None or dense else mask_window(module, mask, key, sliding_window)
    if output_attentions:
        added = visible(mask, query, key, window)
        if added.dtype == torch.bool:
            added = torch.zeros_like(added, dtype=query.dtype).masked_fill_(~added, torch.finfo(query.dtype).min)
        scores = query @ key.repeat_interleave(H // key.shape[1], 1).mT * (D**-0.5 if scaling is None else scaling)
        scores += added
        if s_aux is not None:
            scores = torch.cat((scores, s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    if attend is None:
        if not is_compiling():  # a warning would end the graph
            warn_of_gradients()
        causal = mask is None or (interval and not mask.shape[2] and window is None and T in (1, key.shape[2]))
        seen = None
        if s_aux is not None or not causal:
            seen = check_dense(visible(mask, query, key, window), query, key)
        return dense_attention(module, query, key, value, seen, scaling, dropout, s_aux), weights
    if mask is None and 1 < T < key.shape[2]:
        key, value = key[:, :, :T], value[:, :, :T]
    columns = value.shape[-1]
    if columns < D:
        value = pad(value, (0, D - columns))
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    call: dict[str, Any] = {"scale": scaling, "sinks": s_aux}
    if mask is None or interval:
        rows = None if mask is None or not mask.shape[2] else mask[:, 0, :, 0].view(torch.int32)
        starts, ends = (None, None) if rows is None else (rows[:, 0], rows[:, -1])
        if rows is None or rows.shape[1] == 2:
            return attend(q, k, v, window=window, starts=starts, lengths=ends, **call)[..., :columns], weights
        if window is None:  # padding sees the whole text, and nothing else
            text = attend(q, k, v, starts=starts, lengths=ends, **call)
            padding = attend(q, k, v, causal=False, starts=starts, lengths=rows[:, 1], **call)
            behind = torch.arange(1 - T, 1, device=q.device) + rows[:, 2:] > rows[:, 1:2]
            return torch.where(behind[..., None, None], padding, text)[..., :columns], weights
        mask = visible(mask, query, key, window)
    mask = check_dense(mask, query, key)
    return dense_attention(module, query, key, value, mask, scaling, 0.0, s_aux)[..., :columns], weights


def dense_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any, dropout: float, sinks: Any
) -> Tensor:
    """torch's attention of query, key and value [B,heads,·,D] with a mask of `check_dense`, which sinks [Hq] need."""
    if sinks is not None and mask is not None:
        key, value, mask = with_sinks(key, value, mask.expand(-1, -1, query.shape[2], key.shape[2]), sinks)
        mask = mask.to(query.dtype)
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling)[0]


def mask_window(module: Any, mask: Any, key: Tensor, sliding_window: int | None) -> int | None:
    """Return the window of a layer whose mask is one of this file: the mask says whether there is one, and the layer,
    or its config, how long it is. ValueError for keys of another length than an interval's mask."""
    if mask.shape[-1] != key.shape[2]:
        got, need = f"{key.shape[2]} keys", f"{mask.shape[-1]}, as its mask says"
        raise ValueError(
            f"mixtral_triton: {type(module).__name__} has {got}, needs {need}; or another attn_implementation"
        )
    if mask.shape[1] == 1:
        return None
    for holder in (module, getattr(module, "config", None)):
        sliding_window = sliding_window or getattr(holder, "sliding_window", None)
    if sliding_window is None:
        raise ValueError(f"mixtral_triton: {type(module).__name__} has no sliding_window, and its mask has one")
    return sliding_window


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
    create = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    embeds = tokens if tokens.dim() == 3 else torch.empty((*tokens.shape, 0), device=tokens.device)
    kwargs = {"attention_mask": mask, "position_ids": position_ids, CACHE: cache}
    settings = {} if is_causal is None else {"is_causal": is_causal}
    return create(config=MaskConfig(config, **settings), inputs_embeds=embeds, **kwargs)


def interval_mask(batch_size: int, q_length: int, kv_length: int, **call: Any) -> Tensor:
    """What `AttentionMaskInterface` calls, once a forward. Queries are at q_offset + t, keys at kv_offset + j. The host
    reads `attention_mask` bool [B, N], as for transformers' own masks: one synchronization a forward, none without."""
    q_offset, kv_offset, device = call.get("q_offset", 0), call.get("kv_offset", 0), call["device"]
    attention_mask, local_size = call.get("attention_mask"), call.get("local_size")
    # transformers forbids the skip for patterns that are not causal alone, as of packed sequences, and for static
    # caches, which are causal all the same.
    other = not call.get("allow_is_causal_skip", True) and q_length != 1
    config = call.get("config")  # with the last two the model writes keys of its choice into a dense mask
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    indexed = getattr(config, "index_topk", None) or getattr(config, "keep_window_size", None)
    plain = not (call.get("use_vmap") or chunked or indexed or "allow_is_bidirectional_skip" in call)
    plain = plain and not (other and (is_compiling() or not is_causal_pattern(call["mask_function"])))
    layers = 1 if local_size is None else 2
    first: Tensor | None = None
    last: Tensor | None = None
    if attention_mask is not None:
        static = isinstance(q_offset, Tensor)
        need = q_length if static else q_offset + q_length
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < need:
            past = "" if static else f" ({q_offset} past, {q_length} new)"  # a compiler would fix these sizes
            needs = f"needs [{batch_size}, {need}]{past}, one value a token, or a 4-D mask"
            raise ValueError(f"mixtral_triton: attention_mask is of shape {list(attention_mask.shape)}, {needs}")
        plain = plain and not is_tracing(attention_mask) and not attention_mask.is_meta
        if plain:
            valid = attention_mask[:, kv_offset : kv_offset + kv_length if static else need]
            plain, first = first_key(valid)
            if first is not None and first.dim() == 2:
                first, last = first
    if not plain:
        call |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        dense_mask = eager_mask if indexed else sdpa_mask  # to which transformers 5.7 adds the index
        return dense_mask(batch_size, q_length, kv_length, **call)  # type: ignore[return-value]
    end, shape = q_offset + q_length - kv_offset, (batch_size, layers, 0, kv_length)
    if first is None and not isinstance(end, Tensor) and end == kv_length:
        return torch.empty(shape, dtype=torch.uint32, device=device)
    ends = torch.zeros(batch_size, dtype=torch.int64, device=device) + end
    starts = torch.zeros_like(ends) if first is None else first
    rows = [starts, ends] if last is None else [starts, torch.minimum(last, ends), ends]
    return torch.stack(rows, 1).int().view(torch.uint32)[:, None, :, None].expand(-1, layers, -1, kv_length)


def is_causal_pattern(function: Any) -> bool:
    """Whether a mask function of transformers is made of those that `CAUSAL` names, and of nothing else."""
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    parts = (part for value in cells for part in (value if isinstance(value, tuple) else (value,)))
    causal = function.__module__ == masking_utils.__name__ and function.__qualname__.split(".")[0] in CAUSAL
    return causal and all(is_causal_pattern(part) for part in parts if callable(part))


def first_key(valid: Tensor) -> tuple[bool, Tensor | None]:
    """bool [B, N] -> whether each row is one run of True, and where it starts, int64 [B], or, where padding follows,
    [2, B] with the key after it; None: all are True. The host reads once."""
    runs = (valid[:, 1:] & ~valid[:, :-1]).sum(-1) + valid[:, 0]
    full, plain, whole = torch.stack((valid.all(), (runs <= 1).all(), valid[:, -1].all())).tolist()
    if full:
        return True, None
    first = valid.int().argmax(-1)
    return plain, first if whole else torch.stack((first, valid.shape[1] - valid.flip(1).int().argmax(-1)))


def is_interval(mask: Any) -> bool:
    """Whether `interval_mask` made it as an interval, the empty one included."""
    return isinstance(mask, Tensor) and mask.dtype == torch.uint32


def visible(mask: Any, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """bool [B or 1,1,T,S]: which keys each query sees by a mask of this file; the user's 4-D mask by `check_dense`. No
    mask at all is causal from the first key on, as it is in torch's attention."""
    T, S = query.shape[2], key.shape[2]
    j, i = torch.arange(S, device=query.device), torch.arange(T, device=query.device)[:, None]
    if is_interval(mask) and mask.shape[2]:
        starts, *text_ends, ends = mask[:, :1, :, :1].view(torch.int32).split(1, 2)
        i = i + ends - T
        seen = (j >= starts) & (j <= i) & (j > i - (window or S))
        return seen & (j < text_ends[0]) if text_ends else seen
    if mask is None or is_interval(mask):
        i = i + (S - T if mask is not None or T == 1 else 0)
        return ((j <= i) & (j > i - (window or S)))[None, None]
    return check_dense(mask, query, key)
