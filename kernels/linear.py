"""linear: x @ weight.T by our own kernels for few rows, and for any number of them where `deterministic` asks for it.

T rows of x, N rows of the weight, H columns of both: the depth of the sum

More than FEW rows are a library's business, unless a row's bits must not depend on how many there are: a library picks
another kernel, with another order of the sum, for another T.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .arch import amd
from .checks import Matrix
from .launch import choices, launch, target_arch
from .op import Cost, LaunchConfig, Op, Shape, Sizes, dense_rows, power_of_2, sample, switches
from .quantized import FORMS, QuantizedWeight, sample_quantized, weight_bytes
from .quantized_tiles import few_rows, many_rows
from .tiles import depth_tile, program_tile
from .unpack import fields_of
from .weight import Weight, add_products, times_row_scales, weight_tile

FEW = 16  # rows: the narrowest side of a tensor core tile


@triton.jit(do_not_specialize=["T"])
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


@triton.jit(do_not_specialize=["T"])
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


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """Few rows: 16 weight rows a program, to fill the card, and a deep tile, to keep bytes in flight."""
    if weights := switches(sizes).weight:
        T, N, H = sizes["T"], sizes["N"], sizes["H"]
        rows = None if switches(sizes).deterministic else (T, T)
        return {
            "linear_decode_kernel": few_rows(weights, N, H, FEW, dtype, arch),
            "linear_kernel": many_rows(weights, N, H, rows, dtype, arch),
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


def linear(
    x: Annotated[Tensor, "... H"],
    weight: Annotated[Matrix, "N H"],
    deterministic: bool = False,
) -> Annotated[Tensor, "... N"]:
    """x @ weight.T. `deterministic`: a row's bits do not depend on the other rows, by one tile whatever T is."""
    rows, w = dense_rows(x.reshape(-1, x.shape[-1])), Weight.of(weight)
    (T, H), N = rows.shape, len(weight)
    many = T > FEW or deterministic
    if many and not deterministic and w.name is None:
        return torch.mm(rows, w.data.t()).view(*x.shape[:-1], N)
    kernel = linear_kernel if many else linear_decode_kernel
    sizes = Shape(T=T, H=H, N=N, deterministic=deterministic, weight=w.name)
    config = choices(configs, sizes, x.dtype, x.device)[kernel.__name__]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    args = {"x_ptr": rows, "weight_ptr": w.data, "y_ptr": y, "T": T, "N": N, "stride_xt": rows.stride(0), **w.args}
    row_tiles = triton.cdiv(T, config.constexprs["BLOCK_M"]) if many else min(T, 1)
    grid = (row_tiles * triton.cdiv(N, config.constexprs["BLOCK_N"]),)
    launch(kernel, grid, args, config, H=H, LAYOUT=w.layout(target_arch(x.device)))
    return y


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    x = sample(sizes["T"], sizes["H"], dtype=dtype, device=device, generator=generator)
    N, H, form = sizes["N"], sizes["H"], switches(sizes).weight
    weight: Tensor | QuantizedWeight
    if form is None:
        weight = sample(N, H, dtype=dtype, device=device, generator=generator, scale=H**-0.5)
    else:
        weight = sample_quantized(form, N, H, device=device, generator=generator)
    return {"x": x, "weight": weight, "deterministic": switches(sizes).deterministic}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    T, H, N = (sizes[letter] for letter in ("T", "H", "N"))
    weight = weight_bytes(switches(sizes).weight, N, H, dtype.itemsize)
    return Cost(flops=2 * T * H * N, bytes=weight + (T * H + T * N) * dtype.itemsize)


OP = Op(
    run=linear,
    reference=reference.linear,
    whole={"linear_decode_kernel": ("BLOCK_T",)},
    inputs=inputs,
    configs=configs,
    cost=cost,
    test_shapes=(
        *({"T": T, "H": H, "N": N} for T, H, N in ((1, 512, 40), (3, 100, 64), (16, 256, 33))),
        *(Shape(T=T, H=H, N=N, deterministic=True) for T, H, N in ((1, 128, 70), (70, 100, 64))),
        Shape(T=3, H=128, N=40, weight="int4:64"),
        Shape(T=20, H=100, N=33, weight="int8"),
        Shape(T=5, H=96, N=33, weight="fp8", deterministic=True),
    ),
    bench_shapes=(
        *({"T": T, "H": H, "N": N} for H, N in ((4096, 6144), (4096, 4096), (6144, 8192)) for T in (1, 4, 16)),
        {"T": 1, "H": 4096, "N": 32000},
        Shape(T=1, H=4096, N=6144, deterministic=True),
        *(Shape(T=T, H=4096, N=6144, weight=form) for form in FORMS for T in (1, 4096)),
        Shape(T=4096, H=4096, N=6144, deterministic=True),
    ),
)
