"""route: a token's experts and their weights, from the logits of a gate, with whose kernels (router.py) it is shared.

T tokens, E experts, K experts a token. PDL is set by `launch` (pdl.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..launching.launch import LaunchConfig, launch, select_configs
from ..launching.pdl import pdl_wait
from ..operation.cases import operation, shapes
from ..operation.checks import INT32, RoutingWeights, Within, fail
from .tiles import power_of_2

SELECTED = tl.constexpr(-(2**63))  # less than any expert's key


class Router(NamedTuple):
    """The constants of `select_top_k`; `route` explains them."""

    renormalize: bool
    sigmoid: bool
    groups: int  # 0: every expert may be selected
    top_groups: int
    scale: float

    @classmethod
    def of(cls, renormalize: bool, scoring: str, groups: tuple[int, int] | None, scale: float) -> Router:
        count, top = groups or (0, 0)
        return cls(renormalize, scoring == "sigmoid", 0 if count == top else count, top, scale)


@triton.jit
def _share(logits, largest):
    """The numerators of a softmax. An infinite maximum has none: the experts that have it share the weight."""
    undefined = (largest == float("inf")) | (largest == float("-inf"))
    return tl.where(undefined, (logits == largest).to(tl.float32), tl.exp(logits - largest))


@triton.jit
def _flip(bits):
    """The bits of fp32 -> int32 in the order of the numbers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _keys(values, places):
    """Integers that order fp32 values by size, NaN as -inf, then by `places`, the larger first: no two are equal."""
    values = tl.where(values == values, values, float("-inf"))
    order = _flip(tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)).to(tl.int64)  # -0 equals 0
    return (order << 32) + places


@triton.jit
def _values(keys):
    return _flip((keys >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _scores(logits, valid, SIGMOID: tl.constexpr):
    """Each expert's sigmoid, or its part of the softmax over all."""
    if SIGMOID:
        return tl.where(valid, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    else:
        largest = tl.max(tl.where(valid, logits, float("-inf")), axis=1)[:, None]
        shares = tl.where(valid, _share(logits, largest), 0.0)
        return shares / tl.sum(shares, axis=1)[:, None]


@triton.jit
def _within_best_groups(
    choice, E, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Replace `choice` by -inf outside the TOP_GROUPS groups whose two best sum highest."""
    BLOCK_G: tl.constexpr = triton.next_power_of_2(GROUPS)
    offs_e, offs_g = tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_G)[None, :]
    group, keys = offs_e // (E // GROUPS), _keys(choice, offs_e)
    sums = tl.full((BLOCK_T, BLOCK_G), SELECTED, tl.int64)
    for g in tl.static_range(GROUPS):
        members = tl.where(group == g, keys, SELECTED)
        first = tl.max(members, axis=1)[:, None]
        second = tl.max(tl.where(members == first, SELECTED, members), axis=1)[:, None]
        sums = tl.where(offs_g == g, _keys(_values(first) + _values(second), BLOCK_G - 1 - g), sums)
    kept = group < 0
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.max(sums, axis=1)[:, None]
        sums = tl.where(sums == best, SELECTED, sums)
        kept |= group == BLOCK_G - 1 - (best & (BLOCK_G - 1)).to(tl.int32)
    return tl.where(kept, choice, float("-inf"))


@triton.jit
def select_top_k(
    logits,  # [BLOCK_T, BLOCK_E] fp32
    bias_ptr,  # [E], added to scores to select by, or None
    E,
    TOP_K: tl.constexpr, ROUTER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The TOP_K best of each row -> weights, ids [BLOCK_T, BLOCK_K]."""
    # The softmax has the order of the logits.
    BY_LOGIT: tl.constexpr = not ROUTER.sigmoid and ROUTER.groups == 0 and bias_ptr is None
    offs_e = tl.arange(0, BLOCK_E)[None, :]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    logits = tl.where(logits == logits, logits, float("-inf"))
    choice = logits
    if not BY_LOGIT:
        scores = _scores(logits, offs_e < E, ROUTER.sigmoid)
        choice, shares = scores, tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)
        if ROUTER.groups > 0:
            choice = _within_best_groups(choice, E, ROUTER.groups, ROUTER.top_groups, BLOCK_T, BLOCK_E)
    # A selection is one reduction, since no two keys are equal.
    keys = tl.where(offs_e < E, _keys(choice, BLOCK_E - 1 - offs_e), SELECTED)
    best = tl.full((BLOCK_T, BLOCK_K), SELECTED, tl.int64)
    for k in tl.static_range(TOP_K):
        key = tl.max(keys, axis=1)[:, None]
        if not BY_LOGIT:
            share = tl.sum(tl.where(keys == key, scores, 0.0), axis=1)[:, None]
            shares = tl.where(offs_k == k, share, shares)
        keys = tl.where(keys == key, SELECTED, keys)
        best = tl.where(offs_k == k, key, best)
    ids = BLOCK_E - 1 - (best & (BLOCK_E - 1)).to(tl.int32)
    if BY_LOGIT:
        values = tl.where(offs_k < TOP_K, _values(best), float("-inf"))
        largest = tl.max(values, axis=1)[:, None]
        shares = tl.where(offs_k < TOP_K, _share(values, largest), 0.0)
        total = tl.sum(shares, axis=1)
        if not ROUTER.renormalize:
            total = tl.sum(tl.where(offs_e < E, _share(logits, largest), 0.0), axis=1)
        shares = shares / total[:, None]
    elif ROUTER.renormalize:
        shares = shares / (tl.sum(shares, axis=1)[:, None] + 1e-20)
    return shares if ROUTER.scale == 1.0 else shares * ROUTER.scale, ids


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
    bias_ptr,  # [E], or None
    weights_ptr,  # [T, K] out, fp32
    ids_ptr,  # [T, K] out, int32
    T, E,
    stride_lt, stride_le,
    TOP_K: tl.constexpr, ROUTER: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    ptrs = logits_ptr + offs_t[:, None] * stride_lt + offs_e[None, :] * stride_le
    logits = tl.load(ptrs, mask=(offs_t < T)[:, None] & (offs_e < E)[None, :], other=0.0).to(tl.float32)
    weights, ids = select_top_k(logits, bias_ptr, E, TOP_K, ROUTER, BLOCK_T, BLOCK_E, BLOCK_K)
    store_routes(weights_ptr, ids_ptr, weights, ids, offs_t, T, TOP_K, BLOCK_K)


@dataclass(frozen=True)
class RouteSizes:
    """bias, in a case: whether there is one."""

    T: int
    E: int
    K: int
    renormalize: bool = True
    scoring: str = "softmax"
    bias: bool = False
    groups: tuple[int, int] | None = None
    scale: float = 1.0


def configs(sizes: Any, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """The tile does not depend on T, so a token's bits do not either. A warp has whole tokens."""
    block_e, block_k = power_of_2(sizes.E), power_of_2(sizes.K)
    block_t = power_of_2(1024 // block_e, high=128)
    tiles = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": block_k}
    return {"route_kernel": LaunchConfig(tiles, num_warps=min(4, block_t) if block_t * block_e >= 512 else 1)}


Logits = Annotated[Tensor, "T E"]
TopK = Annotated[int, "K", Within(1, "E")]
Ids = Annotated[Tensor, "T K", INT32]
Bias = Annotated[Tensor, "E", (torch.float32, None)]
TopGroups = tuple[int, int]


def check_router(op: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise ValueError for another scoring, and for groups that do not hold the experts to select."""
    if args["scoring"] not in ("softmax", "sigmoid"):
        raise fail(op, "scoring", repr(args["scoring"]), "'softmax' or 'sigmoid'")
    E, K, groups = sizes["E"], sizes["K"], args["groups"]
    fits = isinstance(groups, tuple) and len(groups) == 2 and all(type(number) is int for number in groups)
    if groups is not None and not (
        fits and 1 <= groups[1] <= groups[0] and E % groups[0] == 0 and 2 * groups[0] <= E >= K * groups[0] // groups[1]
    ):
        needs = f"two integers (n, k), k of n groups of {E} / n experts, 2 at the least, that hold {K} experts"
        raise fail(op, "groups", repr(groups), needs)


def route_flops(case: Any) -> int:
    return case.T * case.E * (case.K + 4)


# Beside `renormalize`, as cases: of DeepSeek-V3, Ernie 4.5 (a softmax and a bias) and Mistral 4 (a softmax and groups).
ROUTERS: tuple[dict[str, Any], ...] = (
    {"scoring": "sigmoid", "bias": True, "groups": (8, 4), "scale": 2.5},
    {"scoring": "sigmoid", "renormalize": False},
    {"bias": True, "scale": 0.5},
    {"groups": (4, 2), "renormalize": False},
)


@operation(
    reference=reference.route,
    case=RouteSizes,
    flops=route_flops,
    test_shapes=(
        *shapes(RouteSizes, "1 8 2, 67 8 2, 5 4 1, 9 6 6, 130 16 3, 3 1 1, 4 160 6"),
        *shapes(RouteSizes, "67 8 2, 4 160 6", renormalize=False),
        *(RouteSizes(9, 160, 6, **fields) for fields in ROUTERS),
    ),
    bench_shapes=(
        *shapes(RouteSizes, "1 8 2, 64 8 2, 4096 8 2"),
        *shapes(RouteSizes, "1 64 8, 4096 64 8", renormalize=False),  # of OLMoE-1B-7B
    ),
    rule=check_router,
)
def route(
    logits: Logits,
    top_k: TopK,
    renormalize: bool = True,
    scoring: str = "softmax",
    bias: Bias | None = None,
    groups: TopGroups | None = None,
    scale: float = 1.0,
) -> tuple[RoutingWeights, Ids]:
    """Select each token's experts: Softmax(TopK(logits)) (Jiang et al. 2024, section 2.1), or by other scores.

    logits       [T, E], fp32, bf16 or fp16; NaN counts as -inf
    top_k        K, in 1..E
    renormalize  False: weights are the scores themselves: TopK(Softmax(logits)), with the softmax over all experts
                 (OLMoE, Muennighoff et al. 2024, section 2)
    scoring      "softmax", or "sigmoid" (DeepSeek-V3, DeepSeek-AI 2024, section 2.1.2, eq. 12 to 16)
    bias         [E] in fp32 or the logits' dtype, or None: added to the scores to select by, not to weigh (Wang et al.
                 2024, "Auxiliary-Loss-Free Load Balancing")
    groups       (n, k), or None: only experts of the k best of n groups of neighbours are selected, each group judged
                 by the sum of its two best (DeepSeek-V3, section 2.1.2); k groups hold top_k experts at least
    scale        of the weights, above 0

    Returns routing weights fp32 [T, K], whose sum is `scale` with `renormalize`, and expert ids int32 [T, K]: larger
    first, ties to the lower id. Where the softmax is undefined, the infinite logits share equally. Raises ValueError
    for another shape or dtype, and for a number out of range.

    >>> ops.route(torch.tensor([[0.0, 3.0, 1.0]]), top_k=2)[1].tolist()
    [[1, 2]]
    """
    weights, ids = empty_routes(len(logits), top_k, logits.device)
    launch_route(logits, bias, weights, ids, Router.of(renormalize, scoring, groups, scale))
    return weights, ids


def empty_routes(T: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    weights = torch.empty((T, K), dtype=torch.float32, device=device)
    return weights, torch.empty((T, K), dtype=torch.int32, device=device)


def launch_route(logits: Tensor, bias: Tensor | None, weights: Tensor, ids: Tensor, router: Router) -> None:
    (T, E), K = logits.shape, ids.shape[1]
    config = select_configs(configs, RouteSizes(T, E, K), logits.dtype, logits.device)["route_kernel"]
    launch(
        route_kernel,
        (triton.cdiv(T, config.constexprs["BLOCK_T"]),),
        config,
        logits_ptr=logits,
        bias_ptr=bias if bias is None else bias.contiguous(),
        weights_ptr=weights,
        ids_ptr=ids,
        T=T,
        E=E,
        stride_lt=logits.stride(0),
        stride_le=logits.stride(1),
        TOP_K=K,
        ROUTER=router,
    )
