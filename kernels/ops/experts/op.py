"""expert_swiglu: the sparse expert layer (Jiang et al. 2024, section 2.1), equal to `reference.expert_swiglu`.

T tokens, K experts a token, N = T * K slots (slot t*K + k), E experts, H hidden, I intermediate. PDL is set by `launch`
(pdl.py).

prefill  sort_by_expert -> up (gate and up GEMM, SwiGLU epilogue) -> down -> combine
decode   up -> down with a split reduction -> combine; each program finds the tokens of its expert

The combine of experts_add_rms_norm also adds the residual and applies the next norm. The kernels are in kernels.py,
their tiles in tiles.py.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import triton
from torch import Tensor

from ... import reference
from ...launching.arch import tma
from ...launching.kernel_args import Groups, Rows
from ...launching.launch import Configs, LaunchConfig, describe, launch, select_configs, target_arch
from ...operation.cases import Cost, draw, operation, shapes
from ...operation.checks import INTS, SlotWeights, Tokens, Within
from ...weights.composite_args import Matrix
from ...weights.formats import CODE_PRODUCTS, QUANT_NAMES, matrix_bytes, multiplies_codes
from ...weights.weight_args import Weight
from ..norm import FusedNorm, NormWeight
from ..sort import expected_distinct_experts, gather_by_expert, sample_ids, sort_by_expert
from ..tiles import power_of_2
from . import gradients, kernels
from .activations import ACTIVATION_CASES, check_activation, constants
from .tiles import ExpertSizes, configs

GateUp = Annotated[Matrix, "E 2*I H"]
Down = Annotated[Matrix, "E H I"]
Ids = Annotated[Tensor, "T K", INTS, Within(0, "E - 1")]


@dataclass(frozen=True)
class ExpertCase:
    T: int
    H: int
    I: int
    E: int
    K: int
    gate_up: str | None = None  # the name of a quantized weight's format
    down: str | None = None
    deterministic: bool = False
    narrow_weights: bool = False  # routing weights in x's dtype
    activation: str = "silu"
    distinct: float | None = None  # the number of experts in use; None: as expected under uniform routing


def draw_routes(case: ExpertCase, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    weights = draw((case.T, case.K), torch.float32, device, generator).softmax(-1)
    weights = weights.to(dtype) if case.narrow_weights else weights
    return {"ids": sample_ids(case.T, case.E, case.K, device, generator), "weights": weights}


def cost(case: ExpertCase, dtype: torch.dtype) -> Cost:
    """Count the weights of every expert in use, x and the result once; h and each slot's output, which do not fit on
    chip between launches, and codes of x and h, written once and read once."""
    T, H, I, E, K = case.T, case.H, case.I, case.E, case.K
    experts = expected_distinct_experts(T, K / E, E) if case.distinct is None else case.distinct
    gate_up = matrix_bytes(case.gate_up, 2 * I, H, dtype.itemsize)
    weights = experts * (gate_up + matrix_bytes(case.down, H, I, dtype.itemsize))
    elements = 2 * T * H + 2 * T * K * (H + I)
    up_codes, down_codes = multiplies_codes(case.gate_up), multiplies_codes(case.down)
    codes, flops = 2 * T * K * (H * up_codes + I * down_codes), 2 * T * K * H * I
    total = int(weights) + elements * dtype.itemsize + codes + 8 * T * K
    return Cost(flops=3 * flops, bytes=total, fp8_flops=(2 * up_codes + down_codes) * flops)


def cost_norm(case: ExpertCase, dtype: torch.dtype) -> Cost:
    """Count the experts' work, the residual, the sum, and the norm's weight."""
    experts, T, H = cost(case, dtype), case.T, case.H
    total = experts.bytes + (2 * T + 1) * H * dtype.itemsize
    return replace(experts, flops=experts.flops + 5 * T * H, bytes=total)


MIXTRAL: dict[str, Any] = {"H": 4096, "I": 14336, "E": 8, "K": 2}
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_DENSE_SHAPES = (
    *(ExpertCase(T, **MIXTRAL) for T in _TOKENS),
    *(ExpertCase(T, **MIXTRAL | {"H": 6144, "I": 16384}) for T in _TOKENS),
)

# Many small experts: of Qwen3-30B-A3B, OLMoE-1B-7B and DeepSeek-V3, whose offsets pass 2^31. int4 at 32 tokens, which
# are 256 slots, is not among them: on gfx90a its down kernel spills 8 bytes.
QWEN3: dict[str, Any] = {"H": 2048, "I": 768, "E": 128, "K": 8}
_MANY_EXPERTS = (
    *(ExpertCase(T, **QWEN3) for T in (1, 8, 32, 64, 4096)),
    *shapes(ExpertCase, "1 2048 768 128 8", narrow_weights=True),
    *(ExpertCase(T, **QWEN3, gate_up="int4:128", down="int4:128") for T in (1, 8, 64)),
    *shapes(ExpertCase, "64 2048 1024 64 8, 64 7168 2048 256 8"),
)


@operation(
    reference=reference.expert_swiglu,
    case=ExpertCase,
    draw=draw_routes,
    count=cost,
    test_shapes=(
        *shapes(ExpertCase, "1 128 256 8 2, 7 80 96 4 1, 33 72 100 8 3, 65 128 256 8 2, 130 90 70 4 2, 200 64 48 2 2"),
        *shapes(ExpertCase, "3 128 96 4 2", gate_up="int4:128", down="int4:32"),
        *shapes(ExpertCase, "70 96 64 4 2, 150 96 64 4 2", gate_up="int8", down="fp8"),
        # More rows of an expert than a tile of few tokens has.
        *shapes(ExpertCase, "128 128 96 2 1", gate_up="int4:128", down="int8"),
        *shapes(ExpertCase, "3 128 100 4 2, 70 100 64 4 2, 300 72 40 2 2", gate_up=CODE_PRODUCTS, down=CODE_PRODUCTS),
        *shapes(ExpertCase, "20 72 96 4 2", gate_up=CODE_PRODUCTS, down="int8"),
        # Many experts, and more slots than 64 tokens of Mixtral have.
        *shapes(ExpertCase, "24 64 32 32 8, 70 64 32 40 8"),
        *shapes(ExpertCase, "20 64 32 12 8", gate_up="int4:32", down="int4:32"),
        *shapes(ExpertCase, "5 64 32 8 2", narrow_weights=True),
        *(ExpertCase(T, 90, 70, 4, 2, activation=name) for T in (7, 130) for name in ACTIVATION_CASES),
    ),
    bench_shapes=(
        *_DENSE_SHAPES,
        *_MANY_EXPERTS,
        *(ExpertCase(T, **MIXTRAL, gate_up=name, down=name) for T in (1, 128, 4096) for name in QUANT_NAMES),
        *(ExpertCase(T, **MIXTRAL, gate_up=CODE_PRODUCTS, down=CODE_PRODUCTS) for T in (128, 4096)),
        *(ExpertCase(T, **MIXTRAL, activation=name) for T in (1, 4096) for name in ACTIVATION_CASES),
    ),
    rule=check_activation,
    gradients=(gradients.backward, gradients.save_inputs),
)
def expert_swiglu(
    x: Tokens,
    gate_up_proj: GateUp,
    down_proj: Down,
    ids: Ids,
    weights: SlotWeights,
    activation: str = "silu",
    deterministic: bool = False,
) -> Tokens:
    """Sum each token's experts, down(silu(gate(x)) * up(x)), with its routing weights (Shazeer 2020; Jiang et al. 2024,
    section 2.1).

    x              [T, H], fp32, bf16 or fp16
    gate_up_proj   [E, 2I, H] in x's dtype, the I rows of the gate first; or a QuantizedWeight of that shape, of which
                   one format quantizes x (fp8.py)
    down_proj      [E, H, I], the same
    ids            [T, K], int32 or int64, in 0..E - 1
    weights        [T, K], the routing weights, in fp32 or x's dtype
    activation     "silu", "gelu_tanh", "clamped_silu:LIMIT" or "clamped_swish:ALPHA:LIMIT": of gate and up
                   (activations.py)
    deterministic  a token's bits do not depend on the other tokens: the prefill kernels, one tile for any T

    Returns [T, H] in x's dtype. Only chosen experts are read. Raises ValueError for another shape, dtype or device. An
    id out of range contributes nothing; on a CPU it is a ValueError.

    >>> x, gate_up_proj, down_proj = torch.randn(3, 64), torch.randn(8, 64, 64), torch.randn(8, 64, 32)
    >>> weights, ids = ops.route(torch.randn(3, 8), top_k=2)
    >>> out = ops.expert_swiglu(x, gate_up_proj, down_proj, ids, weights)
    """
    return _experts(x, gate_up_proj, down_proj, ids, weights, activation, deterministic)


@operation(
    reference=reference.experts_add_rms_norm,
    case=ExpertCase,
    draw=draw_routes,
    count=cost_norm,
    test_shapes=shapes(ExpertCase, "1 128 256 8 2, 7 80 96 4 1, 33 72 100 8 3, 130 90 70 4 2"),
    bench_shapes=tuple(case for case in _DENSE_SHAPES if case.T in (1, 64, 4096)),
    rule=check_activation,
)
def experts_add_rms_norm(
    x: Tokens,
    gate_up_proj: GateUp,
    down_proj: Down,
    ids: Ids,
    weights: SlotWeights,
    residual: Tokens,
    norm_weight: NormWeight,
    eps: float,
    activation: str = "silu",
    deterministic: bool = False,
) -> tuple[Tokens, Tokens]:
    """`expert_swiglu`, the residual added, and the next layer's `rms_norm` of the sum, in the combine's launch.

    x, gate_up_proj, down_proj, ids, weights  as in `expert_swiglu`, and activation, deterministic
    residual                                  [T, H] in x's dtype
    norm_weight                               [H] in x's dtype; eps above 0

    Returns the norm y and the sum [T, H]. Raises ValueError for another shape, dtype or device.

    >>> x, gate_up_proj, down_proj = torch.randn(3, 64), torch.randn(8, 64, 64), torch.randn(8, 64, 32)
    >>> weights, ids = ops.route(torch.randn(3, 8), top_k=2)
    >>> y, total = ops.experts_add_rms_norm(x, gate_up_proj, down_proj, ids, weights, x, torch.ones(64), 1e-5)
    """
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm = FusedNorm.of(residual, norm_weight, total, eps)
    return _experts(x, gate_up_proj, down_proj, ids, weights, activation, deterministic, norm), total


def _experts(
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    ids: Tensor,
    weights: Tensor,
    activation: str,
    deterministic: bool,
    norm: FusedNorm | None = None,
) -> Tensor:
    T, H = x.shape
    E, _, I = down.shape
    rows, ids, projections = Rows.of(x), ids.contiguous(), (Weight.of(gate_up), Weight.of(down))
    arch = target_arch(x.device)
    sizes = ExpertSizes(
        T=T,
        H=H,
        I=I,
        E=E,
        K=ids.shape[1],
        gate_up=projections[0].name,
        down=projections[1].name,
        by_pointers=not all(weight.takes_tma(arch) for weight in projections if weight.multiplied_as_stored),
        deterministic=deterministic,
        norm=norm is not None,
    )
    selected = select_configs(configs, sizes, x.dtype, x.device)
    decode = "experts_up_decode_kernel" in selected
    y = (_launch_decode if decode else _launch_prefill)(rows, *projections, ids, sizes, selected, activation)
    out = torch.empty((T, H), dtype=x.dtype, device=x.device)
    combine(y, ids, weights, out, E, selected, y.shape[0], norm)
    return out


def combine(
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    out: Tensor,
    E: int,
    selected: Configs,
    splits: int = 1,
    norm: FusedNorm | None = None,
) -> None:
    """Sum the rows of each token's slots, y [splits, N, H], with its routing weights to `out` [T, H]."""
    (T, H), K = out.shape, ids.shape[1]
    config = selected["experts_combine_kernel"]
    launch(
        kernels.experts_combine_kernel,
        (T, triton.cdiv(H, config.constexprs["BLOCK_H"])),
        config,
        y_ptr=y,
        ids_ptr=ids,
        weights_ptr=weights.contiguous(),
        out_ptr=out,
        norm=norm,
        N=T * K,
        E=E,
        H=H,
        TOP_K=K,
        SPLIT_K=splits,
    )


def _launch_decode(
    x: Rows, gate_up: Weight, down: Weight, ids: Tensor, sizes: ExpertSizes, selected: Configs, activation: str
) -> Tensor:
    """Return partial sums fp32 [SPLIT_K, N, H]."""
    H, I, E, N = sizes.H, sizes.I, sizes.E, ids.numel()
    arch, programs = target_arch(ids.device), min(N, E)
    h = torch.empty((N, I), dtype=x.ptr.dtype, device=ids.device)
    config = selected["experts_up_decode_kernel"]
    launch(
        kernels.experts_up_decode_kernel,
        (triton.cdiv(I, config.constexprs["BLOCK_N"]), programs),
        config,
        x=x,
        gate_up=gate_up.args,
        ids_ptr=ids,
        h_ptr=h,
        N=N,
        E=E,
        TOP_K=sizes.K,
        H=H,
        I=I,
        LAYOUT=gate_up.layout(arch),
        **constants(activation),
        BY_SLOT=N < E,
    )
    config = selected["experts_down_decode_kernel"]
    splits = config.constexprs["SPLIT_K"]
    y = torch.empty((splits, N, H), dtype=torch.float32, device=ids.device)
    grid = (triton.cdiv(H, config.constexprs["BLOCK_N"]), programs, splits)
    launch(
        kernels.experts_down_decode_kernel,
        grid,
        config,
        h_ptr=h,
        down=down.args,
        ids_ptr=ids,
        y_ptr=y,
        N=N,
        E=E,
        H=H,
        I=I,
        LAYOUT=down.layout(arch),
        BY_SLOT=N < E,
        PREFETCH=down.prefetch_bytes(I // splits, config, grid, arch),
    )
    return y


def _launch_prefill(
    x: Rows, gate_up: Weight, down: Weight, ids: Tensor, sizes: ExpertSizes, selected: Configs, activation: str
) -> Tensor:
    """Return each slot's expert output [1, N, H]."""
    H, I, E, N = sizes.H, sizes.I, sizes.E, ids.numel()
    arch = target_arch(ids.device)
    h = torch.empty((N, I), dtype=x.ptr.dtype, device=ids.device)
    gather = selected.get("gather_by_expert_kernel")
    in_order = gather is not None
    if gather is not None:
        gathered, order, offsets = gather_by_expert(x, ids, E, gather)
        x = Rows.of(gathered)
    else:
        order, offsets = sort_by_expert.op.run(ids, E)
    groups = Groups(order, offsets, E)
    if gate_up.multiplies_codes:
        in_order = tma(arch)  # pointers find a token's codes, which are written once
        x = gate_up.rows_of(x, *((groups, sizes.K) if in_order else ()))
    config = selected["experts_up_kernel"]
    x_desc, short_desc = row_descriptors(x.ptr if in_order else None, config, arch)
    launch(
        kernels.experts_up_kernel,
        prefill_grid(N, E, I, config),
        config,
        x=x,
        x_desc=x_desc,
        short_desc=short_desc,
        gate_up=gate_up.args_for_many_rows,
        gate_up_desc=gate_up.descriptor(2, config, arch),
        h_ptr=h,
        groups=groups,
        TOP_K=sizes.K,
        H=x.ptr.shape[1],
        I=I,
        LAYOUT=gate_up.layout(arch),
        **constants(activation),
        BLOCK_E=power_of_2(E),
    )
    y = torch.empty((1, N, H), dtype=h.dtype, device=ids.device)
    # A row's scale needs all of its columns, and a program of the up kernel has BLOCK_N: a pass reads h and writes its
    # codes, 3 bytes an element of 16 bits, where reading h itself would take 2 for each column tile.
    launch_down(down.rows_of(Rows.of(h), groups), down, y, groups, selected)
    return y


def launch_down(h: Rows, down: Weight, y: Tensor, groups: Groups, selected: Configs) -> None:
    """Multiply rows h [N, I], in sorted order, by a weight [E, H, I] -> y [(1,) N, H], by slot; sorted where `groups`
    has no order."""
    config, arch, (N, H) = selected["experts_down_kernel"], target_arch(y.device), y.shape[-2:]
    # With several products a unit, TMA of h takes more instructions than pointers: int4 1,990 FLOP each, and not 2,400.
    h_desc, short_desc = row_descriptors(h.ptr if down.multiplied_as_stored else None, config, arch)
    launch(
        kernels.experts_down_kernel,
        prefill_grid(N, groups.E, H, config),
        config,
        h=h,
        h_desc=h_desc,
        short_desc=short_desc,
        down=down.args_for_many_rows,
        down_desc=down.descriptor(1, config, arch),
        y_ptr=y,
        groups=groups,
        H=H,
        I=h.ptr.shape[1],
        LAYOUT=down.layout(arch),
        BLOCK_E=power_of_2(groups.E),
    )


def prefill_grid(N: int, E: int, columns: int, config: LaunchConfig) -> tuple[int]:
    """Return a sufficient grid: each group wastes less than one row tile. Surplus programs exit at once."""
    row_tiles = triton.cdiv(N, config.constexprs["BLOCK_M"]) + E - 1 if N else 0
    return (row_tiles * triton.cdiv(columns, config.constexprs["BLOCK_N"]),)


def row_descriptors(rows: Tensor | None, config: LaunchConfig, arch: str) -> tuple[Any, Any]:
    """Return descriptors of rows in sorted order, for a full and for a short row tile; None: pointers read."""
    if rows is None:
        return None, None
    m, short_m, k = (config.constexprs[constant] for constant in ("BLOCK_M", "SHORT_M", "BLOCK_K"))
    full = describe(rows, (kernels.main_rows(m, short_m), k), arch)
    return full, describe(rows, (short_m, k), arch) if short_m else None
