"""expert_swiglu_backward: gradients of `expert_swiglu` around frozen experts, equal to
`reference.expert_swiglu_backward`.

T tokens, K experts a token, N = T * K slots (slot t*K + k), E experts, H hidden, I intermediate

sort, rows of x -> gate and up again -> rows of grad -> grad of h -> the activation's derivative -> grad of x by slot
-> combine

All but the combine compute gradients for routing weights of 1: the combine multiplies by the weights in fp32. The
kernels are in backward_kernels.py, and what the forward has, in kernels.py; their tiles in backward_tiles.py.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from ... import reference
from ...launching.arch import tma
from ...launching.kernel_args import Groups, Rows
from ...launching.launch import Configs, describe, launch, select_configs, target_arch
from ...operation.cases import Cost, operation, shapes
from ...operation.checks import FP32, SlotWeights, Tokens
from ...weights.formats import QUANT_NAMES, matrix_bytes, without_code_products
from ...weights.weight_args import Weight
from ..sort import expected_distinct_experts, gather_by_expert
from ..tiles import power_of_2
from . import backward_kernels
from .activations import ACTIVATION_CASES, check_activation, constants
from .backward_tiles import configs
from .op import (
    MIXTRAL,
    QWEN3,
    Down,
    ExpertCase,
    GateUp,
    Ids,
    combine,
    draw_routes,
    launch_down,
    prefill_grid,
    row_descriptors,
)
from .tiles import ExpertSizes


def cost(case: ExpertCase, dtype: torch.dtype) -> Cost:
    """Count gate_up twice and down once, of every expert in use; x, grad and the result once; and each slot's gate, up,
    their gradients, that of h and that of x, which do not fit on chip between launches, written once and read once."""
    T, H, I, E, K = case.T, case.H, case.I, case.E, case.K
    experts = expected_distinct_experts(T, K / E, E) if case.distinct is None else case.distinct
    gate_up, down = matrix_bytes(case.gate_up, 2 * I, H, dtype.itemsize), matrix_bytes(case.down, H, I, dtype.itemsize)
    elements = 3 * T * H + 2 * T * K * (5 * I + H)
    return Cost(10 * T * K * H * I, int(experts * (2 * gate_up + down)) + elements * dtype.itemsize + 12 * T * K)


@operation(
    reference=reference.expert_swiglu_backward,
    case=ExpertCase,
    draw=draw_routes,
    count=cost,
    test_shapes=(
        *shapes(ExpertCase, "1 128 256 8 2, 7 80 96 4 1, 33 72 40 8 3, 130 90 70 4 2, 24 64 32 32 8"),
        *(ExpertCase(20, 128, 256, 4, 2, gate_up=name, down=name) for name in QUANT_NAMES),
        *(ExpertCase(9, 96, 64, 4, 2, gate_up=name) for name in QUANT_NAMES[1:]),
        *(ExpertCase(33, 72, 40, 4, 2, activation=name) for name in ACTIVATION_CASES),
    ),
    bench_shapes=tuple(
        ExpertCase(T, **sizes, gate_up=name, down=name)
        for sizes in (MIXTRAL, QWEN3)
        for name in (None, *QUANT_NAMES)
        for T in (128, 4096)
    )
    + tuple(ExpertCase(128, **MIXTRAL, activation=name) for name in ACTIVATION_CASES),
    rule=check_activation,
)
def expert_swiglu_backward(
    grad: Tokens,
    x: Tokens,
    gate_up_proj: GateUp,
    down_proj: Down,
    ids: Ids,
    weights: SlotWeights,
    activation: str = "silu",
) -> tuple[Tokens, Annotated[Tensor, "T K", FP32]]:
    """Compute the gradients of `expert_swiglu` in x and in the routing weights, around frozen experts.

    grad           [T, H] in x's dtype: the gradient of the result
    x              [T, H], fp32, bf16 or fp16
    gate_up_proj   [E, 2I, H] in x's dtype, the I rows of the gate first; or a QuantizedWeight of that shape
    down_proj      [E, H, I], the same
    ids            [T, K], int32 or int64, in 0..E - 1
    weights        [T, K] in fp32 or x's dtype, the routing weights
    activation     as in `expert_swiglu`

    Returns the gradients of x [T, H] in its dtype and of weights, fp32 [T, K]. Gate and up are computed again. A code
    is read once for each tile of rows, and neither dense experts nor sums in another order arise: the same call has the
    same bits. Raises ValueError for another shape, dtype or device. An id out of range contributes nothing, and its
    weight has the gradient 0; on a CPU it is a ValueError.

    >>> x, gate_up_proj, down_proj = torch.randn(3, 64), torch.randn(8, 64, 64), torch.randn(8, 64, 32)
    >>> weights, ids = ops.route(torch.randn(3, 8), top_k=2)
    >>> grad_x, grad_weights = ops.expert_swiglu_backward(torch.ones(3, 64), x, gate_up_proj, down_proj, ids, weights)
    """
    (T, H), (E, _, I), (_, K) = x.shape, down_proj.shape, ids.shape
    gate_up, down = (Weight.of(without_code_products(weight)) for weight in (gate_up_proj, down_proj))
    arch, size, ids = target_arch(x.device), x.dtype.itemsize, ids.contiguous()
    by_tma = all(weight.takes_tma(arch) for weight in (gate_up, down) if weight.multiplied_as_stored)
    by_tma = by_tma and H * size % 16 == 0 and 2 * I * size % 16 == 0
    sizes = ExpertSizes(T, H, I, E, K, gate_up.name, down.name, not by_tma, deterministic=False, norm=False)
    selected = select_configs(configs, sizes, x.dtype, x.device)
    gather = selected["gather_by_expert_kernel"]
    rows = torch.empty((T * K, H), dtype=x.dtype, device=x.device)  # of x, then of grad, then of each slot's grad of x
    groups = Groups(*gather_by_expert(Rows.of(x), ids, E, gather, rows)[1:], E)
    both = torch.empty((T * K, 2 * I), dtype=x.dtype, device=x.device)  # gate and up, then their gradients
    launch_down(Rows.of(rows), gate_up, both, groups._replace(order=None), selected)
    gather_by_expert(Rows.of(grad), ids, E, gather, rows)
    grad_h = torch.empty((T * K, I), dtype=x.dtype, device=x.device)
    launch_transposed(backward_kernels.experts_grad_h_kernel, rows, down, grad_h, groups, sizes, selected)
    grad_weights = torch.empty((T, K), dtype=torch.float32, device=x.device)
    launch(
        backward_kernels.swiglu_backward_kernel,
        (T * K,),
        selected["swiglu_backward_kernel"],
        gate_up_ptr=both,
        grad_h_ptr=grad_h,
        ids_ptr=ids,
        grad_weights_ptr=grad_weights,
        groups=groups,
        I=I,
        **constants(activation),
    )
    launch_transposed(backward_kernels.experts_grad_x_kernel, both, gate_up, rows, groups, sizes, selected)
    grad_x = torch.empty((T, H), dtype=x.dtype, device=x.device)
    combine(rows, ids, weights, grad_x, E, selected)
    return grad_x, grad_weights


def launch_transposed(
    kernel: Any, x: Tensor, weight: Weight, out: Tensor, groups: Groups, sizes: ExpertSizes, selected: Configs
) -> None:
    """Multiply x [N, depth], in sorted order, by a weight [E, depth, columns] -> out [N, columns]."""
    config, arch = selected[kernel.__name__], target_arch(x.device)
    x_desc, short_desc, weight_desc = None, None, None
    if tma(arch) and not sizes.by_pointers and weight.multiplied_as_stored:
        n, k = (config.constexprs[constant] for constant in ("BLOCK_N", "BLOCK_K"))
        (x_desc, short_desc), weight_desc = row_descriptors(x, config, arch), describe(weight.data, (1, k, n), arch)
    launch(
        kernel,
        prefill_grid(len(x), sizes.E, out.shape[1], config),
        config,
        x_ptr=x,
        x_desc=x_desc,
        short_desc=short_desc,
        weight=weight.args_for_many_rows,
        weight_desc=weight_desc,
        out_ptr=out,
        groups=groups,
        H=sizes.H,
        I=sizes.I,
        LAYOUT=weight.layout(arch),
        BLOCK_E=power_of_2(sizes.E),
    )
