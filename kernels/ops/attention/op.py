"""attention, cached_attention and rope_append_attention. Their launches are in launches.py, the kernels in
kernels.py, their tiles in tiles.py.

B batch, T query tokens, S key positions, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head size, C ring slots,
P rows of the rotary tables
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from ... import reference
from ...launching.kernel_args import Heads
from ...operation.cases import Cost, draw, operation, shapes
from ...operation.checks import INTS, Within, fail
from ...weights.composite_args import vector_bytes
from ..cache_args import (
    CacheArgs,
    HeadNorm,
    HeadNorms,
    KeyHeads,
    New,
    Past,
    Queries,
    RotaryTables,
    Slots,
    Table,
    cache_inputs,
    check_caches,
    check_rotated_heads,
    norm_inputs,
    rope_tables,
)
from ..rope import launch_append
from .kernels import Bounds, Newest
from .launches import growing, keys_of, launch_decode, launch_prefill, sizes_of, slots_of
from .tiles import fits_decode

Positions = Annotated[Tensor, "B S Hkv D"]
Bound = Annotated[Tensor, "B", INTS, Within(0, "S")]
Sinks = Annotated[Tensor, "Hq", (torch.float32, None)]
Window = Annotated[int, Within(-1, (1 << 31) - 1)]  # None, 0 and -1: no window


def check_heads(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    if sizes["Hq"] % sizes["Hkv"]:
        raise fail(op, "q", f"of {sizes['Hq']} heads", f"a multiple of the {sizes['Hkv']} key/value heads")
    if sizes["D"] > 256:
        raise fail(op, "q", f"of head size {sizes['D']}", "a head size of at most 256")


def _check_attention(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    check_heads(op, args, sizes)
    T, S = sizes["T"], sizes["S"]
    # A [B, heads, T, D] tensor of torch's attention reads as `heads` tokens. Symbolic sizes are checked when they run.
    if args["causal"] and args["lengths"] is None and type(T) is type(S) is int and T > S:
        needs = f"at most the {S} tokens of k: the layout is [B, T, heads, D]; pass lengths if queries precede all keys"
        raise fail(op, "q", f"of {T} tokens", needs)


def _check_cached(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    check_heads(op, args, sizes)
    check_caches(op, args, sizes)


def _check_step(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    if sizes["T"] != 1:
        raise fail(op, "q", f"of {sizes['T']} tokens", "one a sequence: more would need keys that they overwrite")
    check_rotated_heads(op, args, sizes)
    _check_cached(op, args, sizes)


def _contiguous(bound: Tensor | None) -> Tensor | None:
    return None if bound is None else bound.contiguous()


@dataclass(frozen=True)
class AttentionCase:
    B: int
    T: int
    S: int
    Hq: int
    Hkv: int
    D: int
    window: int = 0
    causal: bool = True
    ragged: bool = False  # the keys of sequence b are in [b, S - 2 b)
    deterministic: bool = False
    with_sinks: bool = False


@dataclass(frozen=True)
class CachedCase:
    B: int
    T: int
    Hq: int
    Hkv: int
    D: int
    C: int
    window: int = 0
    past: int = 0  # see `cache_inputs`
    cache: str | None = None  # "int8"
    deterministic: bool = False
    norms: bool = False  # of the heads of queries and keys
    with_sinks: bool = False


def _sinks(case: AttentionCase | CachedCase, device: Any, generator: Any) -> dict[str, Any]:
    return {"sinks": draw((case.Hq,), torch.float32, device, generator)} if case.with_sinks else {}


def _inputs(case: AttentionCase, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    b, sinks = torch.arange(case.B, dtype=torch.int32), _sinks(case, device, generator)
    return {"starts": b.to(device), "lengths": (case.S - 2 * b).to(device), **sinks} if case.ragged else sinks


def _cached_inputs(case: CachedCase, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    return {**cache_inputs(case, dtype, device, generator), **_sinks(case, device, generator)}


def cost(case: AttentionCase | CachedCase, dtype: torch.dtype, beside: int | None = None) -> Cost:
    """Count q, the result, and each key and value that some query sees, once; a chunk's codes in 8 bits twice more.

    beside  tokens whose keys are not in the caches; None: those of the chunk
    """
    B, T, Hq, Hkv, D, window = case.B, case.T, case.Hq, case.Hkv, case.D, case.window
    if isinstance(case, AttentionCase):
        S, causal, beside, quantized = case.S, case.causal, 0, False
    else:
        S, causal, quantized = case.past + T, True, case.cache is not None
        beside = T if beside is None else beside
    keys = min(S, T + window - 1) if window else S
    seeing = min(T, S)  # queries before the first key see none
    if causal:
        pairs = sum(min(i, window or S) for i in range(S - seeing + 1, S + 1))
    else:
        pairs = seeing * min(S, window + 1 if window else S)
    cached = max(0, keys - beside)
    size = D * dtype.itemsize
    slot = vector_bytes(D, dtype.itemsize, quantized)
    fresh = size + 2 * slot if quantized else size  # one launch quantizes the chunk for all query heads
    moved = 2 * T * Hq * size + 2 * Hkv * ((keys - cached) * fresh + cached * slot)
    return Cost(flops=4 * B * Hq * D * pairs, bytes=B * moved)


def _step_inputs(case: CachedCase, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    cos, sin = rope_tables(10000.0, 8192, case.D, device)
    norms = norm_inputs(case, dtype, device, generator)
    return {"cos": cos, "sin": sin, **_cached_inputs(case, dtype, device, generator), **norms}


def step_cost(case: CachedCase, dtype: torch.dtype) -> Cost:
    """Count attention's work, the new key and value read beside the cache and written into it, the angles, and the
    norms' weights."""
    B, Hq, Hkv, D, norms = case.B, case.Hq, case.Hkv, case.D, int(case.norms)
    cached, moved = cost(case, dtype, beside=0), 2 * (B * Hkv + norms) * D * dtype.itemsize + B * D * 4
    return Cost(flops=cached.flops + (3 + 4 * norms) * B * (Hq + Hkv) * D, bytes=cached.bytes + moved)


_HEADS = 32, 8, 128  # Hq, Hkv, D of Mixtral


@operation(
    reference=reference.attention,
    case=AttentionCase,
    draw=_inputs,
    count=cost,
    test_shapes=(
        *shapes(AttentionCase, "1 40 40 4 4 64 0, 1 150 150 2 1 32 33, 1 40 90 2 2 128 24, 1 1 90 4 4 80 30"),
        *shapes(AttentionCase, "1 20 9 2 1 64 0, 2 70 70 4 2 80 16, 3 33 50 4 1 96 0", ragged=True),
        *shapes(AttentionCase, "2 1 700 8 2 128 0, 2 3 600 4 1 96 300, 2 1 90 16 2 128 0", ragged=True),
        *shapes(AttentionCase, "2 50 50 4 2 64 20", causal=False),
        *shapes(AttentionCase, "1 37 37 2 2 80 0", causal=False, ragged=True),
        *shapes(AttentionCase, "1 40 40 4 2 64 24, 2 1 700 8 2 128 0", ragged=True, with_sinks=True),
    ),
    bench_shapes=(
        *(AttentionCase(1, T, T, *_HEADS, window=W) for T in (512, 4096, 8192, 32768) for W in (0, 4096)),
        *shapes(AttentionCase, "1 8192 8192 32 8 128 256"),
        *shapes(AttentionCase, "1 4096 4096 32 8 128 512", causal=False),
        *(AttentionCase(B, 1, S, *_HEADS) for B in (1, 8, 32) for S in (1024, 4096, 32768)),
        *shapes(AttentionCase, "1 4096 4096 32 4 128 0, 8 1 4096 32 4 128 0"),  # of Qwen3-30B-A3B
        *shapes(AttentionCase, "1 4096 4096 64 8 64 128, 1 1 4096 64 8 64 128", with_sinks=True),  # of gpt-oss
    ),
    rule=_check_attention,
    growing=growing,
)
def attention(
    q: Queries,
    k: Positions,
    v: Positions,
    *,
    window: Window | None = None,
    causal: bool = True,
    scale: float | None = None,
    starts: Bound | None = None,
    lengths: Bound | None = None,
    sinks: Sinks | None = None,
    deterministic: bool = False,
) -> Queries:
    """Sliding-window attention (Mistral 7B, section 2; FlashAttention-2, Dao 2023) with grouped queries.

    q                [B, T, Hq, D], fp32, bf16 or fp16; D at most 256, Hq a multiple of Hkv
    k, v             [B, S, Hkv, D] in q's dtype
    window           query i sees key j iff i - window < j <= i; None, 0 and -1: no window
    causal           False: iff |i - j| <= window // 2 (Longformer, Beltagy et al. 2020, section 3.1)
    scale            of the scores; None: D ** -0.5
    starts, lengths  [B], int32 or int64: keys are valid in starts[b]..lengths[b] - 1, and query t is at position
                     lengths[b] - T + t. None: 0 and S
    sinks            [Hq], fp32 or q's dtype: a logit of each head that takes part in the softmax and adds nothing to
                     the result (gpt-oss; Xiao et al. 2024, section 3.3)
    deterministic    a sequence's bits do not depend on the rest of the batch

    Returns [B, T, Hq, D] in q's dtype; zeros for a query that sees no key. What lies outside the valid keys may be NaN.
    Raises ValueError for another shape, dtype or device, and for T > S where causal and without lengths.

    >>> q, k = torch.randn(1, 5, 4, 32), torch.randn(1, 9, 2, 32)
    >>> ops.attention(q, k, k, window=4).shape
    torch.Size([1, 5, 4, 32])
    """
    keys = keys_of(k, v)
    sizes = sizes_of(q, keys, window, deterministic)
    bounds = Bounds(_contiguous(starts), _contiguous(lengths), None)
    # Few causal queries, times the heads of a group, fill a tile of the decode kernel.
    if causal and fits_decode(sizes.T, sizes.Hq, sizes.Hkv):
        return launch_decode(q, keys, bounds, sizes, scale=scale, sinks=sinks)
    return launch_prefill(q, keys, bounds, sizes, causal=causal, scale=scale, sinks=sinks)


_RINGS = ((4096, 4096, 4095), (32768, 0, 32767))  # C, window, past


@operation(
    reference=reference.cached_attention,
    case=CachedCase,
    draw=_cached_inputs,
    count=cost,
    test_shapes=(
        *shapes(CachedCase, "2 5 4 2 64 16 16 0, 2 20 4 2 80 16 16 13, 2 40 2 2 96 16 16 100, 2 17 4 2 32 64 0 20"),
        *shapes(CachedCase, "2 5 4 2 64 16 16 0, 2 20 4 2 80 16 16 13, 2 40 2 2 96 16 16 100", cache="int8"),
        *shapes(CachedCase, "2 20 4 2 80 16 16 13", with_sinks=True),
    ),
    bench_shapes=tuple(
        CachedCase(1, T, *_HEADS, *ring, cache=cache) for cache in (None, "int8") for ring in _RINGS for T in (16, 1024)
    ),
    rule=_check_cached,
)
def cached_attention(
    q: Queries,
    k: KeyHeads,
    v: KeyHeads,
    k_cache: Slots,
    v_cache: Slots,
    past: Past,
    new: New,
    window: Window | None = None,
    deterministic: bool = False,
    sinks: Sinks | None = None,
) -> Queries:
    """Causal attention of a chunk over the ring caches, and over its own keys and values (Mistral 7B, section 2).

    q                 [B, T, Hq, D], fp32, bf16 or fp16; query t is at position past[b] + t
    k, v              [B, T, Hkv, D] of the chunk, not in the caches yet
    k_cache, v_cache  [B, Hkv, C, D] in q's dtype, of equal strides; position p is in slot p mod C. Or 8 bits:
                      k and v then take part quantized, as they will be read from there
    past, new         [B], int32 or int64: tokens before the chunk, and tokens of the chunk that exist. The device reads
                      them, so a CUDA graph replays at any length
    window, sinks     as in `attention`
    deterministic     a sequence's bits do not depend on the rest of the batch

    Returns [B, T, Hq, D]. Raises ValueError for another shape, dtype or device. A sequence with past or new out of
    range is NaN; on a CPU it is a ValueError.

    >>> q, k, cache = torch.randn(1, 3, 4, 32), torch.randn(1, 3, 2, 32), torch.randn(1, 2, 16, 32)
    >>> out = ops.cached_attention(q, k, k, cache, cache, past=torch.tensor([7]), new=torch.tensor([3]))
    """
    slots = slots_of(k_cache, v_cache)
    sizes = sizes_of(q, slots, window, deterministic)
    bounds = Bounds(None, new.contiguous(), past.contiguous())
    if slots.k_scales is None:
        keys = keys_of(k, v)
    else:
        B, T, Hkv, D = k.shape
        empty: Any = k_cache.empty  # type: ignore[union-attr]  # of 8 bits
        chunk = [empty(B, Hkv, T, D, device=k.device) for _ in range(2)]
        launch_append(k, v, chunk[0], chunk[1], None, new.contiguous())
        keys = slots_of(*chunk)
    sizes = replace(sizes, S=sizes.T, C=sizes.S)
    return launch_prefill(q, keys, bounds, sizes, CacheArgs.of(k_cache, v_cache), sinks=sinks)


@operation(
    reference=reference.rope_append_attention,
    case=CachedCase,
    draw=_step_inputs,
    count=step_cost,
    mutates=("k_cache", "v_cache"),
    test_shapes=(
        *shapes(CachedCase, "3 1 8 2 128 16 16 0, 3 1 8 2 96 16 16 13, 2 1 4 2 80 16 16 77, 2 1 4 4 64 64 0 40"),
        *shapes(CachedCase, "1 1 4 1 32 600 0 590, 2 1 2 1 64 600 600 900, 2 1 4 2 32 600 0 0, 2 1 4 2 32 64 5 60"),
        *shapes(CachedCase, "3 1 8 2 128 16 16 13, 2 1 4 2 80 16 16 77", cache="int8"),
        *shapes(CachedCase, "1 1 4 1 16 600 0 590, 2 1 4 2 32 64 5 60", cache="int8"),
        *shapes(CachedCase, "3 1 8 2 96 16 16 13, 2 1 4 2 32 600 0 590", norms=True),
        *shapes(CachedCase, "2 1 4 2 80 16 16 77", cache="int8", norms=True),
        *shapes(CachedCase, "2 1 4 2 32 600 0 590, 2 1 4 2 80 16 16 77", with_sinks=True),
    ),
    bench_shapes=(
        *(
            CachedCase(B, 1, *_HEADS, *ring, cache=cache)
            for cache in (None, "int8")
            for ring in _RINGS
            for B in (1, 32)
        ),
        *(CachedCase(B, 1, 32, 4, 128, *_RINGS[1], norms=True) for B in (1, 32)),  # of Qwen3-30B-A3B
    ),
    rule=_check_step,
)
def rope_append_attention(
    q: Queries,
    k: KeyHeads,
    v: KeyHeads,
    cos: Table,
    sin: Table,
    k_cache: Slots,
    v_cache: Slots,
    past: Past,
    new: New,
    window: Window | None = None,
    deterministic: bool = False,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    eps: float = 1e-6,
    sinks: Sinks | None = None,
) -> Queries:
    """Attention of a decode step: `rope` of q and k at past[b], `append` of k and v, `cached_attention`, in one launch
    and the combine of its splits.

    q                 [B, 1, Hq, D], fp32, bf16 or fp16; D even and at most 256
    k, v              [B, 1, Hkv, D] in q's dtype
    cos, sin          fp32 [P, D/2], as in `rope`
    k_cache, v_cache  [B, Hkv, C, D] in q's dtype, or of 8 bits; of equal strides; written in place
    past, new         [B], int32 or int64, new 0 or 1, as in `cached_attention`
    window, sinks     as in `attention`
    deterministic     a sequence's bits do not depend on the rest of the batch
    q_norm, k_norm    both or neither [D], with eps: as in `rope`

    Returns [B, 1, Hq, D]. Raises ValueError for another shape, dtype or device. Where past or new is out of range the
    result is NaN and nothing is stored (on a CPU a ValueError); beyond the tables it is NaN, too.

    >>> q, k, cos, cache = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 2, 8), torch.ones(16, 4), torch.zeros(1, 2, 16, 8)
    >>> past, new = torch.tensor([3]), torch.tensor([1])
    >>> out = ops.rope_append_attention(q, k, k, cos, torch.zeros(16, 4), cache, cache.clone(), past, new)
    """
    # Every program rotates its own queries. The program of the last split also rotates the new key and stores it in the
    # ring, where no other program reads it: the slot's old key has just left the window.
    slots = slots_of(k_cache, v_cache)
    sizes = sizes_of(q, slots, window, deterministic)
    bounds = Bounds(None, new.contiguous(), past.contiguous())
    newest = Newest(Heads.of(k), Heads.of(v), RotaryTables.of(cos, sin))
    return launch_decode(q, slots, bounds, sizes, newest, norms=HeadNorms.of(q_norm, k_norm, eps), sinks=sinks)
