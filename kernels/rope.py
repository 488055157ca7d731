"""rope: rotary embedding of q and k (Su et al. 2021); append: keys and values into the ring cache.

B batch, T tokens, Hq query heads, Hkv key/value heads, D head size, P rows of the tables, C slots of a cache; slot
p mod C holds position p
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .call import operation
from .checks import FP32, INTS, Cache, Within, fail
from .launch import LaunchConfig, dense_rows, launch, power_of_2, select_configs
from .op import Cost, Sizes
from .quantized_cache import QuantizedCache, quantized, vector_bytes
from .samples import shape_grid, shapes

# The greatest position: far beyond any model's, and a tile of keys past it still fits int32.
POSITIONS_MAX = tl.constexpr(1 << 30)


@triton.jit
def sequence_position(past_ptr, new_ptr, b, T):
    """Position of sequence b and its number of new tokens, int64; 0 and -1 where either is out of range."""
    past, new = tl.load(past_ptr + b).to(tl.int64), tl.load(new_ptr + b).to(tl.int64)
    valid = (past >= 0) & (past <= POSITIONS_MAX) & (new >= 0) & (new <= T)
    return tl.where(valid, past, 0), tl.where(valid, new, -1)


@triton.jit
def _copy_heads(x_ptr, y_ptr, stride_xh, stride_yh, heads, D, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_h < heads) & (offs_d < D)
    tl.store(y_ptr + offs_h * stride_yh + offs_d, tl.load(x_ptr + offs_h * stride_xh + offs_d, mask=mask), mask=mask)


@triton.jit
def _quantize_heads(
    x_ptr, y_ptr, scale_ptr, stride_xh, stride_yh, heads, half, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    offs_h, offs_d = tl.arange(0, BLOCK_H).to(tl.int64), tl.arange(0, BLOCK_HALF)[None, :]
    exists = offs_h < heads
    mask, x = exists[:, None] & (offs_d < half), x_ptr + offs_h[:, None] * stride_xh + offs_d
    low, high = tl.load(x, mask=mask, other=0.0), tl.load(x + half, mask=mask, other=0.0)
    _, _, elements, scales = quantized(low, high)
    tl.store(y_ptr + offs_h[:, None] * stride_yh + offs_d, elements, mask=mask)
    tl.store(scale_ptr + offs_h * (stride_yh // half), scales, mask=exists)


@triton.jit(do_not_specialize=["T", "C"])
def append_kernel(
    k_ptr,  # [B, T, Hkv, D]
    v_ptr,  # [B, T, Hkv, D]
    past_ptr,  # [B] the position of token 0, or None: 0
    new_ptr,  # [B] how many of the T tokens to append
    k_cache_ptr,  # [B, Hkv, C, D], or in 8 bits int16 [B, Hkv, C, D / 2]
    v_cache_ptr,
    k_cache_scales_ptr,  # [B, Hkv, C] fp32 in 8 bits (quantized_cache.py), or None
    v_cache_scales_ptr,
    T, C, Hkv, D,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_cb, stride_ch, stride_cs,
    BLOCK_HKV: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    past, new = sequence_position(new_ptr if past_ptr is None else past_ptr, new_ptr, b, T)
    if past_ptr is None:
        past *= 0  # what it loaded is a count
    # None where t is no new token, or a later token of the chunk takes its slot.
    stored = tl.where((t < new) & (t >= new - C), Hkv, 0)
    out = b * stride_cb + (past + t) % C * stride_cs
    k = k_ptr + b * stride_kb + t * stride_kt
    v = v_ptr + b * stride_vb + t * stride_vt
    if k_cache_scales_ptr is None:
        _copy_heads(k, k_cache_ptr + out, stride_kh, stride_ch, stored, D, BLOCK_HKV, BLOCK_D)
        _copy_heads(v, v_cache_ptr + out, stride_vh, stride_ch, stored, D, BLOCK_HKV, BLOCK_D)
    else:
        HALF: tl.constexpr = BLOCK_D // 2
        k_scales, v_scales = k_cache_scales_ptr + out // (D // 2), v_cache_scales_ptr + out // (D // 2)
        _quantize_heads(k, k_cache_ptr + out, k_scales, stride_kh, stride_ch, stored, D // 2, BLOCK_HKV, HALF)
        _quantize_heads(v, v_cache_ptr + out, v_scales, stride_vh, stride_ch, stored, D // 2, BLOCK_HKV, HALF)


@triton.jit
def angles(cos_ptr, sin_ptr, position, P, columns, half):
    """cos and sin [1, columns] of a position; NaN for a position outside the tables, where a host check would stall."""
    inside = (position >= 0) & (position < P)
    index = tl.where(inside, position, 0) * half + columns
    mask = columns < tl.where(inside, half, 0)
    cos = tl.load(cos_ptr + index, mask=mask, other=float("nan"))[None, :]
    return cos, tl.load(sin_ptr + index, mask=mask, other=float("nan"))[None, :]


@triton.jit
def _rotate(
    x_ptr,  # [heads, D] of one token
    y_ptr,  # [heads, D] out
    stride_xh, stride_yh,
    cos,  # [1, BLOCK_D] fp32
    sin,  # [1, BLOCK_D] fp32
    heads,
    half,  # D / 2
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_h < heads) & (offs_d < half)
    low = tl.load(x_ptr + offs_h * stride_xh + offs_d, mask=mask, other=0.0)
    high = tl.load(x_ptr + offs_h * stride_xh + offs_d + half, mask=mask, other=0.0).to(tl.float32)
    dtype = low.dtype
    low = low.to(tl.float32)
    out = y_ptr + offs_h * stride_yh + offs_d
    tl.store(out, (low * cos - high * sin).to(dtype), mask=mask)
    tl.store(out + half, (high * cos + low * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["T", "C", "stride_pb", "stride_pt"])
def rope_kernel(
    q_ptr,  # [B, T, Hq, D]
    k_ptr,  # [B, T, Hkv, D]
    cos_ptr,  # [P, D / 2] fp32
    sin_ptr,  # [P, D / 2] fp32
    positions_ptr,  # [B, T]
    q_out_ptr,  # [B, T, Hq, D] out
    k_out_ptr,  # [B, T, Hkv, D] out
    T, P, Hq, Hkv, D,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_pb, stride_pt,
    BLOCK_HQ: tl.constexpr, BLOCK_HKV: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(positions_ptr + b * stride_pb + t * stride_pt).to(tl.int64)
    cos, sin = angles(cos_ptr, sin_ptr, position, P, tl.arange(0, BLOCK_HALF), D // 2)
    q, k, token = q_ptr + b * stride_qb + t * stride_qt, k_ptr + b * stride_kb + t * stride_kt, b * T + t
    _rotate(q, q_out_ptr + token * Hq * D, stride_qh, D, cos, sin, Hq, D // 2, BLOCK_HQ, BLOCK_HALF)
    _rotate(k, k_out_ptr + token * Hkv * D, stride_kh, D, cos, sin, Hkv, D // 2, BLOCK_HKV, BLOCK_HALF)


def strides(name: str, x: Tensor, dims: str = "bth") -> dict[str, int]:
    """Return the kernel arguments stride_<name><dim> of x."""
    return {f"stride_{name}{dim}": stride for dim, stride in zip(dims, x.stride(), strict=False)}


def cache_args(k_cache: Any, v_cache: Any) -> dict[str, Any]:
    """Return the kernel arguments of both caches: pointers, scales (None: not in 8 bits), strides, slots."""
    args: dict[str, Any] = {"C": k_cache.shape[2], **strides("c", getattr(k_cache, "codes", k_cache), "bhs")}
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        args |= {f"{name}_ptr": getattr(cache, "codes", cache), f"{name}_scales_ptr": getattr(cache, "scales", None)}
    return args


# The position of each sequence, and how many of the T tokens are new.
Past = Annotated[Tensor, "B", INTS, Within(0, POSITIONS_MAX.value)]
New = Annotated[Tensor, "B", INTS, Within(0, "T")]
Queries = Annotated[Tensor, "B T Hq D"]
Heads = Annotated[Tensor, "B T Hkv D"]
Slots = Annotated[Cache, "B Hkv C D"]
Table = Annotated[Tensor, "P D//2", FP32]


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """One token a program: its heads share one row of the tables."""
    tiles = {"BLOCK_HQ": power_of_2(sizes.get("Hq", 1)), "BLOCK_HKV": power_of_2(sizes["Hkv"])}
    return {"rope_kernel": LaunchConfig(tiles | {"BLOCK_HALF": power_of_2(sizes["D"] // 2)}, num_warps=4)}


def check_head_size(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    if sizes["D"] % 2:
        raise fail(op, "q", f"of head size {sizes['D']}", "an even head size")


def append_configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    tiles = {"BLOCK_HKV": power_of_2(sizes["Hkv"]), "BLOCK_D": power_of_2(sizes["D"])}
    return {"append_kernel": LaunchConfig(tiles, num_warps=2)}


def check_caches(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Both caches need the same strides: kernels compute one offset for both."""
    k_cache, v_cache = args["k_cache"], args["v_cache"]
    if type(k_cache) is not type(v_cache) and QuantizedCache in (type(k_cache), type(v_cache)):
        raise fail(op, "v_cache", f"a {type(v_cache).__name__}", f"a {type(k_cache).__name__}, as k_cache is")
    k_cache, v_cache = (getattr(x, "codes", x) for x in (k_cache, v_cache))
    if k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise fail(op, "v_cache", f"of strides {v_cache.stride()}", "those of k_cache, the last of them 1")


def rope_tables(theta: float, P: int, D: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * theta ** (-2i / D), fp32 [P, D/2] (Su et al. 2021, section 3.2).

    Computed in fp32 on the CPU in transformers' order: at position 30,000 a frequency that is rounded differently, as
    by a GPU's `pow`, changes the logits.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, D, 2, device="cpu", dtype=torch.float32) / D))
    angles = torch.outer(torch.arange(P, device="cpu").float(), frequencies)
    return angles.cos().to(device), angles.sin().to(device)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    B, T, P = sizes["B"], sizes["T"], sizes["P"]
    cos, sin = rope_tables(10000.0, P, sizes["D"], device)
    positions = (torch.arange(T) * 7 + torch.arange(B)[:, None] * 5) % P
    return {"cos": cos, "sin": sin, "positions": positions.to(device)}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Count each element of q and k read and written once, and one row of the tables a token."""
    tokens, D = sizes["B"] * sizes["T"], sizes["D"]
    rotated = tokens * (sizes["Hq"] + sizes["Hkv"]) * D
    return Cost(flops=3 * rotated, bytes=2 * rotated * dtype.itemsize + tokens * D * 4)


def cache_inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    """Return `past` and `new`: sequence b is at position past + 3 b and has T - b new tokens."""
    b = torch.arange(sizes["B"], dtype=torch.int32)
    return {"past": (sizes["past"] + 3 * b).to(device), "new": (sizes["T"] - b).clamp(min=0).to(device)}


def append_cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Count each element of k and v read once and written once."""
    vectors, D, size = 2 * sizes["B"] * sizes["T"] * sizes["Hkv"], sizes["D"], dtype.itemsize
    return Cost(flops=0, bytes=vectors * (D * size + vector_bytes(D, size, "cache" in sizes)))


@operation(
    reference=reference.rope,
    inputs=_inputs,
    configs=configs,
    cost=cost,
    test_shapes=shapes("B T Hq Hkv D P", "2 1 4 4 64 96, 2 5 8 2 80 96, 2 3 4 1 96 96, 2 4 4 4 128 96, 2 2 8 2 32 96"),
    bench_shapes=shapes("B T Hq Hkv D P", "1 1 32 8 128 32768, 1 4096 32 8 128 32768"),
    rule=check_head_size,
)
def rope(
    q: Queries, k: Heads, cos: Table, sin: Table, positions: Annotated[Tensor, "B T", INTS, Within(0, "P - 1")]
) -> tuple[Queries, Heads]:
    """Rotary embedding (Su et al. 2021, eq. 34): rotate the halves of each head against each other.

    q, k       [B, T, Hq, D] and [B, T, Hkv, D], fp32, bf16 or fp16; D even
    cos, sin   fp32 [P, D/2]: of position * theta ** (-2i / D)
    positions  [B, T], int32 or int64, in 0..P - 1

    Returns the rotated q and k, computed in fp32 and rounded once. Raises ValueError for another shape, dtype or
    device. A position out of range gives NaN; on a CPU it is a ValueError.

    >>> q, k, angles = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 2, 8), torch.outer(torch.arange(16), torch.ones(4))
    >>> q, k = ops.rope(q, k, angles.cos(), angles.sin(), positions=torch.tensor([[0, 1, 2]]))
    """
    q, k = dense_rows(q), dense_rows(k)
    B, T, Hq, D = q.shape
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    sizes = {"D": D, "Hq": Hq, "Hkv": k.shape[2]}
    args: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "cos_ptr": cos.contiguous(), "sin_ptr": sin.contiguous()}
    args |= {"positions_ptr": positions, "q_out_ptr": q_out, "k_out_ptr": k_out, "T": T, "P": len(cos), **sizes}
    args |= strides("q", q) | strides("k", k) | strides("p", positions)
    launch(rope_kernel, (T, B), args, select_configs(configs, sizes, q.dtype, q.device)["rope_kernel"])
    return q_out, k_out


_APPEND_SIZES = {"B": 1, "T": 2048, "Hkv": 8, "D": 128, "C": 4096, "past": 0}


@operation(
    reference=reference.append,
    inputs=cache_inputs,
    configs=append_configs,
    cost=append_cost,
    test_shapes=(
        *shape_grid(B=2, Hkv=2, D=80, C=16, past=(0, 13), T=(1, 15, 40)),
        *shape_grid(B=2, Hkv=2, D=80, C=64, past=40, T=(1, 15, 40)),
        *shapes("B T Hkv D C past", "2 15 2 80 16 13, 3 2 1 128 64 40", cache="int8"),
    ),
    bench_shapes=(*shape_grid(**_APPEND_SIZES), *shape_grid(**_APPEND_SIZES, cache="int8")),
    mutates=("k_cache", "v_cache"),
    rule=check_caches,
)
def append(k: Heads, v: Heads, k_cache: Slots, v_cache: Slots, past: Past, new: New) -> None:
    """Write a chunk's keys and values into the ring caches (Mistral 7B, section 2): position p into slot p mod C.

    k, v              [B, T, Hkv, D], fp32, bf16 or fp16
    k_cache, v_cache  [B, Hkv, C, D] in k's dtype, or QuantizedCaches; of equal strides; written in place
    past, new         [B], int32 or int64: sequence b stands at position past[b], and its first new[b] tokens are
                      written

    Returns None. Raises ValueError for another shape, dtype or device. A sequence with past or new out of range writes
    nothing; on a CPU it is a ValueError. Caches that are views of one tensor are wrong in torch.compile where sizes
    vary: inductor (torch 2.13) drops the offset of a view that an operator writes into.

    >>> k_cache, v_cache = torch.zeros(1, 2, 16, 8), torch.zeros(1, 2, 16, 8)
    >>> k, past, new = torch.ones(1, 3, 2, 8), torch.tensor([15]), torch.tensor([3])
    >>> ops.append(k, k, k_cache, v_cache, past, new)
    >>> k_cache[0, 0, :, 0].nonzero().flatten().tolist()
    [0, 1, 15]
    """
    launch_append(k, v, k_cache, v_cache, past.contiguous(), new.contiguous())


def launch_append(k: Tensor, v: Tensor, k_cache: Cache, v_cache: Cache, past: Tensor | None, new: Tensor) -> None:
    """Launch `append`; past None: 0."""
    k, v = dense_rows(k), dense_rows(v)
    B, T, Hkv, D = k.shape
    args: dict[str, Any] = {"k_ptr": k, "v_ptr": v, "past_ptr": past, "new_ptr": new, "T": T, "Hkv": Hkv, "D": D}
    args |= cache_args(k_cache, v_cache) | strides("k", k) | strides("v", v)
    selected = select_configs(append_configs, {"D": D, "Hkv": Hkv}, k.dtype, k.device)
    launch(append_kernel, (T, B), args, selected["append_kernel"])
