"""rms_norm, add_rms_norm with the residual add fused, and embed_rms_norm with the look-up of the embedding's rows: root
mean square norm (Zhang & Sennrich 2019).

B sequences, T tokens or rows, V rows of the embedding, H hidden
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..launching.kernel_args import Pointer, Rows, dense_rows
from ..launching.launch import LaunchConfig, launch, select_configs
from ..operation.cases import Cost, operation, shapes
from ..operation.checks import INTS, Within
from .cache_args import POSITIONS_MAX, New
from .tiles import power_of_2


class FusedNorm(NamedTuple):
    """What a kernel needs that also adds a residual to its result and normalizes the sum."""

    residual: Pointer  # [T, H]
    stride: int  # between its rows
    weight: Pointer  # [H]
    total_ptr: Pointer  # [T, H] out: the sum
    eps: float

    @classmethod
    def of(cls, residual: Tensor, weight: Tensor, total: Tensor, eps: float) -> FusedNorm:
        residual = dense_rows(residual)
        return cls(residual, residual.stride(0), weight.contiguous(), total, eps)


@triton.jit
def normed_rows(
    values,  # [BLOCK_M, BLOCK_H] fp32, zero beyond H
    weight_ptr,  # [H]
    H, eps,
    dtype: tl.constexpr, BLOCK_H: tl.constexpr, OFFSET: tl.constexpr = 0.0,
):  # fmt: skip
    """Normalize rows, rounding to `dtype` before and after the weight, or with an offset after it, as the reference."""
    offs_h = tl.arange(0, BLOCK_H)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / H + eps)
    weight = tl.load(weight_ptr + offs_h, mask=offs_h < H, other=0.0)
    if OFFSET != 0.0:
        return (values * scale[:, None] * (weight.to(tl.float32) + OFFSET)[None, :]).to(dtype)
    return apply_norm(values, scale[:, None], weight[None, :], dtype)


@triton.jit
def apply_norm(values, scale, weight, dtype: tl.constexpr):
    return ((values * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x,  # Rows [T, H]
    residual,  # Rows as x, or None
    weight_ptr,  # [H]
    y_ptr,  # [T, H] out
    total_ptr,  # [T, H] out: x + residual, or None
    T, H,
    eps,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask = (offs_m < T)[:, None] & (offs_h < H)[None, :]
    out = offs_m[:, None] * H + offs_h[None, :]
    x_tile = tl.load(x.ptr + offs_m[:, None] * x.stride + offs_h[None, :], mask=mask, other=0.0)
    dtype: tl.constexpr = x_tile.dtype
    values = x_tile.to(tl.float32)
    if total_ptr is not None:
        added = tl.load(residual.ptr + offs_m[:, None] * residual.stride + offs_h[None, :], mask=mask, other=0.0)
        # The next layer reads the rounded sum, so the norm must use it, too.
        total = (values + added.to(tl.float32)).to(dtype)
        tl.store(total_ptr + out, total, mask=mask)
        values = total.to(tl.float32)
    tl.store(y_ptr + out, normed_rows(values, weight_ptr, H, eps, dtype, BLOCK_H, OFFSET), mask=mask)


@dataclass(frozen=True)
class NormSizes:
    T: int
    H: int
    offset: float = 0.0


def configs(sizes: NormSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """One long row a program; short rows share one whatever T is, since a row's bits depend on the tile."""
    block_h = power_of_2(sizes.H)
    rows = power_of_2(4096 // block_h, high=16)
    warps = power_of_2(block_h * rows // 512, low=1, high=8)
    return {"rms_norm_kernel": LaunchConfig({"BLOCK_M": rows, "BLOCK_H": block_h}, num_warps=warps)}


Features = Annotated[Tensor, "... H"]
NormWeight = Annotated[Tensor, "H"]
Offset = Annotated[float, Within(0, "inf")]


_FIELDS: dict[str, Any] = {
    "reference": reference.rms_norm,
    "case": NormSizes,
    "flops": lambda case: 4 * case.T * case.H,
    "test_shapes": (
        *shapes(NormSizes, "1 128, 17 128, 5 80, 3 1000, 2 4096, 33 1"),
        *shapes(NormSizes, "5 80, 2 4096", offset=1.0),
    ),
    "bench_shapes": (
        *shapes(NormSizes, "1 4096, 64 4096, 4096 4096, 1 6144, 64 6144, 4096 6144"),
        *shapes(NormSizes, "1 2048", offset=1.0),  # of Qwen3-Next-80B-A3B
    ),
}


@operation(name="rms_norm", **_FIELDS)
def _norm(x: Features, weight: NormWeight, eps: float, offset: Offset = 0.0) -> Features:
    return _launch(x, None, weight, eps, offset)[0]


@operation(**_FIELDS)
def add_rms_norm(
    x: Features, residual: Features, weight: NormWeight, eps: float, offset: Offset = 0.0
) -> tuple[Features, Features]:
    """Add a residual and normalize the sum: `rms_norm` with a residual, as an operator of its own, since the schema of
    torch's operator has a fixed number of results.

    x, residual  [..., H], fp32, bf16 or fp16
    weight       [H] in x's dtype; eps above 0; offset as in `rms_norm`

    Returns the norm y and the sum. Raises ValueError for another shape, dtype or device.

    >>> y, total = ops.add_rms_norm(torch.randn(2, 64), torch.randn(2, 64), torch.randn(64), 1e-5)
    """
    return _launch(x, residual, weight, eps, offset)


class RmsNorm:
    """Root mean square norm (Zhang & Sennrich 2019): y = x * rsqrt(mean(x ** 2) + eps) * weight.

    x         [..., H], fp32, bf16 or fp16. Where its rows cannot be viewed as [rows, H], as heads that were split
              off a wider tensor, they are copied, and the launch cache (plan.py) does not remember such a call
    weight    [H] in x's dtype
    eps       above 0
    residual  [..., H] in x's dtype, added to x first, or None
    offset    the weight is offset + weight: 1.0 in Gemma and Qwen3-Next

    Returns y, or y and the sum x + residual. Computed in fp32 and rounded to x's dtype before and after the weight, or
    with an offset after it alone.
    Raises ValueError for another shape, dtype or device; with a residual it names `add_rms_norm`.

    >>> y, total = ops.rms_norm(torch.randn(2, 64), torch.randn(64), 1e-5, residual=torch.randn(2, 64))
    """

    op = _norm.op
    __name__ = "rms_norm"

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, offset: float = 0.0
    ) -> Any:
        if residual is None:
            return _norm(x, weight, eps, offset)
        return add_rms_norm(x, residual, weight, eps, offset)

    def unchecked(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, offset: float = 0.0
    ) -> Any:
        if residual is None:
            return _norm.unchecked(x, weight, eps, offset)
        return add_rms_norm.unchecked(x, residual, weight, eps, offset)


rms_norm = RmsNorm()


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Any]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    rows = Rows.of(x.reshape(-1, x.shape[-1]))
    T, H = rows.ptr.shape
    config = select_configs(configs, NormSizes(T, H, offset), x.dtype, x.device)["rms_norm_kernel"]
    launch(
        rms_norm_kernel,
        (triton.cdiv(T, config.constexprs["BLOCK_M"]),),
        config,
        x=rows,
        residual=None if residual is None else Rows.of(residual.reshape(T, H)),
        weight_ptr=weight.contiguous(),
        y_ptr=y,
        total_ptr=total,
        T=T,
        H=H,
        eps=eps,
        OFFSET=offset,
    )
    return y, total


@triton.jit(do_not_specialize=["T", "limit", "stride_ib"])
def embed_rms_norm_kernel(
    ids_ptr,  # [B, T]
    table,  # Rows [V, H]
    weight_ptr,  # [H]
    past_ptr,  # [B] the position of token 0
    new_ptr,  # [B] how many of the T tokens are new
    y_ptr,  # [B, T, H] out: the norm of x
    x_ptr,  # [B, T, H] out: rows of the table
    T, V, H,
    limit,  # number of positions
    stride_ib, stride_it,
    eps,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = ids_ptr + b * stride_ib
    # Users pass ids and positions, and a check on the host would stall: this kernel, a model's first, makes a sequence
    # NaN where one is out of range. So each token's program reads all ids of its sequence.
    invalid = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        ids = tl.load(row + offs_t.to(tl.int64) * stride_it, mask=offs_t < T, other=0)
        invalid |= ((ids < 0) | (ids >= V)).to(tl.int32)
    bad = tl.max(invalid, axis=0) != 0
    past, new = tl.load(past_ptr + b).to(tl.int64), tl.load(new_ptr + b).to(tl.int64)
    bad = bad | (new < 0) | (new > T) | (past < 0) | (past > limit - tl.minimum(tl.maximum(new, 0), T))
    token = tl.where(bad, 0, tl.load(row + t * stride_it)).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    x = tl.load(table.ptr + token * table.stride + offs_h, mask=offs_h < tl.where(bad, 0, H), other=0.0)
    dtype: tl.constexpr = x.dtype
    values = tl.where(bad, float("nan"), x.to(tl.float32))
    out = (b * T + t) * H + offs_h
    tl.store(x_ptr + out, values.to(dtype), mask=offs_h < H)
    y = normed_rows(values[None, :], weight_ptr, H, eps, dtype, BLOCK_H)
    tl.store(y_ptr + out, tl.reshape(y, (BLOCK_H,)), mask=offs_h < H)


@dataclass(frozen=True)
class EmbedSizes:
    B: int
    T: int
    V: int
    H: int
    past: int = 0  # sequence b is at past + b and has T - b new tokens


def embed_configs(sizes: EmbedSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """One token a program; ids in blocks of 1024 whatever T is, so that one kernel serves all lengths."""
    tiles = {"BLOCK_T": 1024, "BLOCK_H": power_of_2(sizes.H)}
    return {"embed_rms_norm_kernel": LaunchConfig(tiles, num_warps=power_of_2(tiles["BLOCK_H"] // 512, high=8))}


def _embed_inputs(case: EmbedSizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    B, T, past, b = case.B, case.T, case.past, torch.arange(case.B, dtype=torch.int32, device=device)
    bounds = {"past": past + b, "new": (T - b).clamp(min=0), "limit": past + T + B}
    return bounds | {"input_ids": (torch.arange(B * T, device=device) * 7 % case.V).view(B, T)}


def embed_cost(case: EmbedSizes, dtype: torch.dtype) -> Cost:
    """Count each token's id and row read once, the row and its norm written once, and the norm's weight."""
    tokens, H = case.B * case.T, case.H
    return Cost(flops=4 * tokens * H, bytes=(3 * tokens + 1) * H * dtype.itemsize + 8 * tokens)


Embedded = Annotated[Tensor, "B T H"]


@operation(
    reference=reference.embed_rms_norm,
    case=EmbedSizes,
    draw=_embed_inputs,
    count=embed_cost,
    test_shapes=shapes(EmbedSizes, "3 1 50 128 7, 2 3 30 1000 0, 2 5 9 80"),
    bench_shapes=shapes(EmbedSizes, "1 1 32000 4096 100, 1 2048 32000 4096 100"),
)
def embed_rms_norm(
    input_ids: Annotated[Tensor, "B T", INTS, Within(0, "V - 1")],
    table: Annotated[Tensor, "V H"],
    weight: NormWeight,
    eps: float,
    past: Annotated[Tensor, "B", INTS, Within(0, "limit")],
    new: New,
    limit: Annotated[int, Within(1, POSITIONS_MAX.value)],
) -> tuple[Embedded, Embedded]:
    """Look up rows x of the embedding and their norm y (`rms_norm`), in one launch.

    input_ids  [B, T], int32 or int64, in 0..V - 1
    table      [V, H], fp32, bf16 or fp16
    weight     [H] in the table's dtype; eps above 0
    past, new  [B], int32 or int64: sequence b is at position past[b] and has new[b] of the T tokens, at most `limit`
               in all

    Returns y and x [B, T, H]. Raises ValueError for another shape, dtype or device. A sequence with an id, a position
    or a length out of range is NaN; on a CPU it is a ValueError, but for past + new above `limit`, which caches check.

    >>> ids, past, new = torch.tensor([[0, 5, 2]]), torch.tensor([0]), torch.tensor([3])
    >>> y, x = ops.embed_rms_norm(ids, torch.randn(9, 64), torch.randn(64), 1e-5, past, new, limit=16)
    """
    (B, T), (V, H) = input_ids.shape, table.shape
    y, x = (torch.empty((B, T, H), dtype=table.dtype, device=table.device) for _ in range(2))
    launch(
        embed_rms_norm_kernel,
        (T, B),
        select_configs(embed_configs, EmbedSizes(B, T, V, H), table.dtype, table.device)["embed_rms_norm_kernel"],
        ids_ptr=input_ids,
        table=Rows.of(table),
        weight_ptr=weight.contiguous(),
        past_ptr=past.contiguous(),
        new_ptr=new.contiguous(),
        y_ptr=y,
        x_ptr=x,
        T=T,
        V=V,
        H=H,
        limit=limit,
        stride_ib=input_ids.stride(0),
        stride_it=input_ids.stride(1),
        eps=eps,
    )
    return y, x
