"""Errors against fp64 references, and their limits: a multiple of the error of torch in the weights' dtype.

B batch, T tokens, H hidden, E experts, K experts per token
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..kernels.operation.cases import OpWithCases
from ..kernels.registry import OPS
from ..kernels.weights.fp8 import W8A8
from ..kernels.weights.quantized import QuantizedWeight
from ..kernels.weights.quantized_cache import CODE_MAX, QuantizedCache

RATIO = 2.0  # the error of an operation may be this many times that of torch in the same dtype
# The least limit, relative to the largest value: a rounding of a result, in fp32 another order of a long sum.
FLOOR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-19}
CODE_RATIO = 1.5  # by which the ratio of a token's error is larger over a cache of 8 bits
TOKEN_FLOOR = {dtype: floor / 2 for dtype, floor in FLOOR.items()}


def token_floor(dtype: torch.dtype, quantized: bool) -> float:
    """Return the least limit of a token's logits. With a cache of 8 bits it is bf16's: a rounding of fp32 may change a
    code by one, which is as much as a rounding of bf16."""
    return TOKEN_FLOOR[torch.bfloat16 if quantized else dtype]


CODE_SUMS = FLOOR[torch.float16]  # the same for sums of fp8 products, of which a GPU may keep about 14 bits


Args = dict[str, Any]
PERTURBED = 12  # runs of torch on activations next to those of a call whose error is beyond the limit
ACTIVATIONS = ("x", "residual", "q", "k", "v", "k_cache", "v_cache")  # of the arguments of operations


class Tolerance:
    """The fp64 results of one call of an operation, and limits of errors relative to a result's largest value."""

    def __init__(self, name: str, args: Args) -> None:
        self.op, self.args, self.limits = (op := OPS[name]), args, list[float]()
        self.exact = _fp64_results(op, args)
        # Outputs that derive from the outputs before them have no error of their own.
        derived = [] if op.derived_outputs is None else op.derived_outputs(args, self.exact)
        self.independent = len(self.exact) - len(derived)
        # A rotated value near the middle between two codes may take either.
        rotates = "cos" in args and isinstance(args.get("k_cache"), QuantizedCache)
        steps = [FLOOR[torch.bfloat16], *[1 / CODE_MAX] * len(op.mutates)] if rotates else [0.0] * len(self.exact)
        codes = {key for key, x in args.items() if isinstance(x, QuantizedWeight) and x.format == W8A8}
        if codes:  # another rounding of h may change its codes by one
            steps = [2 * FLOOR[torch.bfloat16] if "down_proj" in codes else CODE_SUMS] * len(self.exact)
        for got, exact, step in zip(_results(op, op.call_reference, args), self.exact, steps, strict=True):
            error = _error(got, exact) if len(self.limits) < self.independent else 0.0
            self.limits.append(max(RATIO * error, FLOOR.get(got.dtype, 0.0), step))

    def measure(self, function: Callable[..., Any]) -> tuple[float, float]:
        """The error of `function` and its limit, of the result that is nearest to its limit or farthest beyond it."""
        got, exact = _results(self.op, function, self.args), self.exact
        if len(got) != len(exact):
            return math.inf, 0.0
        if self.op.derived_outputs is not None:
            exact = [*exact[: self.independent], *self.op.derived_outputs(self.args, got)]
        errors = list(map(_error, got, exact))
        if any(map(operator.gt, errors, self.limits)):
            self.limits = self._raised_limits
        return worst(zip(errors, self.limits, strict=True))

    @cached_property
    def _raised_limits(self) -> list[float]:
        """The limits, raised to errors of a rounding and of torch on near activations: one may be small by chance."""
        limits = self.limits
        for seed in range(PERTURBED + 1):
            near = {key: perturb(x, seed) for key in ACTIVATIONS if (x := self.args.get(key)) is not None}
            exact = _fp64_results(self.op, self.args | near)
            got = _results(self.op, self.op.call_reference, self.args | near) if seed else self.exact
            pairs = list(zip(got, exact, strict=True))[: self.independent]
            errors = [_error(*pair) if pair[0].dtype.is_floating_point else 0.0 for pair in pairs]
            limits = [max(limit, RATIO * error) for limit, error in zip_longest(limits, errors, fillvalue=0.0)]
        return limits


def share_of_limit(error: float, limit: float) -> float:
    """error / limit; infinite for an error that is not finite, whatever the limit, and for a limit that is NaN."""
    return math.inf if not math.isfinite(error) or math.isnan(limit) else error / max(limit, 1e-30)


def worst(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return the pair of error and limit with the largest ratio of error to limit."""
    return max(pairs, key=lambda pair: share_of_limit(*pair))


def largest(x: Tensor) -> float:
    """The largest absolute value, 0 of an empty tensor; infinite where a value is NaN."""
    return float(torch.where(x.isnan(), math.inf, x.abs()).max()) if x.numel() else 0.0


def to_fp64(value: Any) -> Any:
    """A tensor of floats, or a quantized weight dequantized, in fp64; anything else unchanged, and so is a weight whose
    products quantize x: they are in fp64 where x is."""
    if isinstance(value, QuantizedWeight) and value.format != W8A8:
        return value.dequantize().double()
    return value.double() if isinstance(value, Tensor) and value.dtype.is_floating_point else value


@dataclass
class ConvertedExperts:
    """The experts of a projection, each dequantized and converted to `dtype` where it is used, to save memory."""

    weight: Any
    dtype: torch.dtype = torch.float64

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, expert: Any) -> Any:
        rows = to_fp64(self.weight[int(expert)])
        return rows.to(self.dtype) if isinstance(rows, Tensor) else rows


def fp64_args(args: Args) -> Args:
    """Return the arguments of an operation in fp64."""
    convert = dict.fromkeys(("gate_up_proj", "down_proj"), ConvertedExperts)
    return {key: convert.get(key, to_fp64)(value) for key, value in args.items()}


def _fp64_results(op: OpWithCases, args: Args) -> list[Tensor]:
    return _results(op, op.call_reference, fp64_args(args))


def _results(op: OpWithCases, function: Callable[..., Any], args: Args) -> list[Tensor]:
    """Return the results of `function`, then copies of the arguments that the operation mutates; caches dequantized."""
    args = {name: value.clone() if name in op.mutates else value for name, value in args.items()}
    out = function(**args)
    results = [] if out is None else list(out) if isinstance(out, tuple) else [out]
    # What attention gives for padding is undefined.
    if "k_cache" in args and results and (T := results[0].shape[1]) > 1:
        valid = torch.arange(T, device=results[0].device) < args["new"][:, None]
        results[0] = results[0].where(valid[..., None, None], 0.0)
    results += [args[name] for name in op.mutates]
    return [x.dequantize() if isinstance(x, QuantizedCache) else x for x in results]


def _error(got: Tensor, exact: Tensor) -> float:
    """The largest difference relative to the largest value; infinite for NaN, another shape, or other integers."""
    if got.shape != exact.shape:
        return math.inf
    if not exact.dtype.is_floating_point:
        return 0.0 if torch.equal(got, exact) else math.inf
    error = largest(got.double() - exact.double()) / max(largest(exact.double()), 1e-30)
    return math.inf if math.isnan(error) else error


def with_perturbed_input(x: Tensor) -> Tensor:
    """x [B,T,H] -> fp64 [2B,T,H]: x, then x with each value changed by TOKEN_FLOOR, to show the model's sensitivity."""
    return torch.cat((x.double(), perturb(x)))


def perturb(x: Any, seed: int = 0) -> Any:
    """x in fp64, each value larger or smaller by half a rounding; with a seed, by more, and in x's dtype. Of a cache of
    8 bits it is the scale of each vector, in bf16."""
    if isinstance(x, QuantizedCache):
        return QuantizedCache(x.codes, perturb(x.scales.bfloat16(), seed).to(x.scales.dtype))
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed), device="cpu").mul_(2).sub_(1)
    near = x.double() * (1 + (1 + 2 * seed) * TOKEN_FLOOR[x.dtype] * signs.to(x.device))
    return near.to(x.dtype) if seed else near


@dataclass(frozen=True)
class Fp64Reference:
    """The exact values of a part of a model, and the limit of one token's error, relative to its norm."""

    exact: Tensor  # fp64 [B,T,H]
    limit: float
    norm: float = 0.0  # the median of all tokens' norms, which replaces a smaller one: few values may cancel nearly

    @classmethod
    def from_baseline(
        cls, exact: Tensor, baseline: Tensor, ratio: float = RATIO, quantized: bool = False
    ) -> Fp64Reference:
        """exact [2B,T,H]: of an input `with_perturbed_input`; baseline [B,T,H]: of the input, in the weights' dtype."""
        exact, perturbed = exact.chunk(2)
        reference = cls(exact.clone(), 0.0, float(exact.norm(dim=-1).median()))  # a view would keep all of it alive
        distance = max(reference.measure(x)[0] for x in (baseline, perturbed))
        if quantized:  # a code more or less changes few tokens, by more than roundings of the others
            ratio *= CODE_RATIO
        return replace(reference, limit=max(ratio * distance, token_floor(baseline.dtype, quantized)))

    def measure(self, got: Tensor, where: Any = ...) -> tuple[float, float]:
        """The largest error of a token of `got`, of exact[where], and its limit; infinite for another shape."""
        exact = self.exact[where]
        if got.shape != exact.shape:
            return math.inf, self.limit
        # The largest value is no measure: a few channels of a residual stream are a thousand times larger than most.
        distance = (got.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=max(self.norm, 1e-30))
        return largest(distance), self.limit
