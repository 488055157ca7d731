"""expert_swiglu: the sparse expert layer (Jiang et al. 2024, section 2.1), equal to `reference.expert_swiglu`.

T tokens, K experts a token, N = T * K slots (slot t*K + k), E experts, H hidden, I intermediate

prefill  sort_by_expert -> up (gate and up GEMM, SwiGLU epilogue) -> down -> combine
decode   up -> down with a split reduction -> combine; each program finds the tokens of its expert

The combine of experts_add_rms_norm also adds the residual and applies the next norm. The kernels are in kernels.py,
their tiles in tiles.py.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import triton
from torch import Tensor

from .. import reference
from ..checks import INTS, SINGLE, Matrix, Within
from ..dispatch import expected_distinct_experts, gather_by_expert, sample_ids, sort_by_expert
from ..launch import Configs, describe, launch, select_configs, target_arch
from ..op import Cost, Op, Shape, Sizes, dense_rows, power_of_2, random_inputs, sampler, shape_grid, shapes, switch
from ..quantized import QUANT_NAMES, weight_bytes
from ..weight import Weight
from . import kernels
from .tiles import DECODE_TOKENS, configs

Tokens = Annotated[Tensor, "T H"]
GateUp = Annotated[Matrix, "E 2*I H"]
Down = Annotated[Matrix, "E H I"]
Ids = Annotated[Tensor, "T K", INTS, Within(0, "E - 1")]
Scores = Annotated[Tensor, "T K", SINGLE]


def expert_swiglu(
    x: Tokens, gate_up_proj: GateUp, down_proj: Down, ids: Ids, weights: Scores, deterministic: bool = False
) -> Tokens:
    """Sum each token's experts with its routing weights (`reference.expert_swiglu`).

    An id out of range (a ValueError on a CPU) contributes nothing. `deterministic`: a token's bits do not depend on the
    other tokens (the prefill kernels, one tile for any T).
    """
    return _experts(x, gate_up_proj, down_proj, ids, weights, deterministic)[0]


def experts_add_rms_norm(
    x: Tokens,
    gate_up_proj: GateUp,
    down_proj: Down,
    ids: Ids,
    weights: Scores,
    residual: Tokens,
    norm_weight: Annotated[Tensor, "H"],
    eps: float,
    deterministic: bool = False,
) -> tuple[Tokens, Tokens]:
    """Norm y of residual + `expert_swiglu` -> y, the sum."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm = {"residual_ptr": dense_rows(residual), "norm_ptr": norm_weight.contiguous(), "total_ptr": total, "eps": eps}
    return _experts(x, gate_up_proj, down_proj, ids, weights, deterministic, **norm)


def _experts(
    x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, deterministic: bool, **norm: Any
) -> tuple[Tensor, Any]:
    """Return the output and None, or with the arguments of a norm the norm and the sum that it normalized."""
    T, H = x.shape
    E, _, I = down.shape
    x, ids, projections = dense_rows(x), ids.contiguous(), (Weight.of(gate_up), Weight.of(down))
    arch = target_arch(x.device)
    sizes = {"T": T, "H": H, "I": I, "E": E, "K": ids.shape[1], "deterministic": deterministic, "norm": bool(norm)}
    sizes |= {"gate_up": projections[0].name, "down": projections[1].name}
    sizes["by_pointers"] = not all(weight.takes_tma(arch) for weight in projections if not weight.name)
    selected = select_configs(configs, sizes, x.dtype, x.device)
    decode = T <= DECODE_TOKENS and not deterministic
    y = (_decode if decode else _prefill)(x, *projections, ids, sizes, selected)
    out = torch.empty((T, H), dtype=x.dtype, device=x.device)
    norm = norm or {"residual_ptr": None, "norm_ptr": None, "total_ptr": None, "eps": 0.0}
    residual, total = norm["residual_ptr"], norm["total_ptr"]
    args = {"y_ptr": y, "ids_ptr": ids, "weights_ptr": weights.contiguous(), "out_ptr": out, **norm}
    args |= {"N": ids.numel(), "E": E, "H": H, "stride_rt": 0 if residual is None else residual.stride(0)}
    combine = selected["experts_combine_kernel"]
    grid = (T, triton.cdiv(H, combine.constexprs["BLOCK_H"]))
    launch(kernels.experts_combine_kernel, grid, args, combine, TOP_K=sizes["K"], SPLIT_K=y.shape[0])
    return out, total


def _decode(x: Tensor, gate_up: Weight, down: Weight, ids: Tensor, sizes: Sizes, selected: Configs) -> Tensor:
    """Return partial sums fp32 [SPLIT_K, N, H]."""
    H, I, E, N = sizes["H"], sizes["I"], sizes["E"], ids.numel()
    up, split = selected["experts_up_decode_kernel"], selected["experts_down_decode_kernel"]
    h = torch.empty((N, I), dtype=x.dtype, device=x.device)
    args = {"x_ptr": x, "gate_up_ptr": gate_up.data, "ids_ptr": ids, "h_ptr": h, "N": N, "E": E, "TOP_K": sizes["K"]}
    args |= {"stride_xt": x.stride(0), **gate_up.args}
    constexprs, arch = {"H": H, "I": I, "BY_SLOT": N < E}, target_arch(x.device)
    grid = (triton.cdiv(I, up.constexprs["BLOCK_N"]), min(N, E))
    launch(kernels.experts_up_decode_kernel, grid, args, up, **constexprs, LAYOUT=gate_up.layout(arch))
    splits = split.constexprs["SPLIT_K"]
    y = torch.empty((splits, N, H), dtype=torch.float32, device=x.device)
    args = {"h_ptr": h, "down_ptr": down.data, "ids_ptr": ids, "y_ptr": y, "N": N, "E": E, **down.args}
    split_grid = (triton.cdiv(H, split.constexprs["BLOCK_N"]), min(N, E), splits)
    launch(kernels.experts_down_decode_kernel, split_grid, args, split, **constexprs, LAYOUT=down.layout(arch))
    return y


def _prefill(x: Tensor, gate_up: Weight, down: Weight, ids: Tensor, sizes: Sizes, selected: Configs) -> Tensor:
    """Return each slot's expert output [1, N, H]."""
    H, I, E, N = sizes["H"], sizes["I"], sizes["E"], ids.numel()
    arch = target_arch(x.device)
    if gather := selected.get("gather_by_expert_kernel"):
        x, order, offsets = gather_by_expert(x, ids, E, gather)
    else:
        order, offsets = sort_by_expert(ids, E)
    h = torch.empty((N, I), dtype=x.dtype, device=x.device)
    y = torch.empty((1, N, H), dtype=x.dtype, device=x.device)

    def run(
        kernel: Any, columns: int, rows: tuple[str, Tensor, bool], weight: tuple[str, Weight, int], **args: Any
    ) -> None:
        """`rows`: name, tensor, whether it is in sorted order; `weight`: name, weight, parts of its descriptor."""
        (x_name, x, in_order), (w_name, w, parts), config = rows, weight, selected[kernel.__name__]
        m, n, k, short_m = (config.constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SHORT_M"))
        args |= {f"{x_name}_ptr": x, f"{x_name}_desc": None, "short_desc": None}
        if in_order:
            args[f"{x_name}_desc"] = describe(x, (kernels.main_rows(m, short_m), k), arch)
            args["short_desc"] = describe(x, (short_m, k), arch) if short_m else None
        args |= {f"{w_name}_ptr": w.staged(), f"{w_name}_desc": w.descriptor(parts, n, k, arch), **w.args}
        # Each group wastes less than one row tile, so these suffice; surplus programs exit at once.
        row_tiles = triton.cdiv(N, m) + E - 1 if N else 0
        args |= {"order_ptr": order, "offsets_ptr": offsets, "E": E}
        constants = {"H": H, "I": I, "BLOCK_E": power_of_2(E), "LAYOUT": w.layout(arch)}
        launch(kernel, (row_tiles * triton.cdiv(columns, n),), args, config, **constants)

    up_args = {"h_ptr": h, "TOP_K": sizes["K"], "stride_xt": x.stride(0)}
    run(kernels.experts_up_kernel, I, ("x", x, gather is not None), ("gate_up", gate_up, 2), **up_args)
    run(kernels.experts_down_kernel, H, ("h", h, True), ("down", down, 1), y_ptr=y)
    return y


def _inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any) -> dict[str, Any]:
    weights = sampler(torch.float32, device, generator)(sizes["T"], sizes["K"]).softmax(-1)
    return {"ids": sample_ids(sizes, device, generator), "weights": weights}


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Count the weights of every expert in use, x and the result once; h and each slot's output, which do not fit on
    chip between launches, written once and read once.

    `sizes["distinct"]`: the number of experts in use; by default the expectation under uniform routing.
    """
    T, H, I, E, K = (sizes[letter] for letter in ("T", "H", "I", "E", "K"))
    experts = sizes.get("distinct", expected_distinct_experts(T, K / E, E))
    gate_up = weight_bytes(switch(sizes, "gate_up"), 2 * I, H, dtype.itemsize)
    weights = experts * (gate_up + weight_bytes(switch(sizes, "down"), H, I, dtype.itemsize))
    elements = 2 * T * H + 2 * T * K * (H + I)
    return Cost(flops=6 * T * K * H * I, bytes=int(weights) + elements * dtype.itemsize + 8 * T * K)


def cost_norm(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Count the experts' work, the residual, the sum, and the norm's weight."""
    experts, T, H = cost(sizes, dtype), sizes["T"], sizes["H"]
    return Cost(flops=experts.flops + 5 * T * H, bytes=experts.bytes + (2 * T + 1) * H * dtype.itemsize)


_SIZES = {"H": 4096, "I": 14336, "E": 8, "K": 2}
_BENCHED = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 2048, 4096, 8192)

OP = Op(
    run=expert_swiglu,
    reference=reference.expert_swiglu,
    inputs=random_inputs(expert_swiglu, _inputs),
    configs=configs,
    cost=cost,
    test_shapes=(
        *shapes("T H I E K", "1 128 256 8 2, 7 80 96 4 1, 33 72 100 8 3, 65 128 256 8 2, 130 90 70 4 2, 200 64 48 2 2"),
        Shape(T=3, H=128, I=96, E=4, K=2, gate_up="int4:128", down="int4:32"),
        Shape(T=70, H=96, I=64, E=4, K=2, gate_up="int8", down="fp8"),
    ),
    bench_shapes=(
        *shape_grid(T=_BENCHED, **_SIZES),
        *shape_grid(T=_BENCHED, **_SIZES | {"H": 6144, "I": 16384}),
        *(shape | {"down": shape["gate_up"]} for shape in shape_grid(T=(1, 4096), **_SIZES, gate_up=QUANT_NAMES)),
    ),
)

NORM_OP = OP.variant(
    experts_add_rms_norm,
    reference=reference.experts_add_rms_norm,
    inputs=random_inputs(experts_add_rms_norm, _inputs),
    configs=lambda sizes, dtype, arch: configs(Shape(sizes, norm=True), dtype, arch),
    cost=cost_norm,
    test_shapes=OP.test_shapes[:3] + OP.test_shapes[4:5],
    bench_shapes=tuple(sizes for sizes in OP.bench_shapes if sizes["T"] in (1, 64, 4096) and "down" not in sizes),
)
