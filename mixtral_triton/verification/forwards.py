"""The ways to read a text: a model's own forwards in its dtype, in fp64, and by the kernels end to end.

B batch, T tokens, R rows of a forward, n tokens of each
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..model.cache import KVCache
from .judge import CallsInFp64, Judge, catch_faults
from .probe import Probe, Step, TextReference
from .report import FP64, Row
from .tolerance import to_fp64

UNCACHED, CHUNKS, TOKENS, ALONE = "whole text", "in chunks", "token by token", "one sequence"
SEPARATE_TOKENS = 2  # tokens that are read one at a time, after the chunks
PADDING = 3  # tokens of right padding behind all chunks but the first
WINDOW_FRACTION = 4  # a window as long as the text is reduced by this factor, so that the ring wraps around
# Its case, the tokens of each row's sequence [R,n], False for padding [R,n], the cache, and the argument `lengths`.
Reading = tuple[str, Tensor, Tensor, Any, Tensor | None]


def probe_config(config: Any, tokens: int) -> Any:
    """The config with a window that is shorter than the text."""
    window = config.sliding_window
    if window is None or window < tokens:
        return config
    return replace(config, sliding_window=max(2, tokens // WINDOW_FRACTION))


def readings(B: int, T: int, make_cache: Callable[[int, int], Any], quantized: bool) -> Iterator[Reading]:
    """The forwards that read a text [B,T], whole and in chunks over a cache, of unequal lengths."""
    whole = make_cache(B, T) if quantized else None
    yield UNCACHED, (text := torch.arange(T).expand(B, T)), text >= 0, whole, None
    cache, behind = make_cache(B, T + PADDING), torch.arange(B)
    num_separate = min(SEPARATE_TOKENS, T - 1) or 1
    bounds = sorted({0, -(-2 * (T - num_separate) // 5), T - num_separate})
    ends = [(bound - behind * (index % 2)).clamp(min=0) for index, bound in enumerate(bounds)]
    ends += [ends[-1] + index for index in range(1, num_separate + 1)]
    for index, (begin, end) in enumerate(pairwise(ends)):
        is_chunk, counts = index + num_separate < len(ends) - 1, end - begin
        columns = torch.arange(int(counts.max()) + (PADDING if begin[0] and is_chunk else 0))
        valid = columns < counts[:, None]
        tokens = torch.where(valid, begin[:, None] + columns, 0)
        if counts.any():
            yield CHUNKS if is_chunk else TOKENS, tokens, valid, cache, None if valid.all() else counts.int()
    cache = make_cache(1, T + PADDING)  # alone, where a step has one row
    for part in (text[:1, : min(2, T - 1)], text[:1, min(2, T - 1) : 3]):
        if part.numel():
            yield ALONE, part, part >= 0, cache, None


@contextmanager
def as_verified(model: Any, config: Any) -> Iterator[None]:
    """Give the model another config, and, with activations="fp8", one rule for forwards of any number of rows."""
    with torch.no_grad(), mock.patch.object(model, "config", config), mock.patch.object(model, "sixteen_bit_rows", 0):
        yield


def cache_maker(model: Any, config: Any, cache_dtype: torch.dtype | None, fp64: bool = False) -> Any:
    """Return a function (batch, slots) that makes a cache. fp64: in fp64, but for int8 codes."""

    def make_cache(batch: int, slots: int) -> KVCache:
        cache = KVCache(config, batch, slots, model.device, cache_dtype or model.dtype)
        if fp64:
            cache.keys, cache.values = (tuple(map(to_fp64, part)) for part in (cache.keys, cache.values))
        return cache

    return make_cache


def compare_readings(
    model: Any, ids: Tensor, text: TextReference, judge: Judge, quick: bool, steps: Callable[[str, int], Step]
) -> tuple[list[Row], KVCache]:
    """Read ids [B,T] in the model's dtype, whose operations `judge` measures, and in fp64 -> the rows of layers and
    logits, and a cache with keys of the text."""
    (B, T), rows, quantized = ids.shape, list[Row](), text.cache_dtype is not None
    count = sum(1 for _ in readings(B, T, lambda *sizes: None, quantized)) * len(model.layers)
    runs: list[Any] = [(text.layers, text.logits, "", judge.watching(model))]
    if not quick:
        runs.append((text.fp64_layers, text.fp64_logits, FP64, CallsInFp64()))
    for layers, logits, suffix, calls in runs:
        probe = Probe(layers, suffix, steps(f"layers of forwards{suffix}", count))
        make_cache = cache_maker(model, text.config, text.cache_dtype, suffix == FP64)
        with as_verified(model, text.config), probe.attached(model), calls:
            for case, tokens, valid, cache, lengths in readings(B, T, make_cache, quantized):
                probe.start(case, tokens, valid)
                alone = TOKENS if tokens.shape[1] == 1 else CHUNKS
                judge.start(alone if case == ALONE else case, with_others=case == UNCACHED)
                if case == TOKENS and suffix == "":
                    cached = cache
                with catch_faults(probe.fail):
                    out = model(ids[probe.where], cache, None if lengths is None else lengths.to(ids.device))
                    probe.record_logits(logits, out)
        rows += probe.rows
    return rows, cached


def compare_end_to_end(model: Any, ids: Tensor, text: TextReference) -> tuple[Row, int]:
    """The row of the logits of ids [B,T] over a cache by the model's operations, with torch's routes, and the number of
    other routes."""
    probe, out = Probe(text.layers), torch.empty(0)
    probe.start("end to end", tokens := torch.arange(ids.shape[1]).expand(ids.shape), tokens >= 0)
    with as_verified(model, text.config), probe.attached(model, routes_alone=True), catch_faults(probe.fail):
        out = model(ids, cache_maker(model, text.config, text.cache_dtype)(*ids.shape))
    return Row(None, "logits", "end to end", *text.end_to_end.measure(out)), probe.flips
