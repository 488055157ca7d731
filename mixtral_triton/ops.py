"""The operations, each also a registered custom operator (`torch.ops.mixtral_triton.*`).

A GPU's tensor goes to the Triton kernel. A CPU's goes to the same kernel, interpreted, where TRITON_INTERPRET=1 was set
before the import, and to plain torch (`mixtral_triton.reference`) elsewhere.

Every operation raises ValueError, naming the argument, on a wrong shape, dtype or device, and on a backward pass (those
that write into a cache, where a gradient is needed). `unchecked` has the same operations without the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .kernels import call, dispatch, norm, router
from .kernels import linear as _linear
from .kernels import rope as _rope
from .kernels.attention import op as _attention
from .kernels.call import PLAIN_TYPES as PLAIN_TYPES
from .kernels.call import untraced as untraced
from .kernels.checks import readable as readable
from .kernels.experts import op as _experts
from .kernels.launch import call_runtime as call_runtime
from .kernels.launch import launch_context as launch_context
from .kernels.launch import launches_dependently as launches_dependently
from .kernels.launch import pdl_region as pdl_region
from .kernels.op import Op
from .kernels.quantized import QuantizedWeight
from .kernels.registry import OPS

P = ParamSpec("P")
R = TypeVar("R")

_CHECKED: dict[str, Callable[..., Any]] = {}
_UNCHECKED: dict[str, Callable[..., Any]] = {}


def _checked(op: Op[P, R]) -> Callable[P, R]:
    """Return the operation as a public function, and register it with torch."""
    checked, unchecked = call.entry_points(op)
    _CHECKED[op.name], _UNCHECKED[op.name] = wraps(op.run)(checked), wraps(op.run)(unchecked)
    _CHECKED[op.name].__doc__ = op.help()
    _CHECKED[op.name].__signature__ = op.plain_signature()  # type: ignore[attr-defined]
    return _CHECKED[op.name]


_rms_norm = _checked(norm.OP)
_add_rms_norm = _checked(norm.ADD_OP)
embed_rms_norm = _checked(norm.EMBED_OP)
linear = _checked(_linear.OP)
route = _checked(router.OP)
gate_route = _checked(router.GATE_OP)
rms_norm_gate_route = _checked(router.NORM_OP)
sort_by_expert = _checked(dispatch.OP)
expert_swiglu = _checked(_experts.OP)
experts_add_rms_norm = _checked(_experts.NORM_OP)
rope = _checked(_rope.OP)
append = _checked(_rope.APPEND_OP)
attention = _checked(_attention.OP)
cached_attention = _checked(_attention.CACHED_OP)
rope_append_attention = _checked(_attention.STEP_OP)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """Root mean square norm (Zhang & Sennrich 2019): y = x * rsqrt(mean(x ** 2) + eps) * weight, in fp32, rounded once.

    Arguments:
        x: Tensor [..., H], float32, bfloat16 or float16
        weight: Tensor [H] of the same dtype
        eps: float above 0
        residual: Tensor [..., H] or None; it is added to x first, and the sum comes back, too
    Returns: y [..., H], or (y, x + residual)
    Raises ValueError that names the argument for a wrong shape, dtype, device or number, and for gradients.
    Example:
        >>> x, weight = torch.randn(2, 64), torch.randn(64)
        >>> ops.rms_norm(x, weight, 1e-5)
    """
    return _rms_norm(x, weight, eps) if residual is None else _add_rms_norm(x, residual, weight, eps)


def _unchecked_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    if residual is None:
        return _UNCHECKED["rms_norm"](x, weight, eps)
    return _UNCHECKED["add_rms_norm"](x, residual, weight, eps)


for _name in OPS.keys() - _CHECKED.keys():
    _checked(OPS[_name])
# The operations for a caller that knows its shapes: a model, whose weights the loader checked.
_FUNCTIONS = {name: staticmethod(function) for name, function in _UNCHECKED.items()}
unchecked: Any = type("unchecked", (), _FUNCTIONS | {"rms_norm": staticmethod(_unchecked_rms_norm)})


def __getattr__(name: str) -> Any:
    """Return an operation of the registry that has no line above, which would only give its types to a checker."""
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _CHECKED[name]


def dispatched(name: str, args: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the operation as torch's operator; where a weight is quantized, the function that flattens it for one."""
    quantized = any(isinstance(value, QuantizedWeight) for value in args.values())
    return _CHECKED[name] if quantized else getattr(torch.ops.mixtral_triton, name)
