"""attention and cached_attention. The kernels stand in kernels.py, their tiles in tiles.py.

B batch, T query tokens, S key positions, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head size, C ring slots
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import triton
from torch import Tensor

from .. import reference
from ..checks import INTS, Above, Within, fail
from ..launch import launch, multiprocessors, select_configs, target_arch
from ..op import Cost, Op, Shape, Sizes, dense_rows, sample, switches
from ..ring import Heads, New, Past, Queries, Slots, cache_inputs, ring_rule, strides
from ..tma import describe
from .kernels import attention_combine_kernel, attention_decode_kernel, attention_prefill_kernel
from .tiles import PACKED_ROWS, configs


def groups(op: str, given: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """As many query heads to each key/value head, and heads that a tile holds."""
    if sizes["Hq"] % sizes["Hkv"]:
        raise fail(op, "q", f"of {sizes['Hq']} heads", f"a multiple of the {sizes['Hkv']} key/value heads")
    if sizes["D"] > 256:
        raise fail(op, "q", f"of head size {sizes['D']}", "a head size of at most 256")


def cached_rule(op: str, given: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    v = given["v"]
    if (given["k"] is None) != (v is None):
        raise fail(op, "v", "None" if v is None else "a tensor", "to be given exactly where k is")
    groups(op, given, sizes)
    ring_rule(op, given, sizes)


Keys = Annotated[Tensor, "B S Hkv D"]
Bounds = Annotated[Tensor, "B", INTS, Within(0, "S")]
Window = Annotated[int, Within(-1, (1 << 31) - 1)]  # None, 0 and -1: no window


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    window: Window | None = None,
    causal: bool = True,
    scale: Annotated[float | None, Above(0.0)] = None,
    starts: Bounds | None = None,
    lengths: Bounds | None = None,
    deterministic: bool = False,
) -> Queries:
    """Sliding-window attention with grouped queries: see `reference.attention`.

    `deterministic`: a sequence's bits do not depend on the rest of the batch. Few causal queries (times the heads of a
    group) decode, the others prefill.
    """
    sizes = sizes_of(q, k, window, deterministic)
    bounds = {"starts_ptr": dense(starts), "lengths_ptr": dense(lengths)}
    G = q.shape[2] // k.shape[2]
    if causal and (q.shape[1] == 1 or q.shape[1] * G <= PACKED_ROWS):
        return decode(q, k, v, bounds | {"past_ptr": None}, sizes, scale, ring=False)
    return _prefill(q, k, v, None, bounds | {"past_ptr": None}, sizes, scale, causal)


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
    """Attention over the ring caches and the fresh k, v, or over the caches alone: see `reference.cached_attention`.

    The device reads the lengths: a CUDA graph replays at any of them. A sequence whose past or new is out of range
    (a ValueError on a CPU) is NaN.
    """
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    sizes = sizes_of(q, keys, window, deterministic)
    bounds = {"starts_ptr": None, "lengths_ptr": dense(new), "past_ptr": dense(past)}
    if k is None or v is None:
        return decode(q, keys, values, bounds, sizes, None, ring=True)
    return _prefill(q, k, v, (k_cache, v_cache), bounds, sizes | {"C": k_cache.shape[2]}, None, True)


_NONE = dict.fromkeys(("new_k_ptr", "new_v_ptr", "cos_ptr", "sin_ptr"))
NO_NEWEST = _NONE | dict.fromkeys(("P", "stride_nkb", "stride_nkh", "stride_nvb", "stride_nvh"), 0)


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def sizes_of(q: Tensor, k: Tensor, window: int | None, deterministic: bool) -> Shape:
    B, T, Hq, D = q.shape
    window = max(0, window or 0)
    if window > 2 * (k.shape[1] + T):
        window = 0  # it reaches every key there is: none, to a kernel that subtracts it in int32
    sizes = {"B": B, "T": T, "S": k.shape[1], "Hq": Hq, "Hkv": k.shape[2], "D": D, "window": window}
    return Shape(sizes, sms=multiprocessors(q.device) or 0, deterministic=deterministic)


def _base_2(scale: float | None, D: int) -> float:
    return (D**-0.5 if scale is None else scale) * math.log2(math.e)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: tuple[Tensor, Tensor] | None,
    bounds: dict[str, Tensor | None],
    sizes: Sizes,
    scale: float | None,
    causal: bool,
) -> Tensor:
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    B, T, Hq, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    slots = (k, v) if cache is None else cache
    arch = target_arch(q.device)
    config = select_configs(configs, sizes, q.dtype, q.device)["attention_prefill_kernel"]
    block = (1, config.constexprs["BLOCK_N"], 1, config.constexprs["BLOCK_D"])
    k_desc, v_desc = (describe(x, block, arch) for x in (k, v))
    if k_desc is None or v_desc is None:  # both or neither: one loop reads them
        k_desc = v_desc = None
    args = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "k_desc": k_desc,
        "v_desc": v_desc,
        "k_cache_ptr": None if cache is None else cache[0],
        "v_cache_ptr": None if cache is None else cache[1],
        "out_ptr": out,
        **bounds,
        "T": T,
        "S": k.shape[1],
        "C": slots[0].shape[2],
        "Hq": Hq,
        "G": Hq // k.shape[2],
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **{f"stride_c{dim}": stride for dim, stride in zip("bhs", slots[0].stride(), strict=False)},
        "window": sizes["window"],
        "scale": _base_2(scale, D),
    }
    grid = (B * Hq, triton.cdiv(T, config.constexprs["BLOCK_M"]))
    flags = {"D": D, "CACHED": cache is not None, "CAUSAL": causal, "WINDOWED": sizes["window"] > 0}
    launch(attention_prefill_kernel, grid, args, config, **flags)
    return out


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: dict[str, Tensor | None],
    sizes: Sizes,
    scale: float | None,
    ring: bool,
    **newest: Any,
) -> Tensor:
    """`newest`: the kernel's arguments about a key that is yet to be rotated and to enter the ring."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    B, T, Hq, D = q.shape
    chosen = select_configs(configs, sizes, q.dtype, q.device)
    config = chosen["attention_decode_kernel"]
    splits = config.constexprs["SPLITS"]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part, lse = out, None
    if splits > 1:
        part = torch.empty((*q.shape[:3], splits, D), dtype=torch.float32, device=q.device)
        lse = torch.empty((*q.shape[:3], splits), dtype=torch.float32, device=q.device)
    args = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": part,
        "lse_ptr": lse,
        **bounds,
        **(newest or NO_NEWEST),
        "T": T,
        "S": k.shape[1],
        "Hq": Hq,
        "G": Hq // k.shape[2],
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        "window": sizes["window"],
        "scale": _base_2(scale, D),
    }
    grid = (splits, k.shape[2], B if T else 0)
    launch(attention_decode_kernel, grid, args, config, D=D, RING=ring, WINDOWED=sizes["window"] > 0)
    if splits > 1:
        args = {"part_ptr": part, "lse_ptr": lse, "out_ptr": out}
        config = chosen["attention_combine_kernel"]
        launch(attention_combine_kernel, (B * T * Hq,), args, config, D=D, SPLITS=splits)
    return out


def _to_its_length(given: dict[str, Any]) -> dict[str, Any]:
    """One sequence, its keys cut where it ends: then all of them are there."""
    if given["lengths"] is None or not len(given["q"]):
        return given
    end = int(given["lengths"][0])
    return {**given, "k": given["k"][:, :end], "v": given["v"][:, :end], "lengths": None}


def _to_its_new(given: dict[str, Any]) -> dict[str, Any]:
    """One sequence, its chunk cut where its new tokens end."""
    end = int(given["new"].sum())
    return {**given, **{name: given[name] if given[name] is None else given[name][:, :end] for name in "qkv"}}


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    """With "ragged": sequence b has its keys in [b, S - 2 b)."""
    B, T, S, D = (sizes[letter] for letter in ("B", "T", "S", "D"))
    q = sample(B, T, sizes["Hq"], D, dtype=dtype, device=device, generator=generator)
    k, v = (sample(B, S, sizes["Hkv"], D, dtype=dtype, device=device, generator=generator) for _ in range(2))
    bounds: dict[str, Any] = {}
    if switches(sizes).ragged:
        b = torch.arange(B, dtype=torch.int32)
        bounds = {"starts": b.to(device), "lengths": (S - 2 * b).to(device)}
    return {"q": q, "k": k, "v": v, "window": sizes["window"], "causal": switches(sizes).causal, **bounds}


def cached_inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    B, T, Hkv, D = (sizes[letter] for letter in ("B", "T", "Hkv", "D"))
    q = sample(B, T, sizes["Hq"], D, dtype=dtype, device=device, generator=generator)
    k, v = (sample(B, T, Hkv, D, dtype=dtype, device=device, generator=generator) for _ in range(2))
    fresh = {"k": k, "v": v} if switches(sizes).fresh else {"k": None, "v": None}
    return {"q": q, **fresh, **cache_inputs(sizes, dtype, device, generator), "window": sizes["window"]}


def _pairs(sizes: Sizes) -> int:
    """Query-key pairs of one head of one sequence."""
    S, window = sizes.get("S", sizes.get("past", 0) + sizes["T"]), sizes["window"]
    T = min(sizes["T"], S)  # queries before the first key see none
    if not switches(sizes).causal:
        return T * min(S, window + 1 if window else S)
    return _area(S, window) - _area(S - T, window)


def _area(n: int, window: int) -> int:
    """Keys seen by the queries 0..n-1 together."""
    short = min(n, window) if window else n
    return short * (short + 1) // 2 + (n - short) * window


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Q in, the result out, and each key and value that some query sees once."""
    B, T, Hq, Hkv, D, window = (sizes[letter] for letter in ("B", "T", "Hq", "Hkv", "D", "window"))
    S = sizes.get("S", sizes.get("past", 0) + T)
    keys = min(S, T + window - 1) if window else S
    elements = B * D * (2 * T * Hq + 2 * keys * Hkv)
    return Cost(flops=4 * B * Hq * D * _pairs(sizes), bytes=elements * dtype.itemsize)


def _shape(B: int, T: int, S: int, Hq: int, Hkv: int, D: int, window: int, **switches: bool) -> Sizes:
    return Shape(B=B, T=T, S=S, Hq=Hq, Hkv=Hkv, D=D, window=window, **switches)


OP = Op(
    run=attention,
    reference=reference.attention,
    inputs=inputs,
    configs=configs,
    cost=cost,
    rule=groups,
    truncate_sequence=_to_its_length,
    test_shapes=(
        _shape(1, 40, 40, 4, 4, 64, 0),
        _shape(2, 70, 70, 4, 2, 80, 16, ragged=True),
        _shape(1, 150, 150, 2, 1, 32, 33),
        _shape(3, 33, 50, 4, 1, 96, 0, ragged=True),
        _shape(1, 40, 90, 2, 2, 128, 24),
        _shape(2, 50, 50, 4, 2, 64, 20, causal=False),
        _shape(1, 37, 37, 2, 2, 80, 0, causal=False, ragged=True),
        _shape(1, 20, 9, 2, 1, 64, 0),
        _shape(2, 1, 700, 8, 2, 128, 0, ragged=True),
        _shape(1, 1, 90, 4, 4, 80, 30),
        _shape(2, 3, 600, 4, 1, 96, 300, ragged=True),
    ),
    bench_shapes=(
        *(_shape(1, T, T, 32, 8, 128, window) for T in (512, 4096, 8192, 32768) for window in (0, 4096)),
        _shape(1, 8192, 8192, 32, 8, 128, 256),
        _shape(1, 4096, 4096, 32, 8, 128, 512, causal=False),
        *(_shape(B, 1, S, 32, 8, 128, 0) for B in (1, 8, 32) for S in (1024, 4096, 32768)),
    ),
)

_CACHED = tuple(
    Shape(B=2, Hq=hq, Hkv=2, D=D, C=C, window=window, past=past, T=T, fresh=fresh)
    for hq, D, C, window, past, T, fresh in (
        (4, 64, 16, 16, 0, 5, 1),
        (4, 80, 16, 16, 13, 20, 1),
        (2, 96, 16, 16, 100, 40, 1),
        (4, 32, 64, 0, 20, 17, 1),
        (8, 128, 16, 16, 3, 1, 0),
        (4, 80, 16, 16, 77, 1, 0),
        (4, 64, 600, 0, 500, 1, 0),
    )
)

CACHED_OP = Op(
    run=cached_attention,
    reference=reference.cached_attention,
    inputs=cached_inputs,
    configs=configs,
    cost=cost,
    rule=cached_rule,
    truncate_sequence=_to_its_new,
    test_shapes=_CACHED,
    bench_shapes=tuple(
        Shape(B=B, Hq=32, Hkv=8, D=128, C=C, window=window, past=C - 1, T=T, fresh=T > 1)
        for C, window in ((4096, 4096), (32768, 0))
        for B, T in ((1, 1), (32, 1), (1, 1024))
    ),
)
