"""Masks of causal attention as intervals of keys, and the functions of transformers that make them.

B batch, T query tokens, S keys
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers import masking_utils
from transformers.masking_utils import create_causal_mask, eager_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

# The functions that transformers' causal masks are made of.
CAUSAL = {"causal_mask_function", "sliding_window_overlay", "and_masks"}
# The keyword of a forward's cache, which transformers 5.24 renamed.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
MARK = torch.uint32  # the dtype of encoded masks: torch computes nothing with it, so no user's mask has it
ROWS = 0, 2, 3  # of an encoded mask: none, those of starts and ends, and of the text's ends between them


class IntervalMask(NamedTuple):
    """Causal attention to keys that are valid in one interval a sequence. transformers' models hand on a mask of four
    dimensions as it is: `encode` makes one, which takes no memory along S, and `decode` reads it.

    starts, ends  int32 [B]: the first valid key, and the key after the last query; None: 0 and S
    text_ends     int32 [B]: the key after the text, where padding follows it, and sees the whole text and nothing else
    windowed      whether keys leave the layer's window; None: no mask at all, and the layer decides
    keys          S
    """

    starts: Tensor | None = None
    ends: Tensor | None = None
    text_ends: Tensor | None = None
    windowed: bool | None = None
    keys: int = 0

    def encode(self, batch: int, device: Any) -> Tensor:
        """Return a tensor of dtype MARK [B, 2 where windowed, else 1, 0, 2 or 3 rows, S]."""
        layers = 2 if self.windowed else 1
        if self.starts is None or self.ends is None:
            return torch.empty((batch, layers, 0, self.keys), dtype=MARK, device=device)
        text_ends = () if self.text_ends is None else (self.text_ends,)
        rows = torch.stack([self.starts, *text_ends, self.ends], 1).int().view(MARK)
        return rows[:, None, :, None].expand(-1, layers, -1, self.keys)

    @classmethod
    def decode(cls, mask: Any) -> "IntervalMask | None":
        """Return the mask that `encode` encoded, that of no mask at all, and None for a user's."""
        if mask is None:
            return NO_MASK
        if not isinstance(mask, Tensor) or mask.dtype != MARK:
            return None
        shape = mask.shape
        if len(shape) != 4 or shape[1] > 2 or shape[2] not in ROWS:
            return None
        windowed, keys = shape[1] == 2, shape[3]
        if not shape[2]:
            return cls(None, None, None, windowed, keys)
        starts, *text_ends, ends = mask[:, 0, :, 0].view(torch.int32).unbind(1)
        return cls(starts, ends, text_ends[0] if text_ends else None, windowed, keys)

    def window(self, module: Any, keys: int, sliding_window: int | None) -> int | None:
        """Return the window of a layer: the mask says whether there is one, and the layer, or its config, how long it
        is. ValueError for another number of keys than the mask's."""
        if self.windowed is None:
            return sliding_window
        if self.keys != keys:
            got, need = f"{type(module).__name__} has {keys} keys", f"{self.keys}, as its mask says"
            raise ValueError(f"mixtral_triton: {got}, needs {need}; or another attn_implementation")
        if not self.windowed:
            return None
        for holder in (module, getattr(module, "config", None)):
            sliding_window = sliding_window or getattr(holder, "sliding_window", None)
        if sliding_window is None:
            raise ValueError(f"mixtral_triton: {type(module).__name__} has no sliding_window, and its mask has one")
        return sliding_window

    def dense(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """Return which keys each query sees, bool [B or 1,1,T,S]."""
        T, S = query.shape[2], key.shape[2]
        j, i = torch.arange(S, device=query.device), torch.arange(T, device=query.device)[:, None] - T
        if self.starts is None or self.ends is None:
            return ((j <= i + S) & (j > i + S - (window or S)))[None, None]
        i = i + self.ends[:, None, None, None]
        seen = (j >= self.starts[:, None, None, None]) & (j <= i) & (j > i - (window or S))
        return seen if self.text_ends is None else seen & (j < self.text_ends[:, None, None, None])


NO_MASK = IntervalMask()


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
    end, starts, ends, windowed = q_offset + q_length - kv_offset, first, None, local_size is not None
    if first is not None or isinstance(end, Tensor) or end != kv_length:
        ends = torch.zeros(batch_size, dtype=torch.int64, device=device) + end
        starts = torch.zeros_like(ends) if first is None else first
        last = None if last is None else torch.minimum(last, ends)
    return IntervalMask(starts, ends, last, windowed, kv_length).encode(batch_size, device)


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
