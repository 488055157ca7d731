"""append: keys and values into the ring cache, and what the operations on the ring share.

B batch, T tokens, Hkv key/value heads, D head size, C slots of a cache; position p lies in slot p mod C
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import INTS, Within, constrain, fail
from .launch import launch, select_configs
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, power_of_2, random_inputs, shapes

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


@triton.jit(do_not_specialize=["T", "C"])
def append_kernel(
    k_ptr,  # [B, T, Hkv, D]
    v_ptr,  # [B, T, Hkv, D]
    past_ptr,  # [B] the position of token 0
    new_ptr,  # [B] how many of the T tokens to append
    k_cache_ptr,  # [B, Hkv, C, D]
    v_cache_ptr,  # [B, Hkv, C, D]
    T, C, Hkv, D,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_cb, stride_ch, stride_cs,
    BLOCK_HKV: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    past, new = sequence_position(past_ptr, new_ptr, b, T)
    # None where t is no new token, or a later token of the chunk takes its slot.
    stored = tl.where((t < new) & (t >= new - C), Hkv, 0)
    out = b * stride_cb + (past + t) % C * stride_cs
    k = k_ptr + b * stride_kb + t * stride_kt
    v = v_ptr + b * stride_vb + t * stride_vt
    _copy_heads(k, k_cache_ptr + out, stride_kh, stride_ch, stored, D, BLOCK_HKV, BLOCK_D)
    _copy_heads(v, v_cache_ptr + out, stride_vh, stride_ch, stored, D, BLOCK_HKV, BLOCK_D)


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    tiles = {"BLOCK_HKV": power_of_2(sizes["Hkv"]), "BLOCK_D": power_of_2(sizes["D"])}
    return {"append_kernel": LaunchConfig(tiles, num_warps=2)}


def check_caches(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Both caches need the same strides: kernels compute one offset for both."""
    k_cache, v_cache = args["k_cache"], args["v_cache"]
    if k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise fail(op, "v_cache", f"of strides {v_cache.stride()}", "those of k_cache, the last of them 1")


def strides(name: str, x: Tensor, dims: str = "bth") -> dict[str, int]:
    """Return the kernel arguments stride_<name><dim> of x."""
    return {f"stride_{name}{dim}": stride for dim, stride in zip(dims, x.stride(), strict=False)}


# The position of each sequence, and how many of the T tokens are new.
Past = Annotated[Tensor, "B", INTS, Within(0, POSITIONS_MAX.value)]
New = Annotated[Tensor, "B", INTS, Within(0, "T")]
Queries = Annotated[Tensor, "B T Hq D"]
Heads = Annotated[Tensor, "B T Hkv D"]
Slots = Annotated[Tensor, "B Hkv C D"]


@constrain(rule=check_caches)
def append(k: Heads, v: Heads, k_cache: Slots, v_cache: Slots, past: Past, new: New) -> None:
    """Write the first new[b] tokens of k and v into the ring caches (`reference.append`).

    A sequence whose past or new is out of range (a ValueError on a CPU) writes nothing.
    """
    k, v = dense_rows(k), dense_rows(v)
    B, T, Hkv, D = k.shape
    args: dict[str, Any] = {"k_ptr": k, "v_ptr": v, "past_ptr": past.contiguous(), "new_ptr": new.contiguous()}
    args |= {"k_cache_ptr": k_cache, "v_cache_ptr": v_cache, "T": T, "C": k_cache.shape[2], "Hkv": Hkv, "D": D}
    args |= strides("k", k) | strides("v", v) | strides("c", k_cache, "bhs")
    selected = select_configs(configs, {"D": D, "Hkv": Hkv}, k.dtype, k.device)
    launch(append_kernel, (T, B), args, selected["append_kernel"])


def cache_inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    """Sequence b has past `past` + 3 b and T - b new tokens."""
    b = torch.arange(sizes["B"], dtype=torch.int32)
    return {"past": (sizes["past"] + 3 * b).to(device), "new": (sizes["T"] - b).clamp(min=0).to(device)}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Count each element of k and v read once and written once."""
    elements = 2 * sizes["B"] * sizes["T"] * sizes["Hkv"] * sizes["D"]
    return Cost(flops=0, bytes=2 * elements * dtype.itemsize)


_CACHES = shapes("B Hkv D C past", "2 2 80 16 0, 2 2 80 16 13, 2 2 80 64 40")

OP = Op(
    run=append,
    reference=reference.append,
    inputs=random_inputs(append, cache_inputs),
    configs=configs,
    cost=cost,
    test_shapes=tuple(shape | {"T": T} for shape in _CACHES for T in (1, 15, 40)),
    bench_shapes=shapes("B T Hkv D C past", "1 2048 8 128 4096 0"),
    mutates=("k_cache", "v_cache"),
)
