"""The activations of experts, one entry each: formula and derivatives in plain torch, and their kernel.

A name has its numbers behind it: "silu", "clamped_silu:7", "clamped_swish:1.702:7". A kernel takes gate and up in fp32
and returns what the down projection multiplies, h, and its derivatives in gate and in up; the compiler drops what a
launch does not use. With s = sigmoid(z), the derivative of gate * s is s * (1 + gate * (1 - s) * dz / dgate).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from math import inf, pi, sqrt
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ... import reference
from ...operation.checks import fail


@dataclass(frozen=True)
class Activation:
    """formula  of gate, up and its numbers, in plain torch
    slopes   its derivatives in gate and in up
    kernel   the Triton function of all three
    numbers  of the cases that tests and compile draw: random values pass the limits
    act_fn   the key of transformers' ACT2FN that makes it, times up; None: a class's own `_apply_gate`
    """

    formula: Callable[..., Tensor]
    slopes: Callable[..., tuple[Tensor, Tensor]]
    kernel: Any
    numbers: tuple[float, ...] = ()
    act_fn: str | None = None


ACTIVATIONS: dict[str, Activation] = reference.ACTIVATIONS  # which is empty until here


def _swish(gate: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """gate * sigmoid(alpha * gate) (Ramachandran et al. 2017), and its derivative."""
    sigmoid = (alpha * gate).sigmoid()
    return gate * sigmoid, sigmoid * (1 + alpha * gate * (1 - sigmoid))


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _silu_slopes(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    activated, slope = _swish(gate)
    return up * slope, activated


@triton.jit
def silu(gate, up, NUMBERS: tl.constexpr):
    """gate * sigmoid(gate) * up (Shazeer 2020)."""
    activated, sigmoid = gate / (1.0 + tl.exp(-gate)), 1.0 / (1.0 + tl.exp(-gate))
    return activated * up, up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), activated


ACTIVATIONS["silu"] = Activation(_silu, _silu_slopes, silu, act_fn="silu")


def _gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _gelu_tanh_slopes(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    tanh = (sqrt(2 / pi) * (gate + 0.044715 * gate**3)).tanh()
    slope = 1 + tanh + gate * (1 - tanh * tanh) * sqrt(2 / pi) * (1 + 3 * 0.044715 * gate**2)
    return up * slope / 2, gate * (1 + tanh) / 2


@triton.jit
def gelu_tanh(gate, up, NUMBERS: tl.constexpr):
    """GELU by its tanh (Hendrycks & Gimpel 2016, section 2), 0.5 * (1 + tanh(z / 2)) = sigmoid(z), * up: Gemma 4."""
    squared = gate * gate
    z = 1.5957691216057308 * gate * (1.0 + 0.044715 * squared)  # 2 * sqrt(2 / pi)
    activated, sigmoid = gate / (1.0 + tl.exp(-z)), 1.0 / (1.0 + tl.exp(-z))
    slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * squared)
    return activated * up, up * sigmoid * (1.0 + gate * (1.0 - sigmoid) * slope), activated


ACTIVATIONS["gelu_tanh"] = Activation(_gelu_tanh, _gelu_tanh_slopes, gelu_tanh, act_fn="gelu_pytorch_tanh")


@triton.jit
def _minimum(x, LIMIT: tl.constexpr):
    return tl.where(x > LIMIT, LIMIT, x)  # a NaN stays


def _clamped_silu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _clamped_slopes(gate: Tensor, up: Tensor, alpha: float, limit: float, offset: float = 1.0) -> tuple[Tensor, Tensor]:
    activated, slope = _swish(gate.clamp(max=limit), alpha)
    return (up.clamp(-limit, limit) + offset) * slope * (gate <= limit), activated * (up.abs() <= limit)


@triton.jit
def clamped_silu(gate, up, NUMBERS: tl.constexpr):
    """`silu` of gate up to a limit, and of up within it (DeepSeek-V4's `_apply_gate` in transformers)."""
    LIMIT: tl.constexpr = NUMBERS[0]
    h, of_gate, of_up = silu(_minimum(gate, LIMIT), _minimum(-_minimum(-up, LIMIT), LIMIT), NUMBERS)
    return h, tl.where(gate <= LIMIT, of_gate, 0.0), tl.where(tl.abs(up) <= LIMIT, of_up, 0.0)


ACTIVATIONS["clamped_silu"] = Activation(
    _clamped_silu, lambda gate, up, limit: _clamped_slopes(gate, up, 1.0, limit, 0.0), clamped_silu, (0.75,)
)


def _clamped_swish(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * (gate * (gate * alpha).sigmoid())


@triton.jit
def clamped_swish(gate, up, NUMBERS: tl.constexpr):
    """gate * sigmoid(alpha * gate) * (up + 1), clamped as `clamped_silu` (gpt-oss, OpenAI 2025; MiniMax-M3)."""
    ALPHA: tl.constexpr = NUMBERS[0]
    LIMIT: tl.constexpr = NUMBERS[1]
    clamped, factor = _minimum(gate, LIMIT), _minimum(-_minimum(-up, LIMIT), LIMIT) + 1.0
    activated, sigmoid = clamped / (1.0 + tl.exp(-ALPHA * clamped)), 1.0 / (1.0 + tl.exp(-ALPHA * clamped))
    of_gate = tl.where(gate <= LIMIT, factor * sigmoid * (1.0 + ALPHA * clamped * (1.0 - sigmoid)), 0.0)
    return activated * factor, of_gate, tl.where(tl.abs(up) <= LIMIT, activated, 0.0)


ACTIVATIONS["clamped_swish"] = Activation(_clamped_swish, _clamped_slopes, clamped_swish, (1.702, 0.75))
ACTIVATION_CASES = [":".join((name, *map(str, x.numbers))) for name, x in ACTIVATIONS.items() if name != "silu"]


def number_names(name: str) -> list[str]:
    """Return what the numbers of an activation are: "alpha", "limit"."""
    return [*signature(ACTIVATIONS[name].formula).parameters][2:]


@cache
def constants(activation: str) -> dict[str, Any]:
    """Return the constexprs of an activation that kernels take: its function, and its numbers. ValueError, KeyError or
    TypeError for another name, or other numbers than it takes."""
    name, *values = activation.split(":")
    signature(ACTIVATIONS[name].formula).bind(*"xx", *(numbers := tuple(map(float, values))))
    if not all(0 < number < inf for number in numbers):
        raise ValueError(activation)
    return {"ACTIVATION": ACTIVATIONS[name].kernel, "NUMBERS": numbers}


def check_activation(op: str, args: Any, sizes: Any) -> None:
    try:
        constants(args["activation"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        names = (":".join((name, *number_names(name))) for name in ACTIVATIONS)
        raise fail(op, "activation", repr(args["activation"]), " or ".join(map(repr, names))) from error
