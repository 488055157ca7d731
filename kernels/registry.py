"""The one list of operations: tests, compile, bench and verify iterate over it, `mixtral_triton.ops` exports it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .operation.cases import OpWithCases
from .ops.attention.op import attention as attention
from .ops.attention.op import cached_attention as cached_attention
from .ops.attention.op import rope_append_attention as rope_append_attention
from .ops.experts.backward import expert_swiglu_backward as expert_swiglu_backward
from .ops.experts.op import expert_swiglu as expert_swiglu
from .ops.experts.op import experts_add_rms_norm as experts_add_rms_norm
from .ops.linear import linear as linear
from .ops.norm import add_rms_norm as add_rms_norm
from .ops.norm import embed_rms_norm as embed_rms_norm
from .ops.norm import rms_norm as rms_norm
from .ops.rope import append as append
from .ops.rope import rope as rope
from .ops.route import route as route
from .ops.router import gate_route as gate_route
from .ops.router import rms_norm_gate_route as rms_norm_gate_route
from .ops.sort import sort_by_expert as sort_by_expert
from .weights.composite_args import COMPOSITES

# By name: the functions that are called, and what each declares.
OPERATIONS: dict[str, Callable[..., Any]] = {
    value.op.name: value for value in tuple(globals().values()) if isinstance(getattr(value, "op", None), OpWithCases)
}
OPS: dict[str, OpWithCases] = {name: function.op for name, function in OPERATIONS.items()}  # type: ignore[attr-defined]


def dispatched(name: str, args: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the operation as torch's operator; where an argument is quantized, the function that flattens it."""
    quantized = any(isinstance(value, COMPOSITES) for value in args.values())
    return OPERATIONS[name] if quantized else getattr(torch.ops.mixtral_triton, name)
