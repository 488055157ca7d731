"""linear: x @ weight.T by our own kernels for few rows, and for any number of them where `deterministic` asks for it.

T rows of x, N rows of the weight, H columns of both: the depth of the sum

More than FEW rows are a library's business, unless a row's bits must not depend on how many there are: a library picks
another kernel, with another order of the sum, for another T.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .arch import amd
from .checks import FLOATS, Binder, boolean
from .launch import launch, target_arch
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, power_of_2, sample
from .quantized_tiles import few_rows, many_rows
from .tiles import depth_tile, program_tile
from .unpack import fields_of
from .weight import Weight, add_products, times_row_scales, weight_tile

FEW = 16  # rows: the narrowest side of a tensor core tile


@triton.jit
def linear_decode_kernel(
    x_ptr,  # [T, H]
    weight_ptr,  # [N, H]
    scales_ptr,  # [N, G], or None
    zeros_ptr,  # the same, or None
    y_ptr,  # [T, N] out
    T,
    N,
    stride_xt,
    stride_wn,
    H: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Operands are swapped: weight rows, each read by one program alone, fill the tensor core's M, the few x rows its N.
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t, offs_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    w_rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    w = weight_ptr + w_rows[:, None] * stride_wn + offs_k[None, :], scales_ptr, zeros_ptr
    x_ptrs = x_ptr + tl.minimum(offs_t, T - 1).to(tl.int64)[None, :] * stride_xt + offs_k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    UNIT: tl.constexpr = BLOCK_K * fields_of(LAYOUT[0])
    for k in range(0, H, UNIT):
        acc = add_products(acc, w, w_rows, x_ptrs, (offs_t < T)[None, :], 0, k, H % UNIT == 0, H, LAYOUT)
    acc = times_row_scales(acc, w, w_rows, H, LAYOUT, AXIS=0)
    out = y_ptr + offs_t.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(offs_t < T)[None, :] & (offs_n < N)[:, None])


@triton.jit
def linear_kernel(
    x_ptr,  # [T, H]
    weight_ptr,  # [N, H]
    scales_ptr,  # [N, G], or None
    zeros_ptr,  # the same, or None
    y_ptr,  # [T, N] out
    T,
    N,
    stride_xt,
    stride_wn,
    H: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = program_tile(tl.cdiv(T, BLOCK_M), N, BLOCK_N, GROUP_M)
    offs_t = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(offs_t, T - 1).to(tl.int64)[:, None] * stride_xt + offs_k[None, :]
    w_rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    w = weight_ptr + w_rows[:, None] * stride_wn + offs_k[None, :], scales_ptr, zeros_ptr
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, H, BLOCK_K):
        x = depth_tile(x_ptrs, offs_k[None, :] < H - k, H, BLOCK_K)
        w_tile = weight_tile(w, w_rows, k, H, BLOCK_K, x.dtype, LAYOUT)
        acc = tl.dot(x, w_tile.T, acc, input_precision="ieee")
        x_ptrs += BLOCK_K  # stepped, not computed from k: fewer instructions in the loop
    acc = times_row_scales(acc, w, w_rows, H, LAYOUT, AXIS=1)
    out = y_ptr + offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & (offs_n < N)[None, :])


def check(x: Tensor, weight: Tensor, deterministic: bool = False) -> Sizes:
    binder = Binder("linear")
    binder.tensor("x", x, "... H", FLOATS)
    binder.tensor("weight", weight, "N H", (x.dtype,))
    binder.positive("N", "H")
    boolean("linear", "deterministic", deterministic)
    return {**binder.sizes, "T": x.numel() // x.shape[-1], "deterministic": int(deterministic)}


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """Few rows: 16 weight rows a program, to fill the card, and a deep tile, to keep bytes in flight."""
    if weights := sizes.get("weights"):
        T, N = sizes["T"], sizes["N"]
        return {
            "linear_decode_kernel": few_rows(weights, N, sizes["H"], FEW, dtype, arch),
            "linear_kernel": many_rows(weights, N, sizes["H"], None if sizes["deterministic"] else (T, T), dtype, arch),
        }
    single, cdna, H = dtype == torch.float32, amd(arch), sizes["H"]
    few = {"BLOCK_T": FEW, "BLOCK_N": 16, "BLOCK_K": power_of_2(H, low=16, high=64 if single else 128 if cdna else 256)}
    many = {"BLOCK_M": 32 if single else 64, "BLOCK_N": 32 if single else 64, "GROUP_M": 8}
    many["BLOCK_K"] = power_of_2(H, low=16, high=32 if single else 64)
    stages = 2 if single or cdna else 4
    return {
        "linear_decode_kernel": LaunchConfig(few, num_warps=4, num_stages=stages),
        "linear_kernel": LaunchConfig(many, num_warps=4, num_stages=stages),
    }


def linear(x: Tensor, weight: Tensor, deterministic: bool = False) -> Tensor:
    """Triton way of `reference.linear`. `deterministic`: `linear_kernel`, with one tile, whatever T is."""
    rows, w = dense_rows(x.reshape(-1, x.shape[-1])), Weight.of(weight)
    (T, H), N = rows.shape, len(weight)
    many, arch = T > FEW or deterministic, target_arch(x.device)
    if many and not deterministic and w.name is None:
        return torch.mm(rows, w.data.t()).view(*x.shape[:-1], N)
    kernel = linear_kernel if many else linear_decode_kernel
    sizes = {"T": T, "H": H, "N": N, "deterministic": int(deterministic), "weights": w.name}
    config = configs(sizes, x.dtype, arch)[kernel.__name__]
    y = empty(x, weight)
    args = {"x_ptr": rows, "weight_ptr": w.data, "y_ptr": y, "T": T, "N": N, "stride_xt": rows.stride(0), **w.args}
    row_tiles = triton.cdiv(T, config.constexprs["BLOCK_M"]) if many else min(T, 1)
    grid = (row_tiles * triton.cdiv(N, config.constexprs["BLOCK_N"]),)
    launch(kernel, grid, args, config, H=H, LAYOUT=w.layout(arch))
    return y


def plain_linear(x: Tensor, weight: Tensor, deterministic: bool = False) -> Tensor:
    """`reference.linear`, with an option that its results do not depend on."""
    return reference.linear(x, weight)


def empty(x: Tensor, weight: Tensor, deterministic: bool = False) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    x = sample(sizes["T"], sizes["H"], dtype=dtype, device=device, generator=generator)
    weight = sample(sizes["N"], sizes["H"], dtype=dtype, device=device, generator=generator, scale=sizes["H"] ** -0.5)
    return {"x": x, "weight": weight, "deterministic": bool(sizes.get("deterministic", 0))}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    T, H, N = (sizes[letter] for letter in ("T", "H", "N"))
    return Cost(flops=2 * T * H * N, bytes=(T * H + N * H + T * N) * dtype.itemsize)


OP = Op(
    name="linear",
    check=check,
    run=linear,
    reference=plain_linear,
    empty=empty,
    inputs=inputs,
    configs=configs,
    cost=cost,
    test_shapes=(
        *({"T": T, "H": H, "N": N} for T, H, N in ((1, 512, 40), (3, 100, 64), (16, 256, 33))),
        *({"T": T, "H": H, "N": N, "deterministic": 1} for T, H, N in ((1, 128, 70), (70, 100, 64))),
    ),
    bench_shapes=(
        *({"T": T, "H": H, "N": N} for H, N in ((4096, 6144), (4096, 4096), (6144, 8192)) for T in (1, 4, 16)),
        {"T": 1, "H": 4096, "N": 32000},
        {"T": 1, "H": 4096, "N": 6144, "deterministic": 1},
        {"T": 4096, "H": 4096, "N": 6144, "deterministic": 1},
    ),
)
