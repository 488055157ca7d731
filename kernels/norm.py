"""rms_norm, and add_rms_norm with the residual add fused: root mean square norm.

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
from .op import Cost, LaunchConfig, Op, Sizes, power_of_2, sample


@triton.jit
def normed_rows(
    values,  # [BLOCK_M, BLOCK_H] fp32, zero beyond H
    weight_ptr,  # [H]
    H,
    eps,
    dtype: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The norm of rows, rounded to `dtype` before and after the weight, as the reference does."""
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
    T,
    H,
    stride_xt,
    stride_rt,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ADD: tl.constexpr,
):
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask = (offs_m < T)[:, None] & (offs_h < H)[None, :]
    out = offs_m[:, None] * H + offs_h[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xt + offs_h[None, :], mask=mask, other=0.0)
    dtype: tl.constexpr = x.dtype
    values = x.to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + offs_m[:, None] * stride_rt + offs_h[None, :], mask=mask, other=0.0)
        # The next layer reads the rounded sum, so the norm must see it too.
        total = (values + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + out, total, mask=mask)
        values = total.to(tl.float32)
    tl.store(y_ptr + out, normed_rows(values, weight_ptr, H, eps, dtype, BLOCK_H), mask=mask)


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """A row a program where rows are long; short rows share one, however few there are: a row's bits depend on it."""
    block_h = power_of_2(sizes["H"])
    rows = power_of_2(4096 // block_h, high=16)
    warps = power_of_2(block_h * rows // 512, low=1, high=8)
    return {"rms_norm_kernel": LaunchConfig({"BLOCK_M": rows, "BLOCK_H": block_h}, num_warps=warps)}


def _rows(x: Tensor) -> Tensor:
    """[..., H] as [T, H] with contiguous rows, without a copy where strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def rms_norm(
    x: Annotated[Tensor, "... H"],
    weight: Annotated[Tensor, "H"],
    eps: Annotated[float, Above(0.0)],
) -> Annotated[Tensor, "... H"]:
    """Root mean square norm, x read once, y written once: see `reference.rms_norm`."""
    return _launch(x, None, weight, eps)[0]


@constrain(error_name="rms_norm")
def add_rms_norm(
    x: Annotated[Tensor, "... H"],
    residual: Annotated[Tensor, "... H"],
    weight: Annotated[Tensor, "H"],
    eps: Annotated[float, Above(0.0)],
) -> tuple[Annotated[Tensor, "... H"], Annotated[Tensor, "... H"]]:
    """The norm y of x + residual -> y, x + residual: see `reference.rms_norm`."""
    y, total = _launch(x, residual, weight, eps)
    return y, total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Any]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    residual = None if residual is None else _rows(residual)
    rows = _rows(x)
    T, H = rows.shape
    config = select_configs(configs, {"T": T, "H": H}, x.dtype, x.device)["rms_norm_kernel"]
    args = {
        "x_ptr": rows,
        "residual_ptr": residual,
        "weight_ptr": weight.contiguous(),
        "y_ptr": y,
        "total_ptr": total,
        "T": T,
        "H": H,
        "stride_xt": rows.stride(0),
        "stride_rt": 0 if residual is None else residual.stride(0),
        "eps": eps,
    }
    launch(rms_norm_kernel, (triton.cdiv(T, config.constexprs["BLOCK_M"]),), args, config, ADD=residual is not None)
    return y, total


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    x = sample(sizes["T"], sizes["H"], dtype=dtype, device=device, generator=generator)
    return {"x": x, "weight": sample(sizes["H"], dtype=dtype, device=device, generator=generator), "eps": 1e-5}


def inputs_add(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    residual = sample(sizes["T"], sizes["H"], dtype=dtype, device=device, generator=generator)
    return {**inputs(sizes, dtype, device, generator), "residual": residual}


def _cost(tensors: int, sizes: Sizes, dtype: torch.dtype) -> Cost:
    T, H = sizes["T"], sizes["H"]
    return Cost(flops=4 * T * H, bytes=(tensors * T * H + H) * dtype.itemsize)


_TEST_SHAPES = tuple({"T": T, "H": H} for T, H in ((1, 128), (17, 128), (5, 80), (3, 1000), (2, 4096), (33, 1)))
_BENCH_SHAPES = tuple({"T": T, "H": H} for H in (4096, 6144) for T in (1, 64, 4096))

OP = Op(
    run=rms_norm,
    reference=reference.rms_norm,
    inputs=inputs,
    configs=configs,
    cost=partial(_cost, 2),
    test_shapes=_TEST_SHAPES,
    bench_shapes=_BENCH_SHAPES,
)

ADD_OP = Op(
    run=add_rms_norm,
    reference=reference.rms_norm,
    inputs=inputs_add,
    configs=configs,
    cost=partial(_cost, 4),
    test_shapes=_TEST_SHAPES,
    bench_shapes=_BENCH_SHAPES,
)
