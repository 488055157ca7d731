"""sort_by_expert: a stable counting sort on the device, without atomics or host synchronization.

N = T * K slots (slot t*K + k is token t's k-th choice), E experts
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..launching.kernel_args import Rows
from ..launching.launch import LaunchConfig, launch, select_configs
from ..operation.call import operation
from ..operation.checks import INT32, INTS, Within
from ..operation.inputs import shapes
from .tiles import power_of_2


@triton.jit(do_not_specialize=["N"])
def sort_by_expert_kernel(
    ids_ptr,  # [N]
    order_ptr,  # [N] out, int32
    offsets_ptr,  # [E + 1] out, int32
    N,
    BLOCK_N: tl.constexpr,
):
    # One program an expert counts the slots of lower experts, then places its own in order.
    expert = tl.program_id(0)
    offs = tl.arange(0, BLOCK_N)
    before = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        ids = tl.load(ids_ptr + start + offs, mask=start + offs < N, other=-1)
        before += ((ids >= 0) & (ids < expert)).to(tl.int32)
    base = tl.sum(before, axis=0)
    if expert == 0:
        tl.store(offsets_ptr, base)
    for start in range(0, N, BLOCK_N):
        ids = tl.load(ids_ptr + start + offs, mask=start + offs < N, other=-1)
        selected = (ids == expert).to(tl.int32)
        index = base + tl.cumsum(selected, axis=0) - 1
        tl.store(order_ptr + index, start + offs, mask=selected != 0)
        base += tl.sum(selected, axis=0)
    tl.store(offsets_ptr + expert + 1, base)


@triton.jit(do_not_specialize=["N"])
def gather_by_expert_kernel(
    ids_ptr,  # [N]
    x,  # Rows [T, H]
    sorted_ptr,  # [N, H] out: a row of x for each slot, in the order of the experts
    order_ptr,  # [N] out, int32
    offsets_ptr,  # [E + 1] out, int32
    N, E, TOP_K,
    H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # A program has BLOCK_S slots: it counts those before each of them, places its own, and copies their rows. No scan:
    # where several lanes hold a row, Triton 3.6 sums the wrong ones.
    first = tl.program_id(0) * BLOCK_S
    offs_e = tl.arange(0, BLOCK_E)
    total = 0
    lower, before = tl.zeros((BLOCK_E,), tl.int32), tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, N, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        ids = _load_experts(ids_ptr, slots, N, E)
        total += tl.sum((ids < E).to(tl.int32), axis=0)
        lower += tl.sum((ids[:, None] < offs_e[None, :]).to(tl.int32), axis=0)
        before += tl.sum(((ids[:, None] == offs_e[None, :]) & (slots < first)[:, None]).to(tl.int32), axis=0)
    if first == 0:
        tl.store(offsets_ptr + offs_e, lower, mask=offs_e < E)
        tl.store(offsets_ptr + E, total)
    slots = first + tl.arange(0, BLOCK_S)
    ids = _load_experts(ids_ptr, slots, N, E)
    earlier = (ids[:, None] == ids[None, :]) & (slots[:, None] > slots[None, :])
    base = tl.sum(tl.where(ids[:, None] == offs_e[None, :], (lower + before)[None, :], 0), axis=1)
    index = base + tl.sum(earlier.to(tl.int32), axis=1)
    inside = ids < E
    tl.store(order_ptr + index, slots, mask=inside)
    x_rows = x.ptr + (slots // TOP_K).to(tl.int64)[:, None] * x.stride
    sorted_rows = sorted_ptr + index.to(tl.int64)[:, None] * H
    for h in range(0, H, BLOCK_H):
        offs_h = (h + tl.arange(0, BLOCK_H))[None, :]
        mask = inside[:, None] & (offs_h < H)
        tl.store(sorted_rows + offs_h, tl.load(x_rows + offs_h, mask=mask, other=0.0), mask=mask)


@triton.jit
def _load_experts(ids_ptr, slots, N, E):
    """Load the expert ids of slots; an id out of range, or beyond N, becomes larger than any."""
    ids = tl.load(ids_ptr + slots, mask=slots < N, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, 1 << 30)


@dataclass(frozen=True)
class SortSizes:
    T: int
    E: int
    K: int


def configs(sizes: SortSizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    """Two block sizes, not one for every power of two: each compiles a kernel, and prompts have all lengths."""
    block = 1024 if sizes.T * sizes.K <= 1024 else 4096
    return {"sort_by_expert_kernel": LaunchConfig({"BLOCK_N": block}, num_warps=power_of_2(block // 256, high=16))}


def sample_ids(T: int, E: int, K: int, device: Any, generator: Any = None) -> Tensor:
    """Draw distinct experts for each token, int32 [T,K]."""
    if torch.device(device).type == "meta":
        return torch.empty((T, K), dtype=torch.int32, device=device)
    scores = torch.rand((T, E), generator=generator)
    return scores.argsort(dim=-1)[:, :K].to(device=device, dtype=torch.int32)


def _inputs(case: SortSizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    return {"ids": sample_ids(case.T, case.E, case.K, device, generator).to(dtype)}


@operation(
    reference=reference.sort_by_expert,
    case=SortSizes,
    inputs=_inputs,
    test_shapes=shapes(SortSizes, "1 8 2, 77 8 2, 40 4 1, 3000 8 2, 9 64 6, 5 1 1, 150 256 8"),
    bench_shapes=shapes(SortSizes, "128 8 2, 1024 8 2, 8192 8 2, 4096 256 8"),
    dtypes=INTS,
)
def sort_by_expert(
    ids: Annotated[Tensor, "T K", INTS, Within(0, "E - 1")], num_experts: Annotated[int, "E", Within(1, 1 << 16)]
) -> tuple[Annotated[Tensor, "T*K", INT32], Annotated[Tensor, "E+1", INT32]]:
    """Sort slots t*K + k by expert: a stable counting sort.

    ids          [T, K], int32 or int64, in 0..E - 1
    num_experts  E

    Returns order int32 [T*K], the slots expert by expert, and offsets int32 [E+1]: expert e's slots are
    order[offsets[e] : offsets[e + 1]]. Raises ValueError for another shape or dtype. An id out of range is dropped; on
    a CPU it is a ValueError.

    >>> order, offsets = ops.sort_by_expert(torch.tensor([[1, 0], [2, 1]]), num_experts=3)
    >>> order.tolist(), offsets.tolist()
    ([1, 0, 3, 2], [0, 1, 3, 4])
    """
    T, K = ids.shape
    order = torch.empty(T * K, dtype=torch.int32, device=ids.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    selected = select_configs(configs, SortSizes(T, num_experts, K), ids.dtype, ids.device)
    launch(
        sort_by_expert_kernel,
        (num_experts,),
        selected["sort_by_expert_kernel"],
        ids_ptr=ids.contiguous(),
        order_ptr=order,
        offsets_ptr=offsets,
        N=T * K,
    )
    return order, offsets


def gather_config(slots: int, experts: int, hidden: int) -> LaunchConfig:
    """About 256 programs; each holds a block of ids times all experts in registers."""
    block_e = power_of_2(experts)
    tiles = {"BLOCK_S": power_of_2(slots // 256, low=16, high=64), "BLOCK_E": block_e}
    tiles |= {"BLOCK_N": max(16, min(2048, 16384 // block_e))}
    return LaunchConfig(tiles | {"BLOCK_H": power_of_2(hidden, low=16, high=256)}, num_warps=8)


def gather_by_expert(x: Rows, ids: Tensor, experts: int, config: LaunchConfig) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, K] -> x in sorted order [N, H], and `sort_by_expert`'s order and offsets."""
    (T, K), H = ids.shape, x.ptr.shape[1]
    gathered = torch.empty((T * K, H), dtype=x.ptr.dtype, device=ids.device)
    order = torch.empty(T * K, dtype=torch.int32, device=ids.device)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    launch(
        gather_by_expert_kernel,
        (triton.cdiv(T * K, config.constexprs["BLOCK_S"]),),
        config,
        ids_ptr=ids,
        x=x,
        sorted_ptr=gathered,
        order_ptr=order,
        offsets_ptr=offsets,
        N=T * K,
        E=experts,
        TOP_K=K,
        H=H,
    )
    return gathered, order, offsets


def expected_distinct_experts(draws: int, share: float, experts: int) -> float:
    """Return the expected number of experts that any of `draws` hits, each expert with probability `share`."""
    return experts * (1 - (1 - share) ** draws)
