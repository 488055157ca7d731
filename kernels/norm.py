"""rms_norm: root mean square norm, with the residual add fused.

T rows, H hidden
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import FLOATS, Binder, number
from .launch import launch, target_arch
from .op import Cost, LaunchConfig, Op, Sizes, power_of_2, sample


@triton.jit
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
    dtype = x.dtype
    values = x.to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + offs_m[:, None] * stride_rt + offs_h[None, :], mask=mask, other=0.0)
        # The next layer reads the rounded sum, so the norm must see it too.
        total = (values + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + out, total, mask=mask)
        values = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / H + eps)
    normed = (values * scale[:, None]).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
    tl.store(y_ptr + out, (normed * weight[None, :]).to(dtype), mask=mask)


def check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Sizes:
    binder = Binder("rms_norm")
    binder.tensor("x", x, "... H", FLOATS)
    binder.tensor("weight", weight, "H", (x.dtype,))
    binder.positive("H")
    number("rms_norm", "eps", eps, above=0.0)
    if residual is not None:
        binder.tensor("residual", residual, "... H", (x.dtype,))
        if residual.shape != x.shape:
            raise ValueError(
                f"rms_norm: argument 'residual' is of shape {list(residual.shape)}, needs that of x, {list(x.shape)}"
            )
    return {"T": x.numel() // x.shape[-1], "H": x.shape[-1]}


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """A row a program where rows are long; short rows share one, which keeps every lane busy."""
    block_h = power_of_2(sizes["H"])
    rows = power_of_2(min(sizes["T"], 4096 // block_h), high=16)
    warps = power_of_2(block_h * rows // 512, low=1, high=8)
    return {"rms_norm_kernel": LaunchConfig({"BLOCK_M": rows, "BLOCK_H": block_h}, num_warps=warps)}


def _rows(x: Tensor) -> Tensor:
    """[..., H] as [T, H] with contiguous rows, without a copy where strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """Triton way of `reference.rms_norm`: x is read once, y (and the sum) written once."""
    y, total = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    if residual is not None:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        residual = _rows(residual)
    rows = _rows(x)
    T, H = rows.shape
    config = configs({"T": T, "H": H}, x.dtype, target_arch(x.device))["rms_norm_kernel"]
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
    return y if total is None else (y, total)


def empty(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y if residual is None else (y, torch.empty_like(y))


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    T, H = sizes["T"], sizes["H"]
    x, weight, residual = (sample(*s, dtype=dtype, device=device, generator=generator) for s in ((T, H), (H,), (T, H)))
    return {"x": x, "weight": weight, "eps": 1e-5, "residual": residual if sizes["residual"] else None}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    T, H = sizes["T"], sizes["H"]
    tensors = 4 if sizes["residual"] else 2
    return Cost(flops=4 * T * H, bytes=(tensors * T * H + H) * dtype.itemsize)


OP = Op(
    name="rms_norm",
    check=check,
    run=rms_norm,
    reference=reference.rms_norm,
    empty=empty,
    inputs=inputs,
    configs=configs,
    cost=cost,
    test_shapes=tuple(
        {"T": T, "H": H, "residual": residual}
        for T, H, residual in ((1, 128, 0), (1, 128, 1), (17, 128, 1), (5, 80, 0), (3, 1000, 1), (2, 4096, 1), (33, 1, 0))
    ),
    bench_shapes=tuple({"T": T, "H": H, "residual": 1} for H in (4096, 6144) for T in (1, 64, 4096)),
)
