"""attention, cached_attention and rope_append_attention. The kernels are in kernels.py, their tiles in tiles.py.

B batch, T query tokens, S key positions, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head size, C ring slots,
P rows of the rotary tables
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import triton
from torch import Tensor

from .. import reference
from ..call import operation
from ..checks import INTS, Within, fail
from ..launch import dense_rows, describe, launch, multiprocessors, select_configs, target_arch, unpacks_by_ptx
from ..op import Cost, Sizes
from ..quantized_cache import QuantizedCache, vector_bytes
from ..rope import (
    Heads,
    New,
    Past,
    Queries,
    Slots,
    Table,
    cache_args,
    cache_inputs,
    check_caches,
    check_head_size,
    launch_append,
    rope_tables,
    strides,
)
from ..samples import draw, shape_grid, shapes
from .kernels import attention_combine_kernel, attention_decode_kernel, attention_prefill_kernel
from .tiles import PACKED_ROWS, configs

Keys = Annotated[Tensor, "B S Hkv D"]
Bounds = Annotated[Tensor, "B", INTS, Within(0, "S")]
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
    if (args["k"] is None) != (args["v"] is None):
        raise fail(op, "v", "None" if args["v"] is None else "a tensor", "a tensor exactly where k is one")
    check_heads(op, args, sizes)
    check_caches(op, args, sizes)


def _check_step(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    if sizes["T"] != 1:
        raise fail(op, "q", f"of {sizes['T']} tokens", "one a sequence: more would need keys that they overwrite")
    check_head_size(op, args, sizes)
    _check_cached(op, args, sizes)


def _truncate_keys(args: dict[str, Any]) -> dict[str, Any]:
    """Cut one sequence's keys at its length."""
    if args["lengths"] is None or not len(args["q"]):
        return args
    end = int(args["lengths"][0])
    return {**args, "k": args["k"][:, :end], "v": args["v"][:, :end], "lengths": None}


def _truncate_chunk(args: dict[str, Any]) -> dict[str, Any]:
    """Cut one sequence's chunk where its new tokens end."""
    end = int(args["new"].sum())
    return {**args, **{name: args[name] if args[name] is None else args[name][:, :end] for name in "qkv"}}


def _inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    """Return bounds where "ragged" is set: the keys of sequence b are in [b, S - 2 b)."""
    b = torch.arange(sizes["B"], dtype=torch.int32)
    bounds = {"starts": b.to(device), "lengths": (sizes["S"] - 2 * b).to(device)}
    return bounds if sizes.get("ragged") else {}


def _cached_inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    shape = [sizes[letter] for letter in ("B", "T", "Hkv", "D")]
    fresh = sizes.get("fresh", True)
    k, v = (draw(shape, dtype, device, generator) if fresh else None for _ in range(2))
    return {"k": k, "v": v, **cache_inputs(sizes, dtype, device, generator)}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Count q, the result, and each key and value that some query sees, once; a chunk's codes in 8 bits twice more."""
    B, T, Hq, Hkv, D, window = (sizes[letter] for letter in ("B", "T", "Hq", "Hkv", "D", "window"))
    S = sizes.get("S", sizes.get("past", 0) + T)
    keys = min(S, T + window - 1) if window else S
    seeing = min(T, S)  # queries before the first key see none
    if sizes.get("causal", True):
        pairs = sum(min(i, window or S) for i in range(S - seeing + 1, S + 1))
    else:
        pairs = seeing * min(S, window + 1 if window else S)
    cached = max(0, keys - T) if "past" in sizes and sizes.get("fresh", T > 1) else keys
    size = D * dtype.itemsize
    slot = vector_bytes(D, dtype.itemsize, "cache" in sizes)
    fresh = size + 2 * slot if "cache" in sizes else size  # one launch quantizes the chunk for all query heads
    moved = 2 * T * Hq * size + 2 * Hkv * ((keys - cached) * fresh + cached * slot)
    return Cost(flops=4 * B * Hq * D * pairs, bytes=B * moved)


def _step_inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    cos, sin = rope_tables(10000.0, 8192, sizes["D"], device)
    return {"cos": cos, "sin": sin, **cache_inputs(sizes, dtype, device, generator)}


def step_cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Count attention's work, the new key and value read beside the cache and written into it, and the angles."""
    B, Hq, Hkv, D = (sizes[letter] for letter in ("B", "Hq", "Hkv", "D"))
    rest, moved = cost(sizes, dtype), 2 * B * Hkv * D * dtype.itemsize + B * D * 4
    return Cost(flops=rest.flops + 3 * B * (Hq + Hkv) * D, bytes=rest.bytes + moved)


_LETTERS = "B T S Hq Hkv D window"
_HEADS = {"Hq": 32, "Hkv": 8, "D": 128}


@operation(
    reference=reference.attention,
    inputs=_inputs,
    configs=configs,
    cost=cost,
    test_shapes=(
        *shapes(_LETTERS, "1 40 40 4 4 64 0, 1 150 150 2 1 32 33, 1 40 90 2 2 128 24, 1 1 90 4 4 80 30"),
        *shapes(_LETTERS, "1 20 9 2 1 64 0, 2 70 70 4 2 80 16, 3 33 50 4 1 96 0", ragged=True),
        *shapes(_LETTERS, "2 1 700 8 2 128 0, 2 3 600 4 1 96 300", ragged=True),
        *shapes(_LETTERS, "2 50 50 4 2 64 20", causal=False),
        *shapes(_LETTERS, "1 37 37 2 2 80 0", causal=False, ragged=True),
    ),
    bench_shapes=(
        *({"B": 1, "T": T, "S": T, **_HEADS, "window": W} for T in (512, 4096, 8192, 32768) for W in (0, 4096)),
        *shapes(_LETTERS, "1 8192 8192 32 8 128 256"),
        *shapes(_LETTERS, "1 4096 4096 32 8 128 512", causal=False),
        *shape_grid(B=(1, 8, 32), T=1, S=(1024, 4096, 32768), **_HEADS, window=0),
    ),
    rule=_check_attention,
    truncate_sequence=_truncate_keys,
)
def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    window: Window | None = None,
    causal: bool = True,
    scale: float | None = None,
    starts: Bounds | None = None,
    lengths: Bounds | None = None,
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
    deterministic    a sequence's bits do not depend on the rest of the batch

    Returns [B, T, Hq, D] in q's dtype; zeros for a query that sees no key. What lies outside the valid keys may be NaN.
    Raises ValueError for another shape, dtype or device, and for T > S where causal and without lengths.

    >>> q, k = torch.randn(1, 5, 4, 32), torch.randn(1, 9, 2, 32)
    >>> ops.attention(q, k, k, window=4).shape
    torch.Size([1, 5, 4, 32])
    """
    sizes = _sizes(q, k, window, deterministic)
    args = _common_args(q, k, v, sizes, (starts, lengths, None), scale)
    # Few causal queries, times the heads of a group, fill a tile of the decode kernel.
    if causal and (args["T"] == 1 or args["T"] * args["G"] <= PACKED_ROWS):
        return _decode(args, sizes)
    return _prefill(args, sizes, None, causal)


_CACHED = "B T Hq Hkv D C window past"
_RINGS = shapes("C window past", "4096 4096 4095, 32768 0 32767")
_CACHES: tuple[dict[str, Any], ...] = ({}, {"cache": "int8"})


@operation(
    reference=reference.cached_attention,
    inputs=_cached_inputs,
    configs=configs,
    cost=cost,
    test_shapes=(
        *shapes(_CACHED, "2 5 4 2 64 16 16 0, 2 20 4 2 80 16 16 13, 2 40 2 2 96 16 16 100, 2 17 4 2 32 64 0 20"),
        *shapes(_CACHED, "2 1 8 2 128 16 16 3, 2 1 4 2 80 16 16 77, 2 1 4 2 64 600 0 500", fresh=False),
        *shapes(_CACHED, "2 5 4 2 64 16 16 0, 2 20 4 2 80 16 16 13, 2 40 2 2 96 16 16 100", cache="int8"),
        *shapes(_CACHED, "2 1 8 2 128 16 16 3, 2 1 4 2 16 600 0 500", fresh=False, cache="int8"),
    ),
    bench_shapes=tuple(
        {"B": B, "T": T, **_HEADS, **ring, **({} if T > 1 else {"fresh": False}), **cache}
        for cache in _CACHES
        for ring in _RINGS
        for B, T in ((1, 1), (32, 1), (1, 1024))
    ),
    rule=_check_cached,
    truncate_sequence=_truncate_chunk,
)
def cached_attention(
    q: Queries,
    k: Heads | None,
    v: Heads | None,
    k_cache: Slots,
    v_cache: Slots,
    past: Past,
    new: New,
    window: Window | None = None,
    deterministic: bool = False,
) -> Queries:
    """Causal attention of a chunk over the ring caches, and over its own keys and values (Mistral 7B, section 2).

    q                 [B, T, Hq, D], fp32, bf16 or fp16; query t is at position past[b] + t
    k, v              [B, T, Hkv, D] of the chunk, not in the caches yet. None: the caches hold the chunk, too
    k_cache, v_cache  [B, Hkv, C, D] in q's dtype, of equal strides; position p is in slot p mod C. Or QuantizedCaches:
                      k and v then take part quantized, as they will be read from there
    past, new         [B], int32 or int64: tokens before the chunk, and tokens of the chunk that exist. The device reads
                      them, so a CUDA graph replays at any length
    window            as in `attention`
    deterministic     a sequence's bits do not depend on the rest of the batch

    Returns [B, T, Hq, D]. Raises ValueError for another shape, dtype or device. A sequence with past or new out of
    range is NaN; on a CPU it is a ValueError.

    >>> q, k, cache = torch.randn(1, 3, 4, 32), torch.randn(1, 3, 2, 32), torch.randn(1, 2, 16, 32)
    >>> out = ops.cached_attention(q, k, k, cache, cache, past=torch.tensor([7]), new=torch.tensor([3]))
    """
    keys, values, scales = _slots(k_cache, v_cache)
    sizes, bounds = _sizes(q, keys, window, deterministic, scales), (None, new, past)
    if k is None or v is None:
        return _decode(_common_args(q, keys, values, sizes, bounds) | scales, sizes)
    if scales:
        B, T, Hkv, D = k.shape
        chunk = [QuantizedCache.empty(B, Hkv, T, D, device=k.device) for _ in range(2)]
        launch_append(k, v, chunk[0], chunk[1], None, new.contiguous())
        k, v, scales = _slots(*chunk)
    args = _common_args(q, k, v, sizes, bounds) | scales
    return _prefill(args, {**sizes, "C": k_cache.shape[2]}, (k_cache, v_cache), True)


@operation(
    reference=reference.rope_append_attention,
    inputs=_step_inputs,
    configs=configs,
    cost=step_cost,
    mutates=("k_cache", "v_cache"),
    test_shapes=(
        *shapes(_CACHED, "3 1 8 2 128 16 16 0, 3 1 8 2 96 16 16 13, 2 1 4 2 80 16 16 77, 2 1 4 4 64 64 0 40"),
        *shapes(_CACHED, "1 1 4 1 32 600 0 590, 2 1 2 1 64 600 600 900, 2 1 4 2 32 600 0 0, 2 1 4 2 32 64 5 60"),
        *shapes(_CACHED, "3 1 8 2 128 16 16 13, 2 1 4 2 80 16 16 77", cache="int8"),
        *shapes(_CACHED, "1 1 4 1 16 600 0 590, 2 1 4 2 32 64 5 60", cache="int8"),
    ),
    bench_shapes=tuple({"B": B, "T": 1, **_HEADS, **ring, **c} for c in _CACHES for ring in _RINGS for B in (1, 32)),
    rule=_check_step,
)
def rope_append_attention(
    q: Queries,
    k: Heads,
    v: Heads,
    cos: Table,
    sin: Table,
    k_cache: Slots,
    v_cache: Slots,
    past: Past,
    new: New,
    window: Window | None = None,
    deterministic: bool = False,
) -> Queries:
    """Attention of a decode step: `rope` of q and k at past[b], `append` of k and v, `cached_attention`, in one launch
    and the combine of its splits.

    q                 [B, 1, Hq, D], fp32, bf16 or fp16; D even and at most 256
    k, v              [B, 1, Hkv, D] in q's dtype
    cos, sin          fp32 [P, D/2], as in `rope`
    k_cache, v_cache  [B, Hkv, C, D] in q's dtype, or QuantizedCaches; of equal strides; written in place
    past, new         [B], int32 or int64, new 0 or 1, as in `cached_attention`
    window            as in `attention`
    deterministic     a sequence's bits do not depend on the rest of the batch

    Returns [B, 1, Hq, D]. Raises ValueError for another shape, dtype or device. Where past or new is out of range the
    result is NaN and nothing is stored (on a CPU a ValueError); beyond the tables it is NaN, too.

    >>> q, k, cos, cache = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 2, 8), torch.ones(16, 4), torch.zeros(1, 2, 16, 8)
    >>> past, new = torch.tensor([3]), torch.tensor([1])
    >>> out = ops.rope_append_attention(q, k, k, cos, torch.zeros(16, 4), cache, cache.clone(), past, new)
    """
    # Every program rotates its own queries. The program of the last split also rotates the new key and stores it in the
    # ring, where no other program reads it: the slot's old key has just left the window.
    keys, values, scales = _slots(k_cache, v_cache)
    sizes = _sizes(q, keys, window, deterministic, scales)
    k, v = dense_rows(k), dense_rows(v)
    newest = {"new_k_ptr": k, "new_v_ptr": v, "cos_ptr": cos.contiguous(), "sin_ptr": sin.contiguous(), "P": len(cos)}
    newest |= strides("nk", k[:, 0], "bh") | strides("nv", v[:, 0], "bh")
    return _decode(_common_args(q, keys, values, sizes, (None, new, past)) | scales, sizes, newest)


KernelArgs = dict[str, Any]
_NO_NEWEST: KernelArgs = dict.fromkeys(("new_k_ptr", "new_v_ptr", "cos_ptr", "sin_ptr"))
_NO_NEWEST |= dict.fromkeys(("P", "stride_nkb", "stride_nkh", "stride_nvb", "stride_nvh"), 0)


def _slots(k_cache: Any, v_cache: Any) -> tuple[Tensor, Tensor, KernelArgs]:
    """Return keys and values [B, C, Hkv, D], or their codes [B, C, Hkv, D/2], and the scales by argument."""
    if isinstance(k_cache, Tensor):
        return k_cache.transpose(1, 2), v_cache.transpose(1, 2), {}
    scales = {"k_scales_ptr": k_cache.scales, "v_scales_ptr": v_cache.scales}
    return k_cache.codes.transpose(1, 2), v_cache.codes.transpose(1, 2), scales


def _sizes(q: Tensor, k: Tensor, window: int | None, deterministic: bool, scales: KernelArgs | None = None) -> Sizes:
    B, T, Hq, D = q.shape
    window = max(0, window or 0)
    if window > 2 * (k.shape[1] + T):
        window = 0  # it reaches every key; the kernel subtracts it in int32
    sizes = {"B": B, "T": T, "S": k.shape[1], "Hq": Hq, "Hkv": k.shape[2], "D": D, "window": window}
    cache = {"cache": "int8"} if scales else {}
    return {**sizes, **cache, "sms": multiprocessors(q.device), "deterministic": deterministic}


def _common_args(
    q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, bounds: Sequence[Tensor | None], scale: float | None = None
) -> KernelArgs:
    """Return the arguments that both kernels take. `bounds`: starts, lengths and past."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    Hq, D = q.shape[2:]
    args: KernelArgs = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "k_scales_ptr": None, "v_scales_ptr": None}
    bounds = [None if bound is None else bound.contiguous() for bound in bounds]
    args |= zip(("starts_ptr", "lengths_ptr", "past_ptr"), bounds, strict=True)
    args |= {"T": q.shape[1], "S": k.shape[1], "Hq": Hq, "G": Hq // k.shape[2], "window": sizes["window"]}
    args |= {"scale": (D**-0.5 if scale is None else scale) * math.log2(math.e)}
    return args | strides("q", q) | strides("k", k) | strides("v", v)


def _prefill(args: KernelArgs, sizes: Sizes, cache: Any, causal: bool) -> Tensor:
    q, keys_values = args["q_ptr"], (args["k_ptr"], args["v_ptr"])
    B, T, Hq, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arch, quantized = target_arch(q.device), "cache" in sizes
    config = select_configs(configs, sizes, q.dtype, q.device)["attention_prefill_kernel"]
    n, d = config.constexprs["BLOCK_N"], config.constexprs["BLOCK_D"]
    k_desc, v_desc = (None if quantized else describe(x, (1, n, 1, d), arch) for x in keys_values)
    if heads_first := k_desc is None and not quantized:  # transformers' cache
        k_desc, v_desc = (describe(x.transpose(1, 2), (1, 1, n, d), arch) for x in keys_values)
    if k_desc is None or v_desc is None:  # both or neither: one loop reads both
        k_desc, v_desc, heads_first = None, None, False
    args |= {"k_desc": k_desc, "v_desc": v_desc, "out_ptr": out, **cache_args(*(cache or keys_values))}
    if cache is None:
        args |= {"k_cache_ptr": None, "v_cache_ptr": None}
    grid = (B * Hq, triton.cdiv(T, config.constexprs["BLOCK_M"]))
    flags = {"D": D, "CACHED": cache is not None, "CAUSAL": causal, "WINDOWED": sizes["window"] > 0}
    flags |= {"HEADS_FIRST": heads_first, "PTX": quantized and unpacks_by_ptx(arch)}
    launch(attention_prefill_kernel, grid, args, config, **flags)
    return out


def _decode(args: KernelArgs, sizes: Sizes, newest: KernelArgs = _NO_NEWEST) -> Tensor:
    """Launch the decode kernel. `newest`: its arguments about a key that is neither rotated nor in the ring yet."""
    q = args["q_ptr"]
    B, T, Hq, D = q.shape
    selected = select_configs(configs, sizes, q.dtype, q.device)
    config = selected["attention_decode_kernel"]
    splits = config.constexprs["SPLITS"]
    part = out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if splits > 1:
        part = torch.empty((*q.shape[:3], splits, D), dtype=torch.float32, device=q.device)
        lse = torch.empty((*q.shape[:3], splits), dtype=torch.float32, device=q.device)
    args |= {"out_ptr": part, "lse_ptr": lse, **newest}
    flags = {"D": D, "RING": args["past_ptr"] is not None, "WINDOWED": sizes["window"] > 0}
    flags["PTX"] = "cache" in sizes and unpacks_by_ptx(target_arch(q.device))
    launch(attention_decode_kernel, (splits, sizes["Hkv"], B if T else 0), args, config, **flags)
    if splits > 1:
        args = {"part_ptr": part, "lse_ptr": lse, "out_ptr": out}
        config = selected["attention_combine_kernel"]
        launch(attention_combine_kernel, (B * T * Hq,), args, config, D=D, SPLITS=splits)
    return out
