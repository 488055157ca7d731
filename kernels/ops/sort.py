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
from ..operation.cases import operation, shapes
from ..operation.checks import INT32, INTS, Within
from .tiles import power_of_2


@triton.jit
def _sort_part(ids_ptr, order_ptr, offsets_ptr, N, BLOCK_N: tl.constexpr):
    """Store this program's part of its expert's slots, in order, and the expert's end -> where the part is in `order`.

    program_id(0) is the expert, program_id(1) the part. Each program reads all ids twice: their number has no square.
    """
    expert, part = tl.program_id(0), tl.program_id(1)
    offs = tl.arange(0, BLOCK_N)
    before, own = tl.zeros((BLOCK_N,), tl.int32), tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        ids = tl.load(ids_ptr + start + offs, mask=start + offs < N, other=-1)
        before += ((ids >= 0) & (ids < expert)).to(tl.int32)
        own += (ids == expert).to(tl.int32)
    base, count = tl.sum(before, axis=0), tl.sum(own, axis=0)
    if part == 0:
        if expert == 0:
            tl.store(offsets_ptr, base)
        tl.store(offsets_ptr + expert + 1, base + count)
    share = tl.cdiv(count, tl.num_programs(1))
    begin = base + tl.minimum(part * share, count)
    end = tl.minimum(begin + share, base + count)
    for start in range(0, tl.where(begin < end, N, 0), BLOCK_N):
        ids = tl.load(ids_ptr + start + offs, mask=start + offs < N, other=-1)
        selected = (ids == expert).to(tl.int32)
        index = base + tl.cumsum(selected, axis=0) - 1
        base += tl.sum(selected, axis=0)
        tl.store(order_ptr + index, start + offs, mask=(selected != 0) & (index >= begin) & (index < end))
    return begin, end


@triton.jit(do_not_specialize=["N"])
def sort_by_expert_kernel(
    ids_ptr,  # [N]
    order_ptr,  # [N] out, int32
    offsets_ptr,  # [E + 1] out, int32
    N,
    BLOCK_N: tl.constexpr,
):
    _sort_part(ids_ptr, order_ptr, offsets_ptr, N, BLOCK_N)


@triton.jit(do_not_specialize=["N"])
def gather_by_expert_kernel(
    ids_ptr,  # [N]
    x,  # Rows [T, H]
    sorted_ptr,  # [N, H] out: a row of x for each slot, in the order of the experts
    order_ptr,  # [N] out, int32
    offsets_ptr,  # [E + 1] out, int32
    N, TOP_K,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    begin, end = _sort_part(ids_ptr, order_ptr, offsets_ptr, N, BLOCK_N)
    tl.debug_barrier()  # other threads of this program stored the order that the loop reads
    for first in range(begin, end, BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        slots = tl.load(order_ptr + rows, mask=rows < end, other=0)
        x_rows = x.ptr + (slots // TOP_K).to(tl.int64)[:, None] * x.stride
        sorted_rows = sorted_ptr + rows.to(tl.int64)[:, None] * H
        for h in range(0, H, BLOCK_H):
            offs_h = (h + tl.arange(0, BLOCK_H))[None, :]
            mask = (rows < end)[:, None] & (offs_h < H)
            tl.store(sorted_rows + offs_h, tl.load(x_rows + offs_h, mask=mask, other=0.0), mask=mask)


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
    draw=_inputs,
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


def gather_config(hidden: int) -> LaunchConfig:
    """One for any number of slots: up to 74 registers, three programs an SM; a tile of four rows spills on sm_80."""
    tiles = {"BLOCK_N": 2048, "BLOCK_S": 2, "BLOCK_H": power_of_2(hidden, low=16, high=2048)}
    return LaunchConfig(tiles, num_warps=8)


def gather_by_expert(x: Rows, ids: Tensor, experts: int, config: LaunchConfig) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, K] -> x in sorted order [N, H], and `sort_by_expert`'s order and offsets."""
    (T, K), H = ids.shape, x.ptr.shape[1]
    gathered = torch.empty((T * K, H), dtype=x.ptr.dtype, device=ids.device)
    order = torch.empty(T * K, dtype=torch.int32, device=ids.device)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    # Several, since a route may be skewed; of few slots each has 16 at least.
    parts = min(max(4, 256 // experts), triton.cdiv(T * K, 16))
    launch(
        gather_by_expert_kernel,
        (experts, parts),
        config,
        ids_ptr=ids,
        x=x,
        sorted_ptr=gathered,
        order_ptr=order,
        offsets_ptr=offsets,
        N=T * K,
        TOP_K=K,
        H=H,
    )
    return gathered, order, offsets


def expected_distinct_experts(draws: int, share: float, experts: int) -> float:
    """Return the expected number of experts that any of `draws` hits, each expert with probability `share`."""
    return experts * (1 - (1 - share) ** draws)
