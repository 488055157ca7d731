"""rope_append_attention: a decode step's attention, the rotation of its one token a sequence and the ring included.

B batch, Hq query heads, Hkv key/value heads, D head size, P rows of the rotary tables, C slots of the ring cache

Every program rotates its own queries. The one of the last split rotates the new key, counts it in, and puts it into the
ring, where no other one reads: the slot's old key has just left the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import reference
from ..checks import fail
from ..op import Cost, Op, Shape, Sizes, dense_rows, sample
from ..ring import Heads, New, Past, Queries, Slots, cache_inputs, ring_rule
from ..rope import Table, tables
from ..rope import rule as rope_rule
from .op import Window, decode, dense, groups, sizes_of
from .op import cost as attention_cost
from .tiles import configs


def rule(op: str, given: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    if sizes["T"] != 1:
        raise fail(op, "q", f"of {sizes['T']} tokens", "one a sequence: more would need keys that they overwrite")
    rope_rule(op, given, sizes)
    groups(op, given, sizes)
    ring_rule(op, given, sizes)


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
    """q and k rotated at past[b], k and v into the caches, attention over those: `reference.rope_append_attention`.

    Where past or new is out of range (a ValueError on a CPU), the result is NaN and nothing enters the cache; so it is
    NaN beyond the tables. `deterministic`: a sequence's bits do not depend on the rest of the batch.
    """
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    sizes = sizes_of(q, keys, window, deterministic)
    k, v = dense_rows(k), dense_rows(v)
    newest = {
        "new_k_ptr": k,
        "new_v_ptr": v,
        "cos_ptr": cos.contiguous(),
        "sin_ptr": sin.contiguous(),
        "P": len(cos),
        **{
            f"stride_n{name}{dim}": x.stride(at) for name, x in (("k", k), ("v", v)) for dim, at in (("b", 0), ("h", 2))
        },
    }
    bounds = {"starts_ptr": None, "lengths_ptr": dense(new), "past_ptr": dense(past)}
    return decode(q, keys, values, bounds, sizes, None, ring=True, **newest)


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    B, T, D = sizes["B"], sizes["T"], sizes["D"]
    heads = {
        name: sample(B, T, sizes[letter], D, dtype=dtype, device=device, generator=generator)
        for name, letter in (("q", "Hq"), ("k", "Hkv"), ("v", "Hkv"))
    }
    cos, sin = tables(8192, D, device)
    caches = cache_inputs(sizes, dtype, device, generator)
    return {**heads, "cos": cos, "sin": sin, **caches, "window": sizes["window"]}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Attention's, but the new key comes from beside the cache and goes into it, and so does its value; the angles."""
    B, Hq, Hkv, D = (sizes[letter] for letter in ("B", "Hq", "Hkv", "D"))
    rest = attention_cost(sizes, dtype)
    return Cost(
        flops=rest.flops + 3 * B * (Hq + Hkv) * D, bytes=rest.bytes + 2 * B * Hkv * D * dtype.itemsize + B * D * 4
    )


def _shape(B: int, Hq: int, Hkv: int, D: int, C: int, window: int, past: int) -> Sizes:
    return Shape(B=B, T=1, Hq=Hq, Hkv=Hkv, D=D, C=C, window=window, past=past)


OP = Op(
    run=rope_append_attention,
    reference=reference.rope_append_attention,
    inputs=inputs,
    configs=configs,
    cost=cost,
    rule=rule,
    mutates=("k_cache", "v_cache"),
    test_shapes=(
        _shape(3, 8, 2, 128, 16, 16, 0),
        _shape(3, 8, 2, 96, 16, 16, 13),
        _shape(2, 4, 2, 80, 16, 16, 77),
        _shape(2, 4, 4, 64, 64, 0, 40),
        _shape(1, 4, 1, 32, 600, 0, 590),
        _shape(2, 2, 1, 64, 600, 600, 900),
    ),
    bench_shapes=tuple(_shape(B, 32, 8, 128, C, C if C == 4096 else 0, C - 1) for C in (4096, 32768) for B in (1, 32)),
)
