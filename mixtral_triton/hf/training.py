"""Training around frozen experts: their backward, and when a model's own functions run in the place of operations.

T tokens, K experts per token, E experts
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import ops
from ..kernels.operation.call import transformed
from ..kernels.weights.quantized import QuantizedWeight


def is_recorded(*tensors: Any) -> bool:
    """Whether torch records gradients of any of these tensors, for a backward pass that operations do not have."""
    recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
    return recorded and (is_compiling() or not transformed())  # a compiler's own levels are no transformation


@cache
def warn_of_gradients() -> None:
    text = "while gradients are recorded attention (after apply also norms and rotary embedding) is transformers' own"
    need = "an evaluation needs torch.no_grad(), under which all is this package's"
    warnings.warn(f"mixtral_triton: {text}, and experts are this package's; {need}", stacklevel=3)


def untrained_targets(model: Any) -> list[str]:
    """The paths of quantized weights that an adapter's `target_parameters` name: PEFT finds no parameter there."""
    configs = getattr(model, "peft_config", None) or {}
    targets = [name for config in configs.values() for name in getattr(config, "target_parameters", None) or ()]
    quantized = [path for path, module in model.named_modules() if isinstance(module, QuantizedWeight)]
    return [path for path in quantized if any(f".{path}".endswith(f".{name}") for name in targets)]


def own_routes(ids: Tensor, weights: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and weights [T,K] with a weight of 0 for other ranks' experts, of E and above, and which these are."""
    foreign = ids >= E
    return ids.masked_fill(foreign, 0), weights.masked_fill(foreign, 0.0), foreign


class FrozenExperts(torch.autograd.Function):
    """`ops.expert_swiglu`, with gradients of x and of the routing weights, which recompute each slot's values. It saves
    x, ids and weights alone. A backward pass of the experts' own weights, of weights that were written since the
    forward, or with create_graph=True is a ValueError."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, name: str, activation: str
    ) -> Tensor:
        ctx.save_for_backward(x, ids, weights)
        ctx.projections, ctx.name, ctx.versions = (gate_up, down), name, versions(gate_up, down)
        ctx.activation = activation
        ids, weights, _ = own_routes(ids, weights, len(down))
        weights = weights if weights.dtype == x.dtype else weights.float()
        return ops.expert_swiglu(x, gate_up, down, ids, weights, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x, ids, weights), (gate_up, down) = ctx.saved_tensors, ctx.projections
        if torch.is_grad_enabled():
            raise ValueError(f"mixtral_triton: {ctx.name} has no second derivatives, needs create_graph=False")
        if ctx.versions != versions(gate_up, down):
            raise ValueError(f"mixtral_triton: {ctx.name} has weights that were written after forward, needs the same")
        if any(ctx.needs_input_grad[1:3]):
            needs = (
                'needs frozen ones, requires_grad_(False), no adapter on them, or experts_implementation="grouped_mm"'
            )
            raise ValueError(f"mixtral_triton: {ctx.name} has experts that require gradients, {needs}")
        own_ids, own_weights, foreign = ids, weights if weights.dtype == x.dtype else weights.float(), None
        if ids.device.type == "cpu":  # where the operation refuses other ranks' ids, which elsewhere contribute nothing
            own_ids, own_weights, foreign = own_routes(ids, own_weights, len(down))
        routes = own_ids, own_weights, ctx.activation
        grad_x, grad_weights = ops.expert_swiglu_backward(grad, x, gate_up, down, *routes)
        if foreign is not None:
            grad_weights = grad_weights.masked_fill(foreign, 0.0)
        return grad_x, None, None, None, grad_weights.to(weights.dtype), None, None


def versions(*weights: Any) -> list[int]:
    """How often each tensor of these weights was written in place."""
    tensors = (tensor for weight in weights for tensor in getattr(weight, "tensors", (weight,)))
    return [tensor._version for tensor in tensors if isinstance(tensor, Tensor) and not tensor.is_inference()]
