"""The yardstick of an operation: exact results in wider arithmetic; the error of plain torch sets the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..kernels.quantized import QuantizedWeight
from ..kernels.registry import OPS

RATIO = 2.0  # an operation may err at most this many times as much as plain torch in the same dtype
# What one rounding of a result (16-bit types), or another order of a long sum (fp32), may cost in any case.
FLOOR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-19}

Args = dict[str, Any]


class Tolerance:
    """The exact results of one call of an operation, and how far from them another way to do it may be.

    Errors and limits are relative to the largest value of the result.
    """

    def __init__(self, name: str, args: Args, plain: Callable[..., Any] | None = None) -> None:
        """`plain` is the way whose error sets the limits; None: the operation's reference."""
        op = OPS[name]
        self.args, self.mutates, self.derived_outputs = args, op.mutates, op.derived_outputs
        self.exact = truth(name, args, op.mutates)
        # What follows from the results before it has no error of its own.
        self.own = len(self.exact) - (0 if op.derived_outputs is None else len(op.derived_outputs(args, self.exact)))
        self.limits: list[float] = []
        for same, exact in zip(_results(plain or op.call_reference, args, op.mutates), self.exact, strict=True):
            error = _error(same, exact) if len(self.limits) < self.own else 0.0
            self.limits.append(max(RATIO * error, FLOOR.get(same.dtype, 0.0)))

    def measure(self, function: Callable[..., Any]) -> tuple[float, float]:
        """Error of `function` and its limit; of several results, the one nearest to (or farthest beyond) its limit."""
        got = _results(function, self.args, self.mutates)
        exact = (
            self.exact
            if self.derived_outputs is None
            else [*self.exact[: self.own], *self.derived_outputs(self.args, got)]
        )
        errors = [_error(*pair) for pair in zip(got, exact, strict=True)]
        return worst(zip(errors, self.limits, strict=True))


def worst(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Of (error, limit), the one nearest to its limit, or farthest beyond it."""
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-30))


def measure(name: str, args: Args, plain: Callable[..., Any] | None = None) -> tuple[float, float]:
    """Error of the runtime's `name` on `args`, and its limit."""
    return Tolerance(name, args, plain).measure(ops.dispatched(name, args))


def _results(function: Callable[..., Any], args: Args, mutates: tuple[str, ...]) -> list[Tensor]:
    """What a call gives back, and the arguments it changed (copies: the caller's stay as they are)."""
    own = {name: value.clone() if name in mutates else value for name, value in args.items()}
    out = function(**own)
    results = [] if out is None else list(out) if isinstance(out, tuple) else [out]
    return results + [own[name] for name in mutates]


def truth(name: str, args: Args, mutates: tuple[str, ...] = ()) -> list[Tensor]:
    """The reference in wider arithmetic; the experts one at a time, since a layer of them is most of a model."""
    if name == "experts_add_rms_norm":
        args = dict(args)
        residual, weight, eps = (args.pop(key) for key in ("residual", "norm_weight", "eps"))
        (out,) = truth("expert_swiglu", args, mutates)
        return list(reference.rms_norm(out, to_fp64(weight), eps, to_fp64(residual)))
    if name != "expert_swiglu":
        wide = {key: to_fp64(value) for key, value in args.items()}
        return _results(OPS[name].call_reference, wide, mutates)
    x, weights = to_fp64(args["x"]), to_fp64(args["weights"])
    out = torch.zeros_like(x)
    for expert in set(args["ids"].unique().tolist()) & set(range(len(args["down_proj"]))):
        only = weights.masked_fill(args["ids"] != expert, 0.0).sum(-1, keepdim=True)
        gate_up, down = (to_fp64(args[key][expert : expert + 1]) for key in ("gate_up_proj", "down_proj"))
        out += reference.expert_swiglu(x, gate_up, down, torch.zeros_like(args["ids"][:, :1]), only)
    return [out]


def to_fp64(value: Any) -> Any:
    """In fp64: a tensor of floats, a quantized weight as the values that it stands for; anything else as it is."""
    if isinstance(value, QuantizedWeight):
        return value.dequantize().double()
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return value
    return value.double()


def _error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value; any NaN, or any difference of integers, is infinite."""
    if not want.dtype.is_floating_point:
        return 0.0 if torch.equal(got, want) else float("inf")
    if got.numel() == 0:
        return 0.0
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")
