"""The gradients of torch's operator of `expert_swiglu`, also in a compiler's graph of a training step."""

from typing import Any

import torch
from torch import Tensor


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate_up, down, ids, weights, ctx.activation, _, *parts = inputs
    ctx.save_for_backward(x, ids, weights)
    ctx.experts, ctx.parts = (gate_up, down), parts


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of x and of the routing weights by `expert_swiglu_backward`."""
    if any(ctx.needs_input_grad[1:3]):
        needs = "needs frozen ones: it has gradients of x and of weights alone"
        raise ValueError(f"mixtral_triton.ops.expert_swiglu has experts that require gradients, {needs}")
    x, ids, weights = ctx.saved_tensors
    operator = torch.ops.mixtral_triton.expert_swiglu_backward
    grad_x, grad_weights = operator(grad, x, *ctx.experts, ids, weights, ctx.activation, *ctx.parts)
    return grad_x, None, None, None, grad_weights.to(weights.dtype), *[None] * (2 + len(ctx.parts))
