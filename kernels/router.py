"""route: softmax over the experts, top-k, renormalize, in one pass.

T tokens, E experts, K experts a token
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import INT32, SINGLE, Within
from .launch import launch, select_configs
from .op import Cost, LaunchConfig, Op, Sizes, power_of_2, sampler, shapes


@triton.jit
def select_top_k(
    logits,  # [BLOCK_T, BLOCK_E] fp32
    E,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The TOP_K largest of each row -> weights, ids [BLOCK_T, BLOCK_K]."""
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    logits = tl.where(logits == logits, logits, float("-inf"))
    # A flag marks selected experts and padding: their logits may equal the -inf of another.
    taken = tl.broadcast_to((offs_e >= E)[None, :], (BLOCK_T, BLOCK_E))
    largest = tl.zeros((BLOCK_T,), tl.float32)
    shares = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for k in tl.static_range(TOP_K):
        value = tl.max(tl.where(taken, float("-inf"), logits), axis=1)
        first = tl.min(tl.where((logits == value[:, None]) & (taken == 0), offs_e[None, :], BLOCK_E), axis=1)
        taken = taken | (offs_e[None, :] == first[:, None])
        if k == 0:
            largest = value
        undefined = (largest == float("inf")) | (largest == float("-inf"))
        # An infinite maximum has no softmax: the experts that share it share the weight.
        share = tl.where(undefined, (value == largest).to(tl.float32), tl.exp(value - largest))
        shares = tl.where(offs_k[None, :] == k, share[:, None], shares)
        ids = tl.where(offs_k[None, :] == k, first[:, None], ids)
    return shares / tl.sum(shares, axis=1)[:, None], ids


@triton.jit
def store_routes(weights_ptr, ids_ptr, weights, ids, offs_t, T, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_k = tl.arange(0, BLOCK_K)
    out = offs_t[:, None] * TOP_K + offs_k[None, :]
    mask = (offs_t < T)[:, None] & (offs_k < TOP_K)[None, :]
    tl.store(weights_ptr + out, weights, mask=mask)
    tl.store(ids_ptr + out, ids, mask=mask)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logits_ptr,  # [T, E]
    weights_ptr,  # [T, K] out, fp32
    ids_ptr,  # [T, K] out, int32
    T, E,
    stride_lt, stride_le,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    ptrs = logits_ptr + offs_t[:, None] * stride_lt + offs_e[None, :] * stride_le
    logits = tl.load(ptrs, mask=(offs_t < T)[:, None] & (offs_e < E)[None, :], other=0.0).to(tl.float32)
    weights, ids = select_top_k(logits, E, TOP_K, BLOCK_T, BLOCK_E, BLOCK_K)
    store_routes(weights_ptr, ids_ptr, weights, ids, offs_t, T, TOP_K, BLOCK_K)


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """The tile does not depend on T, so a token's bits do not either."""
    block_e, block_k = power_of_2(sizes["E"]), power_of_2(sizes["K"])
    block_t = power_of_2(1024 // block_e, high=128)
    tiles = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": block_k}
    return {"route_kernel": LaunchConfig(tiles, num_warps=4 if block_t * block_e >= 512 else 1)}


def route(
    logits: Annotated[Tensor, "T E"], top_k: Annotated[int, "K", Within(1, "E")]
) -> tuple[Annotated[Tensor, "T K", SINGLE], Annotated[Tensor, "T K", INT32]]:
    """Select each token's experts from the logits -> weights, ids (`reference.route`)."""
    T, E = logits.shape
    weights, ids = empty_routes(T, top_k, logits.device)
    config = select_configs(configs, {"T": T, "E": E, "K": top_k}, logits.dtype, logits.device)["route_kernel"]
    args = {"logits_ptr": logits, "weights_ptr": weights, "ids_ptr": ids, "T": T, "E": E}
    args |= {"stride_lt": logits.stride(0), "stride_le": logits.stride(1)}
    launch(route_kernel, (triton.cdiv(T, config.constexprs["BLOCK_T"]),), args, config, TOP_K=top_k)
    return weights, ids


def empty_routes(T: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    weights = torch.empty((T, K), dtype=torch.float32, device=device)
    return weights, torch.empty((T, K), dtype=torch.int32, device=device)


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    logits = sampler(dtype, device, generator)(sizes["T"], sizes["E"], scale=2.0)
    return {"logits": logits, "top_k": sizes["K"]}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    T, E, K = sizes["T"], sizes["E"], sizes["K"]
    return Cost(flops=(K + 4) * T * E, bytes=T * (E * dtype.itemsize + K * 8))


OP = Op(
    run=route,
    reference=reference.route,
    inputs=inputs,
    configs=configs,
    cost=cost,
    test_shapes=shapes("T E K", "1 8 2, 67 8 2, 5 4 1, 9 6 6, 130 16 3, 3 1 1, 4 160 6"),
    bench_shapes=shapes("T E K", "1 8 2, 64 8 2, 4096 8 2"),
)
