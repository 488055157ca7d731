"""embed_rms_norm: the embedding's rows and the first norm of a model in one launch.

B sequences, T tokens, V rows of the embedding, H hidden

Ids and positions come from the user, and reading them on the host would stall the stream. So this kernel, the first of
the model, checks them: a sequence with anything out of range becomes NaN and stays NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import INTS, Above, Range, Within, constrain, fail, readable
from .launch import launch, select_configs
from .norm import normed_rows
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, power_of_2, sampler
from .ring import POSITIONS_MAX, strides


@triton.jit(do_not_specialize=["T", "limit", "stride_ib"])
def embed_rms_norm_kernel(
    ids_ptr,  # [B, T]
    table_ptr,  # [V, H]
    weight_ptr,  # [H]
    past_ptr,  # [B] the position of token 0, or None
    new_ptr,  # [B] how many of the T tokens are new, or None
    y_ptr,  # [B, T, H] out: the norm of x
    x_ptr,  # [B, T, H] out: rows of the table
    T, V, H,
    limit,  # number of positions
    stride_ib, stride_it, stride_tv,
    eps,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = ids_ptr + b * stride_ib
    # One id out of range makes its whole sequence NaN, so each token's program reads all ids.
    invalid = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        ids = tl.load(row + offs_t.to(tl.int64) * stride_it, mask=offs_t < T, other=0)
        invalid |= ((ids < 0) | (ids >= V)).to(tl.int32)
    bad = tl.max(invalid, axis=0) != 0
    if past_ptr is not None:
        past, new = tl.load(past_ptr + b).to(tl.int64), tl.load(new_ptr + b).to(tl.int64)
        bad = bad | (new < 0) | (new > T) | (past < 0) | (past > limit - tl.minimum(tl.maximum(new, 0), T))
    token = tl.where(bad, 0, tl.load(row + t * stride_it)).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    x = tl.load(table_ptr + token * stride_tv + offs_h, mask=offs_h < tl.where(bad, 0, H), other=0.0)
    dtype: tl.constexpr = x.dtype
    values = tl.where(bad, float("nan"), x.to(tl.float32))
    out = (b * T + t) * H + offs_h
    tl.store(x_ptr + out, values.to(dtype), mask=offs_h < H)
    y = normed_rows(values[None, :], weight_ptr, H, eps, dtype, BLOCK_H)
    tl.store(y_ptr + out, tl.reshape(y, (BLOCK_H,)), mask=offs_h < H)


def check_positions(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    for name in ("new", "limit"):
        if (args[name] is None) != (args["past"] is None):
            raise fail(op, name, repr(args[name]), "a value exactly where past has one")


def end_ranges(args: Mapping[str, Any]) -> Iterator[Range]:
    if args["past"] is not None and readable(args["past"]):
        yield "new", args["past"] + args["new"], 0, args["limit"]


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """One token a program; ids in blocks of 1024 whatever T is, so that one kernel serves all lengths."""
    block_h = power_of_2(sizes["H"])
    tiles = {"BLOCK_T": 1024, "BLOCK_H": block_h}
    return {"embed_rms_norm_kernel": LaunchConfig(tiles, num_warps=power_of_2(block_h // 512, high=8))}


@constrain(rule=check_positions, ranges=end_ranges)
def embed_rms_norm(
    input_ids: Annotated[Tensor, "B T", INTS, Within(0, "V - 1")],
    table: Annotated[Tensor, "V H"],
    weight: Annotated[Tensor, "H"],
    eps: Annotated[float, Above(0.0)],
    past: Annotated[Tensor | None, "B", INTS, Within(0, "limit")] = None,
    new: Annotated[Tensor | None, "B", INTS, Within(0, "T")] = None,
    limit: Annotated[int | None, Within(1, POSITIONS_MAX.value)] = None,
) -> tuple[Annotated[Tensor, "B T H"], Annotated[Tensor, "B T H"]]:
    """Look up rows x of the embedding and their norm y -> y, x (`reference.embed_rms_norm`).

    With past and new, sequence b is at position past[b] and has new[b] new tokens, at most `limit` in all. A sequence
    is NaN where an id, new or a position is out of range (a ValueError on a CPU).
    """
    (B, T), (V, H) = input_ids.shape, table.shape
    y, x = (torch.empty((B, T, H), dtype=table.dtype, device=table.device) for _ in range(2))
    table = dense_rows(table)
    past_ptr, new_ptr = (None if bound is None else bound.contiguous() for bound in (past, new))
    args: dict[str, Any] = {"ids_ptr": input_ids, "table_ptr": table, "weight_ptr": weight.contiguous()}
    args |= {
        "y_ptr": y,
        "x_ptr": x,
        "past_ptr": past_ptr,
        "new_ptr": new_ptr,
        "T": T,
        "V": V,
        "H": H,
        "limit": limit or 0,
        "eps": eps,
    }
    args |= {**strides("i", input_ids), "stride_tv": table.stride(0)}
    selected = select_configs(configs, {"T": T, "H": H}, table.dtype, table.device)
    launch(embed_rms_norm_kernel, (T, B), args, selected["embed_rms_norm_kernel"])
    return y, x


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    """With "past": sequence b is at past + b and has T - b new tokens."""
    B, T, V, H = (sizes[letter] for letter in ("B", "T", "V", "H"))
    ids = (torch.arange(B * T, device=device) * 7 % V).view(B, T)
    draw = sampler(dtype, device, generator)
    args = {"input_ids": ids, "table": draw(V, H), "weight": draw(H), "eps": 1e-5}
    if "past" in sizes:
        b = torch.arange(B, dtype=torch.int32, device=device)
        args |= {"past": sizes["past"] + b, "new": (T - b).clamp(min=0), "limit": sizes["past"] + T + B}
    return args


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Count each token's id and row read once, the row and its norm written once, and the norm's weight."""
    tokens, H = sizes["B"] * sizes["T"], sizes["H"]
    return Cost(flops=4 * tokens * H, bytes=(3 * tokens + 1) * H * dtype.itemsize + 8 * tokens)


OP = Op(
    run=embed_rms_norm,
    reference=reference.embed_rms_norm,
    inputs=inputs,
    configs=configs,
    cost=cost,
    test_shapes=(
        {"B": 3, "T": 1, "V": 50, "H": 128, "past": 7},
        {"B": 2, "T": 5, "V": 9, "H": 80},
        {"B": 2, "T": 3, "V": 30, "H": 1000, "past": 0},
    ),
    bench_shapes=tuple({"B": 1, "T": T, "V": 32000, "H": 4096, "past": 100} for T in (1, 2048)),
)
