"""What rope, append and attention share: heads of queries, keys and values, ring caches, and positions.

B batch, T tokens, Hq query heads, Hkv key/value heads, D head size, P rows of the rotary tables, C slots of a cache;
slot p mod C holds position p
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching.kernel_args import Pointer
from ..operation.cases import draw
from ..operation.checks import FP32, INTS, Within, fail
from ..weights.composite_args import Cache, first_part

# The greatest position: far beyond any model's, and a tile of keys past it still fits int32.
POSITIONS_MAX = tl.constexpr(1 << 30)

# The position of each sequence, and how many of the T tokens are new.
Past = Annotated[Tensor, "B", INTS, Within(0, POSITIONS_MAX.value)]
New = Annotated[Tensor, "B", INTS, Within(0, "T")]
Queries = Annotated[Tensor, "B T Hq D"]
KeyHeads = Annotated[Tensor, "B T Hkv D"]
Slots = Annotated[Cache, "B Hkv C D"]
Table = Annotated[Tensor, "P D//2", FP32]
HeadNorm = Annotated[Tensor, "D"]


class CacheArgs(NamedTuple):
    """The ring caches of keys and values as an argument of kernels."""

    k_ptr: Pointer  # [B, Hkv, C, D]
    v_ptr: Pointer
    k_scales: Pointer  # [B, Hkv, C] fp32 in 8 bits, or None
    v_scales: Pointer
    stride_b: int
    stride_h: int
    stride_c: int

    @classmethod
    def of(cls, k_cache: Cache, v_cache: Cache) -> CacheArgs:
        (k, v), (k_scales, v_scales) = cache_parts(k_cache, v_cache)
        return cls(k, v, k_scales, v_scales, *k.stride()[:3])


class HeadNorms(NamedTuple):
    """RMS norms of each head of queries and keys, which are rotated after it (Qwen3, section 2)."""

    q_ptr: Pointer  # [D]
    k_ptr: Pointer
    eps: float

    @classmethod
    def of(cls, q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> HeadNorms | None:
        return None if q_norm is None or k_norm is None else cls(q_norm.contiguous(), k_norm.contiguous(), eps)


class RotaryTables(NamedTuple):
    cos: Pointer  # [P, D / 2] fp32
    sin: Pointer

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor) -> RotaryTables:
        return cls(cos.contiguous(), sin.contiguous())


def cache_parts(*caches: Cache) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the tensors of caches, or their codes; and their scales, or None."""
    return [first_part(x) for x in caches], [None if isinstance(x, Tensor) else x.scales for x in caches]


@triton.jit
def sequence_position(past_ptr, new_ptr, b, T):
    """Position of sequence b and its number of new tokens, int64; 0 and -1 where either is out of range."""
    past, new = tl.load(past_ptr + b).to(tl.int64), tl.load(new_ptr + b).to(tl.int64)
    valid = (past >= 0) & (past <= POSITIONS_MAX) & (new >= 0) & (new <= T)
    return tl.where(valid, past, 0), tl.where(valid, new, -1)


@triton.jit
def angles(tables, P, position, columns, half):
    """cos and sin [1, columns] of a position; NaN for a position outside the tables, where a host check would stall."""
    inside = (position >= 0) & (position < P)
    index = tl.where(inside, position, 0) * half + columns
    mask = columns < tl.where(inside, half, 0)
    cos = tl.load(tables.cos + index, mask=mask, other=float("nan"))[None, :]
    return cos, tl.load(tables.sin + index, mask=mask, other=float("nan"))[None, :]


def check_head_size(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    if sizes["D"] % 2:
        raise fail(op, "q", f"of head size {sizes['D']}", "an even head size")


def check_rotated_heads(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    check_head_size(op, args, sizes)
    if (args["q_norm"] is None) != (args["k_norm"] is None):
        given, other = ("q_norm", "k_norm") if args["k_norm"] is None else ("k_norm", "q_norm")
        raise fail(op, other, "None", f"a norm of the heads, as {given} is")


def check_caches(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Both caches need the same strides: kernels compute one offset for both."""
    k_cache, v_cache = args["k_cache"], args["v_cache"]
    if isinstance(k_cache, Tensor) != isinstance(v_cache, Tensor):
        raise fail(op, "v_cache", f"a {type(v_cache).__name__}", f"a {type(k_cache).__name__}, as k_cache is")
    (k_cache, v_cache), _ = cache_parts(k_cache, v_cache)
    if k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise fail(op, "v_cache", f"of strides {v_cache.stride()}", "those of k_cache, the last of them 1")


def norm_inputs(case: Any, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    """Return norms of heads where the case has them."""
    names = ("q_norm", "k_norm") if case.norms else ()
    return {name: 1.0 + draw((case.D,), dtype, device, generator) / 4 for name in names}


def rope_tables(theta: float, P: int, D: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * theta ** (-2i / D), fp32 [P, D/2] (Su et al. 2021, section 3.2).

    Computed in fp32 on the CPU in transformers' order: at position 30,000 a frequency that is rounded differently, as
    by a GPU's `pow`, changes the logits.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, D, 2, device="cpu", dtype=torch.float32) / D))
    angles = torch.outer(torch.arange(P, device="cpu").float(), frequencies)
    return angles.cos().to(device), angles.sin().to(device)


def cache_inputs(case: Any, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    """Return `past` and `new`: sequence b is at position past + 3 b and has T - b new tokens."""
    b = torch.arange(case.B, dtype=torch.int32)
    return {"past": (case.past + 3 * b).to(device), "new": (case.T - b).clamp(min=0).to(device)}
