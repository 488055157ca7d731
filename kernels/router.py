"""route: softmax over the experts, top-k, renormalize, in one pass; gate_route: the logits before it, in the same pass.

T tokens, H hidden, E experts, K experts a token
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .arch import amd
from .checks import INT32, SINGLE, Within
from .launch import choices, launch
from .op import Cost, LaunchConfig, Op, Sizes, dense_rows, power_of_2, sample
from .tiles import depth_tile


@triton.jit
def _choose(
    logits,  # [BLOCK_T, BLOCK_E] fp32
    E,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The TOP_K largest of each row -> weights, ids [BLOCK_T, BLOCK_K]."""
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    logits = tl.where(logits == logits, logits, float("-inf"))
    # Taken experts, and the padding, are told apart by a flag: their logits may equal a free one's -inf.
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
        # An infinite maximum has no softmax: those that share it share the weight.
        share = tl.where(undefined, (value == largest).to(tl.float32), tl.exp(value - largest))
        shares = tl.where(offs_k[None, :] == k, share[:, None], shares)
        ids = tl.where(offs_k[None, :] == k, first[:, None], ids)
    return shares / tl.sum(shares, axis=1)[:, None], ids


@triton.jit
def _store_choice(weights_ptr, ids_ptr, weights, ids, offs_t, T, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
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
    T,
    E,
    stride_lt,
    stride_le,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    ptrs = logits_ptr + offs_t[:, None] * stride_lt + offs_e[None, :] * stride_le
    logits = tl.load(ptrs, mask=(offs_t < T)[:, None] & (offs_e < E)[None, :], other=0.0).to(tl.float32)
    weights, ids = _choose(logits, E, TOP_K, BLOCK_T, BLOCK_E, BLOCK_K)
    _store_choice(weights_ptr, ids_ptr, weights, ids, offs_t, T, TOP_K, BLOCK_K)


@triton.jit(do_not_specialize=["T"])
def gate_route_kernel(
    x_ptr,  # [T, H]
    gate_ptr,  # [E, H]
    logits_ptr,  # [T, E] out
    weights_ptr,  # [T, K] out, fp32
    ids_ptr,  # [T, K] out, int32
    T,
    E,
    stride_xt,
    stride_ge,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_e, offs_h = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_H)
    x_ptrs = x_ptr + tl.minimum(offs_t, T - 1)[:, None] * stride_xt + offs_h[None, :]
    gate_ptrs = gate_ptr + tl.minimum(offs_e, E - 1)[None, :] * stride_ge + offs_h[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for h in range(0, H, BLOCK_H):
        x = depth_tile(x_ptrs + h, offs_h[None, :] < H - h, H, BLOCK_H)
        gate = depth_tile(gate_ptrs + h, offs_h[:, None] < H - h, H, BLOCK_H)
        acc = tl.dot(x, gate, acc, input_precision="ieee")
    logits = acc.to(logits_ptr.dtype.element_ty)
    out = logits_ptr + offs_t[:, None] * E + offs_e[None, :]
    tl.store(out, logits, mask=(offs_t < T)[:, None] & (offs_e < E)[None, :])
    # The route is that of the rounded logits, which a caller may see.
    weights, ids = _choose(logits.to(tl.float32), E, TOP_K, BLOCK_T, BLOCK_E, BLOCK_K)
    _store_choice(weights_ptr, ids_ptr, weights, ids, offs_t, T, TOP_K, BLOCK_K)


def configs(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """The tile does not depend on T, so that a token's bits do not either."""
    block_e, block_k = power_of_2(sizes["E"]), power_of_2(sizes["K"])
    block_t = power_of_2(1024 // block_e, high=128)
    tiles = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": block_k}
    return {"route_kernel": LaunchConfig(tiles, num_warps=4 if block_t * block_e >= 512 else 1)}


def route(
    logits: Annotated[Tensor, "T E"],
    top_k: Annotated[int, "K", Within(1, "E")],
) -> tuple[Annotated[Tensor, "T K", SINGLE], Annotated[Tensor, "T K", INT32]]:
    """logits -> the weights and ids of each token's experts: see `reference.route`."""
    T, E = logits.shape
    weights, ids = _unset(T, top_k, logits.device)
    config = choices(configs, {"T": T, "E": E, "K": top_k}, logits.dtype, logits.device)["route_kernel"]
    args = {
        "logits_ptr": logits,
        "weights_ptr": weights,
        "ids_ptr": ids,
        "T": T,
        "E": E,
        "stride_lt": logits.stride(0),
        "stride_le": logits.stride(1),
    }
    launch(route_kernel, (triton.cdiv(T, config.constexprs["BLOCK_T"]),), args, config, TOP_K=top_k)
    return weights, ids


def _unset(T: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights and ids to be written."""
    weights = torch.empty((T, K), dtype=torch.float32, device=device)
    return weights, torch.empty((T, K), dtype=torch.int32, device=device)


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    logits = sample(sizes["T"], sizes["E"], dtype=dtype, device=device, generator=generator, scale=2.0)
    return {"logits": logits, "top_k": sizes["K"]}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    T, E, K = sizes["T"], sizes["E"], sizes["K"]
    return Cost(flops=(K + 4) * T * E, bytes=T * (E * dtype.itemsize + K * 8))


def configs_gate(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """The least tile that a tensor core takes: a token's bits do not depend on T, and many tokens fill the card."""
    single, block_e = dtype == torch.float32, power_of_2(sizes["E"], low=16)
    depth = power_of_2((64 if single else 256) * 16 // block_e, low=16)
    tiles = {"BLOCK_T": 16, "BLOCK_E": block_e, "BLOCK_K": power_of_2(sizes["K"])}
    tiles["BLOCK_H"] = power_of_2(sizes["H"], low=16, high=depth)
    stages = 2 if single or amd(arch) else 4
    return {"gate_route_kernel": LaunchConfig(tiles, num_warps=4, num_stages=stages)}


def gate_route(
    x: Annotated[Tensor, "T H"],
    gate: Annotated[Tensor, "E H"],
    top_k: Annotated[int, "K", Within(1, "E")],
    deterministic: bool = False,
) -> tuple[Annotated[Tensor, "T E"], Annotated[Tensor, "T K", SINGLE], Annotated[Tensor, "T K", INT32]]:
    """The gate's matrix product and `route` of it -> logits, weights, ids: see `reference.gate_route`.

    A token's bits do not depend on the other tokens in any case: the tile is the same for every T.
    """
    (T, H), E = x.shape, len(gate)
    logits = torch.empty((T, E), dtype=x.dtype, device=x.device)
    weights, ids = _unset(T, top_k, x.device)
    config = choices(configs_gate, {"T": T, "H": H, "E": E, "K": top_k}, x.dtype, x.device)["gate_route_kernel"]
    x, gate = dense_rows(x), dense_rows(gate)
    args = {"x_ptr": x, "gate_ptr": gate, "logits_ptr": logits, "weights_ptr": weights, "ids_ptr": ids, "T": T, "E": E}
    args |= {"stride_xt": x.stride(0), "stride_ge": gate.stride(0)}
    grid = (triton.cdiv(T, config.constexprs["BLOCK_T"]),)
    launch(gate_route_kernel, grid, args, config, H=H, TOP_K=top_k)
    return logits, weights, ids


def inputs_gate(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    T, H, E = sizes["T"], sizes["H"], sizes["E"]
    x = sample(T, H, dtype=dtype, device=device, generator=generator)
    gate = sample(E, H, dtype=dtype, device=device, generator=generator, scale=2.0 * H**-0.5)
    return {"x": x, "gate": gate, "top_k": sizes["K"]}


def cost_gate(sizes: Sizes, dtype: torch.dtype) -> Cost:
    T, H, E = sizes["T"], sizes["H"], sizes["E"]
    rest = cost(sizes, dtype)
    return Cost(flops=2 * T * H * E + rest.flops, bytes=(T * H + E * H) * dtype.itemsize + rest.bytes)


def follows(args: Any, results: Any) -> Any:
    """The route is exactly that of the logits beside it, whichever way they were rounded."""
    return reference.route(results[0], args["top_k"])


OP = Op(
    run=route,
    reference=reference.route,
    inputs=inputs,
    configs=configs,
    cost=cost,
    test_shapes=tuple(
        {"T": T, "E": E, "K": K}
        for T, E, K in ((1, 8, 2), (67, 8, 2), (5, 4, 1), (9, 6, 6), (130, 16, 3), (3, 1, 1), (4, 160, 6))
    ),
    bench_shapes=tuple({"T": T, "E": 8, "K": 2} for T in (1, 64, 4096)),
    whole={"route_kernel": ("BLOCK_K",)},
)

GATE_OP = Op(
    run=gate_route,
    reference=reference.gate_route,
    inputs=inputs_gate,
    configs=configs_gate,
    cost=cost_gate,
    test_shapes=tuple(
        {"T": T, "H": H, "E": E, "K": K}
        for T, H, E, K in ((1, 128, 8, 2), (19, 80, 8, 2), (33, 300, 16, 3), (2, 64, 160, 6), (3, 64, 1, 1))
    ),
    bench_shapes=tuple({"T": T, "H": H, "E": 8, "K": 2} for H in (4096, 6144) for T in (1, 64, 4096)),
    whole={"gate_route_kernel": ("BLOCK_K",)},
    follows=follows,
)
