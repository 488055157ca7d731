"""rms_norm, and add_rms_norm with the residual add fused: root mean square norm (Zhang & Sennrich 2019).

T rows, H hidden
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import Above, constrain
from .launch import launch, select_configs
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, power_of_2, sampler, shapes


@triton.jit
def normed_rows(
    values,  # [BLOCK_M, BLOCK_H] fp32, zero beyond H
    weight_ptr,  # [H]
    H, eps,
    dtype: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Normalize rows, rounding to `dtype` before and after the weight, as the reference does."""
    offs_h = tl.arange(0, BLOCK_H)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / H + eps)
    weight = tl.load(weight_ptr + offs_h, mask=offs_h < H, other=0.0)
    return normed(values, scale[:, None], weight[None, :], dtype)


@triton.jit
def normed(values, scale, weight, dtype: tl.constexpr):
    return ((values * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H] as x, or None
    weight_ptr,  # [H]
    y_ptr,  # [T, H] out
    total_ptr,  # [T, H] out: x + residual, or None
    T, H,
    stride_xt, stride_rt,
    eps,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask = (offs_m < T)[:, None] & (offs_h < H)[None, :]
    out = offs_m[:, None] * H + offs_h[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xt + offs_h[None, :], mask=mask, other=0.0)
    dtype: tl.constexpr = x.dtype
    values = x.to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + offs_m[:, None] * stride_rt + offs_h[None, :], mask=mask, other=0.0)
        # The next layer reads the rounded sum, so the norm must use it, too.
        total = (values + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + out, total, mask=mask)
        values = total.to(tl.float32)
    tl.store(y_ptr + out, normed_rows(values, weight_ptr, H, eps, dtype, BLOCK_H), mask=mask)


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """One long row a program; short rows share one whatever T is, since a row's bits depend on the tile."""
    block_h = power_of_2(sizes["H"])
    rows = power_of_2(4096 // block_h, high=16)
    warps = power_of_2(block_h * rows // 512, low=1, high=8)
    return {"rms_norm_kernel": LaunchConfig({"BLOCK_M": rows, "BLOCK_H": block_h}, num_warps=warps)}


def rms_norm(
    x: Annotated[Tensor, "... H"], weight: Annotated[Tensor, "H"], eps: Annotated[float, Above(0.0)]
) -> Annotated[Tensor, "... H"]:
    """Root mean square norm (`reference.rms_norm`)."""
    return _launch(x, None, weight, eps)[0]


@constrain(error_name="rms_norm")
def add_rms_norm(
    x: Annotated[Tensor, "... H"],
    residual: Annotated[Tensor, "... H"],
    weight: Annotated[Tensor, "H"],
    eps: Annotated[float, Above(0.0)],
) -> tuple[Annotated[Tensor, "... H"], Annotated[Tensor, "... H"]]:
    """Norm y of x + residual -> y, x + residual (`reference.rms_norm`)."""
    y, total = _launch(x, residual, weight, eps)
    return y, total


def _flatten(x: Tensor) -> Tensor:
    """[..., H] -> [T, H] with contiguous rows, without a copy where strides allow it."""
    return dense_rows(x.reshape(-1, x.shape[-1]))


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Any]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    residual = None if residual is None else _flatten(residual)
    rows = _flatten(x)
    T, H = rows.shape
    config = select_configs(configs, {"T": T, "H": H}, x.dtype, x.device)["rms_norm_kernel"]
    args: dict[str, Any] = {"x_ptr": rows, "residual_ptr": residual, "weight_ptr": weight.contiguous()}
    args |= {
        "y_ptr": y,
        "total_ptr": total,
        "stride_xt": rows.stride(0),
        "stride_rt": 0 if residual is None else residual.stride(0),
    }
    args |= {"T": T, "H": H, "eps": eps}
    launch(rms_norm_kernel, (triton.cdiv(T, config.constexprs["BLOCK_M"]),), args, config, ADD=residual is not None)
    return y, total


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    draw = sampler(dtype, device, generator)
    return {"x": draw(sizes["T"], sizes["H"]), "weight": draw(sizes["H"]), "eps": 1e-5}


def inputs_add(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    residual = sampler(dtype, device, generator)(sizes["T"], sizes["H"])
    return {**inputs(sizes, dtype, device, generator), "residual": residual}


def _cost(tensors: int, sizes: Sizes, dtype: torch.dtype) -> Cost:
    T, H = sizes["T"], sizes["H"]
    return Cost(flops=4 * T * H, bytes=(tensors * T * H + H) * dtype.itemsize)


OP = Op(
    run=rms_norm,
    reference=reference.rms_norm,
    inputs=inputs,
    configs=configs,
    cost=partial(_cost, 2),
    test_shapes=shapes("T H", "1 128, 17 128, 5 80, 3 1000, 2 4096, 33 1"),
    bench_shapes=shapes("T H", "1 4096, 64 4096, 4096 4096, 1 6144, 64 6144, 4096 6144"),
)

ADD_OP = Op(
    run=add_rms_norm,
    reference=reference.rms_norm,
    inputs=inputs_add,
    configs=configs,
    cost=partial(_cost, 4),
    test_shapes=OP.test_shapes,
    bench_shapes=OP.bench_shapes,
)
